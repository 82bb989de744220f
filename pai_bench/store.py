"""What a run leaves on disk: one directory for each run, whose result.json is written last and once."""

import csv
import hashlib
import io
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pai_bench import files
from pai_bench.core import Mask, Scores, State
from pai_bench.errors import ConfigError, OwnedError, UserError
from pai_bench.ownership import Claim, job_id
from pai_bench.status import CHECKPOINT, QUEUED, RESULT, finished

log = logging.getLogger(__name__)

_PREVIOUS = "checkpoint.previous.pt"
_MAGIC = b"pai_bench checkpoint 2\n"
_PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "wandb", "numpy")


def provenance() -> dict[str, Any]:
    """What is needed to tell where a number came from: code, versions, machine and command line."""
    home = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=home, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": sys.argv,
    }


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint beside the previous one, which stays until the next: one of the two is always whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    current = directory / CHECKPOINT
    if current.is_file():
        current.replace(directory / _PREVIOUS)
    files.write_atomically(current, _MAGIC + hashlib.sha256(payload).digest() + payload)


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, on the CPU, or None. A torn one is passed over, and the log says so."""
    for path in (directory / CHECKPOINT, directory / _PREVIOUS):
        if not path.is_file():
            continue
        content = path.read_bytes()
        start = len(_MAGIC) + hashlib.sha256().digest_size
        payload = content[start:]
        if content[:start] == _MAGIC + hashlib.sha256(payload).digest():
            state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            curve = directory / "curve.jsonl"
            if state.get("curve_bytes", 0) <= (curve.stat().st_size if curve.is_file() else 0):
                return state
        log.warning("%s is damaged, or its curve is; an earlier checkpoint, or the start, takes its place", path)
    return None


class RunDirectory:
    """The directory of one run that is not finished yet, claimed for this process.

    Args:
        path: created if it is missing.

    Raises:
        ConfigError: it cannot be created or written to.
        OwnedError: another process is working on it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: Claim | None = None
        # Lines that the curve had beyond the checkpoint.
        self.num_repeated = 0
        try:
            path.mkdir(parents=True, exist_ok=True)
            claim = self._claim = Claim(path)
            previous: dict[str, Any] = {}
            if (path / "status.json").is_file():
                previous = json.loads((path / "status.json").read_text())
            self._status = previous
            # Finished just before it could be claimed, or by a process that died before it had tidied up.
            self.row = finished(path)
            (path / QUEUED).unlink(missing_ok=True)
            # What the run goes on from, or None: it starts.
            self.checkpoint = load_checkpoint(path) if self.row is None else None
            if self.row is not None:
                self._tidy()
                return
            if self.checkpoint is None:
                # An attempt that ended early left half a record; nothing of it is true of this attempt.
                for left in path.iterdir():
                    if left.is_dir():
                        shutil.rmtree(left)
                    elif not left.name.startswith(claim.path.name):  # other processes try to claim it too
                        left.unlink(missing_ok=True)
                (path / "curve.jsonl").touch()
            else:
                later = (path / "curve.jsonl").read_bytes()[self.checkpoint["curve_bytes"] :]
                self.num_repeated = later.count(b"\n")
                os.truncate(path / "curve.jsonl", self.checkpoint["curve_bytes"])
                for torn in path.glob("*.tmp-*"):
                    if not torn.name.startswith(claim.path.name):
                        torn.unlink(missing_ok=True)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"results_dir={path.parent}: cannot be written to ({error.strerror}); give another with results_dir="
            ) from error
        self._status = {
            "state": "running",
            "attempt": previous.get("attempt", 0) + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job_id(),
            "started": previous.get("started", time.time()) if self.checkpoint else time.time(),
        }
        self.status("running")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint that knows how far the curve had come.

        Raises:
            OwnedError: another process has taken the run over.
        """
        self.check()
        with (self.path / "curve.jsonl").open("rb") as curve:
            os.fsync(curve.fileno())
            save_checkpoint(self.path, state | {"curve_bytes": os.fstat(curve.fileno()).st_size})

    def check(self) -> None:
        """Makes sure that this process may still write here.

        Raises:
            OwnedError: another process has taken the run over.
            UserError: the directory has vanished.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: it has vanished while the run was going on; run it again")
        try:
            taken = self._claim is not None and self._claim.taken()
        except (OSError, ValueError):
            return  # a file system that stalls tells nothing
        if taken:
            raise OwnedError(f"{self.path}: another process has taken this run over, so this one ends")

    @property
    def lost(self) -> bool:
        """Whether another process has taken the directory over."""
        return self._claim is not None and self._claim.lost

    def start_log(self) -> logging.Handler:
        """Sends everything that this package logs to run.log too."""
        handler = logging.FileHandler(self.path / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("pai_bench").addHandler(handler)
        return handler

    def close(self) -> None:
        """Gives the directory free for other processes."""
        if self._claim is not None:
            self._claim.release()

    def status(self, state: str, **details: Any) -> None:
        """Replaces status.json: state is running, finished, failed or preempted; times are seconds since 1970."""
        self._status |= {"state": state, "updated": time.time(), **details}
        files.write_json(self.path / "status.json", self._status)

    def discard(self) -> None:
        """Removes the directory: a run that was refused leaves nothing behind."""
        shutil.rmtree(self.path)

    def record(self, metrics: dict[str, float], epoch: float) -> None:
        """Appends one line to curve.jsonl."""
        with (self.path / "curve.jsonl").open("a") as file:
            file.write(json.dumps(files.valid({"epoch": epoch, **metrics}), allow_nan=False) + "\n")

    def curve(self) -> list[dict[str, float]]:
        """The lines of curve.jsonl."""
        return [json.loads(line) for line in (self.path / "curve.jsonl").read_text().splitlines()]

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, atomically."""
        files.write_atomically(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, atomically."""
        files.write_json(self.path / name, value)

    def write_tensors(self, name: str, tensors: Mask | Scores | State) -> None:
        """Writes tensors by name in the safetensors format, atomically."""
        files.write_atomically(self.path / name, files.tensor_bytes(tensors))

    def finish(self, row: dict[str, Any]) -> None:
        """Writes metrics.csv and then result.json, whose appearance is what makes the run finished."""
        self.check()
        epochs = [line for line in self.curve() if "test/top1" in line]
        temporary = self.path / "metrics.csv.tmp"
        with temporary.open("w", newline="") as file:
            keys = list(dict.fromkeys(key for line in epochs for key in line))
            writer = csv.DictWriter(file, keys, lineterminator="\n")
            writer.writeheader()
            writer.writerows(epochs)
        temporary.replace(self.path / "metrics.csv")
        self.write_json(RESULT, row)
        self._tidy()

    def _tidy(self) -> None:
        """What follows the result. The newest checkpoint goes last: where it lies beside a result, this is undone."""
        self.status("finished", exit_code=0)
        for name in (_PREVIOUS, CHECKPOINT):
            (self.path / name).unlink(missing_ok=True)


class Elsewhere:
    """The run directory for a process that leaves the writing to another."""

    lost, num_repeated = False, 0

    def __init__(self, path: Path, checkpoint: dict[str, Any] | None) -> None:
        self.path, self.checkpoint = path, checkpoint

    def start_log(self) -> logging.Handler:
        """Nowhere."""
        return logging.NullHandler()

    def curve(self) -> list[dict[str, float]]:
        """Nothing."""
        return []

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    check = close = save_checkpoint = status = discard = record = finish = _nothing
    write_text = write_json = write_tensors = _nothing
