"""Transposed convolutions: of kernels of one pixel they are convolutions, and are treated as these."""

import pytest
import torch
from conftest import composed
from torch import Generator, Tensor, nn

import pai_bench as pb
from pai_bench import experiment
from pai_bench.analysis import paths
from pai_bench.errors import ConfigError
from pai_bench.learned.network import LearnedNetwork
from pai_bench.masks import layers, masks

SHAPE = (3, 8, 8)
NAME = "2.weight"
PLACES = [(of * 6 + output, of * 4 + within) for of in range(2) for output in range(6) for within in range(4)]


def as_convolution(weight: Tensor) -> Tensor:
    """(12, 4, 1, 1), of the weight (8, 6, 1, 1) of a transposed convolution in two groups."""
    found = torch.empty(12, 4, 1, 1, dtype=weight.dtype)
    for output, of_input in PLACES:
        found[output, of_input % 4] = weight[of_input, output % 6]
    return found


def twins() -> tuple[nn.Sequential, nn.Sequential]:
    """A network, and one with a transposed convolution that computes the same."""
    torch.manual_seed(0)

    def network(middle: nn.Module) -> nn.Sequential:
        last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), middle, nn.ReLU(), *last)

    one = network(nn.Conv2d(8, 12, 1, groups=2))
    other = network(nn.ConvTranspose2d(8, 12, 1, groups=2))
    state = one.state_dict()
    weight = torch.empty(8, 6, 1, 1)
    for output, of_input in PLACES:
        weight[of_input, output % 6] = state[NAME][output, of_input % 4]
    other.load_state_dict(state | {NAME: weight})
    return one, other


def test_turning_gives_the_weight_of_the_convolution_that_computes_the_same() -> None:
    one, other = twins()
    images = torch.randn(5, *SHAPE)
    torch.testing.assert_close(one(images), other(images))
    weights = {name: weight.detach() for name, weight in masks.prunable(other).items()}
    turned = layers.turned(other, weights)
    assert all(torch.equal(turned[name], weight) for name, weight in masks.prunable(one).items())
    again = layers.turned(other, turned)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("pruner", "sparsity", "more"),
    [
        ("magnitude", 0.8, {}),
        ("magnitude", 0.8, {"allocation": "uniform"}),
        ("magnitude", 0.8, {"allocation": "erk"}),
        ("magnitude", 48 / 312, {"allocation": "n_m"}),
        ("magnitude", 0.8, {"allocation": "constant_fan_in"}),
        ("magnitude", 0.8, {"repair": "flow"}),
        ("magnitude", 0.8, {"target": "effective"}),
        ("npb", 0.8, {}),
    ],
)
def test_it_is_pruned_as_the_convolution_that_computes_the_same(
    pruner: str, sparsity: float, more: dict[str, str]
) -> None:
    one, other = (pb.prune(net, pruner, sparsity=sparsity, input_shape=SHAPE, **more) for net in twins())  # type: ignore[arg-type]
    assert 0 < masks.kept({NAME: one[NAME]}) < 48
    assert all(torch.equal(kept, one[name]) for name, kept in (other | {NAME: as_convolution(other[NAME])}).items())


def test_it_has_the_dead_units_of_the_convolution_that_computes_the_same() -> None:
    one, other = twins()
    mask = masks.full(other)
    mask[NAME][:, 1] = False  # outputs 1 and 7, of either group, have no input
    mask["6.weight"][:, 3] = False  # nobody reads output 3
    reached = paths.effective(other, mask, SHAPE)
    assert reached is not None and paths.dead_units(other, reached) == {"0.weight": 0, NAME: 3, "6.weight": 0}
    theirs = paths.effective(one, mask | {NAME: as_convolution(mask[NAME])}, SHAPE)
    assert theirs is not None and torch.equal(as_convolution(reached[NAME]), theirs[NAME])


@pytest.mark.parametrize("search", ["edge_popup", "gem_miner"])
def test_its_mask_is_learned_from_the_beginning_of_the_convolution(search: str) -> None:
    settings = composed(f"search={search}", "sparsity=0.5").search
    assert settings is not None
    one, other = (
        LearnedNetwork(net, settings.method(), 156, Generator().manual_seed(0), affine="none") for net in twins()
    )
    assert torch.equal(as_convolution(other.scores[1].detach()), one.scores[1])
    assert torch.equal(as_convolution(other.weights[NAME]), one.weights[NAME])
    assert torch.allclose(other.weights[NAME].abs(), torch.tensor((2 / 4) ** 0.5))


def test_a_transfer_by_fan_in_refuses_it() -> None:
    words = ["pruner=magnitude", "sparsity=0.5"]
    one, other = twins()
    experiment._check_transfer(composed(*words, "transfer=fan_in"), one)
    experiment._check_transfer(composed(*words, "transfer=rescale"), other)
    with pytest.raises(ConfigError, match=r"^transfer=fan_in: 2.weight is of a transposed convolution, .*; choose"):
        experiment._check_transfer(composed(*words, "transfer=fan_in"), other)
