"""Effective sparsity: which weights lie on a path from the image to the outputs."""

from collections.abc import Callable

import pytest
import torch
from conftest import Chain, residual
from test_filters import model_of
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench.analysis import paths, signal
from pai_bench.core import Batches
from pai_bench.masks import masks

SHAPE = (3, 32, 32)


def on_a_path(model: Chain, mask: masks.Mask) -> masks.Mask:
    """By hand, for a chain: a weight counts if kept paths lead to its input channel and on from its output channel."""
    between = {name: m.flatten(2).any(2) if m.ndim == 4 else m for name, m in mask.items()}
    forward, names = [torch.ones(3, dtype=torch.bool)], list(mask)
    for name in names:
        forward.append((between[name] & forward[-1]).any(1))
    backward = torch.ones(4, dtype=torch.bool)
    reached = {}
    for name, into in zip(reversed(names), reversed(forward[:-1]), strict=True):
        both = backward[:, None] & into[None]
        reached[name] = mask[name] & (both[:, :, None, None] if mask[name].ndim == 4 else both)
        backward = (between[name] & backward[:, None]).any(0)
    return {name: reached[name] for name in names}


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.5, 1.0])
def test_effective_weights_of_a_chain_are_those_on_a_path(density: float) -> None:
    torch.manual_seed(0)
    model = Chain(bias=True)
    for seed in range(5):
        generator = Generator().manual_seed(seed)
        mask = {n: torch.rand(w.shape, generator=generator) < density for n, w in masks.prunable(model).items()}
        found, expected = paths.effective(model, mask, (3, 8, 8)), on_a_path(model, mask)
        assert all(torch.equal(found[name], expected[name]) for name in mask)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("density", [0.03, 0.1, 0.3])
def test_effective_weights_of_a_residual_net_are_those_whose_removal_can_matter(density: float) -> None:
    """A weight lies on a path exactly if, with positive weights and no norms, the output depends on it."""
    torch.manual_seed(0)
    model = residual().double()
    generator = Generator().manual_seed(1)
    mask = {n: torch.rand(w.shape, generator=generator) < density for n, w in masks.prunable(model).items()}
    found = paths.effective(model, mask, (3, 8, 8))
    positive = {name: m.double().requires_grad_() for name, m in mask.items()}
    model.eval()
    others = {
        name: torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
        for name, p in model.named_parameters()
        if name not in mask
    }
    outputs = torch.func.functional_call(model, positive | others, (torch.ones(1, 3, 8, 8, dtype=torch.float64),))
    gradients = torch.autograd.grad(outputs.sum(), list(positive.values()))
    for (name, m), gradient in zip(mask.items(), gradients, strict=True):
        assert torch.equal(found[name], m & (gradient > 0)), name


class Largest(nn.Module):
    """Takes the largest value of each channel, by one of several words for it."""

    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.pool = nn.Conv2d(3, 4, 3), nn.LazyLinear(2), pool
        self(torch.zeros(1, 3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.conv(x)).flatten(1))


@pytest.mark.parametrize(
    "pool", [lambda x: x.flatten(2).max(2).values, lambda x: x.flatten(2).max(2)[0], lambda x: x.amax((2, 3))]
)
def test_the_largest_value_is_reached_from_all(pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Largest(pool)
    mask = masks.full(model)
    mask["fc.weight"][:, 1] = False
    found = paths.effective(model, mask, (3, 8, 8))
    assert found is not None and [bool(part.all()) for part in found["conv.weight"]] == [True, False, True, True]


def test_dilated_pooling_is_not_known() -> None:
    model = Largest(lambda x: F.max_pool2d(x, 2, 1, 0, 2))
    assert paths.effective(model, masks.full(model), (3, 8, 8)) is None


def test_effective_sparsity_of_a_deep_network_neither_overflows_nor_vanishes() -> None:
    model = model_of("resnet110")
    generator = Generator().manual_seed(0)
    full = masks.full(model)
    assert masks.kept(paths.effective(model, full, SHAPE)) == masks.total(full)
    mask = {n: torch.rand(w.shape, generator=generator) < 0.05 for n, w in masks.prunable(model).items()}
    reached = paths.effective(model, mask, SHAPE)
    assert 0.5 * masks.kept(mask) < masks.kept(reached) < masks.kept(mask)


def test_dead_units_are_those_that_no_path_runs_through() -> None:
    model = Chain()
    mask = masks.full(model)
    mask["conv2.weight"][:, 2] = False  # nobody reads unit 2 of the first layer
    mask["conv1.weight"][4] = False  # nothing feeds unit 4
    reached = paths.effective(model, mask, (3, 8, 8))
    assert paths.dead_units(model, reached) == {"conv1.weight": 2, "conv2.weight": 0, "fc.weight": 0}
    assert not reached["conv2.weight"][:, 4].any() and not reached["conv1.weight"][2].any()


def test_signal_and_paths_agree(batches: Batches) -> None:
    model = Chain()
    mask = masks.full(model)
    mask["conv2.weight"][:] = False
    assert masks.kept(paths.effective(model, mask, (3, 8, 8))) == 0
    masks.apply_(model, mask)
    assert not signal.output_depends_on_input(model, batches[0][0])
