"""Rounds within training, rewinding, regrowth, transfer, rescaling and sanity checks: what the round loop does."""

import copy
import dataclasses
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain, Untrained, composed, drawn, options
from test_train import CPU, RECIPE, FewImages
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench import experiment
from pai_bench.core import (
    Ablation,
    Batches,
    DataSettings,
    Drawn,
    Mask,
    Pruner,
    Round,
    Scores,
    ScoringData,
    Selection,
    Subnetwork,
    TrainingLength,
    labels_of,
)
from pai_bench.data.imagenet import Streamed
from pai_bench.data.resident import Resident
from pai_bench.errors import ConfigError
from pai_bench.masks import masks, selection
from pai_bench.pruners import force, gradient_norm, magnitude, neural_tangent_transfer, snip, synflow
from pai_bench.pruning import ablations, schedules
from pai_bench.pruning.rounds import Pruned, prune
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
    trainer = Trainer(
        model, FewImages(), RECIPE, CPU, seed=0, channels_last=channels_last, compile_model=False,
        compact_training=False, record=lambda metrics, epoch: lines.append((epoch, metrics)),
        keep_epochs=[r.rewind_epoch for r in rounds if r.rewind_epoch is not None and r.rewind_weights],
    )  # fmt: skip
    settings.setdefault("initial", drawn(model))
    pruned = prune(
        model, pruner, allocate, rounds, ablation=ablation or Ablation(), input_shape=SHAPE,
        draw=FewImages().draw, training=trainer, loss=F.cross_entropy, seed=0,
        record=lambda metrics, epoch: lines.append((epoch, metrics)), **settings,
    )  # fmt: skip
    return pruned, trainer, lines


def trained_to(epoch: float, mask: Mask | None = None) -> nn.Module:
    """A network trained without any round."""
    torch.manual_seed(0)
    model = Chain()
    trainer = Trainer(
        model, FewImages(), RECIPE, CPU,
        seed=0, channels_last=False, compile_model=False, compact_training=False, record=lambda metrics, epoch: None,
    )  # fmt: skip
    trainer.until(masks.full(model) if mask is None else mask, epoch)
    return model


def equal(a: nn.Module, b: nn.Module, mask: Mask | None = None) -> bool:
    other = b.state_dict()
    return all(
        torch.equal(v, other[k] * mask[k] if mask and k in mask else other[k]) for k, v in a.state_dict().items()
    )


# Training and rewinding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0.0, 0.4, 1.0, 2.2])
def test_rewinding_returns_to_the_weights_of_an_epoch_or_step(epoch: float) -> None:
    rounds = schedules.iterative(
        0.8, LENGTH, levels=2, rewind_epoch=None, rewind_step=round(5 * epoch), rewind_weights=True
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
    assert trainer.epoch == 3 and trainer.age == 15 + 2 * (15 - round(5 * epoch))


def test_a_rewound_ticket_trains_like_one_that_was_given_the_mask() -> None:
    rounds = schedules.iterative(0.5, LENGTH, levels=1, rewind_epoch=0.0, rewind_step=None, rewind_weights=True)
    pruned, trainer, _ = searched(rounds)
    trainer.finish(pruned.mask_with_coupled, 3)
    assert equal(trainer.model, trained_to(3, pruned.mask))


def test_learning_rate_rewinding_keeps_the_weights() -> None:
    rounds = schedules.iterative(0.5, LENGTH, levels=1, rewind_epoch=1.0, rewind_step=None, rewind_weights=False)
    pruned, trainer, lines = searched(rounds)
    assert trainer.epoch == 1 and equal(trainer.model, trained_to(3), pruned.mask)
    assert not any(buffer.any() for buffer in trainer.step.optimizer.buffers.values())
    trainer.finish(pruned.mask_with_coupled, 3)
    rates = [metrics["lr"] for _, metrics in lines if "lr" in metrics]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.1, 0.01])


def test_fine_tuning_goes_on_at_the_last_learning_rate() -> None:
    rounds = schedules.fine_tune(0.5, LENGTH, levels=2, epochs=1)
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
    assert [epoch for epoch, metrics in lines if "test/top1" in metrics] == [0, 1, 2, 3]


def test_gradual_pruning_masks_within_epochs_and_ends_with_an_evaluation_of_the_pruned_network() -> None:
    rounds = schedules.gradual(0.8, LENGTH, start_epoch=0.0, end_epoch=3.0, every_steps=2)
    pruned, trainer, lines = searched(rounds)
    assert len(rounds) == 8 and pruned.sparsities == sorted(pruned.sparsities)
    evaluated = len([1 for _, metrics in lines if "test/top1" in metrics])
    trainer.finish(pruned.mask_with_coupled, 3)
    assert len([1 for _, metrics in lines if "test/top1" in metrics]) == evaluated + 1


def test_momentum_of_pruned_weights_is_dropped() -> None:
    _, trainer, _ = searched([Round(0.5, until_epoch=1.0)])
    scores = {n: w.detach().abs() for n, w in masks.prunable(trainer.model).items()}
    mask = top(scores, masks.full(trainer.model), 0.8)
    trainer.until(mask, 1.4)
    for name in masks.prunable(trainer.model):
        assert not trainer.step.optimizer.buffers[name][~mask[name]].any()


def test_diagnostics_stand_before_and_after_every_round() -> None:
    calls: list[int] = []

    def diagnose(held: Mask) -> dict[str, float]:
        calls.append(1)
        return {"flow/loss": float(len(calls))}

    _, _, lines = searched([Round(0.3), Round(0.5)], diagnose=diagnose)
    rounds = [metrics for _, metrics in lines if "prune/round" in metrics]
    assert [(r["before/flow/loss"], r["after/flow/loss"]) for r in rounds] == [(1, 2), (3, 4)]


# Regrowth, transfer, rescaling ----------------------------------------------------------------------------------------


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


# Sanity checks --------------------------------------------------------------------------------------------------------


def test_shuffling_keeps_the_layers_densities_and_moves_the_positions() -> None:
    plain = searched([Round(0.7)])[0]
    shuffled = searched([Round(0.4), Round(0.7)], ablation=Ablation(mask=ablations.shuffle))[0]
    again = searched([Round(0.4), Round(0.7)], ablation=Ablation(mask=ablations.shuffle))[0]
    assert shuffled.without_ablation is not None and plain.without_ablation is None
    for name in plain.mask:
        assert torch.equal(shuffled.without_ablation[name], plain.mask[name])
        assert shuffled.mask[name].sum() == plain.mask[name].sum()
        assert torch.equal(shuffled.mask[name], again.mask[name])
    assert any((shuffled.mask[name] != plain.mask[name]).any() for name in plain.mask)


@pytest.mark.parametrize("reduce", [None, "l2"])
def test_what_a_shuffled_mask_brings_back_has_its_initial_value(reduce: Any) -> None:
    torch.manual_seed(0)
    model = Chain()
    before = drawn(model)
    pruner = dataclasses.replace(MAGNITUDE, reduce=reduce)
    pruned, _, _ = searched([Round(0.3), Round(0.5)], pruner, Ablation(mask=ablations.shuffle), model=model)
    for name, parameter in model.named_parameters():
        expected = before[name] * pruned.mask_with_coupled[name] if name in pruned.mask_with_coupled else before[name]
        assert torch.equal(parameter, expected), name
    with pytest.raises(ConfigError, match="no value to come back with"):
        searched([Round(0.3, until_epoch=1.0)], MAGNITUDE, Ablation(mask=ablations.shuffle))


def test_inversion_reverses_ties_too() -> None:
    candidates = {"a": torch.ones(4, dtype=torch.bool)}
    inverted = ablations.invert({"a": torch.full((4,), 5.0)}, candidates, Generator())
    assert top(inverted, candidates, 0.5)["a"].tolist() == [False, False, True, True]


def test_inverted_scores_keep_what_was_pruned_first() -> None:
    torch.manual_seed(0)
    model = Chain()
    scores = {name: torch.randn(w.shape) for name, w in masks.prunable(model).items()}  # signed, as GraSP's
    candidates = masks.full(model)
    inverted = ablations.invert(scores, candidates, Generator())
    upper, lower = (top(given, candidates, 0.5) for given in (scores, inverted))
    assert not any((upper[name] & lower[name]).any() for name in upper)
    assert masks.kept(upper) + masks.kept(lower) in (masks.total(upper), masks.total(upper) + 1)
    twice = top(ablations.invert(inverted, candidates, Generator()), candidates, 0.8)
    assert all(torch.equal(twice[name], top(scores, candidates, 0.8)[name]) for name in twice)


def test_inverted_rounds_go_on_when_nothing_is_left_to_rank() -> None:
    def flow(net: Subnetwork, *rest: Any) -> Scores:
        return synflow.score(net, *rest)

    rounds = [Round(s) for s in (0.2, 0.4, 0.6, 0.8)]
    pruned = searched(rounds, Pruner(flow, "eval", None), Ablation(scores=ablations.invert))[0]
    assert masks.kept(pruned.mask) == masks.num_kept(0.8, masks.total(pruned.mask))


@pytest.mark.parametrize("sparsities", [[0.5], [0.3, 0.6, 0.9]])
def test_inversion_never_brings_back_what_is_pruned(sparsities: list[float]) -> None:
    pruner = Pruner(snip.score, "eval", ScoringData(None, 20, 20, False))
    pruned = searched([Round(s) for s in sparsities], pruner, Ablation(scores=ablations.invert))[0]
    assert masks.kept(pruned.mask) == masks.num_kept(sparsities[-1], masks.total(pruned.mask))
    plain = searched([Round(s) for s in sparsities], pruner)[0]
    common = sum(int((pruned.mask[name] & plain.mask[name]).sum()) for name in plain.mask)
    assert common < 0.2 * masks.kept(plain.mask)


def test_random_labels_are_other_labels_and_the_same_images(batches: Batches) -> None:
    broken = ablations.random_labels(batches, Generator().manual_seed(0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(broken, batches, strict=True))
    labels, before = (torch.cat([y for _, y in b]) for b in (broken, batches))
    assert labels.dtype == before.dtype and set(labels.tolist()) <= set(before.tolist())
    assert (labels != before).any()


def test_random_pixels_permute_every_image_in_its_own_way(batches: Batches) -> None:
    broken = ablations.random_pixels(batches, Generator().manual_seed(0))
    orders = []
    for (x, y), (before, labels) in zip(broken, batches, strict=True):
        assert torch.equal(y, labels) and x.shape == before.shape
        for image, original in zip(x.flatten(2), before.flatten(2), strict=True):
            order = [int((original[0] == value).nonzero()[0]) for value in image[0]]
            assert sorted(order) == list(range(64))
            assert torch.equal(image, original[:, order])  # channels stay together
            orders.append(tuple(order))
    assert len(set(orders)) == len(orders)


def watched(batches: Batches, made: list[Any]) -> Drawn:
    """The batches, made when they are asked for: their numbers are noted."""

    def images(number: int) -> torch.Tensor:
        made.append(number)
        return batches[number][0].clone()

    return Drawn(images, labels_of(batches))


def test_random_pixels_are_made_batch_by_batch_and_are_those_of_all_at_once(batches: Batches) -> None:
    generator, other = Generator().manual_seed(0), Generator().manual_seed(0)
    made: list[Any] = []
    broken = ablations.random_pixels(watched(batches, made), generator)
    expected = []
    for images, _ in batches:
        order = torch.stack([torch.randperm(64, generator=other) for _ in images])
        expected.append(images.flatten(2).gather(2, order[:, None].expand(-1, 3, -1)).view(images.shape))
    assert torch.equal(generator.get_state(), other.get_state())
    assert set(made) <= {0}, "the first tells the size"
    made.clear()
    for _ in range(2):  # walked twice, they are the same
        assert all(map(torch.equal, (images for images, _ in broken), expected))
    assert made == [0, 1] * 2
    assert all(map(torch.equal, labels_of(broken), labels_of(batches))) and made == [0, 1] * 2


def test_fisher_of_single_images_looks_at_batch_after_batch(batches: Batches) -> None:
    events: list[Any] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        events.append("loss")
        return F.cross_entropy(logits, labels)

    model = Chain().eval()
    net = Subnetwork(model, masks.full(model), drawn(model), SHAPE)
    found, expected = (
        gradient_norm.fisher(net, seen, loss, Generator(), per_example=alone, temperature=1.0)
        for seen, alone in (
            (watched(batches, events), True),
            ([(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))], False),
        )
    )
    assert events == [0, *["loss"] * 12, 1, *["loss"] * 8, *["loss"] * 20]
    assert all(torch.equal(found[name], scores) and scores.any() for name, scores in expected.items())


def test_official_random_pixels_are_those_of_all_at_once() -> None:
    images = torch.randint(256, (5, 4, 4, 3), generator=Generator().manual_seed(1), dtype=torch.uint8)
    found, labels = ablations.random_pixels_official(images, torch.arange(5), Generator().manual_seed(0))
    generator = Generator().manual_seed(0)
    order = torch.stack([torch.randperm(48, generator=generator) for _ in range(5)])
    assert torch.equal(found, images.flatten(1).gather(1, order).view(images.shape))
    assert torch.equal(labels, torch.randperm(5, generator=generator))


def byte_images() -> Resident:
    """Twelve images of four classes in bytes, with a border of one black pixel for crops."""
    generator = np.random.default_rng(0)
    images = generator.integers(1, 256, (12, 4, 4, 3), dtype=np.uint8)  # none is black
    labels = np.arange(12) % 4
    place = DataSettings(Path(), False, torch.device("cpu"), 0)
    settings = {"validation": 0.0, "mean": [0.0] * 3, "std": [1.0] * 3, "padding": 1, "flip": True}
    return Resident((images, labels), (images, labels), 4, place, **settings)


@pytest.mark.parametrize("augment", [False, True])
def test_official_random_pixels_permute_all_values_of_an_image_before_it_is_augmented(augment: bool) -> None:
    data = byte_images()
    examples = ScoringData(per_class=3, total=None, batch_size=6, augment=augment)
    change = partial(ablations.random_pixels_official, generator=Generator().manual_seed(0))
    broken = data.draw(examples, Generator().manual_seed(1), torch.float32, change)
    plain = data.draw(examples, Generator().manual_seed(1), torch.float32)
    assert [x.shape for x, _ in broken] == [(6, 3, 4, 4)] * 2
    found, before = (torch.cat([y for _, y in batches]) for batches in (broken, plain))
    assert found.bincount().tolist() == [3] * 4 and (found != before).any()  # balanced, and others
    pixels, original = ((255 * torch.cat([x for x, _ in b])).round().int() for b in (broken, plain))
    for image, other in zip(pixels, original, strict=True):
        black = image.eq(0).all(0)
        assert torch.equal(image.eq(0).any(0), black)  # the border was added afterwards, to whole pixels
        assert augment or not black.any()
        if not augment:
            assert sorted(image.flatten().tolist()) == sorted(other.flatten().tolist())
            assert (
                image[0].flatten().sort().values.tolist() != other[0].flatten().sort().values.tolist()
            )  # channels mix
    inside = pixels.eq(0).all(1).sum((1, 2))
    assert (inside > 0).any() == augment
    same = data.draw(examples, Generator().manual_seed(1), torch.float32)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(same, plain, strict=True))  # what is stored stays


def test_streamed_images_are_not_changed() -> None:
    with pytest.raises(ConfigError, match=r"many sizes and are not changed; use .* ablation=random_pixels"):
        Streamed.draw(None, ScoringData(None, 2, 2, False), Generator(), torch.float32, lambda *stored: stored)  # type: ignore[arg-type]


def test_a_change_of_stored_images_reaches_the_score(batches: Batches) -> None:
    seen: list[Batches] = []

    def watched(net: Subnetwork, batches: Batches, *rest: Any) -> Scores:
        seen.append(batches)
        return magnitude.score(net, batches, *rest)

    model = Chain()
    changes = []

    def draw(examples: ScoringData, generator: Generator, dtype: torch.dtype, change: Any = None) -> Batches:
        assert dtype == torch.float64
        changes.append(change(torch.arange(24, dtype=torch.uint8).view(2, 2, 2, 3), torch.tensor([0, 1])))
        return [(images.to(dtype), labels) for images, labels in batches]

    prune(
        model, Pruner(watched, "eval", ScoringData(None, 20, 20, False)), topk, [Round(0.3), Round(0.5)],
        ablation=Ablation(images=ablations.random_pixels_official), initial=drawn(model), input_shape=SHAPE, draw=draw,
        training=Untrained(), loss=F.cross_entropy, seed=0, record=lambda metrics, epoch: None,
    )  # fmt: skip
    assert len(seen) == len(changes) == 2
    for scored in seen:
        assert all(torch.equal(x, y.double()) for (x, _), (y, _) in zip(scored, batches, strict=True))
    (first, _), (second, _) = changes
    assert first[0].flatten().sort().values.tolist() == list(range(12))
    assert not torch.equal(first, second)  # every round in its own way


def test_weights_are_redrawn_or_shuffled_under_the_same_mask() -> None:
    pruned, trainer, _ = searched([Round(0.6)])
    torch.manual_seed(7)
    fresh = Chain().state_dict()
    state = copy.deepcopy(trainer.model.state_dict())
    changed = ablations.shuffle_weights(state, fresh, pruned.mask, Generator().manual_seed(0))
    for name, kept in pruned.mask.items():
        assert torch.equal(changed[name][kept].sort().values, state[name][kept].sort().values)
        assert not changed[name][~kept].any() and (changed[name] != state[name]).any()
    trainer.restart(pruned.mask_with_coupled, ablations.reinitialize(state, fresh, pruned.mask, Generator()))
    for name, weight in masks.prunable(trainer.model).items():
        assert torch.equal(weight, fresh[name] * pruned.mask[name])


@pytest.mark.parametrize("name", [name for name in options("ablation") if name != "none"])
def test_every_ablation_fills_one_hook(name: str) -> None:
    ablation = experiment._ablation(composed("pruner=snip", "sparsity=0.5", f"ablation={name}")["ablation"])
    assert len([hook for hook in dataclasses.asdict(ablation).values() if hook is not None]) == 1


def test_rounds_before_training_do_not_train() -> None:
    model = Chain()
    prune(
        model, MAGNITUDE, topk, [Round(0.5)], ablation=Ablation(), initial=drawn(model), input_shape=SHAPE,
        draw=lambda examples, generator, dtype: [], training=Untrained(), loss=F.cross_entropy, seed=0,
        record=lambda metrics, epoch: None,
    )  # fmt: skip
