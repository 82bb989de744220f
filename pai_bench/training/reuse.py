"""Trainings that several searches have in common: what one run has trained, another takes over.

The ticket of level k trains k networks on the way to its mask. The ticket of level k + 1 trains the same ones and one
more, with which the ticket of level k ends. So a chain of L levels costs L + 1 trainings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pai_bench.core import Mask, Record, Watch
from pai_bench.system.cache import Cache
from pai_bench.training.trainer import Trainer


class SharedTraining:
    """A trainer that takes over trainings which earlier runs have done, and keeps its own for later runs.

    Only trainings to the end of the recipe are kept. Costs are carried over, so they are those of the whole way.

    Args:
        trainer: does what nobody has done before.
        cache: holds the trainings. None: every training is done here.
        rounds: says what the rounds so far have reached, which with the settings determines the network.
        curve: the lines that the run has recorded.
        record: receives the lines of a training that is taken over.
        taken_over: receives the number of images of such a training.
        checkpoint: called after it, when the state may be saved.
    """

    def __init__(
        self,
        trainer: Trainer,
        cache: Cache | None = None,
        *,
        rounds: Callable[[], Sequence[float]] = list,
        curve: Callable[[], list[dict[str, Any]]] = list,
        record: Record = lambda metrics, epoch: None,
        taken_over: Callable[[int], None] = lambda num_examples: None,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self.trainer, self._cache = trainer, cache
        self._rounds, self._curve, self._record = rounds, curve, record
        self._taken_over, self._checkpoint = taken_over, checkpoint

    @property
    def epoch(self) -> float:
        """The recipe's clock, in epochs."""
        return self.trainer.epoch

    @property
    def age_epochs(self) -> float:
        """All training so far, in epochs."""
        return self.trainer.age_epochs

    def rewind(self, mask: Mask, epoch: float, weights: bool) -> None:
        """As `Trainer.rewind`."""
        self.trainer.rewind(mask, epoch, weights)

    def until(self, mask: Mask, epoch: float, watch: Watch | None = None) -> None:
        """As `Trainer.until`. A training that is watched is done here: nobody else has looked at its epochs."""
        trainer, cache = self.trainer, self._cache
        if cache is None or watch is not None or not trainer.epoch < trainer.num_epochs <= epoch:
            trainer.until(mask, epoch, watch)
            return
        key = {"rounds": list(self._rounds())}
        if not trainer.has_begun(mask) and self._take(cache, key, mask):
            trainer.until(mask, epoch)  # takes no step, but finds out how the network is trained
            return
        before = trainer.seconds
        trainer.until(mask, epoch)
        if cache.worth_keeping(trainer.seconds - before):
            self._keep(cache, key)

    def finish(self, mask: Mask, epoch: float) -> None:
        """As `Trainer.finish`."""
        self.until(mask, epoch)
        self.trainer.finish(mask, epoch)

    def _take(self, cache: Cache, key: dict[str, Any], mask: Mask) -> bool:
        """Puts the trainer where an earlier run's training ended, and records what that run recorded."""
        expected = _shapes(dict(_flat(self._tensors(), "")))

        def use(tensors: dict[str, Tensor], notes: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            if _shapes(tensors) != expected:
                raise ValueError("its tensors are not those of this network")
            return _nested(tensors) | notes["state"], notes["lines"]

        if (found := cache.take("training", key, use)) is None:
            return False
        state, lines = found
        before = self.trainer.num_examples
        parts = {name: state.get(name, {}) for name in ("model", "optimizer", "mask", "kept")}
        kept = {int(clock): values for clock, values in parts["kept"].items()}
        self.trainer.load_state(state | parts | {"kept": kept, "random": None, "moving": None, "watch": None}, mask)
        self._taken_over(self.trainer.num_examples - before)
        for line in lines:
            self._record({name: value for name, value in line.items() if name != "epoch"}, line["epoch"])
        self._checkpoint()
        return True

    def _keep(self, cache: Cache, key: dict[str, Any]) -> None:
        state, progress = self.trainer.state(), self.trainer.progress
        start = progress.age - (progress.clock - progress.mask_since)
        lines = [
            line
            for line in self._curve()
            if "test_top1" in line and (not start or round(line["epoch"] * progress.steps_per_epoch) > start)
        ]
        notes = {"state": {name: state[name] for name in ("scaler", "compact_speedup", "progress")}, "lines": lines}
        cache.put("training", key, dict(_flat(self._tensors(), "")), notes)

    def _tensors(self) -> dict[str, Any]:
        state = self.trainer.state()
        return {name: state[name] for name in ("model", "optimizer", "mask", "kept", "sums")}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of what every trainer of a network has, whatever it has trained."""
    return {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(("kept/", "mask/"))}


def _flat(values: Mapping[Any, Any], path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings by their paths, as in optimizer/momentum/fc.weight. Names have no slash."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield f"{path}{name}", value
        else:
            yield from _flat(value, f"{path}{name}/")


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `_flat` made its tensors from."""
    found: dict[str, Any] = {}
    for path, tensor in tensors.items():
        *folders, name = path.split("/")
        inner = found
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = tensor
    return found
