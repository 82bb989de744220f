"""Which network is trained: the whole one, or a compact one in its place. The rest of training sees no difference."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pai_bench.core import Mask, Shape
from pai_bench.masks import masks
from pai_bench.system.world import world
from pai_bench.training import compact
from pai_bench.training.compact import CompactNetwork, original
from pai_bench.training.optimizer import OptimizerState
from pai_bench.training.recipe import Recipe
from pai_bench.training.step import Execution, Step, batch_norm_scales

log = logging.getLogger(__name__)


class TrainedNetwork:
    """A masked network with its optimizer, and the compact network that may be trained in its place.

    Args:
        model: the whole network, on the device. It is trained in place.
        compact_training: train a compact network where that saves work. Its dead channels keep their running
            statistics, so not if pruned weights may return after training.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, execution: Execution, input_shape: Shape, *, compact_training: bool
    ) -> None:
        self.model, self.device = model, execution.device
        self._recipe, self._execution, self._input_shape = recipe, execution, input_shape
        self._compact_training = compact_training
        self.mask: Mask = {}
        self._whole = Step(model, recipe, execution)
        self.step = self._whole  # of the network that is trained now
        self._compact: CompactNetwork | None = None
        self._small: Step | None = None
        self._examined: Mask | None = None  # the mask under which a compact network was last looked for
        self.compact_speedup: float | None = None  # time of a whole step over that of a compact one, where measured

    @property
    def trained(self) -> nn.Module:
        """The network that is trained under this mask, whole or compact."""
        return self.model if self._compact is None else self._compact.model

    def is_under(self, mask: Mask) -> bool:
        """Whether this very mask holds."""
        return mask.keys() == self.mask.keys() and all(self.mask[name] is kept for name, kept in mask.items())

    def apply_mask(self, mask: Mask) -> None:
        """Makes a mask hold from now on, for the weights and for the state of their optimizer."""
        self.mask = mask
        self._compact, self.compact_speedup = None, None
        self._whole.optimizer.apply_mask(mask)

    def move_mask(self, mask: Mask) -> None:
        """Makes a mask hold that will move again. From now on the whole network is trained."""
        self._compact_training = False
        self.mask = mask
        self._compact, self.compact_speedup = None, None
        self._whole.optimizer.apply_mask(mask, moves=True)

    def optimizer_state(self) -> OptimizerState:
        """The state of the optimizer, by parameters of the whole network. Tensors are those in use, not copies."""
        self.sync()
        return self._whole.optimizer.state

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Gives the optimizer another state. An empty one makes it forget."""
        self._whole.optimizer.load_state(state)

    @contextmanager
    def training_for(self, num_images: int) -> Iterator[Step]:
        """The step of the network to train inside the block, which may be a compact one.

        Args:
            num_images: how many images it is trained on under this mask. It decides whether to look for a compact
                network. With 0 it is not looked for, but used if there is one already.
        """
        if self._compact_training and num_images:
            self._find_compact(num_images)
        if self._compact is None or self._small is None:
            yield self.step
            return
        self._small.optimizer.load_state(self._compact.load_from(self.model, self._whole.optimizer.state))
        self.step = self._small
        try:
            yield self.step
        finally:
            self.sync()
            self.step = self._whole

    def sync(self) -> None:
        """Brings the whole network up to date with the compact one."""
        if self.step is not self._whole:
            assert self._compact is not None
            self._whole.optimizer.load_state(self._compact.store_to(self.model, self.step.optimizer.state))

    def _find_compact(self, num_images: int) -> None:
        """Looks for a compact network once under a mask."""
        if self._compact is not None or self._examined is self.mask:
            return
        if not compact.is_long(self.model, self._input_shape, num_images, self.device):
            return
        self._examined = self.mask
        found = compact.find(self.model, self.mask, self._input_shape)
        if found is None:
            return
        small = self._step_of(found)
        if world().size == 1 and self.compact_speedup is None:  # a resumed run decides as it did before
            self.compact_speedup = self._measured_speedup(found)
        if self.device.type == "cuda" and (self.compact_speedup or compact.FASTER) < compact.FASTER:
            log.info(
                "training.compact=auto: the whole network is trained: it takes %.2f times as long as the compact one",
                self.compact_speedup,
            )
            return
        log.info("training without dead channels")
        self._compact, self._small = found, small
        small.optimizer.apply_mask(found.mask(self.mask))

    def _step_of(self, found: CompactNetwork) -> Step:
        prunable, parameters = masks.prunable(self.model), found.parameters()
        scales = batch_norm_scales(self.model)
        return Step(
            found.model,
            self._recipe,
            self._execution,
            parameters=parameters,
            decayed={name for name in parameters if original(name) in prunable},
            penalised=[name for name in parameters if original(name) in scales],
            sums=self._whole.sums,
            scaler=self._whole.scaler,
            prepare=found.zero_removed_grads,
        )

    def _measured_speedup(self, found: CompactNetwork) -> float:
        shape = (self._recipe.batch_size, *self._input_shape)
        precision = self._recipe.precision
        capture = self._execution.capture and precision != "float16"
        whole, small = compact.pass_seconds([self.model, found.model], shape, self.device, precision, capture)
        return whole / small
