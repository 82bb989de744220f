"""Ablations: what each breaks, and what it leaves alone."""

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain, composed, drawn, options
from test_rounds import MAGNITUDE, SHAPE, searched, top, topk
from torch import Generator
from torch.nn import functional as F

from pai_bench.batches import Drawn, labels_of
from pai_bench.core import HOOKS, Ablation, Batches, DataSettings, Pruner, Round, Scores, ScoringData, Subnetwork
from pai_bench.data.imagenet import Streamed
from pai_bench.data.resident import Resident
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.pruners import gradient_norm, magnitude, snip, synflow
from pai_bench.pruning import ablations
from pai_bench.pruning.rounds import prune


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
        model,
        Pruner(watched, "eval", ScoringData(None, 20, 20, False)),
        topk,
        [Round(0.3), Round(0.5)],
        ablation=Ablation(images=ablations.random_pixels_official),
        initial=drawn(model),
        input_shape=SHAPE,
        draw=draw,
        loss=F.cross_entropy,
        seed=0,
        record=lambda metrics, epoch: None,
    )
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
    ablation = composed("pruner=snip", "sparsity=0.5", f"ablation={name}").ablation
    assert len([hook for hook in HOOKS if getattr(ablation, hook) is not None]) == 1 and ablation.name == name
