"""Checkpoints on disk: the last two of a run, each with a checksum, so that one is always whole."""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import torch

from pai_bench.errors import UserError
from pai_bench.runs.status import CHECKPOINT
from pai_bench.system import files

log = logging.getLogger(__name__)

PREVIOUS = "checkpoint.previous.pt"
_ANY_MAGIC = b"pai_bench checkpoint "
MAGIC = _ANY_MAGIC + b"5\n"


class _DamagedError(ValueError):
    """A file that holds no checkpoint of its run, or a curve that is not whole."""


def save_checkpoint(directory: Path, state: dict[str, Any], curve_bytes: int = 0) -> None:
    """Writes a checkpoint, and keeps the previous one beside it. So one of the two is always whole.

    Args:
        directory: the directory of the run. Its name goes into the checkpoint.
        curve_bytes: the present size of the curve file.
    """
    buffer = io.BytesIO()
    torch.save(state | {"run": directory.name, "curve_bytes": curve_bytes}, buffer)
    payload = buffer.getvalue()
    current = directory / CHECKPOINT
    if current.is_file():
        current.replace(directory / PREVIOUS)
    files.write_atomically(current, MAGIC + hashlib.sha256(payload).digest() + payload)


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of this run, on the CPU, or None. Damaged ones are removed, with a warning.

    Raises:
        UserError: a whole one cannot be loaded here. It stays.
    """
    for path in (directory / CHECKPOINT, directory / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state = _checkpoint(path)
            _check_curve(directory / "curve.jsonl", state["curve_bytes"])
            return state
        except _DamagedError as error:
            log.warning("%s; an earlier checkpoint, or the start, takes its place", error)
            path.unlink()  # the next checkpoint would put it in the place of the earlier one
    return None


def _checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        _DamagedError: it is damaged, or belongs to another run.
        UserError: it is whole, and cannot be loaded here.
    """
    try:
        state = torch.load(io.BytesIO(_payload(path)), map_location="cpu", weights_only=True)
        run, _ = state["run"], state["curve_bytes"]
    except (_DamagedError, UserError, OSError):
        raise
    except Exception as error:  # torch has many kinds of errors for too little memory, and the checksum is right
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"{path}: it is whole but cannot be loaded ({said}); give the process more memory, or remove both "
            "files checkpoint*.pt of this folder to start again"
        ) from error
    if run != path.parent.name:
        raise _DamagedError(f"{path}: it is a checkpoint of another run, {run}")
    return dict(state)


def _payload(path: Path) -> bytes:
    """What a checkpoint file holds behind its checksum.

    Raises:
        _DamagedError: the checksum is another.
        UserError: another version has written it.
    """
    content = path.read_bytes()
    start = len(MAGIC) + hashlib.sha256().digest_size
    payload = content[start:]
    if content[:start] == MAGIC + hashlib.sha256(payload).digest():
        return payload
    if len(content) > start and content.startswith(_ANY_MAGIC) and not content.startswith(MAGIC):
        raise UserError(
            f"{path}: another version of pai_bench has written it; go on with that version, or remove both files "
            "checkpoint*.pt of this folder to start again"
        )
    raise _DamagedError(f"{path}: it is damaged")


def _check_curve(path: Path, num_bytes: int) -> None:
    """Refuses a curve that is damaged before the end of a checkpoint.

    Raises:
        _DamagedError: the curve is too short or damaged.
    """
    content = path.read_bytes()[:num_bytes] if path.is_file() else b""
    if len(content) < num_bytes:
        raise _DamagedError(f"{path}: it ends before the checkpoint does")
    try:
        whole = all("epoch" in json.loads(line) for line in content.splitlines())
    except (ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise _DamagedError(f"{path}: it is damaged")
