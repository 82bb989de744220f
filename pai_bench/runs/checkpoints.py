"""When a run is kept on disk, what of it, and when it ends because the machine is wanted for something else."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from pai_bench.core import Mask, Weights
from pai_bench.errors import PreemptedError
from pai_bench.pruning.pruned import Pruned
from pai_bench.runs.directory import NullRunDirectory, RunDirectory
from pai_bench.system import preemption
from pai_bench.system.world import world
from pai_bench.training.trainer import Trainer


@dataclass(frozen=True)
class TrainingStart:
    """What is known only when the last training begins: the mask is found, and weights may have been ablated."""

    overlap: float | None  # share of the kept weights that no ablation changed; None without an ablation
    has_signal: bool  # the output depends on the image
    search_examples: int  # images that the search has trained on
    age_epochs: float  # training done by the search
    num_lines: int  # of the curve
    same_signs: float | None = None  # share of the kept weights that have their initial sign after a transfer


@dataclass
class RunProgress:
    """What a run has reached beside its training. It saves and restores itself."""

    pruned: Pruned | None = None
    without_ablation: Mask | None = None  # the mask that a search without the ablation has found
    search_without_ablation: Pruned | None = None  # as far as that search has come
    cache_hit: str | None = (
        None  # what of the search an earlier run had computed: "scores", "mask", "training", nothing
    )
    reused_examples: int = 0  # images of trainings that earlier runs had done, and this one took over
    training: TrainingStart | None = None
    signs: Weights | None = None  # of the prunable weights when the last training began: -1, 0 or 1, as int8

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it: plain values and tensors."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("pruned", "search_without_ablation"):
            pruned = found[name]
            found[name] = pruned and pruned.state()
        found["training"] = self.training and asdict(self.training)
        return found

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> RunProgress:
        """What `state` returned, on the device."""
        found = {item.name: _on(device, state[item.name]) for item in fields(cls)}
        for name in ("pruned", "search_without_ablation"):
            if found[name] is not None:
                found[name] = Pruned.from_state(found[name], device)
        if found["training"] is not None:
            found["training"] = TrainingStart(**found["training"])
        return cls(**found)


def _on(device: torch.device, value: Any) -> Any:
    """Tensors by name on the device; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return {key: item.to(device) if isinstance(item, torch.Tensor) else item for key, item in value.items()}


class Checkpoints:
    """When a run is kept on disk, and when it ends because the machine is wanted for something else.

    Args:
        progress: of the run; it is saved with the trainer's state.
        every_epochs: epochs between two checkpoints.
        every_minutes: minutes after which the next step or round is kept too.
        dataset_checksum: of the images, which must be the same when the run goes on.
        started: on the clock of time.perf_counter, with the time of earlier attempts taken off.
    """

    def __init__(
        self,
        files: RunDirectory | NullRunDirectory,
        progress: RunProgress,
        *,
        every_epochs: int,
        every_minutes: float,
        dataset_checksum: str,
        started: float,
    ) -> None:
        self.files, self.progress, self.started = files, progress, started
        self.every_epochs, self.every_seconds = every_epochs, 60 * every_minutes
        self._dataset_checksum = dataset_checksum
        self.trainer: Trainer | None = None  # the one whose state counts now
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
        of_run = {"seconds": seconds, "dataset_checksum": self._dataset_checksum}
        self.files.save_checkpoint(self.progress.state() | {"trainer": self.trainer.state()} | of_run)
        self._saved, self._epochs = time.perf_counter(), 0
