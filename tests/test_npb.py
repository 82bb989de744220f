"""NPB: where a layer's weights lie is the best place, and paths are counted."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Chain, composed, pruned_as, residual
from torch import Generator, nn

from pai_bench.analysis import paths
from pai_bench.errors import UserError
from pai_bench.masks import allocation, masks
from pai_bench.pruners import npb
from pai_bench.pruners.npb import Layer

SHAPE = (3, 8, 8)


def value(counts: torch.Tensor, inputs: torch.Tensor, most: float, alpha: float, beta: float) -> float:
    """What is maximised, from its definition."""
    channels = int((counts.sum(0) > 0).sum() + (counts.sum(1) > 0).sum())
    number, kernels = int(counts.sum()), int((counts > 0).sum())
    on_paths = float((counts * inputs[None]).sum())
    return alpha * channels / sum(counts.shape) + (1 - alpha) * on_paths / most + beta * kernels / number


@pytest.mark.parametrize("inputs", [[0.3, 1.0, 0.5], [1.0, 1.0, 1.0], [1.0, 0.001, 0.001]])
@pytest.mark.parametrize(("alpha", "beta"), [(0.01, 1.0), (0.5, 0.0), (0.9, 0.1), (0.0, 0.0), (1.0, 0.0), (0.3, 0.3)])
def test_no_other_place_of_the_weights_of_a_layer_is_better(inputs: list[float], alpha: float, beta: float) -> None:
    """All ways to put up to two weights into each of nine kernels."""
    reach = torch.tensor(inputs, dtype=torch.float64)
    every = torch.tensor(list(itertools.product(range(3), repeat=9))).view(-1, 3, 3)
    layer = Layer(torch.full((3, 3), 2), reach[None])
    channels = ((every.sum(1) > 0).sum(1) + (every.sum(2) > 0).sum(1)).double()
    kernels, on_paths = (every > 0).sum((1, 2)).double(), (every * reach).sum((1, 2))
    for number in range(1, 19):
        of_number = every.sum((1, 2)) == number
        most = float(on_paths[of_number].max())
        values = alpha * channels / 6 + (1 - alpha) * on_paths / most + beta * kernels / number
        best = float(values[of_number].max())
        counts = npb._balanced(layer, number, alpha, beta, limit=2)
        assert int(counts.sum()) == number and int(counts.max()) <= 2
        assert value(counts, reach, most, alpha, beta) == pytest.approx(best, abs=1e-12), number


def test_the_limit_of_a_kernel_grows_where_weights_do_not_fit() -> None:
    layer = Layer(torch.full((2, 3), 9), torch.ones(1, 3, dtype=torch.float64))
    assert int(npb._balanced(layer, 12, 0.01, 1.0, limit=2).max()) == 2
    assert npb._balanced(layer, 13, 0.01, 1.0, limit=2).sum() == 13
    assert (npb._balanced(layer, 54, 0.01, 1.0, limit=2) == 9).all()


def test_a_dead_input_gets_weights_last_and_groups_have_inputs_of_their_own() -> None:
    layer = Layer(torch.full((3, 3), 1), torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64))
    assert npb._balanced(layer, 6, 0.9, 1.0, limit=1).tolist() == [[1, 0, 1]] * 3
    assert npb._balanced(layer, 7, 0.9, 1.0, limit=1).sum(0).tolist() == [3, 1, 3]
    depthwise = Layer(torch.full((4, 1), 9), torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64))
    assert npb._balanced(depthwise, 4, 0.5, 1.0, limit=9).flatten().tolist() == [1, 1, 1, 1]
    assert npb._balanced(depthwise, 12, 0.0, 0.0, limit=9).flatten().tolist() == [0, 0, 3, 9]


def test_paths_are_those_of_the_layers_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2)).double()
    model.eval()
    generator = Generator().manual_seed(0)
    weights = {
        name: (torch.rand(w.shape, generator=generator) < 0.6).double() for name, w in masks.prunable(model).items()
    }
    found = npb._paths_into(model, (3,), weights, "4.weight")  # type: ignore[arg-type]
    by_hand = weights["3.weight"] @ weights["0.weight"] @ torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(found, by_hand / by_hand.max(), rtol=1e-4, atol=0)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "batch": lambda: nn.BatchNorm2d(4, track_running_stats=False),
}


@pytest.mark.parametrize("norm", NORMS)
def test_paths_run_through_norms_of_one_image_as_if_there_were_none(norm: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[norm](), nn.ReLU(), nn.Conv2d(4, 2, 3)).double().eval()
    weights = {name: torch.ones_like(weight).detach() for name, weight in masks.prunable(model).items()}
    for output, inputs in enumerate((1, 2, 3, 3)):
        weights["0.weight"][output, inputs:] = 0
    found = npb._paths_into(model, SHAPE, weights, "3.weight")
    torch.testing.assert_close(found, torch.tensor([1 / 3, 2 / 3, 1, 1], dtype=torch.float64), rtol=1e-6, atol=0)


def test_an_image_without_a_batch_is_counted_and_an_input_that_does_not_fit_is_refused() -> None:
    class Other(nn.Conv1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input[:, :4])

    body = [nn.Flatten(2), nn.Conv1d(3, 6, 3)]
    model = nn.Sequential(*body, Other(4, 2, 3)).double().eval()
    weights = {name: torch.ones_like(weight).detach() for name, weight in masks.prunable(model).items()}
    with pytest.raises(UserError, match=r"^pruner=npb: an input of 2.weight has 6 channels, and its weight is for 4;"):
        npb._paths_into(model, SHAPE, weights, "2.weight")
    model = nn.Sequential(*body, nn.Flatten(0, 1), nn.Conv1d(6, 2, 3)).double().eval()
    weights = {name: torch.ones_like(weight).detach() for name, weight in masks.prunable(model).items()}
    weights["1.weight"][:5] = 0
    assert npb._paths_into(model, SHAPE, weights, "3.weight").tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_layers_have_their_densities_and_all_weights_are_on_paths(sparsity: float) -> None:
    torch.manual_seed(0)
    model = residual()
    full = masks.full(model)
    found = pruned_as(model, SHAPE, "pruner=npb", f"sparsity={sparsity}").mask
    keep = masks.num_kept(sparsity, masks.total(full))
    scores = {name: torch.rand(kept.shape, generator=Generator().manual_seed(0)) for name, kept in full.items()}
    random = allocation.erk(scores, full, keep, Generator(), kernel=True).mask
    assert masks.densities(found) == masks.densities(random)
    reached = paths.effective(model, found, SHAPE)
    assert reached is not None
    assert sparsity > 0.5 or all(torch.equal(reached[name], kept) for name, kept in found.items())
    assert masks.kept(reached) >= masks.kept(paths.effective(model, random, SHAPE) or {})


def test_weights_on_no_path_fill_the_fullest_kernels() -> None:
    kept = torch.zeros(2, 2, 4, 1, dtype=torch.bool)
    kept[0, 0, :3], kept[0, 1, :1], kept[1, 1, :2] = True, True, True
    reached = kept.clone()
    reached[1] = False  # nobody reads the second output
    layer = Layer(torch.full((2, 2), 4), torch.ones(1, 2, dtype=torch.float64))
    everything = torch.ones_like(kept)
    found = npb._refilled(kept, reached, everything, layer)
    assert found.flatten(2).sum(2).tolist() == [[4, 2], [0, 0]] and not (reached & ~found).any()
    assert torch.equal(npb._refilled(kept, kept, everything, layer), kept)
    kept[1] = True  # ten weights for four places
    found = npb._refilled(kept, reached, everything, layer)
    assert found[0].all() and int(found.sum()) == int(kept.sum()) and not (found & ~(kept | everything)).any()


def test_kernels_of_the_first_layer_of_the_network_alone_have_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    balanced = npb._balanced

    def noted(*settings: Any, **more: Any) -> torch.Tensor:
        limits.append(settings[-1])
        return balanced(*settings, **more)

    monkeypatch.setattr(npb, "_balanced", noted)
    for prunable in ("all", "no_first"):
        torch.manual_seed(0)
        words = ["pruner=npb", "sparsity=0.7", "pruner.score.max_per_kernel=3"]
        pruned_as(Chain(), SHAPE, *words, prunable=prunable)
    assert limits == [9, 3, 3] + [3, 3]


def test_it_goes_on_from_a_mask() -> None:
    torch.manual_seed(0)
    words = ["pruner=npb", "sparsity=0.9", "schedule=linear", "schedule.rounds=3", "pruner.score.densities=uniform"]
    found = pruned_as(Chain(), SHAPE, *words)
    assert masks.kept(found.mask) == masks.num_kept(0.9, masks.total(found.mask)) and found.num_tied == [0, 0, 0]


def test_the_settings_are_those_of_the_authors_for_resnet_20() -> None:
    settings = composed("pruner=npb", "sparsity=0.9").pruner.score.settings  # type: ignore[union-attr]
    assert settings == {"densities": "erk", "alpha": 0.01, "beta": 1.0, "max_per_kernel": 9}
