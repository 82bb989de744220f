"""Whole searches equal the authors' loops, bit for bit, with the numbers of weights that their code keeps."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from conftest import Chain, drawn
from scored import SHAPE
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench.core import (
    Ablation,
    Batches,
    Pruner,
    Rounding,
    Scores,
    ScoringData,
    Selection,
    Subnetwork,
    TrainingLength,
)
from pai_bench.masks import masks, selection
from pai_bench.pruners import (
    force,
    snip,
    synflow,
)
from pai_bench.pruning import schedules
from pai_bench.pruning.rounds import prune

Draw = Callable[[ScoringData, Generator, torch.dtype], Batches]


def search(
    model: nn.Module, pruner: Pruner, density: float, rounds: int, rounding: Rounding, draw: Draw
) -> tuple[list[masks.Mask], masks.Mask]:
    """The masks with which the rounds of a search begin, and the one that it finds."""
    seen: list[masks.Mask] = []
    assert pruner.score is not None
    score = pruner.score

    def watched(net: Subnetwork, *rest: Any) -> Scores:
        seen.append({name: kept.clone() for name, kept in net.mask.items()})
        return score(net, *rest)

    def topk(scores: Scores, candidates: masks.Mask, keep: int, generator: Generator) -> Selection:
        return selection.keep_largest(scores, candidates, keep)

    found = prune(
        model,
        dataclasses.replace(pruner, score=watched),
        topk,
        schedules.exponential(1 - density, TrainingLength(1, 1), rounds=rounds, rounding=rounding),
        ablation=Ablation(),
        initial=drawn(model),
        input_shape=SHAPE,
        draw=draw,
        loss=F.cross_entropy,
        seed=0,
        record=lambda metrics, epoch: None,
    )
    return seen, found.mask


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_search_by_synflow_is_the_authors_loop_bit_for_bit(dtype: Literal["float32", "float64"]) -> None:
    """100 rounds; theirs prune trunc((1 - d_i) N) weights by a threshold over all, with masks in the network."""
    torch.manual_seed(0)
    model = Chain(bias=True)
    density, number = 0.1, 626
    weights = {name: w.detach().to(getattr(torch, dtype)).abs() for name, w in masks.prunable(model).items()}
    others = {name: p.detach().to(getattr(torch, dtype)).abs() for name, p in model.named_parameters()}
    theirs = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
    factors = {name: torch.ones_like(w) for name, w in weights.items()}
    expected = []
    for i in range(1, 101):
        expected.append({name: factor.bool() for name, factor in factors.items()})
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        image = torch.ones((1, *SHAPE), dtype=getattr(torch, dtype))
        state = others | {name: leaf * factors[name] for name, leaf in leaves.items()}
        torch.func.functional_call(theirs, state, (image,)).sum().backward()
        sizes = torch.cat([(leaf.grad * leaf).detach().abs().flatten() for leaf in leaves.values()])
        threshold = sizes.sort().values[int((1 - density ** (i / 100)) * number) - 1]
        parts = (sizes > threshold).split([w.numel() for w in weights.values()])
        factors = {name: part.view(w.shape).to(w.dtype) for (name, w), part in zip(weights.items(), parts, strict=True)}
    pruner = Pruner(synflow.score, "eval", None, dtype)
    seen, found = search(copy.deepcopy(model), pruner, density, 100, "up", lambda *_: [])
    assert masks.kept(found) == sum(int(factor.sum()) for factor in factors.values()) == 63
    for ours, mask in zip([*seen, found], [*expected, {n: f.bool() for n, f in factors.items()}], strict=True):
        assert all(torch.equal(ours[name], mask[name]) for name in mask)
    nearest, _ = search(copy.deepcopy(model), pruner, density, 100, "nearest", lambda *_: [])
    assert [masks.kept(mask) for mask in nearest] != [masks.kept(mask) for mask in seen]


@pytest.mark.parametrize("method", ["force", "iterative SNIP"])
@pytest.mark.parametrize("official_loss", [False, True])
def test_a_search_by_force_or_iterative_snip_is_the_authors_loop_bit_for_bit(
    method: str, official_loss: bool, batches: Batches
) -> None:
    """10 rounds in train mode; theirs keep all that reach the trunc(d_i N)-th largest score. FORCE starts from w0."""
    torch.manual_seed(0)
    model = Chain(bias=True).double()
    density, number = 0.13, 626
    images = [[(x.double() + 0.1 * i, y)] for i, (x, y) in enumerate([batches[0]] * 10)]
    start = {name: w.detach().clone() for name, w in masks.prunable(model).items()}
    kept = {name: torch.ones_like(w) for name, w in start.items()}
    expected = []
    for i in range(1, 11):
        expected.append({name: factor.bool() for name, factor in kept.items()})
        net = copy.deepcopy(model).train()
        with torch.no_grad():
            for name, w in masks.prunable(net).items():
                w.copy_(start[name] * kept[name])
        ((x, y),) = images[i - 1]
        (F.nll_loss if official_loss else F.cross_entropy)(net(x), y).backward()
        scores = {}
        for name, w in masks.prunable(net).items():
            assert w.grad is not None
            scores[name] = ((start[name] if method == "force" else w) * w.grad).detach().abs()
        k = int(math.exp(i / 10 * math.log(density)) * number)
        threshold = torch.cat([s.flatten() for s in scores.values()]).topk(k).values[-1]
        assert threshold > 0  # or all that are zero would stay
        kept = {name: (s >= threshold).double() for name, s in scores.items()}
    functions = {
        ("force", False): force.score,
        ("force", True): force.score_true_logit,
        ("iterative SNIP", False): snip.score,
        ("iterative SNIP", True): snip.score_true_logit,
    }
    pruner = Pruner(
        functions[method, official_loss], "train", ScoringData(None, 12, 12, False), regrow=method == "force"
    )
    for rounding in ("down", "nearest"):
        left = iter(images)
        seen, found = search(copy.deepcopy(model), pruner, density, 10, rounding, lambda *_, left=left: next(left))
        equal = [
            all(torch.equal(ours[name], mask[name]) for name in mask)
            for ours, mask in zip([*seen, found], [*expected, {n: f.bool() for n, f in kept.items()}], strict=True)
        ]
        assert all(equal) if rounding == "down" else not all(equal)
