"""Masks, allocation and schedules: exact counts, stable ties, nesting."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import Chain, options
from torch import Generator, nn

from pai_bench import allocation, masks, schedules
from pai_bench.errors import ConfigError, UserError

GENERATOR = Generator()


def everything(*shapes: tuple[int, ...]) -> masks.Mask:
    return {f"layer{i}.weight": torch.ones(shape, dtype=torch.bool) for i, shape in enumerate(shapes)}


# Which weights --------------------------------------------------------------------------------------------------------


def test_prunable_are_weights_of_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 2, 2),
        nn.LayerNorm(5), nn.Embedding(3, 5), nn.Linear(5, 2),
    )  # fmt: skip
    assert list(masks.prunable(model)) == ["0.weight", "2.weight", "3.weight", "6.weight"]


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert masks.total(masks.prunable(model)) == 16


# How many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "num_prunable", "expected"),
    [(0.98, 14_761_664, 295_233), (0.9, 14_761_664, 1_476_166), (0.0, 7, 7), (0.98, 100, 2), (0.999, 1000, 1)],
)
def test_num_kept_is_the_rounded_density(sparsity: float, num_prunable: int, expected: int) -> None:
    assert masks.num_kept(sparsity, num_prunable) == expected


def test_a_sparsity_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves none of 100 weights; give at most 0\.99"):
        masks.num_kept(0.9999, 100)


# Allocation -----------------------------------------------------------------------------------------------------------


def test_global_topk_keeps_the_highest_scores_of_the_whole_network() -> None:
    scores = {"a": torch.tensor([0.1, 0.9, -3.0]), "b": torch.tensor([[0.5], [0.8]])}
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    mask = allocation.global_topk(scores, candidates, 0.4, GENERATOR)
    assert mask["a"].tolist() == [False, True, False]
    assert mask["b"].tolist() == [[True], [True]]


def test_ties_go_to_the_first_and_are_counted() -> None:
    scores = {"a": torch.tensor([1.0, 0.0, 0.0, 2.0]), "b": torch.tensor([0.0, 0.0])}
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    mask = allocation.global_topk(scores, candidates, 0.5, GENERATOR)
    assert mask["a"].tolist() == [True, True, False, True]
    assert not mask["b"].any()
    assert allocation.num_tied(scores, candidates, mask) == 4
    assert allocation.num_tied(scores, candidates, candidates) == 0


def test_only_candidates_are_kept_even_when_others_score_higher() -> None:
    scores = {"a": torch.tensor([9.0, 1.0, 2.0, 9.0])}
    candidates = {"a": torch.tensor([False, True, True, False])}
    assert allocation.global_topk(scores, candidates, 0.75, GENERATOR)["a"].tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="cannot keep 3 of 2"):
        allocation.global_topk(scores, candidates, 0.25, GENERATOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 7, 500, 999, 1000])
def test_keep_largest_agrees_with_a_stable_sort(dtype: torch.dtype, k: int) -> None:
    values = torch.randint(-5, 5, (1000,), generator=Generator().manual_seed(0)).to(dtype)
    expected = torch.zeros(1000, dtype=torch.bool)
    expected[torch.sort(values, descending=True, stable=True).indices[:k]] = True
    mask = allocation.keep_largest({"a": values}, {"a": torch.ones(1000, dtype=torch.bool)}, k)
    assert torch.equal(mask["a"], expected)


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 0.97])
def test_uniform_keeps_the_same_share_of_every_layer(sparsity: float) -> None:
    candidates = everything((3, 5), (7, 11), (2,), (40, 40))
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(1)) for name, mask in candidates.items()}
    mask = allocation.uniform(scores, candidates, sparsity, GENERATOR)
    for kept in mask.values():
        share = (1 - sparsity) * kept.numel()
        assert math.floor(share) - 1 <= int(kept.sum()) <= math.ceil(share) + 1
    for name, kept in mask.items():
        if kept.any() and not kept.all():
            assert scores[name][kept].min() > scores[name][~kept].max()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1.0, math.inf, math.nan]), r"2 of 3 scores of fc are not finite \(torch.float32\).*float64"),
        (torch.zeros(3), "every score is zero, in fc"),
    ],
    ids=["not finite", "all zero"],
)
def test_scores_that_rank_nothing_are_refused(values: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        allocation.check_scores({"fc": values}, {"fc": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("allocate", options("allocation"))
@pytest.mark.parametrize("sparsity", [0.98, 0.999])
def test_every_allocation_reaches_its_counts_over_many_nested_rounds(allocate: str, sparsity: float) -> None:
    candidates = everything((16, 1, 3, 3), (16, 16, 3, 3), (8, 16, 1, 1), (10, 8), (7,), (1,), (40, 40))
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(1)) for name, mask in candidates.items()}
    for this in schedules.exponential(sparsity, rounds=200):
        mask = getattr(allocation, allocate)(scores, candidates, this.sparsity, GENERATOR)
        assert masks.kept(mask) == masks.num_kept(this.sparsity, masks.total(mask))
        assert not any((mask[name] & ~candidates[name]).any() for name in mask)
        candidates = mask


@pytest.mark.parametrize("tied", [False, True])
def test_scores_of_any_memory_format_are_ranked_alike(tied: bool) -> None:
    values = torch.ones(4, 3, 3, 3) if tied else torch.rand(4, 3, 3, 3, generator=Generator().manual_seed(0))
    candidates = everything((4, 3, 3, 3))
    plain, last = (
        allocation.global_topk({"layer0.weight": v}, candidates, 0.7, GENERATOR)["layer0.weight"]
        for v in (values, values.contiguous(memory_format=torch.channels_last))
    )
    assert torch.equal(plain, last) and last.is_contiguous()


# The mask on a model --------------------------------------------------------------------------------------------------


def test_apply_zeroes_the_pruned_weights_and_no_others() -> None:
    model = Chain(bias=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = {name: torch.rand(weight.shape) < 0.5 for name, weight in masks.prunable(model).items()}
    masks.apply_(model, mask)
    for name, value in model.state_dict().items():
        expected = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(value, expected)


def test_measures_of_a_mask() -> None:
    mask = {"a": torch.tensor([True, False, False, True]), "b": torch.tensor([False] * 6)}
    assert masks.kept(mask) == 2
    assert masks.sparsity(mask) == 0.8
    assert masks.densities(mask) == {"a": 0.5, "b": 0.0}
    assert masks.collapsed(mask) == ["b"]


# Schedules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in options("schedule") if name != "none"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.98, 0.9999])
def test_density_never_rises_and_ends_at_the_target(name: str, sparsity: float) -> None:
    settings = {} if name == "one_shot" else {"rounds": 17}
    sparsities = [this.sparsity for this in getattr(schedules, name)(sparsity, **settings)]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == sparsity
    assert all(0 <= value < 1 for value in sparsities)


def test_exponential_rounds_prune_the_same_share_of_what_is_left() -> None:
    densities = [1.0] + [1 - this.sparsity for this in schedules.exponential(0.99, rounds=100)]
    ratios = [after / before for before, after in pairwise(densities)]
    assert ratios == pytest.approx([0.01 ** (1 / 100)] * 100)


def test_linear_rounds_prune_the_same_number_of_weights() -> None:
    sparsities = [0.0] + [this.sparsity for this in schedules.linear(0.6, rounds=6)]
    steps = [after - before for before, after in pairwise(sparsities)]
    assert steps == pytest.approx([0.1] * 6)


def test_a_schedule_of_one_round_is_one_shot() -> None:
    assert schedules.exponential(0.7, rounds=1) == schedules.linear(0.7, rounds=1) == schedules.one_shot(0.7)
