"""Searches whose rounds take place when a condition holds: the epoch, the mask, the records, and going on."""

import copy
import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain, drawn
from few_images import RECIPE, FewImages, same
from few_images import trainer as training_of
from test_conditions import bird, crop
from torch import Tensor
from torch.nn import functional as F

from pai_bench.core import Condition, Mask, Pruner, Round
from pai_bench.masks import masks, selection
from pai_bench.pruners import magnitude, synflow
from pai_bench.pruning.conditions import Moment
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.rounds import prune
from pai_bench.system import distributed
from pai_bench.training.reuse import SharedTraining
from pai_bench.training.trainer import Trainer

MAGNITUDE = Pruner(magnitude.score, "eval", None)
LONGER = replace(RECIPE, epochs=6, lr_milestones=[2, 3])


def topk(scores: Any, candidates: Mask, keep: int, generator: Any) -> Any:
    return selection.keep_largest(scores, candidates, keep)


Line = tuple[float, dict[str, float]]


def searched(
    rounds: list[Round],
    pruner: Pruner = MAGNITUDE,
    resume: tuple[dict[str, Any], dict[str, Any]] | None = None,
    saved: list[tuple[dict[str, Any], dict[str, Any], int]] | None = None,
    compact_training: bool = False,
) -> tuple[Pruned, Trainer, list[Line]]:
    """A search on few images, and the training after it.

    Args:
        resume: states of search and trainer to go on from.
        saved: receives such states, and the number of lines so far, wherever a checkpoint is offered.
    """
    torch.manual_seed(0)
    model, lines = Chain(), []
    initial = drawn(model)
    reached: list[Pruned] = [] if resume is None else [Pruned.from_state(resume[0], torch.device("cpu"))]

    def offer(epoch_ended: bool = False) -> None:
        if saved is not None and reached:
            saved.append((copy.deepcopy(reached[-1].state()), copy.deepcopy(trainer.state()), len(lines)))

    def note(pruned: Pruned) -> None:
        reached.append(pruned)
        offer()

    def record(metrics: dict[str, float], epoch: float) -> None:
        lines.append((epoch, metrics))

    trainer = training_of(model, LONGER, record=record, checkpoint=offer, compact_training=compact_training)
    if resume is not None:
        trainer.load_state(copy.deepcopy(resume[1]), reached[0].mask_with_coupled)
    pruned = prune(
        model,
        pruner,
        topk,
        rounds,
        initial=initial,
        input_shape=(3, 8, 8),
        draw=FewImages().draw,
        training=SharedTraining(trainer),
        loss=F.cross_entropy,
        seed=0,
        record=record,
        resume_from=reached[0] if reached else None,
        checkpoint=note,
    )
    trainer.finish(pruned.mask_with_coupled, LONGER.epochs)
    return pruned, trainer, lines


def trained() -> list[dict[str, Tensor]]:
    """The prunable weights after each epoch of dense training."""
    torch.manual_seed(0)
    model = Chain()
    trainer = training_of(model, LONGER)
    history = []
    for epoch in range(1, LONGER.epochs + 1):
        trainer.until(masks.full(model), epoch)
        history.append({name: weight.detach().clone() for name, weight in masks.prunable(model).items()})
    return history


def flat(weights: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([weight.double().numpy().ravel() for weight in weights.values()])


def largest(weights: dict[str, Tensor], sparsity: float) -> Mask:
    scores = {name: weight.abs() for name, weight in weights.items()}
    everything = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    keep = masks.num_kept(sparsity, masks.total(everything))
    return selection.keep_largest(scores, everything, keep).mask


def test_early_crop_prunes_at_the_epoch_that_the_weights_decide() -> None:
    history = trained()
    vectors = [flat(weights) for weights in history]
    distances = [float(np.linalg.norm(v - vectors[0]) / np.linalg.norm(vectors[0])) for v in vectors]
    changes = [abs(after - before) for before, after in pairwise(distances)]
    expected = next(at + 2 for at, change in enumerate(changes) if change < 0.4 * distances[1])
    assert 3 <= expected < 6, "the test needs a training in which the condition holds in time"
    rounds = crop(0.6, latest=1.0)
    pruned, trainer, lines = searched(rounds)
    assert (pruned.epoch, pruned.condition_met) == (expected, True)
    recorded = {epoch: line["condition/distance"] for epoch, line in lines if "condition/distance" in line}
    assert list(recorded) == list(range(1, expected + 1))
    assert list(recorded.values()) == pytest.approx(distances[:expected], rel=1e-12)
    assert [line["prune/round"] for epoch, line in lines if "prune/round" in line] == [1, 2, 3, 4]
    assert {epoch for epoch, line in lines if "prune/round" in line} == {expected}
    mask = largest(history[expected - 1], 0.6)
    assert same(pruned.mask, mask)  # weights stay, so magnitude in rounds is magnitude in one
    assert trainer.epoch == 6 and trainer.num_examples == 6 * 40
    assert pruned.condition_flops == 0


def test_early_bird_prunes_at_the_epoch_that_the_masks_decide() -> None:
    chosen = [largest(weights, 0.5) for weights in trained()]
    apart = [
        sum(int((before[name] != after[name]).sum()) for name in after) / masks.total(after)
        for before, after in pairwise(chosen)
    ]
    limit = sorted(apart)[1]
    expected = next(at + 2 for at, distance in enumerate(apart) if distance <= limit)
    assert 2 < expected < 6, "the test needs masks that settle in time"
    pruned, _, lines = searched(bird(0.5, max_distance=limit))
    assert (pruned.epoch, pruned.condition_met) == (expected, True)
    assert same(pruned.mask, chosen[expected - 1])
    recorded = [line["condition/distance"] for _, line in lines if "condition/distance" in line]
    assert recorded == pytest.approx(apart[: expected - 1])
    assert all(
        line["condition/chance"] == pytest.approx(0.5, abs=1e-3) for _, line in lines if "condition/chance" in line
    )


def test_early_bird_compares_what_any_pruner_of_weights_would_choose_and_counts_what_that_costs() -> None:
    passes = Pruner(synflow.score, "eval", None)
    pruned, _, _ = searched(bird(0.5, max_distance=1.0, num_masks=3), passes)
    assert (pruned.epoch, pruned.condition_met) == (3, True)
    assert pruned.flops > 0 and pruned.condition_flops == 3 * pruned.flops
    at_once, _, _ = searched([Round(0.5, until_epoch=3.0)], passes)
    assert same(pruned.mask, at_once.mask) and at_once.condition_flops == 0


def test_a_condition_that_never_holds_leaves_the_round_at_its_latest_time_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        pruned, _, lines = searched(crop(0.6, threshold=0.0, rounds=2))
    assert (pruned.epoch, pruned.condition_met) == (3.0, False)
    assert "round 1: its condition has not held by epoch 3, the latest time for this round" in caplog.text
    assert [epoch for epoch, line in lines if "prune/round" in line] == [3.0, 3.0]
    plain, _, _ = searched([replace(one, when=None) for one in crop(0.6, rounds=2)])
    assert same(plain.mask, pruned.mask) and (plain.epoch, plain.condition_met) == (3.0, None)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        searched(crop(0.6, threshold=10.0, rounds=2))
    assert "round 1: its condition holds, at epoch 2" in caplog.text and "has not held" not in caplog.text


def test_a_condition_is_asked_after_whole_epochs_and_the_latest_time_may_lie_within_one() -> None:
    seen = []

    def never(moment: Moment) -> tuple[bool, dict[str, float], dict[str, Tensor]]:
        seen.append(len(moment.notes))
        return False, {}, moment.notes | {str(len(seen)): torch.zeros(1)}

    pruned, _, _ = searched([Round(0.5, until_epoch=2.4, when=Condition(never))])
    assert seen == [0, 1] and (pruned.epoch, pruned.condition_met) == (2.4, False)


def test_every_round_has_a_condition_of_its_own() -> None:
    settled = crop(0.6, latest=1.0, threshold=10.0)[0].when  # it holds after the second epoch that it sees
    rounds = [Round(0.3, until_epoch=5.0, when=settled), Round(0.6, until_epoch=6.0, when=settled)]
    pruned, _, lines = searched(rounds)
    assert [epoch for epoch, line in lines if "prune/round" in line] == [2.0, 4.0]
    assert (pruned.epoch, pruned.condition_met) == (4.0, True)
    for latest in (1.0, 0.0):  # too early for the condition, which is said in both cases
        assert searched([replace(rounds[0], until_epoch=latest), rounds[1]])[0].condition_met is False


def test_a_condition_sees_the_weights_of_a_compact_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})
    settled = crop(0.6, latest=1.0, threshold=10.0)[0].when
    rounds = [Round(0.97, until_epoch=1.0), Round(0.98, until_epoch=6.0, when=settled)]
    found = []
    for compact in (True, False):
        _, trainer, lines = searched(rounds, compact_training=compact)
        assert (trainer.trained is trainer.model) != compact
        found.append([line["condition/distance"] for _, line in lines if "condition/distance" in line])
    assert len(found[0]) == 2 and found[0][1] > 0 and found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("schedule", ["crop", "bird", "two conditions"])
def test_a_search_goes_on_from_wherever_it_was_stopped(schedule: str) -> None:
    """Within an epoch, between its last step and its evaluation, between epochs, and between rounds."""
    settled = crop(0.6, latest=1.0, threshold=10.0)[0].when
    rounds = {
        "crop": crop(0.6, latest=1.0, rounds=3),
        "bird": bird(0.5, num_masks=3, max_distance=0.2),
        "two conditions": [Round(0.3, until_epoch=5.0, when=settled), Round(0.6, until_epoch=6.0, when=settled)],
    }[schedule]
    saved: list[Any] = []
    expected, trainer, lines = searched(rounds, saved=saved)
    assert 2 <= (expected.epoch or 0) < 6 and expected.condition_met
    watched = [state["watch"] for _, state, _ in saved if state["watch"] is not None]
    assert {watch["ended"] for watch in watched} == {False, True}
    for pruned_state, trainer_state, num_lines in saved:
        found, again, more = searched(rounds, resume=(pruned_state, trainer_state))
        assert same(found.mask, expected.mask)
        assert (found.epoch, found.condition_met) == (expected.epoch, expected.condition_met)
        assert found.condition_flops == expected.condition_flops
        assert _untimed(lines[:num_lines] + more) == _untimed(lines)
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), name


def _untimed(lines: list[Line]) -> list[Line]:
    return [(epoch, {k: v for k, v in line.items() if "per_second" not in k}) for epoch, line in lines]


def test_the_first_process_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process asks the condition, and goes by the answer of the first."""
    answers = iter([(False, {"condition/distance": 1.0}), (True, {"condition/distance": 2.0})])

    def agree(action: Any) -> Any:
        action()
        return next(answers)

    monkeypatch.setattr(distributed, "agree", agree)
    pruned, _, lines = searched(crop(0.6, latest=1.0, threshold=10.0))
    assert (pruned.epoch, pruned.condition_met) == (2, True)
    assert [line["condition/distance"] for _, line in lines if "condition/distance" in line] == [1.0, 2.0]
