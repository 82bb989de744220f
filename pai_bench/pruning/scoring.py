"""What scores see: a copy of the network in the precision of the pruner, with channels first as in the images.

So a mask depends neither on the memory layout nor on the precision in which the network is trained.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis.norm_statistics import statistics, with_statistics
from pai_bench.core import NUM_PASS_IMAGES, Batches, Pruner, ScoringData, Weights
from pai_bench.errors import ConfigError
from pai_bench.system import seeding
from pai_bench.system.layout import laid_out, lay_out_

PLAIN = torch.contiguous_format
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def copy_for_scores(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network, with floating-point parameters and buffers in `dtype`."""
    copied = copy.deepcopy(model).to(dtype)
    lay_out_(copied, PLAIN)
    return copied


def is_about_types(error: RuntimeError) -> bool:
    """Whether an operation has refused tensors of two types."""
    return re.search(r"same dtype|scalar type|type \(.*should be the same", str(error)) is not None


@torch.no_grad()
def update_(copied: nn.Module, model: nn.Module) -> None:
    """Gives a copy the present values of the network it was made from."""
    torch._foreach_copy_(_tensors(copied), _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def cast_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    """Weights in `dtype`, laid out as in the copy."""
    return {name: laid_out(weight.to(dtype), PLAIN) for name, weight in weights.items()}


class Redraw:
    """Draws the weights of a network anew.

    Args:
        build: makes a model, its weights drawn from torch's global generator.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(self, build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        self._build, self._device, self._dtype = build, device, dtype
        self.used = False  # whether weights have been drawn

    def __call__(self, generator: Generator) -> Weights:
        """The values of all parameters of a freshly built model."""
        self.used = True
        number = int(torch.randint(1 << 62, (), generator=generator))
        with seeding.seeded(number, "redraw"):
            model = self._build()
        return {name: parameter.detach().to(self._device, self._dtype) for name, parameter in model.named_parameters()}


def check_pass(pruner: Pruner, model: nn.Module) -> None:
    """Refuses a pass before scoring that would change nothing.

    Raises:
        ConfigError: the score looks at no images, or the network has no norms with running statistics.
    """
    if pruner.scoring_data is None:
        raise ConfigError(f"pruner.mode=eval_after_pass: pruner={pruner.name} looks at no images; set pruner.mode=eval")
    if not with_statistics(model):
        raise ConfigError(
            "pruner.mode=eval_after_pass: the network has no norms with running statistics, so the pass would change "
            "nothing; set pruner.mode=eval"
        )


def data_of_pass(pruner: Pruner) -> ScoringData:
    """The images of the pass that sets the statistics of norms: whatever their class, and else as for the score."""
    data = pruner.scoring_data
    assert data is not None, "the pass has been checked"
    return ScoringData(None, pruner.pass_images or NUM_PASS_IMAGES, data.batch_size, data.augment, balanced=False)


@contextmanager
def after_pass(model: nn.Module, batches: Batches) -> Iterator[None]:
    """Runs a block in which norms have the statistics of one pass of images. Afterwards they have their own again."""
    found = statistics(model, {}, (images for images, _ in batches))
    buffers = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        _copy_(buffers, found)
        yield
    finally:
        _copy_(buffers, before)


@torch.no_grad()
def _copy_(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(values[name])
