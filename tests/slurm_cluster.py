"""A SLURM cluster of one node that lives in a folder: the real daemons, started by hand, nothing in /etc."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SEARCH = f"{os.environ['PATH']}:/usr/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=SEARCH) is None]

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
MaxArraySize={max_array_size}
MinJobAge=600
KillWait=3
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=100000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    """Starts the daemons; `env` is what a process needs to talk to them.

    Jobs are counted, not confined: `cpus` may be more than the machine has.
    """

    def __init__(self, cpus: int = 4, max_array_size: int = 6) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of a Unix socket has at most 107 characters
        self.root.chmod(0o755)
        self.env = os.environ | {"PATH": SEARCH, "SLURM_CONF": str(self.root / "slurm.conf")}
        (self.root / "state").mkdir()
        (self.root / "spool").mkdir()
        sockets = [socket.socket() for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        host = socket.gethostname().partition(".")[0]
        (self.root / "slurm.conf").write_text(
            CONF.format(
                host=host, ports=ports, user=getpass.getuser(), root=self.root, cpus=cpus, max_array_size=max_array_size
            )
        )
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start(
                "munged",
                "--foreground",
                "--force",
                f"--key-file={key}",
                f"--socket={self.root}/munge.socket",
                f"--pid-file={self.root}/munged.pid",
                f"--log-file={self.root}/munged.log",
                f"--seed-file={self.root}/munged.seed",
            )
            until(lambda: (self.root / "munge.socket").exists())
            self._start("slurmctld", "-D", "-f", f"{self.root}/slurm.conf")
            until(lambda: "UP" in self.run("scontrol", "ping", check=False))
            self._start("slurmd", "-D", "-f", f"{self.root}/slurm.conf")
            until(lambda: self.run("sinfo", "--noheader", "--partition=low", "--format=%t").strip() == "idle")
        except BaseException:
            self.stop()
            raise

    def _start(self, *command: str) -> None:
        with (self.root / f"{command[0]}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            )

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a SLURM command."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=check)
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What scontrol knows about a job: JobState, ExitCode, Restarts, and so on."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """Ends every job and every daemon, and removes the folder."""
        if len(self.daemons) == 3:
            self.run("scancel", "--signal=KILL", f"--user={getpass.getuser()}", check=False)
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.root, ignore_errors=True)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.1)
