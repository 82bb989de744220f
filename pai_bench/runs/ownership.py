"""Only one process at a time writes a run directory. It holds a claim, and keeps it alive by a heartbeat."""

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from pai_bench.errors import OwnedError
from pai_bench.system import files
from pai_bench.system.slurm_job import job_id, restarts

DEAD_AFTER_SECONDS = 180.0  # an owner on another machine counts as dead after this time without a heartbeat


_NAME = "owner.json"


_CLAIM: dict[str, type | tuple[type, ...]] = {
    "host": str, "pid": int, "started": (str, type(None)), "since": (int, float), "machine": str,
    "job": (str, type(None)), "restarts": int, "token": str,
}  # fmt: skip


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        pass
    else:
        return None if fields[0] == "Z" else fields[19]
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _holder(path: Path) -> dict[str, Any] | None:
    """What a claim file says about its owner. Empty if it cannot be read, None if there is none."""
    try:
        return files.read_json(path, **_CLAIM)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _machine() -> str:
    """A name for the place in which process ids are unique: one boot of a machine and, within it, one container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _is_alive(holder: dict[str, Any], age: float, dead_after_seconds: float) -> bool:
    if holder and holder["job"] and holder["job"] == job_id() and holder["restarts"] < restarts():
        return False  # the owner is this job itself, before it went back into the queue
    if holder and holder["machine"] == _machine():
        return bool(_started(holder["pid"]) == holder["started"])
    return age < dead_after_seconds


def _is_of(path: Path, token: str | None) -> bool:
    """Whether a claim file is there and has this token. None: it cannot be read."""
    holder = _holder(path)
    return holder is not None and holder.get("token") == token


def claimed(directory: Path) -> bool:
    """Whether a living process holds a directory, as far as one can tell without writing."""
    path = directory / _NAME
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    holder = _holder(path)
    return holder is not None and _is_alive(holder, age, DEAD_AFTER_SECONDS)


class Claim:
    """The right to write a directory. It is held until it is released or its process ends.

    A process of the same machine loses its claim as soon as it ends. A process of another machine loses its claim
    after `dead_after_seconds` without a heartbeat. File locks are not used: some network file systems lack them.

    Raises:
        OwnedError: another process holds the claim.
    """

    def __init__(
        self, directory: Path, *, heartbeat_seconds: float = 20, dead_after_seconds: float = DEAD_AFTER_SECONDS
    ) -> None:
        self.path = directory / _NAME
        self._heartbeat_seconds, self._dead_after_seconds = heartbeat_seconds, dead_after_seconds
        self._token = secrets.token_hex(8)
        self._take()
        self._stop = threading.Event()
        self.lost = False
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        """Releases the directory."""
        self._stop.set()
        if _is_of(self.path, self._token):
            self.path.unlink(missing_ok=True)

    def taken(self) -> bool:
        """Whether another process has taken over the directory.

        Raises:
            OSError, ValueError: the claim file cannot be read.
        """
        try:
            return bool(files.read_json(self.path, token=str)["token"] != self._token)
        except FileNotFoundError:
            return True

    def _take(self) -> None:
        for _ in range(20):
            if self._create(self.path):
                self._remove_left_over()
                return
            holder = _holder(self.path)
            if holder is not None and self._alive(self.path, holder):
                where = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                job = f" (job {holder['job']})" if holder.get("job") else ""
                since = files.moment(holder.get("since", 0))
                raise OwnedError(
                    f"{self.path.parent}: {where}{job} has been running it since {since}; wait for it, or end it"
                )
            if holder is not None:
                self._clear(self.path, holder.get("token"))
            time.sleep(0.05)
        raise OwnedError(f"{self.path.parent}: other processes keep claiming it; try again")

    def _clear(self, dead: Path, token: str | None) -> None:
        """Removes a claim whose owner is dead, unless another process has done so by now.

        Several processes may find it dead at once. Only the one that creates a second file may remove it. If that
        process dies before it is done, its second file is removed in the same way.

        Args:
            token: of the claim whose owner was found dead. None: it could not be read.
        """
        if not _is_of(dead, token):
            return
        clearing = self.path.with_name(f"{_NAME}.{token or 'torn'}.cleared")
        if clearing == dead:
            dead.unlink(missing_ok=True)
        elif self._create(clearing):
            if _is_of(dead, token):
                dead.unlink(missing_ok=True)
            clearing.unlink(missing_ok=True)
        elif (holder := _holder(clearing)) is not None and not self._alive(clearing, holder):
            self._clear(clearing, holder.get("token"))

    def _remove_left_over(self) -> None:
        """Removes the files of processes that died while they claimed the directory."""
        for path in self.path.parent.glob(f"{_NAME}.*"):
            holder = _holder(path)
            if holder is not None and not self._alive(path, holder):
                path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Creates a whole claim file, and returns True, unless there is one."""
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": time.time(),
            "machine": _machine(),
            "job": job_id(),
            "restarts": restarts(),
            "token": self._token,
        }
        temporary = path.with_name(f"{path.name}.tmp-{self._token}")
        temporary.write_text(json.dumps(content))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _alive(self, path: Path, holder: dict[str, Any]) -> bool:
        """Whether a claim file is there and the process that made it is alive, as far as one can tell."""
        age = self._age(path)
        return path.exists() and _is_alive(holder, age, self._dead_after_seconds)

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of the file system."""
        probe = self.path.with_name(f"{_NAME}.tmp-{self._token}-clock")
        try:
            probe.touch()
            return probe.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_seconds):
            try:
                if self.taken():
                    self.lost = True
                    return
                os.utime(self.path)
            except (OSError, ValueError):
                continue  # the file system stalls; the next beat tries again
