"""As much of a W&B server as the real client needs: it takes runs and keeps them in memory."""

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import quote, unquote

from local_server import JSONHandler, LocalServer

KEY = "a" * 40


class Server(LocalServer):
    """What it was told stands in its attributes."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.preempting: set[str] = set()
        self.exit_codes: dict[str, list[int]] = {}
        self.refuse = False  # every key is wrong
        self.files: dict[str, dict[str, bytes]] = {}  # of each run, by name
        self.artifacts: list[dict[str, Any]] = []
        self.sweep = ""  # its yaml
        self.trials: list[dict[str, Any]] = []  # which the agent of the sweep is to do: settings by name
        super().__init__(_Handler)

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to report here."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "WANDB_ERROR_REPORTING": "false"}


class _Handler(JSONHandler, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        _, place, run, name = unquote(self.path).split("/", 3)
        body = self._body()
        if place == "files":
            self.server.files.setdefault(run, {})[name] = body
        self.answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refuse:
            self.answer({"errors": [{"message": "permission denied"}]}, 401)
        elif self.path.endswith("/file_stream"):
            self._stream(self.path.split("/")[-2], json.loads(body))
        elif self.path == "/graphql":
            request = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            self.answer({"data": self._data(named[1] if named else "", request.get("variables") or {})})
        else:
            self.answer({})

    def _stream(self, run: str, content: dict[str, Any]) -> None:
        files = content.get("files") or {}
        if "wandb-history.jsonl" in files:
            lines = [json.loads(line) for line in files["wandb-history.jsonl"]["content"]]
            self.server.history.setdefault(run, []).extend(lines)
        if "wandb-summary.json" in files:
            self.server.runs.setdefault(run, {})["summary"] = json.loads(files["wandb-summary.json"]["content"][-1])
        if content.get("preempting"):
            self.server.preempting.add(run)
        if content.get("complete"):
            self.server.exit_codes.setdefault(run, []).append(content.get("exitcode", 0))
        self.answer({"limits": {}})

    def _data(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "test"}
        if operation == "Viewer":
            teams: dict[str, Any] = {"edges": []}
            return {"viewer": {"id": "u", "entity": "test", "username": "test", "flags": "{}", "teams": teams}}
        if operation == "UpsertBucket":
            name = given["name"]
            new = name not in self.server.runs
            run = self.server.runs.setdefault(name, {})
            run |= {key: given[key] for key in ("project", "groupName", "tags", "displayName") if given.get(key)}
            if given.get("config"):
                run["config"] = json.loads(given["config"])
            project = {"id": "p", "name": run.get("project", ""), "entity": entity}
            bucket = {
                "id": name,
                "name": name,
                "displayName": name,
                "description": "",
                "sweepName": None,
                "config": json.dumps(run.get("config", {})),
                "historyLineCount": 0,
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if operation == "RunResumeStatus":
            name = given["name"]
            if name not in self.server.runs:
                return {"model": {"id": "p", "name": given.get("project"), "entity": entity, "bucket": None}}
            run, lines = self.server.runs[name], self.server.history.get(name, [])
            bucket = {
                "id": name,
                "name": name,
                "displayName": name,
                "tags": run.get("tags") or [],
                "summaryMetrics": json.dumps(run.get("summary", {})),
                "config": json.dumps(run.get("config", {})),
                "historyLineCount": len(lines),
                "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
                "logLineCount": 0,
                "eventsLineCount": 0,
                "eventsTail": "[]",
                "wandbConfig": json.dumps({"t": 1}),
            }
            return {"model": {"id": "p", "name": given.get("project"), "entity": entity, "bucket": bucket}}
        if operation == "CreateRunFiles":
            url = f"http://{self.headers['Host']}/files/{given['run']}"
            files = [{"name": name, "uploadUrl": f"{url}/{quote(name)}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            self.server.artifacts.append(given)
            latest = {"latestArtifact": {"id": "QXJ0aWZhY3Q6MQ==", "versionIndex": 0}, "id": "s"}
            artifact = {"id": "QXJ0aWZhY3Q6MQ==", "state": "COMMITTED", "artifactSequence": latest}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "UpsertSweep":
            self.server.sweep = given["config"]
            project = {"id": "p", "name": given.get("projectName") or "pai-bench", "entity": entity}
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            runs: dict[str, Any] = {"edges": []}
            return {"project": {"sweep": {"name": "sweep1", "config": self.server.sweep, "runs": runs}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent1"}}}
        if operation == "Heartbeat":
            commands = [] if json.loads(given["runState"]) else [self._command()]
            return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "ArtifactType":
            return {"project": None}
        if operation == "ServerInfo":
            return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}
        return {}

    def _command(self) -> dict[str, Any]:
        """The next trial of the sweep for its agent."""
        if not self.server.trials:
            return {"type": "exit"}
        values = self.server.trials.pop(0)
        arguments = {key: {"value": value} for key, value in values.items()}
        run = f"trial{len(self.server.trials)}"
        return {"type": "run", "run_id": run, "program": "run.py", "args": arguments}
