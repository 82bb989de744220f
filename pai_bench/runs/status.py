"""The states of runs, read from their directories. Imports no torch, because this also runs on login nodes."""

from collections.abc import Callable
from contextlib import suppress
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
    """The result row of a finished run, or None if there is no valid row."""
    try:
        return _row(directory)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def finished_and_clean(directory: Path) -> dict[str, Any] | None:
    """The result row of a finished run, or None if the run ended between writing the row and tidying up."""
    return None if (directory / CHECKPOINT).is_file() else finished(directory)


def _row(directory: Path) -> dict[str, Any]:
    return files.read_json(directory / RESULT, id=str, test_top1=(int, float), sparsity=(int, float))


def noted(directory: Path) -> dict[str, Any]:
    """The valid entries of status.json: always state; maybe attempt, updated, started, job, error and exit_code.

    Raises:
        OSError: the file is missing, or cannot be read.
        ValueError: the file is damaged.
    """
    kinds: dict[str, type | tuple[type, ...]] = {
        "attempt": int,
        "updated": (int, float),
        "started": (int, float),
        "job": str,
        "error": str,
        "exit_code": int,
    }
    content = files.read_json(directory / STATUS, state=str)
    valid = {key: content[key] for key in kinds if isinstance(content.get(key), kinds[key])}
    return {"state": content["state"]} | valid


@dataclass(frozen=True)
class RunState:
    """The state of a run, read from its directory."""

    # finished, running, queued, preempted, failed, killed (ended without a record), broken (damaged records) or missing
    name: str
    job: str | None = None  # the SLURM job
    error: str | None = None
    exit_code: int = 0
    attempt: int = 0
    updated: float = 0.0  # seconds since 1970


def state(directory: Path) -> RunState:
    """The state of a run. Only its directory is read, so a run may count as queued although its job is gone."""
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
    """Writes down that a job in the queue will do this run. A run that begins meanwhile needs no such record.

    Args:
        text: the content of config.yaml.
        since: when the job was submitted, in seconds since 1970.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # A job that has begun clears its directory, of what is being written here too.
    with suppress(FileNotFoundError):
        if not (directory / "config.yaml").is_file():
            files.write_atomically(directory / "config.yaml", text.encode())
        files.write_json(directory / QUEUED, {"job": job, "since": since})


def read(root: Path, **needed: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The result rows of every finished run below a folder, sorted by id.

    Args:
        needed: columns that each row must have beside its id, and the types of their values.

    Raises:
        DataError: a row cannot be read, or lacks a column, or two directories hold the same run.
    """
    return list(finished_runs(root, **needed).values())


def finished_runs(root: Path, **needed: type | tuple[type, ...]) -> dict[Path, dict[str, Any]]:
    """The same rows by the directories of their runs, which may have been renamed."""
    directories: dict[str, Path] = {}
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(root.glob(f"*/{RESULT}")):
        try:
            row = files.read_json(path, id=str, **needed)
        except (OSError, ValueError) as error:
            raise DataError(f"{error}; run it again, or take it away") from error
        if (name := row["id"]) in rows:
            raise DataError(
                f"{path.parent} and {directories[name]}: both hold the run {name}; take one of the two away"
            )
        directories[name], rows[name] = path.parent, row
    return {directories[name]: rows[name] for name in sorted(rows)}
