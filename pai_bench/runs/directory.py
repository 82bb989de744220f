"""What a run leaves on disk: one directory. Its result.json is written last, and once."""

import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from pai_bench.core import Mask, Scores, State
from pai_bench.errors import ConfigError, OwnedError, UserError
from pai_bench.runs.checkpoint_file import PREVIOUS, load_checkpoint, save_checkpoint
from pai_bench.runs.ownership import Claim
from pai_bench.runs.status import CHECKPOINT, QUEUED, RESULT, STATUS, finished, noted
from pai_bench.system import files
from pai_bench.system.slurm_job import job_id

log = logging.getLogger(__name__)


DAMAGED = f"{RESULT}.damaged"


def final_weights(state: State, half: bool) -> State:
    """A state dict for the disk. With `half`, kernels and matrices, but not norms, are in half precision."""
    if not half:
        return state
    return {
        name: value.half() if value.is_floating_point() and value.dim() > 1 else value for name, value in state.items()
    }


class RunDirectory:
    """The directory of a run that is not finished, claimed for this process.

    Args:
        path: the directory; it is created if it is missing.

    Raises:
        ConfigError: the directory cannot be created or written to.
        OwnedError: another process is working on it.
        UserError: it has a checkpoint that is whole, and cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: Claim | None = None
        # How many lines the curve had beyond the checkpoint. The run will write them again.
        self.num_repeated = 0
        # The checkpoint from which the run goes on. None: the run starts from the beginning.
        self.checkpoint: dict[str, Any] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            claim = self._claim = Claim(path)
            previous = self._status = self._previous()
            # Another process may have finished the run between our check and our claim, or died before it tidied up.
            self.row = finished(path)
            if self.row is not None:
                (path / QUEUED).unlink(missing_ok=True)
                self._tidy()
                return
            self._take_up(claim.path.name)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"results_dir={path.parent}: cannot be written to ({error.strerror}); give another with results_dir="
            ) from error
        except BaseException:  # in a sweep this process goes on: the directory is for others then
            self.close()
            raise
        self._status = {
            "state": "running",
            "attempt": previous.get("attempt", 0) + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job_id(),
            "started": previous.get("started", time.time()) if self.checkpoint else time.time(),
        }
        self.status("running")

    def _take_up(self, claim: str) -> None:
        """Finds the checkpoint, and removes what the run will write again.

        Args:
            claim: what the names of claims begin with. Other processes may be trying to claim: their files stay.
        """
        path = self.path
        if (path / RESULT).is_file():
            (path / RESULT).replace(path / DAMAGED)
            log.warning("%s is damaged, and is now %s; the run is done again", path / RESULT, DAMAGED)
        (path / QUEUED).unlink(missing_ok=True)
        self.checkpoint = load_checkpoint(path)
        if self.checkpoint is not None:
            later = (path / "curve.jsonl").read_bytes()[self.checkpoint["curve_bytes"] :]
            self.num_repeated = later.count(b"\n")
            os.truncate(path / "curve.jsonl", self.checkpoint["curve_bytes"])
        # Without a checkpoint no file of an earlier attempt says anything about this one. The status counts attempts.
        for left in path.glob("*" if self.checkpoint is None else "*.tmp-*"):
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name not in (DAMAGED, STATUS) and not left.name.startswith(claim):
                left.unlink(missing_ok=True)
        (path / "curve.jsonl").touch()

    def _previous(self) -> dict[str, Any]:
        """What status.json says about earlier attempts. Empty if there were none, or if the file is damaged."""
        try:
            return noted(self.path)
        except FileNotFoundError:
            pass
        except ValueError as error:
            log.warning("%s; it is written anew", error)
        return {}

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint, with the present size of the curve file.

        Raises:
            OwnedError: another process has taken over the run.
        """
        self.check()
        with (self.path / "curve.jsonl").open("rb") as curve:
            os.fsync(curve.fileno())
            save_checkpoint(self.path, state, os.fstat(curve.fileno()).st_size)

    def check(self) -> None:
        """Checks that this process may still write to the directory.

        Raises:
            OwnedError: another process has taken over the run.
            UserError: the directory has vanished.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: it has vanished while the run was going on; run it again")
        try:
            taken = self._claim is not None and self._claim.taken()
        except (OSError, ValueError):
            return  # the file system stalls, so nothing is known
        if taken:
            raise OwnedError(f"{self.path}: another process has taken this run over, so this one ends")

    @property
    def lost(self) -> bool:
        """Whether another process has taken over the directory."""
        return self._claim is not None and self._claim.lost

    @property
    def saved(self) -> bool:
        """Whether the run has a checkpoint by now."""
        return any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS))

    def start_log(self) -> logging.Handler:
        """Makes this package write its log to run.log too."""
        handler = logging.FileHandler(self.path / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("pai_bench").addHandler(handler)
        return handler

    def close(self) -> None:
        """Releases the directory for other processes."""
        if self._claim is not None:
            self._claim.release()

    def status(self, state: str, **details: Any) -> None:
        """Replaces status.json. The state is running, finished, failed or preempted. Times are seconds since 1970."""
        self._status |= {"state": state, "updated": time.time(), **details}
        files.write_json(self.path / STATUS, self._status)

    def discard(self) -> None:
        """Removes the directory. A run that was refused leaves nothing behind."""
        try:
            shutil.rmtree(self.path)
        except OSError as error:  # as where another machine reads a file; why the run was refused is more important
            log.warning("%s: it could not be removed: %s", self.path, error)

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
        """Writes metrics.csv and then result.json. The run is finished as soon as result.json exists."""
        self.check()
        epochs = [line for line in self.curve() if "test_top1" in line]
        keys = list(dict.fromkeys(key for line in epochs for key in line))
        temporary = self.path / "metrics.csv.tmp"
        temporary.write_text(files.csv_text(epochs, keys))
        temporary.replace(self.path / "metrics.csv")
        self.write_json(RESULT, row)
        self._tidy()

    def _tidy(self) -> None:
        """Tidies up after the result is written. A checkpoint beside a result means that this is not done yet."""
        self.status("finished", exit_code=0)
        for name in (PREVIOUS, CHECKPOINT):
            (self.path / name).unlink(missing_ok=True)


class NullRunDirectory:
    """The run directory of a process that does not write: rank 0 of its run does."""

    lost, saved, num_repeated = False, False, 0

    def __init__(self, path: Path, checkpoint: dict[str, Any] | None) -> None:
        self.path, self.checkpoint = path, checkpoint

    def start_log(self) -> logging.Handler:
        """A handler that drops everything."""
        return logging.NullHandler()

    def curve(self) -> list[dict[str, float]]:
        """No lines."""
        return []

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    check = close = save_checkpoint = status = discard = record = finish = _nothing
    write_text = write_json = write_tensors = _nothing
