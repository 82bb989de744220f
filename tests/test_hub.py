"""The upload of a run: the real client of the Hugging Face Hub against a server of our own."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, composed

from pai_bench import experiment
from pai_bench.runs.hub import FILES, card

pytest.importorskip("huggingface_hub")


class Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse = False
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "/revision/" in self.path:  # older clients ask how a repository stores large files
            self._answer({"id": "me/net", "sha": "1", "xetEnabled": False})
        else:
            self._answer({"error": "there is nothing"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.tokens.add(self.headers.get("authorization"))
        url = f"http://{self.headers['Host']}/me/net"
        if hub.refuse:
            self._answer({"error": "you may not write there"}, 403)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer({"url": url, "id": "1"})
        elif self.path.startswith("/api/models/me/net/preupload/"):
            asked = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
            )
        elif self.path.startswith("/api/models/me/net/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({"errors": [], "warnings": []})


@pytest.fixture
def hub() -> Iterator[Hub]:
    started = Hub()
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("hub")
    words = ["model=lenet300", "model.hidden=[16]", "training=smoke", "training.epochs=1", "tracker=none", "device=cpu"]
    cfg = composed(*words, "pruner=snip", "sparsity=0.9", f"results_dir={results}")
    experiment.run(cfg)
    return cfg.directory


def export(directory: Path, hub: Hub | None, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    port = hub.server_port if hub else 9  # where nobody listens
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": "hf_mine", "HF_HOME": str(directory.parent / "hf")}
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(directory), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_is_uploaded_with_a_card(directory: Path, hub: Hub) -> None:
    done = export(directory, hub, "--hub", "me/net", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded to http://127.0.0.1:{hub.server_port}/me/net\n"
    assert set(hub.files) == {*FILES, "README.md"}
    assert all(hub.files[name] == (directory / name).read_bytes() for name in FILES)
    (created,) = hub.created
    assert created["name"] == "net" and created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_mine"}
    row = json.loads(hub.files["result.json"])
    text = hub.files["README.md"].decode()
    assert f"# {row['id']}" in text and f"{100 * row['test_top1']:.2f} %" in text and "pruned by SNIP" in text
    assert f"{row['num_kept']:,} of {row['num_prunable']:,}" in text
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.M)) == set(FILES)


def test_the_card_of_a_dense_network_says_so(directory: Path) -> None:
    row = json.loads((directory / "result.json").read_text()) | {"sparsity": 0.0}
    text = card(composed("model=lenet300"), row)
    assert "lenet300-h16, trained on digits.\n" in text and "pruned by" not in text


@pytest.mark.parametrize(
    ("words", "refuse", "code", "said"),
    [
        (["--hub", "me/net"], True, 1, "--hub me/net: it cannot be uploaded ("),
        (["--hub", "no such/name/at all"], False, 2, "there can be no such repository; give USER/NAME"),
        (["--hub", "me/net", "-o", "m.pt"], False, 2, "not allowed with argument"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line(
    words: list[str], refuse: bool, code: int, said: str, directory: Path, hub: Hub
) -> None:
    hub.refuse = refuse
    done = export(directory, hub, *words)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not hub.files
    assert "argument" in said or len(done.stderr.splitlines()) == 1


def test_a_hub_that_cannot_be_reached_and_a_run_without_weights(directory: Path, tmp_path: Path) -> None:
    done = export(directory, None, "--hub", "me/net")
    assert done.returncode == 1 and "--hub me/net: it cannot be uploaded (" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = export(tmp_path, None, "--hub", "me/net")
    assert done.returncode == 4 and "it is not the directory of a finished run" in done.stderr
