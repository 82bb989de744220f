"""Allocations: exact counts, stable ties, nesting, and the densities of the literature."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from safetensors.torch import save_file
from torch import Generator

from pai_bench.core import TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.masks import allocation, masks, sampling
from pai_bench.pruning import schedules

GENERATOR = Generator()
LENGTH = TrainingLength(epochs=160, steps_per_epoch=391)


def num_kept(candidates: masks.Mask, sparsity: float) -> int:
    return masks.num_kept(sparsity, masks.total(candidates))


def everything(*shapes: tuple[int, ...]) -> masks.Mask:
    return {f"layer{i}.weight": torch.ones(shape, dtype=torch.bool) for i, shape in enumerate(shapes)}


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


NESTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "global": (allocation.global_topk, {"min_density": 0.0}),
    "uniform": (allocation.uniform, {}),
    "erk": (allocation.erk, {"kernel": True}),
    "sampled": (sampling.sampled, {"beta": 1.0, "scope": "global", "rescale": False}),
}


@pytest.mark.parametrize("allocate", NESTED)
@pytest.mark.parametrize("sparsity", [0.98, 0.999])
def test_allocations_reach_their_counts_over_many_nested_rounds(allocate: str, sparsity: float) -> None:
    shapes = [(16, 1, 3, 3), (16, 16, 3, 3), (8, 16, 1, 1), (10, 8), (7, 1), (1, 1), (40, 40)]
    candidates = everything(*shapes)
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(1)) for name, mask in candidates.items()}
    for this in schedules.exponential(sparsity, LENGTH, rounds=200, rounding="nearest"):
        mask = NESTED[allocate][0](
            scores, candidates, num_kept(candidates, this.sparsity), GENERATOR, **NESTED[allocate][1]
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


def test_layer_rates_are_those_of_the_lottery_ticket_papers() -> None:
    """Conv-2 of Frankle and Carbin: in rounds of 20 %, convolutions and the last layer at half the rate."""
    candidates = everything((64, 3, 3, 3), (64, 64, 3, 3), (256, 16384), (256, 256), (10, 256))
    sizes = {name: mask.numel() for name, mask in candidates.items()}
    rates = [0.1, 0.1, 0.2, 0.2, 0.1]
    mask = candidates
    for level in range(1, 16):
        expected = {name: (1 - rate) ** level * sizes[name] for name, rate in zip(sizes, rates, strict=True)}
        scores = {name: torch.rand(kept.shape) for name, kept in mask.items()}
        keep = round(sum(expected.values()))
        mask = allocation.layer_rates(scores, mask, keep, GENERATOR, convolution=0.5, last=0.5).mask
        assert masks.kept(mask) == keep
        for name, kept in mask.items():
            assert abs(int(kept.sum()) - expected[name]) < 1.5 + level / 2, (level, name)


def test_layer_rates_that_cannot_reach_the_sparsity_are_refused() -> None:
    candidates = everything((10, 10), (10, 10))
    scores = {name: torch.rand(10, 10) for name in candidates}
    kept = allocation.layer_rates(scores, candidates, 100, GENERATOR, convolution=1, last=0).mask
    assert [int(mask.sum()) for mask in kept.values()] == [0, 100]
    for keep, last in ((99, 0), (40, 0.5)):
        with pytest.raises(ConfigError, match="layer_rates would prune more than all of a layer"):
            allocation.layer_rates(scores, candidates, keep, GENERATOR, convolution=1, last=last)
    whole = allocation.layer_rates(scores, candidates, 200, GENERATOR, convolution=0, last=0).mask
    assert masks.kept(whole) == 200


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


@pytest.mark.parametrize("name", ["uniform", "erk", "igq", "erk_plus", "uniform_plus"])
def test_layers_have_the_numbers_of_one_round_after_many(name: str) -> None:
    allocate = composed("pruner=random", "sparsity=0.9", f"allocation={name}").allocation
    candidates = everything((16, 3, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (10, 32))
    scores = {layer: torch.rand(mask.shape, generator=GENERATOR) for layer, mask in candidates.items()}
    once = allocate(scores, candidates, num_kept(candidates, 0.9), GENERATOR).mask
    mask = candidates
    for level in range(1, 11):
        mask = allocate(scores, mask, num_kept(candidates, 1 - 0.1 ** (level / 10)), GENERATOR).mask
    assert masks.counts(mask) == masks.counts(once)


def test_densities_are_taken_of_layers_that_candidates_turn(tmp_path: Path) -> None:
    """Of a transposed convolution inputs and outputs are exchanged while weights are chosen, and not in files."""
    theirs = torch.zeros(6, 8, 2, 2, dtype=torch.bool)
    theirs.view(-1)[:48] = True
    save_file({"layer0.weight": theirs}, tmp_path / "m.safetensors")
    candidates = everything((8, 6, 2, 2))
    scores = {"layer0.weight": torch.rand(8, 6, 2, 2, generator=Generator().manual_seed(0))}
    found = allocation.densities_of_mask(scores, candidates, 48, GENERATOR, mask=str(tmp_path / "m.safetensors"))
    assert int(found.mask["layer0.weight"].sum()) == 48


def test_a_smallest_density_is_that_of_what_is_left() -> None:
    """A mask to go on from may have emptied a layer."""
    candidates = everything((10, 10), (50, 2))
    candidates["layer0.weight"][:] = False
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(0)) for name, mask in candidates.items()}
    mask = allocation.global_topk(scores, candidates, 20, GENERATOR, min_density=0.1).mask
    assert [int(kept.sum()) for kept in mask.values()] == [0, 20]
