"""Checkpoints on disk: the last two of a run, each with a checksum, so that one is always whole."""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import torch

from pai_bench.runs.status import CHECKPOINT
from pai_bench.system import files

log = logging.getLogger(__name__)

PREVIOUS = "checkpoint.previous.pt"


MAGIC = b"pai_bench checkpoint 4\n"


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
    """The newest whole checkpoint of this run, on the CPU, or None. Damaged ones are removed, with a warning."""
    for path in (directory / CHECKPOINT, directory / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state = _checkpoint(path)
            _check_curve(directory / "curve.jsonl", state["curve_bytes"])
            return state
        except ValueError as error:
            log.warning("%s; an earlier checkpoint, or the start, takes its place", error)
            path.unlink()  # the next checkpoint would put it in the place of the earlier one
    return None


def _checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        ValueError: it is damaged, or belongs to another run.
    """
    content = path.read_bytes()
    start = len(MAGIC) + hashlib.sha256().digest_size
    payload = content[start:]
    if content[:start] != MAGIC + hashlib.sha256(payload).digest():
        raise ValueError(f"{path}: it is damaged")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        run, _ = state["run"], state["curve_bytes"]
    except Exception as error:  # torch raises many kinds of errors for a file that is no checkpoint
        raise ValueError(f"{path}: it is no checkpoint of a run ({type(error).__name__})") from error
    if run != path.parent.name:
        raise ValueError(f"{path}: it is a checkpoint of another run, {run}")
    return dict(state)


def _check_curve(path: Path, num_bytes: int) -> None:
    """Refuses a curve that is damaged before the end of a checkpoint.

    Raises:
        ValueError: the curve is too short or damaged.
    """
    content = path.read_bytes()[:num_bytes] if path.is_file() else b""
    if len(content) < num_bytes:
        raise ValueError(f"{path}: it ends before the checkpoint does")
    try:
        whole = all("epoch" in json.loads(line) for line in content.splitlines())
    except (ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: it is damaged")
