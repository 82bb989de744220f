"""How runs stand, by what lies in their directories. Imports no torch: a login node asks too."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pai_bench.errors import DataError
from pai_bench.runs.ownership import claimed
from pai_bench.system import files

RESULT = "result.json"
QUEUED = "queued.json"
STATUS = "status.json"
CHECKPOINT = "checkpoint.pt"


def finished(directory: Path) -> dict[str, Any] | None:
    """The result row of a finished run, or None: there is none, or what is there is no row."""
    try:
        return _row(directory)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def finished_and_clean(directory: Path) -> dict[str, Any] | None:
    """The result row of a finished run, or None if it was ended between that and the last of its records."""
    return None if (directory / CHECKPOINT).is_file() else finished(directory)


def _row(directory: Path) -> dict[str, Any]:
    return files.read_json(directory / RESULT, id=str, test_top1=(int, float), sparsity=(int, float))


def noted(directory: Path) -> dict[str, Any]:
    """What status.json says: its state, and of attempt, updated, started, job, error and exit_code what makes sense.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged.
    """
    kinds: dict[str, type | tuple[type, ...]] = {
        "attempt": int, "updated": (int, float), "started": (int, float), "job": str, "error": str, "exit_code": int,
    }  # fmt: skip
    found = files.read_json(directory / STATUS, state=str)
    return {"state": found["state"]} | {key: found[key] for key in kinds if isinstance(found.get(key), kinds[key])}


@dataclass(frozen=True)
class RunState:
    """How a run stands, by what lies in its directory."""

    # finished, running, queued, preempted, failed, killed (ended without a word), broken (damaged records) or missing
    name: str
    job: str | None = None  # of SLURM
    error: str | None = None
    exit_code: int = 0
    attempt: int = 0
    updated: float = 0.0  # seconds since 1970


def state(directory: Path) -> RunState:
    """How a run stands. Nothing but its directory is asked, so a job that is gone may still be called queued."""
    damaged: list[str] = []

    def content(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return read()
        except OSError:
            return {}
        except ValueError as error:
            damaged.append(str(error))
            return {}

    status = content(lambda: noted(directory))
    queued = content(lambda: files.read_json(directory / QUEUED, job=str, since=(int, float)))
    row = content(lambda: _row(directory))
    attempt, updated, job = status.get("attempt", 0), status.get("updated", 0.0), status.get("job")
    if row:
        return RunState("finished", job, attempt=attempt, updated=updated)
    if claimed(directory):
        return RunState("running", job, attempt=attempt, updated=updated)
    if queued and queued["since"] > updated:
        return RunState("queued", queued["job"], attempt=attempt, updated=queued["since"])
    if damaged:
        return RunState("broken", job, "; ".join(damaged), 1, attempt, updated)
    if not status:
        return RunState("missing")
    name = status["state"] if status["state"] in ("preempted", "failed") else "killed"
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
            rows.append(files.read_json(path, id=str))
        except (OSError, ValueError) as error:
            raise DataError(f"{error}; run it again, or take it away") from error
    return sorted(rows, key=lambda row: str(row["id"]))
