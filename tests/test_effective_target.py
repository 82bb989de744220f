"""target=effective: the fewest weights with an effective sparsity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain, composed, pruned_as, residual
from torch import Generator, nn

import pai_bench as pb
from pai_bench import experiment
from pai_bench.analysis import paths
from pai_bench.core import Allocate, Selection
from pai_bench.errors import ConfigError
from pai_bench.masks import allocation, masks, sampling
from pai_bench.pruning.effective import Target

SHAPE = (3, 8, 8)
ALLOCATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "global": (allocation.global_topk, {"min_density": 0.0}),
    "uniform": (allocation.uniform, {}),
    "erk": (allocation.erk, {"kernel": True}),
    "sampled": (sampling.sampled, {"beta": 1.0, "scope": "global", "rescale": False}),
}


def allocate_by(name: str) -> Allocate:
    function, settings = ALLOCATIONS[name]
    return lambda *given: function(*given, **settings)


def random_scores(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator) for name, w in masks.prunable(model).items()}


def effective_sparsity(model: nn.Module, mask: masks.Mask, shape: tuple[int, int, int] = SHAPE) -> float:
    reached = paths.effective(model, mask, shape)
    assert reached is not None
    return masks.sparsity(reached)


def chosen(model: nn.Module, allocate: Allocate, scores: masks.Mask, sparsity: float) -> masks.Mask:
    full = masks.full(model)
    return Target(model, full, SHAPE).choose(allocate, scores, full, sparsity, lambda: Generator().manual_seed(5)).mask


# The bisection --------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(2, 3)
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_a_global_ranking_it_is_the_smallest_number_that_is_enough(seed: int) -> None:
    """Every number of weights is tried."""
    model = tiny()
    full, scores, allocate = masks.full(model), random_scores(model, seed), allocate_by("global")
    every = {keep: allocate(scores, full, keep, Generator()).mask for keep in range(1, masks.total(full) + 1)}
    reached = {keep: effective_sparsity(model, mask) for keep, mask in every.items()}
    jumps = {keep for keep in reached if keep > 1 and reached[keep - 1] - reached[keep] > 1.5 / masks.total(full)}
    assert jumps, "one more weight brings several onto paths"
    for sparsity in (0.0, 0.3, 0.5, 0.8, 0.9, 0.97):
        mask = chosen(model, allocate, scores, sparsity)
        enough = [keep for keep, value in reached.items() if value <= sparsity + 1e-12]
        assert masks.kept(mask) == enough[0] and enough == list(range(enough[0], masks.total(full) + 1))
        assert all(torch.equal(kept, every[enough[0]][name]) for name, kept in mask.items())


@pytest.mark.parametrize("build", [Chain, residual])
@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.6, 0.95])
def test_the_effective_sparsity_is_reached_and_masks_nest(
    name: str, sparsity: float, build: Callable[[], nn.Module]
) -> None:
    model = build()
    seen: list[masks.Mask] = []

    def noted(*given: Any) -> Selection:
        selection = allocate_by(name)(*given)
        assert masks.kept(selection.mask) == given[2]
        assert not any((kept & ~given[1][key]).any() for key, kept in selection.mask.items())
        seen.append(selection.mask)
        return selection

    mask = chosen(model, noted, random_scores(model, 3), sparsity)
    assert effective_sparsity(model, mask) <= sparsity
    assert masks.sparsity(mask) <= effective_sparsity(model, mask)
    fewer = [one for one in seen if masks.kept(one) == masks.kept(mask) - 1]
    least = masks.num_kept(sparsity, masks.total(mask), "up")  # with fewer it cannot be
    assert fewer or masks.kept(mask) == least
    assert all(effective_sparsity(model, one) > sparsity for one in fewer)
    larger = [one for one in seen if masks.kept(one) >= masks.kept(mask) and effective_sparsity(model, one) <= sparsity]
    assert all(
        not (small[key] & ~big[key]).any() for small in larger for big in larger for key in small
        if masks.kept(small) < masks.kept(big)
    )  # fmt: skip


def test_where_all_kept_weights_are_on_paths_it_is_the_sparsity() -> None:
    model = Chain()
    scores = {name: torch.zeros(weight.shape) for name, weight in masks.prunable(model).items()}
    for name, values in scores.items():  # whole channels, which lead from the image to all outputs
        values[:2] = 1.0 if name != "fc.weight" else 0.0
        values[:, 2 if name != "conv1.weight" else 3 :] = 0.0
    scores["fc.weight"][:, :2] = 1.0
    full = masks.full(model)
    number = int(sum(values.sum() for values in scores.values()))
    mask = chosen(model, allocate_by("global"), scores, 1 - number / masks.total(full))
    assert masks.kept(mask) == number and all(torch.equal(kept, scores[name] == 1) for name, kept in mask.items())


def test_an_allocation_that_refuses_some_numbers_is_asked_for_others() -> None:
    model = Chain()
    floors = lambda *given: allocation.global_topk(*given, min_density=0.05)  # noqa: E731
    mask = chosen(model, floors, random_scores(model, 0), 0.9)
    assert effective_sparsity(model, mask) <= 0.9 and min(masks.densities(mask).values()) >= 0.05

    def never(*_: Any) -> Selection:
        raise ConfigError("allocation: it has one number; give it")

    with pytest.raises(ConfigError, match="allocation: it has one number"):
        chosen(model, never, random_scores(model, 0), 0.9)


def test_candidates_that_are_not_enough_are_refused() -> None:
    model = Chain()
    mask = masks.full(model)
    mask["fc.weight"][:] = False
    target = Target(model, masks.full(model), SHAPE)
    with pytest.raises(ConfigError, match="all candidates together have effective sparsity 1; give a higher sparsity"):
        target.choose(allocate_by("global"), random_scores(model, 0), mask, 0.9, Generator)


class Padded(nn.Module):
    """Two convolutions on a map of one pixel: eight of nine positions of a kernel see nothing but padding."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 2, size, padding=size // 2), nn.Conv2d(2, 2, size, padding=size // 2)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(torch.relu(self.conv1(x))).mean((2, 3)))


@pytest.mark.parametrize(("pixels", "size", "active"), [(1, 3, 1), (2, 5, 9), (2, 3, 9)])
def test_a_kernel_whose_only_weight_sees_nothing_but_padding_is_on_no_path(pixels: int, size: int, active: int) -> None:
    model, shape = Padded(size), (3, pixels, pixels)
    found = paths.effective(model, masks.full(model), shape)
    assert found is not None and int(found["conv1.weight"][0, 0].sum()) == active
    mask = masks.full(model)
    mask["conv1.weight"][0] = False
    mask["conv1.weight"][0, 1, 0, 0] = True  # alone in its filter, at a corner
    found = paths.effective(model, mask, shape)
    assert found is not None
    sees = active == size * size
    assert bool(found["conv1.weight"][0].any()) == bool(found["conv2.weight"][:, 0].any()) == sees
    assert found["conv1.weight"][1].any() and found["conv2.weight"][:, 1].any()


# In a search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["pruner=random"], ["pruner=magnitude", "schedule=linear", "schedule.rounds=4"]])
def test_every_round_has_its_effective_sparsity(words: list[str]) -> None:
    torch.manual_seed(0)
    model = residual()
    lines: list[dict[str, float]] = []
    found = pruned_as(
        model, SHAPE, *words, "sparsity=0.8", target="effective", record=lambda metrics, _: lines.append(metrics)
    )
    reached = [line["prune/effective_sparsity"] for line in lines]
    goals = [0.8] if len(lines) == 1 else [0.2, 0.4, 0.6, 0.8]
    assert all(goal - 0.02 < value <= goal for value, goal in zip(reached, goals, strict=True))
    assert all(line["prune/sparsity"] <= line["prune/effective_sparsity"] for line in lines)
    assert effective_sparsity(model, found.mask) == reached[-1]


def test_early_rounds_keep_everything_where_the_whole_network_has_weights_on_no_path() -> None:
    torch.manual_seed(0)
    model, shape = Padded(), (3, 1, 1)  # of nine positions of a kernel one sees the pixel
    assert effective_sparsity(model, masks.full(model), shape) > 0.8
    lines: list[dict[str, float]] = []
    words = ["pruner=random", "schedule=linear", "schedule.rounds=4", "sparsity=0.95"]
    pruned_as(model, shape, *words, target="effective", record=lambda metrics, _: lines.append(metrics))
    assert [line["prune/sparsity"] == 0 for line in lines[:3]] == [True] * 3
    assert lines[-1]["prune/effective_sparsity"] <= 0.95 < lines[-1]["prune/effective_sparsity"] + 0.02
    with pytest.raises(ConfigError, match=r"sparsity=0\.5: all candidates together have effective sparsity 0\.8"):
        pruned_as(model, shape, "pruner=random", "sparsity=0.5", target="effective")


@pytest.mark.parametrize("pruner", ["phew", "npb"])
def test_a_score_that_needs_the_number_is_refused(pruner: str) -> None:
    refused = f"^target=effective: pruner={pruner} needs the number of weights to keep"
    with pytest.raises(ConfigError, match=refused):
        composed(f"pruner={pruner}", "sparsity=0.8", "target=effective")
    with pytest.raises(ConfigError, match=refused):  # as for a score of the user's
        pruned_as(residual(), SHAPE, f"pruner={pruner}", "sparsity=0.8", target="effective")


def test_a_run_and_the_library_find_the_same_mask(tmp_path: Path) -> None:
    words = ["pruner=magnitude", "sparsity=0.9", "model=lenet5", "training.epochs=0", "tracker=none", "device=cpu"]
    rows = {
        target: experiment.run(composed(*words, f"target={target}", f"results_dir={tmp_path}"))
        for target in ("sparsity", "effective")
    }
    one, other = rows["sparsity"], rows["effective"]
    assert (one["target"], other["target"]) == ("sparsity", "effective")
    assert one["target_sparsity"] == other["target_sparsity"] == 0.9
    assert other["sparsity"] < 0.9 < one["effective_sparsity"] and 0.899 < other["effective_sparsity"] <= 0.9

    from pai_bench.runs.export import initial

    network, shape = initial(tmp_path / other["id"])
    mask = pb.prune(network, "magnitude", sparsity=0.9, target="effective", input_shape=shape)
    assert masks.kept(mask) == other["num_kept"]
    with pytest.raises(ConfigError, match="input_shape"):
        pb.prune(network, "magnitude", sparsity=0.9, target="effective")


# Names and refusals ---------------------------------------------------------------------------------------------------

BASE = ["pruner=snip", "sparsity=0.9"]


def test_it_is_a_method_of_its_own() -> None:
    one, other = composed(*BASE), composed(*BASE, "target=effective")
    assert composed(*BASE, "target=sparsity").id == one.id != other.id
    assert other.task == one.task and other.method != one.method
    assert composed("target=effective").id == composed().id, "a dense network is one run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=paths"], "target=paths: give one of sparsity, effective"),
        (["ablation=shuffle_mask"], "target=effective: ablation=shuffle_mask changes the mask"),
        (["pruner=filter_magnitude"], "target=effective: pruner=filter_magnitude prunes filters"),
        (["allocation=sampled", "allocation.rescale=true"], "target=effective: allocation.rescale=true needs"),
        (["allocation=layer_rates"], "target=effective: the fractions of allocation=layer_rates are of what is left"),
    ],
)  # fmt: skip
def test_what_cannot_hold_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(*BASE, "target=effective", *words)
