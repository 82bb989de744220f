"""One process at a time writes a run directory: a claim that its owner keeps alive by a heartbeat."""

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from pai_bench.errors import OwnedError

_NAME = "owner.json"


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


class Claim:
    """The right to write a directory, held until it is released or its process ends.

    A process of the same machine that no longer exists has lost its claim at once; one of another machine when its
    heartbeat has been silent for `dead_after_seconds`. No file locks are needed, which network file systems may lack.

    Raises:
        OwnedError: another process holds it.
    """

    def __init__(self, directory: Path, *, heartbeat_seconds: float = 20, dead_after_seconds: float = 180) -> None:
        self.path = directory / _NAME
        self._heartbeat_seconds, self._dead_after_seconds = heartbeat_seconds, dead_after_seconds
        self._token = secrets.token_hex(8)
        self._take()
        self._stop = threading.Event()
        self.lost = False
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        """Gives the directory free."""
        self._stop.set()
        if self._holder().get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        for _ in range(20):
            if self._create(self.path):
                return
            holder = self._holder()
            if self._alive(holder):
                where = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                job = f" (job {holder['job']})" if holder.get("job") else ""
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", 0)))
                raise OwnedError(
                    f"{self.path.parent}: {where}{job} has been running it since {since}; wait for it, or end it"
                )
            # Of all who find this claim dead, the one that creates this file clears it away.
            clearing = self.path.with_name(f"{_NAME}.{holder.get('token', 'torn')}.cleared")
            if self._create(clearing):
                if self._holder().get("token") == holder.get("token"):
                    self.path.unlink(missing_ok=True)
                clearing.unlink(missing_ok=True)
            elif self._age(clearing) > self._dead_after_seconds:
                clearing.unlink(missing_ok=True)  # whoever cleared has died over it
            time.sleep(0.05)
        raise OwnedError(f"{self.path.parent}: other processes keep claiming it; try again")

    def _create(self, path: Path) -> bool:
        """Creates a claim file, whole, if there is none."""
        content = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": time.time(),
            "job": os.environ.get("SLURM_JOB_ID"), "token": self._token,
        }  # fmt: skip
        temporary = path.with_name(f"{path.name}.tmp-{self._token}")
        temporary.write_text(json.dumps(content))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            holder: dict[str, Any] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return holder

    def _alive(self, holder: dict[str, Any]) -> bool:
        if not holder:
            return self._age(self.path) < self._dead_after_seconds and self.path.exists()
        if holder["host"] == socket.gethostname():
            return bool(_started(holder["pid"]) == holder["started"])
        return self._age(self.path) < self._dead_after_seconds

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of its file system."""
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
                if self._holder().get("token") != self._token:
                    self.lost = True
                    return
                os.utime(self.path)
            except OSError:
                continue  # a file system that stalls; the next beat tries again
