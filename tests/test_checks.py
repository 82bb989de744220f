"""Scores that cannot rank anything are refused."""

import math

import pytest
import torch
from torch import Generator

from pai_bench.errors import UserError
from pai_bench.masks import masks
from pai_bench.pruning import checks


def everything(*shapes: tuple[int, ...]) -> masks.Mask:
    return {f"layer{i}.weight": torch.ones(shape, dtype=torch.bool) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_only_scores_of_candidates_have_to_be_finite(density: float) -> None:
    n = 100_000
    candidate = torch.rand(n, generator=Generator().manual_seed(0)) < density
    kept = masks.positions(candidate)
    values = torch.full((n,), torch.nan).index_fill_(0, kept, 1.0)
    checks.check_scores({"a": values}, {"a": candidate})
    values[kept[7]] = torch.inf
    with pytest.raises(UserError, match=f"1 of {len(kept)} scores of a are not finite"):
        checks.check_scores({"a": values}, {"a": candidate})


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
        checks.check_scores({"fc": values}, {"fc": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize(("dtype", "is_said"), [(torch.float32, True), (torch.float64, False)])
def test_a_wider_type_is_named_where_there_is_one(dtype: torch.dtype, is_said: bool) -> None:
    mask = everything((2, 2))
    scores = {name: torch.full(kept.shape, math.inf, dtype=dtype) for name, kept in mask.items()}
    with pytest.raises(UserError, match=r"scores of layer0.weight are not finite .*smaller initial weights") as said:
        checks.check_scores(scores, mask)
    assert ("pruner.dtype=float64" in str(said.value)) == is_said
