"""How runs stand, by what lies in their directories. Imports no torch: a login node asks too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pai_bench import files
from pai_bench.errors import DataError
from pai_bench.ownership import claimed

RESULT = "result.json"
QUEUED = "queued.json"
CHECKPOINT = "checkpoint.pt"


def finished(directory: Path) -> dict[str, Any] | None:
    """The result row of a finished run, or None."""
    path = directory / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def settled(directory: Path) -> dict[str, Any] | None:
    """The result row of a finished run, or None if it was ended between that and the last of its records."""
    return None if (directory / CHECKPOINT).is_file() else finished(directory)


@dataclass(frozen=True)
class RunState:
    """How a run stands, by what lies in its directory."""

    name: str  # finished, running, queued, preempted, failed, dead (killed without a word) or missing
    job: str | None = None  # of SLURM
    error: str | None = None
    exit_code: int = 0
    attempt: int = 0
    updated: float = 0.0  # seconds since 1970


def state(directory: Path) -> RunState:
    """How a run stands. Nothing but its directory is asked, so a job that is gone may still be called queued."""

    def content(name: str) -> dict[str, Any]:
        try:
            found = json.loads((directory / name).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    status, queued = content("status.json"), content(QUEUED)
    attempt, updated, job = status.get("attempt", 0), status.get("updated", 0.0), status.get("job")
    if (directory / RESULT).is_file():
        return RunState("finished", job, attempt=attempt, updated=updated)
    if claimed(directory):
        return RunState("running", job, attempt=attempt, updated=updated)
    if queued and queued["since"] > updated:
        return RunState("queued", queued["job"], attempt=attempt, updated=queued["since"])
    if not status:
        return RunState("missing")
    name = "dead" if status["state"] == "running" else status["state"]
    return RunState(name, job, status.get("error"), status.get("exit_code", 0), attempt, updated)


def mark_queued(directory: Path, job: str, since: float, text: str) -> None:
    """Notes that a job which waits in a queue will do this run.

    Args:
        text: its config.yaml.
        since: when it was submitted, in seconds since 1970.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.yaml").is_file():
        files.write_atomically(directory / "config.yaml", text.encode())
    files.write_json(directory / QUEUED, {"job": job, "since": since})


def read(root: Path) -> list[dict[str, Any]]:
    """The result rows of every finished run below a folder, sorted by id.

    Raises:
        DataError: one of them cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for path in root.glob(f"*/{RESULT}"):
        try:
            rows.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: it is damaged ({error}); take the run away, or make it anew") from error
    return sorted(rows, key=lambda row: str(row["id"]))
