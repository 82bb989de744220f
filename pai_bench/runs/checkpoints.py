"""When a run is kept on disk, what of it, and when it ends because the machine is wanted for something else."""

import time
from typing import Any

from pai_bench.errors import PreemptedError
from pai_bench.runs import store
from pai_bench.system import preemption
from pai_bench.system.world import world
from pai_bench.training.trainer import Trainer


class Checkpoints:
    """When a run is kept on disk, and when it ends because the machine is wanted for something else.

    `reached` is what the run has come to beside the state of its trainer.
    """

    def __init__(self, cfg: dict[str, Any], files: store.RunDirectory | store.NullRunDirectory, started: float) -> None:
        self.files, self.started = files, started
        self.every_epochs, self.every_seconds = cfg["checkpoint_epochs"], 60 * cfg["checkpoint_minutes"]
        self.trainer: Trainer | None = None
        self.reached: dict[str, Any] = {}
        self._saved, self._epochs = time.perf_counter(), 0

    def offer(self, epoch_ended: bool = False) -> None:
        """Saves if it is time to; called wherever the run could be taken up again.

        Raises:
            PreemptedError: a signal has asked for the end; the checkpoint is written.
            OwnedError: another process has taken the run over, so this one must write nothing more.
        """
        if self.files.lost:
            self.files.check()
        self._epochs += epoch_ended
        # Where there are several processes, the first decides: at the next step the others find it gone.
        wanted = preemption.requested() if world().rank == 0 else None
        late = time.perf_counter() - self._saved > self.every_seconds
        if wanted or late or (epoch_ended and self._epochs >= self.every_epochs):
            self.save()
        if wanted:
            raise PreemptedError(f"{self.files.path.name} was preempted by {wanted}; the same command goes on with it")

    def save(self) -> None:
        """Saves now."""
        if self.trainer is None:
            return
        seconds = time.perf_counter() - self.started
        self.files.save_checkpoint(self.reached | {"trainer": self.trainer.state(), "seconds": seconds})
        self._saved, self._epochs = time.perf_counter(), 0
