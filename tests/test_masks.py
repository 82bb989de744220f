"""Masks, allocation and schedules: exact counts, stable ties, nesting."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain
from safetensors.torch import save_file
from torch import Generator, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pai_bench.core import TrainingLength
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import allocation, masks
from pai_bench.pruning import schedules

GENERATOR = Generator()
LENGTH = TrainingLength(epochs=160, steps_per_epoch=391)


def num_kept(candidates: masks.Mask, sparsity: float) -> int:
    return masks.num_kept(sparsity, masks.total(candidates))


def everything(*shapes: tuple[int, ...]) -> masks.Mask:
    return {f"layer{i}.weight": torch.ones(shape, dtype=torch.bool) for i, shape in enumerate(shapes)}


# Which weights --------------------------------------------------------------------------------------------------------


def test_prunable_are_weights_of_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 2, 2),
        nn.LayerNorm(5), nn.Embedding(3, 5), nn.Linear(5, 2),
    )  # fmt: skip
    assert list(masks.prunable(model)) == ["0.weight", "2.weight", "3.weight", "6.weight"]


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "separate"])
def test_the_projections_of_attention_are_prunable(widths: dict[str, int]) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
    packed = ["in_proj_weight"] if not widths else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert list(masks.prunable(attention)) == [*packed, "out_proj.weight"]
    assert not masks.unprunable(attention)


def test_other_weights_of_two_dimensions_are_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 5), nn.LayerNorm([2, 3]), nn.PReLU(4), nn.LSTM(2, 3))
    model.token = nn.Parameter(torch.zeros(1, 1, 7))
    model[0] = nn.utils.parametrizations.weight_norm(model[0])
    assert list(masks.unprunable(model)) == [
        "0.parametrizations.weight.original1", "1.weight", "2.weight", "2.bias", "4.weight_ih_l0", "4.weight_hh_l0",
    ]  # fmt: skip


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


@pytest.mark.parametrize("num_prunable", [626, 14_576, 270_896, 14_761_664])
@pytest.mark.parametrize("density", [0.1, 0.02, 0.01, 1 / 3])
def test_rounds_can_keep_the_numbers_of_the_authors_code(num_prunable: int, density: float) -> None:
    """Synaptic-Flow prunes trunc((1 - d_i) N) weights, FORCE keeps trunc(d_i N); the last round keeps the nearest."""
    of = {
        (schedule, rounding): [
            masks.num_kept(r.sparsity, num_prunable, r.rounding)
            for r in getattr(schedules, schedule)(1 - density, LENGTH, rounds=100, rounding=rounding)
        ]
        for schedule in ("exponential", "linear")
        for rounding in ("nearest", "up", "down")
    }
    exponential = [density ** (i / 100) for i in range(1, 100)]
    assert of["exponential", "up"][:-1] == [num_prunable - int((1 - d) * num_prunable) for d in exponential]
    logarithmic = [math.exp(i / 100 * math.log(density)) for i in range(1, 100)]
    assert of["exponential", "down"][:-1] == [int(d * num_prunable) for d in logarithmic]
    for schedule in ("exponential", "linear"):
        last = {of[schedule, rounding][-1] for rounding in ("nearest", "up", "down")}
        assert last == {round(density * num_prunable)}
        rounded = zip(*(of[schedule, rounding] for rounding in ("down", "nearest", "up")), strict=True)
        assert all(low <= near <= high <= low + 1 for low, near, high in rounded)


def test_a_whole_number_of_weights_is_not_rounded() -> None:
    assert {masks.num_kept(0.98, 100, rounding) for rounding in ("nearest", "up", "down")} == {2}  # 1 - 0.98 > 0.02
    assert {masks.num_kept(0.93, 100, rounding) for rounding in ("nearest", "up", "down")} == {7}  # 1 - 0.93 < 0.07


def test_a_sparsity_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves none of 100 weights; give at most 0\.99"):
        masks.num_kept(0.9999, 100)


# Allocation -----------------------------------------------------------------------------------------------------------


def test_global_topk_keeps_the_highest_scores_of_the_whole_network() -> None:
    scores = {"a": torch.tensor([0.1, 0.9, -3.0]), "b": torch.tensor([[0.5], [0.8]])}
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    mask = allocation.global_topk(scores, candidates, num_kept(candidates, 0.4), GENERATOR, min_density=0.0).mask
    assert mask["a"].tolist() == [False, True, False]
    assert mask["b"].tolist() == [[True], [True]]


def test_ties_go_to_the_first_and_are_counted() -> None:
    scores = {"a": torch.tensor([1.0, 0.0, 0.0, 2.0]), "b": torch.tensor([0.0, 0.0])}
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    chosen = allocation.global_topk(scores, candidates, num_kept(candidates, 0.5), GENERATOR, min_density=0.0)
    assert chosen.mask["a"].tolist() == [True, True, False, True]
    assert not chosen.mask["b"].any()
    assert chosen.num_tied == 4
    for sparsity in (0.0, 2 / 3):  # all that are equal stay, or none
        assert (
            allocation.global_topk(
                scores, candidates, num_kept(candidates, sparsity), GENERATOR, min_density=0.0
            ).num_tied
            == 0
        )
    by_layer = allocation.uniform(scores, candidates, num_kept(candidates, 0.5), GENERATOR)
    assert [kept.tolist() for kept in by_layer.mask.values()] == [[True, False, False, True], [True, False]]
    assert by_layer.num_tied == 2


def test_only_candidates_are_kept_even_when_others_score_higher() -> None:
    scores = {"a": torch.tensor([9.0, 1.0, 2.0, 9.0])}
    candidates = {"a": torch.tensor([False, True, True, False])}
    mask = allocation.global_topk(scores, candidates, num_kept(candidates, 0.75), GENERATOR, min_density=0.0).mask
    assert mask["a"].tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="cannot keep 3 of 2"):
        allocation.global_topk(scores, candidates, num_kept(candidates, 0.25), GENERATOR, min_density=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 7, 500, 999, 1000])
def test_keep_largest_agrees_with_a_stable_sort(dtype: torch.dtype, k: int) -> None:
    values = torch.randint(-5, 5, (1000,), generator=Generator().manual_seed(0)).to(dtype)
    expected = torch.zeros(1000, dtype=torch.bool)
    expected[torch.sort(values, descending=True, stable=True).indices[:k]] = True
    mask = allocation.keep_largest({"a": values}, {"a": torch.ones(1000, dtype=torch.bool)}, k).mask
    assert torch.equal(mask["a"], expected)


def whole(values: torch.Tensor) -> allocation.Pool:
    return allocation.pool(values, torch.ones_like(values, dtype=torch.bool))


LONG = {
    "random": lambda n, g: torch.randn(n, generator=g),
    "of many sizes": lambda n, g: (8 * torch.randn(n, generator=g)).exp(),
    "equal": lambda n, g: torch.ones(n),
    "mostly zero": lambda n, g: (torch.rand(n, generator=g) - 0.9).clamp_min(0),
    "few values": lambda n, g: torch.randint(5, (n,), generator=g).float(),
    "ordered": lambda n, g: torch.arange(n).float(),
    "periodic, as the sample is": lambda n, g: (torch.arange(n) % 12).float(),
    "infinite": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.3, -torch.inf, torch.rand(n, generator=g)),
}


@pytest.mark.parametrize("kind", LONG)
def test_selection_by_a_sample_is_exact(kind: str) -> None:
    n = 200_003
    values = LONG[kind](n, Generator().manual_seed(0))
    ordered = values.sort(descending=True).values
    for k in (1, 2, 2_000, n // 2, n - 2_000, n - 1, n):
        assert allocation.kth_largest([whole(values)], k) == ordered[k - 1], k
        assert allocation.kth_largest([whole(values[:70_000]), whole(values[70_000:])], k) == ordered[k - 1], k
        assert allocation.kth_largest([whole(values.double())], k) == ordered[k - 1].double(), k
    allowed = torch.rand(n, generator=Generator().manual_seed(1)) < 0.6
    ordered = values[allowed].sort(descending=True).values
    for k in (1, 2_000, len(ordered) // 2, len(ordered)):
        assert allocation.kth_largest([allocation.pool(values, allowed)], k) == ordered[k - 1], k


def test_selection_is_exact_where_the_sample_meets_no_candidate() -> None:
    values = torch.randn(6_000, generator=Generator().manual_seed(0))
    for step in range(8, 20):
        allowed = torch.arange(6_000) % step > 0
        expected = values[allowed].sort(descending=True).values[2_999]
        assert allocation.kth_largest([allocation.pool(values, allowed)], 3_000) == expected, step


@pytest.mark.parametrize("density", [0.5, 0.1])  # above and below where places are remembered
def test_only_scores_of_candidates_have_to_be_finite(density: float) -> None:
    n = 2 * masks._SMALL
    kept = masks.positions(torch.rand(n, generator=Generator().manual_seed(0)) < density)
    candidate = masks.at(torch.Size([n]), kept)
    if density == 0.5:
        candidate = candidate.clone()
    assert (masks.remembered(candidate) is None) == (density == 0.5)
    values = torch.full((n,), torch.nan).index_fill_(0, kept, 1.0)
    allocation.check_scores({"a": values}, {"a": candidate})
    values[kept[7]] = torch.inf
    with pytest.raises(UserError, match=f"1 of {len(kept)} scores of a are not finite"):
        allocation.check_scores({"a": values}, {"a": candidate})


def test_keep_largest_of_long_layers_agrees_with_a_stable_sort() -> None:
    generator = Generator().manual_seed(0)
    scores = {name: torch.randint(2000, (70_001 + i,), generator=generator).double() for i, name in enumerate("abcd")}
    candidates = {
        "a": torch.ones(70_001, dtype=torch.bool),
        "b": torch.rand(70_002, generator=generator) < 0.3,
        "c": torch.rand(70_003, generator=generator) < 0.1,
        "d": torch.zeros(70_004, dtype=torch.bool),
    }
    values = torch.cat([torch.where(candidates[name], scores[name], -1) for name in scores])
    for k in (1, 5_000, 70_000):
        expected = torch.zeros(len(values), dtype=torch.bool)
        expected[torch.sort(values, descending=True, stable=True).indices[:k]] = True
        mask = allocation.keep_largest(scores, candidates, k).mask
        assert torch.equal(torch.cat(list(mask.values())), expected)


def test_positions_follow_a_mask_that_is_changed_in_place() -> None:
    mask = masks.at(torch.Size((2, 3)), torch.tensor([1, 5]))
    assert mask.tolist() == [[False, True, False], [False, False, True]]
    assert masks.positions(mask).tolist() == [1, 5]
    mask[0, 0] = True
    assert masks.positions(mask).tolist() == [0, 1, 5]


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 0.97])
def test_uniform_keeps_the_same_share_of_every_layer(sparsity: float) -> None:
    candidates = everything((3, 5), (7, 11), (2,), (40, 40))
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(1)) for name, mask in candidates.items()}
    mask = allocation.uniform(scores, candidates, num_kept(candidates, sparsity), GENERATOR).mask
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


NESTED = {
    "global": {"min_density": 0.0},
    "uniform": {},
    "erk": {"kernel": True},
    "sampled": {"beta": 1.0, "scope": "global", "rescale": False},
}


@pytest.mark.parametrize("allocate", NESTED)
@pytest.mark.parametrize("sparsity", [0.98, 0.999])
def test_allocations_reach_their_counts_over_many_nested_rounds(allocate: str, sparsity: float) -> None:
    shapes = [(16, 1, 3, 3), (16, 16, 3, 3), (8, 16, 1, 1), (10, 8), (7, 1), (1, 1), (40, 40)]
    candidates = everything(*shapes)
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(1)) for name, mask in candidates.items()}
    for this in schedules.exponential(sparsity, LENGTH, rounds=200, rounding="nearest"):
        mask = getattr(allocation, allocate)(
            scores, candidates, num_kept(candidates, this.sparsity), GENERATOR, **NESTED[allocate]
        ).mask
        assert masks.kept(mask) == masks.num_kept(this.sparsity, masks.total(mask))
        assert not any((mask[name] & ~candidates[name]).any() for name in mask)
        candidates = mask


def test_a_floor_keeps_the_highest_scores_of_every_layer() -> None:
    candidates = everything((30,), (100,))
    scores = {"layer0.weight": torch.arange(30.0), "layer1.weight": 1000 + torch.arange(100.0)}
    mask = allocation.global_topk(scores, candidates, num_kept(candidates, 0.9), GENERATOR, min_density=0.1).mask
    assert mask["layer0.weight"].nonzero().squeeze(1).tolist() == [27, 28, 29]
    assert mask["layer1.weight"].nonzero().squeeze(1).tolist() == list(range(90, 100))
    assert (
        not allocation.global_topk(scores, candidates, num_kept(candidates, 0.9), GENERATOR, min_density=0.0)
        .mask["layer0.weight"]
        .any()
    )
    with pytest.raises(ConfigError, match=r"allocation.min_density=0.5: it keeps 65, the sparsity 13"):
        allocation.global_topk(scores, candidates, num_kept(candidates, 0.9), GENERATOR, min_density=0.5)


def densities(mask: masks.Mask) -> list[float]:
    return list(masks.densities(mask).values())


def test_uniform_plus_spends_the_whole_budget() -> None:
    candidates = everything((64, 3, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3), (100, 128))
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(0)) for name, mask in candidates.items()}
    mask = allocation.uniform_plus(scores, candidates, num_kept(candidates, 0.95), GENERATOR, min_last=0.2).mask
    first, one, two, last = densities(mask)
    assert (first, last) == (1.0, pytest.approx(0.2, abs=1e-4))
    assert one == pytest.approx(two, abs=1e-4) and one < 0.05
    assert masks.kept(mask) == masks.num_kept(0.95, masks.total(mask))
    others = densities(
        allocation.uniform_plus(scores, candidates, num_kept(candidates, 0.5), GENERATOR, min_last=0.2).mask
    )[1:]
    assert len(set(np.round(others, 3))) == 1
    with pytest.raises(ConfigError, match="allocation=uniform_plus keeps the first layer"):
        allocation.uniform_plus(scores, candidates, num_kept(candidates, 0.99), GENERATOR, min_last=0.2)


def test_erdos_renyi_densities_are_proportional_until_a_layer_is_full() -> None:
    candidates = everything((16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64))
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(0)) for name, mask in candidates.items()}
    before = [0.0] * 4
    for sparsity in (0.95, 0.9, 0.8, 0.6, 0.3):
        mask = allocation.erk(scores, candidates, num_kept(candidates, sparsity), GENERATOR, kernel=True).mask
        ratios = [d / (sum(m.shape) / m.numel()) for d, m in zip(densities(mask), mask.values(), strict=True) if d < 1]
        assert max(ratios) == pytest.approx(min(ratios), rel=0.02)
        assert all(now >= then for now, then in zip(densities(mask), before, strict=True))
        before = densities(mask)
    with pytest.raises(ConfigError, match="not for filters"):
        allocation.erk({"a": torch.ones(3)}, {"a": torch.ones(3, dtype=torch.bool)}, 2, GENERATOR, kernel=True)


@pytest.mark.parametrize("surplus", ["proportional", "next"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6, 0.9])
def test_smart_ratio_keeps_exactly_the_number_whatever_is_full(surplus: Any, sparsity: float) -> None:
    candidates = everything((4, 3, 3, 3), (6, 4, 3, 3), (8, 6, 3, 3), (8, 8, 3, 3), (4, 8))
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(0)) for name, mask in candidates.items()}
    keep = num_kept(candidates, sparsity)
    settings = {"shape": "vgg", "linear_density": 0.5, "surplus": surplus}
    mask = allocation.smart_ratio(scores, candidates, keep, GENERATOR, **settings).mask
    assert masks.kept(mask) == keep
    counts = [int(kept.sum()) for kept in mask.values()]
    full = [kept == candidate.numel() for kept, candidate in zip(counts, candidates.values(), strict=True)]
    assert sorted(full[:4], reverse=True) == full[:4]  # the first layers are filled before those behind them
    assert counts[4] == 16


def test_densities_of_another_mask_are_taken_over(tmp_path: Path) -> None:
    candidates = everything((10, 10), (50, 4))
    theirs = {name: torch.zeros_like(mask) for name, mask in candidates.items()}
    theirs["layer0.weight"].view(-1)[:30] = True
    save_file(theirs, tmp_path / "m.safetensors")
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(0)) for name, mask in candidates.items()}
    mask = allocation.densities_of_mask(
        scores, candidates, num_kept(candidates, 0.9), GENERATOR, mask=str(tmp_path / "m.safetensors")
    ).mask
    assert [int(kept.sum()) for kept in mask.values()] == [30, 0]
    kept = mask["layer0.weight"]
    assert scores["layer0.weight"][kept].min() > scores["layer0.weight"][~kept].max()
    with pytest.raises(ConfigError, match=r"keeps 30 weights and sparsity=0.8 keeps 60"):
        allocation.densities_of_mask(
            scores, candidates, num_kept(candidates, 0.8), GENERATOR, mask=str(tmp_path / "m.safetensors")
        )
    with pytest.raises(ConfigError, match=r"there is no such file"):
        allocation.densities_of_mask(
            scores, candidates, num_kept(candidates, 0.8), GENERATOR, mask=str(tmp_path / "other")
        )
    with pytest.raises(ConfigError, match=r"holds no mask of other \(3,\)"):
        other = {"other": torch.ones(3)}
        allocation.densities_of_mask(
            other, {"other": torch.ones(3, dtype=torch.bool)}, 2, GENERATOR, mask=str(tmp_path / "m.safetensors")
        )


@pytest.mark.parametrize("tied", [False, True])
def test_scores_of_any_memory_format_are_ranked_alike(tied: bool) -> None:
    values = torch.ones(4, 3, 3, 3) if tied else torch.rand(4, 3, 3, 3, generator=Generator().manual_seed(0))
    candidates = everything((4, 3, 3, 3))
    plain, last = (
        allocation.global_topk(
            {"layer0.weight": v}, candidates, num_kept(candidates, 0.7), GENERATOR, min_density=0.0
        ).mask["layer0.weight"]
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


@pytest.mark.parametrize(("dtype", "is_said"), [(torch.float32, True), (torch.float64, False)])
def test_a_wider_type_is_named_where_there_is_one(dtype: torch.dtype, is_said: bool) -> None:
    mask = everything((2, 2))
    scores = {name: torch.full(kept.shape, math.inf, dtype=dtype) for name, kept in mask.items()}
    with pytest.raises(UserError, match=r"scores of layer0.weight are not finite .*lower the initial scale") as said:
        allocation.check_scores(scores, mask)
    assert ("pruner.dtype=float64" in str(said.value)) == is_said


def test_a_large_weight_is_cleared_in_one_launch_where_there_is_no_cache_to_keep_to() -> None:
    class Launches(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    shape = (16, masks._IN_CACHE)
    with Launches() as seen:
        masks.clear_(torch.empty(shape, device="meta"), torch.empty(shape, dtype=torch.bool, device="meta"))
    assert seen.names.count("bitwise_and_") == 1


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_weights_are_cleared_in_any_layout(dtype: torch.dtype, form: torch.memory_format) -> None:
    generator = Generator().manual_seed(0)
    model = nn.Conv2d(150, 130, 3, bias=False).to(dtype, memory_format=form)
    weight = model.weight.detach().clone()
    assert weight.numel() > masks._IN_CACHE > masks._SMALL
    first = torch.rand(weight.shape, generator=generator) < 0.5
    then = masks.at(weight.shape, masks.positions(first & (torch.rand(weight.shape, generator=generator) < 0.3)))
    last = then & (torch.rand(weight.shape, generator=generator) < 0.5)
    before: masks.Mask = {}
    for kept in (first, then, last):  # by bits, by bits again, and by the places that are remembered
        masks.apply_narrower_(model, before, {"weight": kept})
        assert torch.equal(model.weight, weight * kept)
        before = {"weight": kept}
    model.weight.data.fill_(torch.nan)
    masks.apply_(model, {"weight": last})
    assert not model.weight[~last].any() and model.weight[last].isnan().all()


def test_measures_of_a_mask() -> None:
    mask = {"a": torch.tensor([True, False, False, True]), "b": torch.tensor([False] * 6)}
    assert masks.kept(mask) == 2
    assert masks.sparsity(mask) == 0.8
    assert masks.densities(mask) == {"a": 0.5, "b": 0.0}
    assert masks.collapsed(mask) == ["b"]


# Schedules ------------------------------------------------------------------------------------------------------------


def test_exponential_rounds_prune_the_same_share_of_what_is_left() -> None:
    densities = [1.0] + [1 - this.sparsity for this in schedules.exponential(0.99, LENGTH, rounds=100, rounding="up")]
    ratios = [after / before for before, after in pairwise(densities)]
    assert ratios == pytest.approx([0.01 ** (1 / 100)] * 100)


def test_linear_rounds_prune_the_same_number_of_weights() -> None:
    sparsities = [0.0] + [this.sparsity for this in schedules.linear(0.6, LENGTH, rounds=6, rounding="down")]
    steps = [after - before for before, after in pairwise(sparsities)]
    assert steps == pytest.approx([0.1] * 6)


def test_a_schedule_of_one_round_is_one_shot() -> None:
    one, settings = schedules.one_shot(0.7, LENGTH), {"rounds": 1, "rounding": "up"}
    assert schedules.exponential(0.7, LENGTH, **settings) == schedules.linear(0.7, LENGTH, **settings) == one
    assert schedules.early(0.7, LENGTH, epoch=0.0, step=None, **settings) == one


def test_front_loaded_rounds_prune_the_published_share_of_what_is_left() -> None:
    """r_j = p / (j p + n (1 - p)), which starts at 10.7 % and ends at 3.0 % for three quarters in 25 rounds."""
    densities = [1.0] + [1 - r.sparsity for r in schedules.front_loaded(0.75, LENGTH, rounds=25, warmup_epochs=1)]
    shares = [1 - after / before for before, after in pairwise(densities)]
    assert shares == pytest.approx([0.75 / (j * 0.75 + 25 * 0.25) for j in range(1, 26)])
    assert (round(100 * shares[0], 1), round(100 * shares[-1], 1)) == (10.7, 3.0)
    assert densities[-1] == 0.25
    rounds = schedules.front_loaded(0.75, LENGTH, rounds=3, warmup_epochs=5)
    assert [this.until_epoch for this in rounds] == [5, 6, 7]


def test_gradual_pruning_follows_its_cubic() -> None:
    rounds = schedules.gradual(0.8, LENGTH, start_epoch=10, end_epoch=20, every_steps=391)
    assert [this.until_epoch for this in rounds] == pytest.approx(list(range(11, 21)))
    assert [this.sparsity for this in rounds] == pytest.approx([0.8 * (1 - (1 - t / 10) ** 3) for t in range(1, 11)])


def test_iterative_rounds_train_to_the_end_and_go_back_to_a_step() -> None:
    settings = {"levels": 3, "rewind_epoch": None, "rewind_step": 1000, "rewind_weights": True}
    rounds = schedules.iterative(0.488, LENGTH, **settings)
    assert [round(1 - this.sparsity, 6) for this in rounds] == [0.8, 0.64, 0.512]  # the papers' 20 % at a time
    assert {this.until_epoch for this in rounds} == {160.0}
    assert {round(this.rewind_epoch * LENGTH.steps_per_epoch) for this in rounds} == {1000}


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (
            "early",
            {"epoch": 1.0, "step": 3, "rounds": 1, "rounding": "up"},
            "schedule.epoch=1.0, schedule.step=3: give one of the two",
        ),
        (
            "early",
            {"epoch": 161.0, "step": None, "rounds": 1, "rounding": "up"},
            "schedule.epoch=161.0: it lies outside training.epochs=160",
        ),
        ("gradual", {"start_epoch": 5, "end_epoch": 5, "every_steps": 1}, "start_epoch=5, end_epoch=5"),
        ("front_loaded", {"rounds": 161, "warmup_epochs": 1}, "schedule.rounds=161, warmup_epochs=1"),
        ("fine_tune", {"levels": 1, "epochs": 161}, "schedule.epochs=161: training.epochs=160"),
    ],
)
def test_times_outside_training_are_refused(schedule: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        getattr(schedules, schedule)(0.5, LENGTH, **settings)
