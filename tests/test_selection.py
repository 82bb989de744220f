"""Exact selection: the fast functions give the bits of the plain ones."""

import math
from collections.abc import Callable

import pytest
import torch
from emulated_graphs import recorded
from torch import Generator, Tensor

from pai_bench.core import Mask, Scores
from pai_bench.masks import masks, selection
from pai_bench.masks.selection import (
    chosen_on_device,
    keep_largest,
    keep_largest_by_sorting,
    keep_largest_on_device,
    kth_largest,
    kth_largest_by_sorting,
    pool,
)

VALUES: dict[str, Callable[[int, Generator], Tensor]] = {
    "random": lambda n, g: torch.randn(n, generator=g),
    "of many sizes": lambda n, g: (8 * torch.randn(n, generator=g)).exp(),
    "equal": lambda n, g: torch.ones(n),
    "mostly zero": lambda n, g: (torch.rand(n, generator=g) - 0.9).clamp_min(0),
    "few values": lambda n, g: torch.randint(5, (n,), generator=g).float(),
    "ordered": lambda n, g: torch.arange(n).float(),
    "periodic, as the sample is": lambda n, g: (torch.arange(n) % 12).float(),
    "infinite": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.3, -torch.inf, torch.rand(n, generator=g)),
    "infinite both ways": lambda n, g: torch.tensor([-torch.inf, 0, torch.inf])[torch.randint(3, (n,), generator=g)],
    "zeros of both signs": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.5, -0.0, 0.0),
}


def candidates_of(share: float, like: Scores) -> Mask:
    """A random mask of about this share of every layer; of the last layer nothing, where there are several."""
    generator = Generator().manual_seed(1)
    found = {name: torch.rand(values.shape, generator=generator) < share for name, values in like.items()}
    if len(found) > 1:
        found[list(found)[-1]].fill_(False)
    return found


SHAPES = {
    "one small layer": [(1000,)],
    "one large layer": [(200_003,)],
    "many small layers": [(16, 3, 3, 3), (7,), (1,), (30, 20)],
    "many layers, some of them large": [(600_001,), (9,), (700, 70, 3, 3), (40,), (300, 1000), (2, 3)],
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.6, 0.01])
def test_the_largest_scores_are_those_of_a_stable_sort(kind: str, shapes: str, share: float) -> None:
    generator = Generator().manual_seed(0)
    scores = {}
    for number, shape in enumerate(SHAPES[shapes]):
        scores[f"layer{number}"] = VALUES[kind](math.prod(shape), generator).double().view(shape)
    candidates = candidates_of(share, scores)
    before = {name: mask.clone() for name, mask in candidates.items()}
    number = masks.kept(candidates)
    assert (masks.total(candidates) > selection._SMALL) == (shapes == "many layers, some of them large")
    for k in sorted({0, min(1, number), number // 50, number // 2, max(number - 1, 0), number}):
        expected = keep_largest_by_sorting(scores, candidates, k)
        large = masks.total(candidates) > selection._SMALL
        for keep in (keep_largest,) if large and k != number // 2 else (keep_largest, keep_largest_on_device):
            found = keep(scores, candidates, k)
            assert all(torch.equal(found.mask[name], expected.mask[name]) for name in scores), (keep, k)
            assert found.num_tied == expected.num_tied, (keep, k)
            assert list(found.mask) == list(scores) and masks.kept(found.mask) == k
    assert all(torch.equal(before[name], mask) for name, mask in candidates.items())
    with pytest.raises(ValueError, match=f"cannot keep {number + 1} of {number}"):
        keep_largest(scores, candidates, number + 1)
    with pytest.raises(ValueError, match=f"cannot keep {number + 1} of {number}"):
        keep_largest_on_device(scores, candidates, number + 1)


def test_a_choice_on_the_device_reads_nothing_and_follows_its_number() -> None:
    """As a CUDA graph: the same operations for every number, on scores and candidates that change in place."""
    generator = Generator().manual_seed(0)
    values, allowed = torch.randint(0, 40, (5000,), generator=generator).double(), torch.ones(5000, dtype=torch.bool)
    k, found = torch.tensor([3]), []

    def choose() -> None:
        found[:] = chosen_on_device(values, allowed, k)

    replay = recorded(choose, values.device)
    chosen, tied = found
    for number in (1, 700, 5000, 0, 123):
        values.copy_(torch.randint(0, 40, (5000,), generator=generator))
        allowed.copy_(torch.rand(5000, generator=generator) < 0.5)
        k.fill_(min(number, int(allowed.sum())))
        replay()
        expected = keep_largest_by_sorting({"w": values}, {"w": allowed}, int(k))
        assert torch.equal(chosen, expected.mask["w"]) and int(tied) == expected.num_tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", VALUES)
def test_the_kth_largest_is_that_of_a_sort(kind: str, dtype: torch.dtype) -> None:
    n = 200_003
    values = VALUES[kind](n, Generator().manual_seed(0)).to(dtype)
    every = torch.ones(n, dtype=torch.bool)
    for k in (1, 2, 2_000, n // 2, n - 2_000, n - 1, n):
        expected = kth_largest_by_sorting(values, k)
        assert kth_largest([pool(values, every)], k) == expected, k
        assert (
            kth_largest([pool(values[:70_000], every[:70_000]), pool(values[70_000:], every[70_000:])], k) == expected
        )
    for share in (0.6, 0.1):
        allowed = torch.rand(n, generator=Generator().manual_seed(1)) < share
        number = int(allowed.sum())
        for k in (1, 2_000, number // 2, number):
            assert kth_largest([pool(values, allowed)], k) == kth_largest_by_sorting(values[allowed], k), k


def test_selection_is_exact_where_the_sample_meets_no_candidate() -> None:
    values = torch.randn(6_000, generator=Generator().manual_seed(0))
    for step in range(8, 20):
        allowed = torch.arange(6_000) % step > 0
        assert kth_largest([pool(values, allowed)], 3_000) == kth_largest_by_sorting(values[allowed], 3_000), step
