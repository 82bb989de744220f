"""What the round loop does: training, rewinding, regrowth, transfer and rescaling."""

import copy
import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Chain, drawn
from few_images import FewImages
from few_images import trainer as training_of
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench.core import (
    Ablation,
    Mask,
    Pruner,
    Round,
    Scores,
    ScoringData,
    Selection,
    Subnetwork,
    TrainingLength,
)
from pai_bench.masks import masks, selection
from pai_bench.pruners import force, magnitude, neural_tangent_transfer, synflow
from pai_bench.pruning import schedules
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.rounds import prune
from pai_bench.training.trainer import Trainer

SHAPE = (3, 8, 8)
LENGTH = TrainingLength(3, 5)  # of RECIPE on FewImages
MAGNITUDE = Pruner(magnitude.score, "eval", None)


def topk(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
    return selection.keep_largest(scores, candidates, keep)


def top(scores: Scores, candidates: Mask, sparsity: float) -> Mask:
    return topk(scores, candidates, masks.num_kept(sparsity, masks.total(candidates)), Generator()).mask


def searched(
    rounds: list[Round],
    pruner: Pruner = MAGNITUDE,
    ablation: Ablation | None = None,
    allocate: Any = topk,
    model: nn.Module | None = None,
    channels_last: bool = False,
    **settings: Any,
) -> tuple[Pruned, Trainer, list[tuple[float, dict[str, float]]]]:
    if model is None:
        torch.manual_seed(0)
        model = Chain()
    lines: list[tuple[float, dict[str, float]]] = []
    trainer = training_of(
        model,
        channels_last=channels_last,
        record=lambda metrics, epoch: lines.append((epoch, metrics)),
        keep_epochs=[r.rewind_epoch for r in rounds if r.rewind_epoch is not None and r.rewind_weights],
    )
    settings.setdefault("initial", drawn(model))
    pruned = prune(
        model,
        pruner,
        allocate,
        rounds,
        ablation=ablation or Ablation(),
        input_shape=SHAPE,
        draw=FewImages().draw,
        training=trainer,
        loss=F.cross_entropy,
        seed=0,
        record=lambda metrics, epoch: lines.append((epoch, metrics)),
        **settings,
    )
    return pruned, trainer, lines


def trained_to(epoch: float, mask: Mask | None = None) -> nn.Module:
    """A network trained without any round."""
    torch.manual_seed(0)
    model = Chain()
    trainer = training_of(model)
    trainer.until(masks.full(model) if mask is None else mask, epoch)
    return model


def equal(a: nn.Module, b: nn.Module, mask: Mask | None = None) -> bool:
    other = b.state_dict()
    return all(
        torch.equal(v, other[k] * mask[k] if mask and k in mask else other[k]) for k, v in a.state_dict().items()
    )


@pytest.mark.parametrize("epoch", [0.0, 0.4, 1.0, 2.2])
def test_rewinding_returns_to_the_weights_of_an_epoch_or_step(epoch: float) -> None:
    rounds = schedules.iterative(
        0.8, LENGTH, levels=2, keep_per_level=None, rewind_epoch=None, rewind_step=round(5 * epoch), rewind_weights=True
    )
    pruned, trainer, lines = searched(rounds)
    assert trainer.clock == round(5 * epoch)
    assert equal(trainer.model, trained_to(epoch), pruned.mask)
    assert masks.kept(pruned.mask) == masks.num_kept(0.8, masks.total(pruned.mask))
    # The first level prunes the network that dense training leads to.
    dense = trained_to(3)
    scores = {name: weight.detach().abs() for name, weight in masks.prunable(dense).items()}
    first = top(scores, masks.full(dense), rounds[0].sparsity)
    assert not any((pruned.mask[name] & ~first[name]).any() for name in first)
    # Recorded time never goes back, and finding the mask is counted.
    times = [time for time, _ in lines]
    assert times == sorted(times)
    assert trainer.num_examples == 40 * 3 + round((3 - epoch) * 40)
    trainer.finish(pruned.mask_with_coupled, 3)
    assert trainer.epoch == 3 and trainer.progress.age == 15 + 2 * (15 - round(5 * epoch))


def one_level(epoch: float, rewind_weights: bool) -> dict[str, Any]:
    given = {"rewind_epoch": epoch, "rewind_step": None, "rewind_weights": rewind_weights}
    return {"levels": 1, "keep_per_level": None} | given


def test_a_rewound_ticket_trains_like_one_that_was_given_the_mask() -> None:
    rounds = schedules.iterative(
        0.5, LENGTH, levels=1, keep_per_level=None, rewind_epoch=0.0, rewind_step=None, rewind_weights=True
    )
    pruned, trainer, _ = searched(rounds)
    trainer.finish(pruned.mask_with_coupled, 3)
    assert equal(trainer.model, trained_to(3, pruned.mask))


def test_learning_rate_rewinding_keeps_the_weights() -> None:
    rounds = schedules.iterative(
        0.5, LENGTH, levels=1, keep_per_level=None, rewind_epoch=1.0, rewind_step=None, rewind_weights=False
    )
    pruned, trainer, lines = searched(rounds)
    assert trainer.epoch == 1 and equal(trainer.model, trained_to(3), pruned.mask)
    assert not any(buffer.any() for buffer in trainer.network.step.optimizer.state["momentum"].values())
    trainer.finish(pruned.mask_with_coupled, 3)
    rates = [metrics["lr"] for _, metrics in lines if "lr" in metrics]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.1, 0.01])


def test_fine_tuning_goes_on_at_the_last_learning_rate() -> None:
    rounds = schedules.fine_tune(0.5, LENGTH, levels=2, keep_per_level=None, epochs=1)
    pruned, trainer, lines = searched(rounds)
    trainer.finish(pruned.mask_with_coupled, 3)
    assert [metrics["lr"] for _, metrics in lines if "lr" in metrics] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("step", [0, 1, 7])
def test_pruning_early_in_training_goes_on_from_there(step: int) -> None:
    rounds = schedules.early(0.5, LENGTH, epoch=None, step=step, rounds=1, rounding="nearest")
    pruned, trainer, lines = searched(rounds)
    assert trainer.clock == step and equal(trainer.model, trained_to(step / 5), pruned.mask)
    trainer.finish(pruned.mask_with_coupled, 3)
    assert trainer.clock == 15
    assert [epoch for epoch, metrics in lines if "test_top1" in metrics] == [0, 1, 2, 3]


def test_gradual_pruning_masks_within_epochs_and_ends_with_an_evaluation_of_the_pruned_network() -> None:
    rounds = schedules.gradual(0.8, LENGTH, start_epoch=0.0, end_epoch=3.0, every_steps=2)
    pruned, trainer, lines = searched(rounds)
    assert len(rounds) == 8 and pruned.sparsities == sorted(pruned.sparsities)
    evaluated = len([1 for _, metrics in lines if "test_top1" in metrics])
    trainer.finish(pruned.mask_with_coupled, 3)
    assert len([1 for _, metrics in lines if "test_top1" in metrics]) == evaluated + 1


def test_momentum_of_pruned_weights_is_dropped() -> None:
    _, trainer, _ = searched([Round(0.5, until_epoch=1.0)])
    scores = {n: w.detach().abs() for n, w in masks.prunable(trainer.model).items()}
    mask = top(scores, masks.full(trainer.model), 0.8)
    trainer.until(mask, 1.4)
    for name in masks.prunable(trainer.model):
        assert not trainer.network.step.optimizer.state["momentum"][name][~mask[name]].any()


def test_diagnostics_stand_before_and_after_every_round() -> None:
    calls: list[int] = []

    def diagnose(held: Mask) -> dict[str, float]:
        calls.append(1)
        return {"flow/loss": float(len(calls))}

    _, _, lines = searched([Round(0.3), Round(0.5)], diagnose=diagnose)
    rounds = [metrics for _, metrics in lines if "prune/round" in metrics]
    assert [(r["before/flow/loss"], r["after/flow/loss"]) for r in rounds] == [(1, 2), (3, 4)]


def test_force_lets_weights_return_with_their_initial_values() -> None:
    torch.manual_seed(0)
    model = Chain()
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    seen: list[Mask] = []

    def watched(net: Subnetwork, *rest: Any) -> Scores:
        seen.append(net.mask)
        return force.score(net, *rest)

    rounds = [Round(s) for s in (0.5, 0.7, 0.8, 0.9)]
    regrowing = Pruner(watched, "train", ScoringData(None, 20, 20, False), regrow=True)
    pruned, *_ = searched(rounds, regrowing, model=model)
    steps = [*seen, pruned.mask]
    assert any((after[n] & ~before[n]).any() for before, after in pairwise(steps) for n in after)
    for mask, this in zip(steps[1:], rounds, strict=True):
        assert masks.kept(mask) == masks.num_kept(this.sparsity, masks.total(mask))
    for name, weight in masks.prunable(model).items():
        assert torch.equal(weight, initial[name] * pruned.mask[name])
    nesting = dataclasses.replace(regrowing, regrow=False)
    seen.clear()
    torch.manual_seed(0)
    final = searched(rounds, nesting, model=Chain())[0].mask
    steps = [*seen, final]
    assert not any((after[n] & ~before[n]).any() for before, after in pairwise(steps) for n in after)


def test_transferred_weights_are_what_training_starts_from() -> None:
    torch.manual_seed(0)
    model = Chain(norm=False)

    def transfer(net: Subnetwork, *rest: Any) -> dict[str, torch.Tensor]:
        settings = {"steps": 3, "lr": 1e-2, "kernel": "kept", "kernel_weight": 1e-3, "decay": 1e-5}
        return neural_tangent_transfer.transfer(net, *rest, **settings)

    pruner = Pruner(
        neural_tangent_transfer.score, "eval", ScoringData(None, 20, 20, False), regrow=True, transfer=transfer
    )
    before = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    pruned, trainer, _ = searched([Round(0.5)] * 3, pruner, model=model)
    for name, weight in masks.prunable(trainer.model).items():
        kept = pruned.mask[name]
        assert not weight[~kept].any() and (weight[kept] != before[name][kept]).any()


@pytest.mark.parametrize("regrow_moved", [False, True])
def test_a_weight_returns_with_its_initial_value_or_where_it_stood(regrow_moved: bool) -> None:
    """Every round adds one to what is kept. Weights go and come back; a search that is taken up again ends the same."""
    torch.manual_seed(0)
    model = Chain()
    initial = drawn(model)
    seen: list[Scores] = []

    def score(net: Subnetwork, *rest: Any) -> Scores:
        seen.append(neural_tangent_transfer.score(net, *rest))
        first = {name: torch.arange(w.numel()).view(w.shape) % 2 == 0 for name, w in net.weights.items()}
        return {name: (kept if len(seen) in (1, 3) else ~kept).double() for name, kept in first.items()}

    def moving(net: Subnetwork, *rest: Any) -> dict[str, torch.Tensor]:
        return {name: weight + 1 for name, weight in net.weights.items()}

    pruner = Pruner(score, "eval", None, regrow=True, regrow_moved=regrow_moved, transfer=moving)
    reached: list[tuple[Pruned, dict[str, torch.Tensor]]] = []

    def checkpoint(pruned: Pruned) -> None:
        reached.append((pruned, copy.deepcopy(model.state_dict())))

    searched([Round(0.5)] * 4, pruner, model=model, checkpoint=checkpoint)
    half = torch.arange(initial["fc.weight"].numel()).view(initial["fc.weight"].shape) % 2 == 0
    start = initial["fc.weight"]
    expected = [start, torch.where(half, start + 1, start), start + 1, start + torch.where(half, 2, 1)]
    if not regrow_moved:
        expected[2] = torch.where(half, start, start + 1)
        expected[3] = torch.where(half, start + 1, start)
    for scores, values in zip(seen, expected, strict=True):
        torch.testing.assert_close(scores["fc.weight"].float(), values.abs())
    last = {name: weight.clone() for name, weight in model.named_parameters()}
    resume_from, state = reached[2]
    model.load_state_dict(state)
    del seen[2:]
    searched([Round(0.5)] * 4, pruner, model=model, resume_from=resume_from, initial=initial)
    assert all(torch.equal(weight, last[name]) for name, weight in model.named_parameters())


MOVES: dict[str, dict[str, Any]] = {
    "the mask alone": {},
    "training": {"rounds": [Round(0.3, until_epoch=1), Round(0.6, until_epoch=2), Round(0.8, until_epoch=3)]},
    "rewinding": {
        "rounds": [Round(0.3, 1.0, rewind_epoch=0.4), Round(0.6, 1.0, rewind_epoch=0.4), Round(0.8, 1.0)],
    },
    "regrowth": {"regrow": True},
    "transfer": {"transfer": lambda net, *rest: {name: 2 * weight - 0.1 for name, weight in net.weights.items()}},
    "rescaling": {
        "allocate": lambda *given: dataclasses.replace(
            topk(*given), scale={name: torch.full_like(values, 1.5) for name, values in given[0].items()}
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("moved", MOVES)
def test_a_score_remembers_nothing_once_weights_move(moved: str) -> None:
    memories = []

    def watched(net: Subnetwork, *rest: Any) -> Scores:
        memories.append(len(net.cache))
        fresh = synflow.score(dataclasses.replace(net, cache={}), *rest)
        scores = synflow.score(net, *rest)
        assert all(torch.equal(scores[name], fresh[name]) for name in fresh)
        return scores

    move = dict(MOVES[moved])
    rounds, allocate = move.pop("rounds", [Round(0.3), Round(0.6), Round(0.8)]), move.pop("allocate", topk)
    searched(rounds, Pruner(watched, "eval", None, **move), allocate=allocate)
    assert memories == ([0, 1, 1] if moved == "the mask alone" else [0, 0, 0])


def test_a_search_leaves_the_memory_format_as_it_was() -> None:
    seen = []

    def watched(net: Subnetwork, *rest: Any) -> Scores:
        seen.append(all(weight.is_contiguous() for weight in net.weights.values()))
        return magnitude.score(net, *rest)

    pruned, trainer, _ = searched([Round(0.3), Round(0.6)], Pruner(watched, "eval", None), channels_last=True)
    assert seen == [True, True]
    weight = trainer.model.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    plain, *_ = searched([Round(0.3), Round(0.6)])
    assert all(torch.equal(pruned.mask[name], kept) for name, kept in plain.mask.items())


def test_a_sketch_rescales_the_weights() -> None:
    torch.manual_seed(0)
    model = Chain()
    before = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}

    def sketch(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        return Selection(
            topk(scores, candidates, keep, generator).mask, {n: torch.full_like(s, 3.0) for n, s in scores.items()}
        )

    pruned, trainer, _ = searched([Round(0.3), Round(0.5)], allocate=sketch, model=model)
    for name, weight in masks.prunable(trainer.model).items():
        torch.testing.assert_close(weight.detach(), 9 * before[name] * pruned.mask[name])  # a factor in every round


def test_rounds_before_training_do_not_train() -> None:
    model = Chain()
    prune(
        model,
        MAGNITUDE,
        topk,
        [Round(0.5)],
        ablation=Ablation(),
        initial=drawn(model),
        input_shape=SHAPE,
        draw=lambda examples, generator, dtype: [],
        loss=F.cross_entropy,
        seed=0,
        record=lambda metrics, epoch: None,
    )
