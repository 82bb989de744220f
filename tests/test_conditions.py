"""Conditions of rounds, the schedules that have one (EarlyCroP and Early-Bird), and what goes with them."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain, composed
from torch import Tensor

import pai_bench as pb
from pai_bench.config import checks
from pai_bench.core import Mask, Round, TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.launch.chains import trainings
from pai_bench.launch.fitting import epochs_to_train
from pai_bench.pruning import schedules
from pai_bench.pruning.conditions import Moment, masks_settle, weights_settle

LENGTH = TrainingLength(6, 5)


# The conditions alone -------------------------------------------------------------------------------------------------


def refused() -> Mask:
    raise AssertionError("weights_settle asks for no mask")


def asked(trajectory: list[list[float]], fraction: float) -> list[tuple[bool, dict[str, float]]]:
    """The answers of weights_settle, epoch by epoch, on two weights of two layers."""
    notes: dict[str, Tensor] = {}
    answers = []
    for first, second in trajectory:
        weights = {"a": torch.tensor([[first]]), "b": torch.tensor([second])}
        holds, metrics, notes = weights_settle(Moment(weights, refused, notes), fraction=fraction)
        answers.append((holds, metrics))
    return answers


def test_weights_settle_where_an_epoch_changes_their_distance_by_less_than_the_threshold() -> None:
    """|w_1| = 4; the distances are 0, 8/4, 11/4 and 12/4, so the changes are 2, 3/4 and 1/4."""
    trajectory = [[0.0, 4.0], [8.0, 4.0], [11.0, 4.0], [12.0, 4.0]]
    answers = asked(trajectory, fraction=0.375)  # threshold 3/4: the third epoch changes it by just that much
    assert [holds for holds, _ in answers] == [False, False, False, True]
    assert [metrics["condition/distance"] for _, metrics in answers] == [0, 2, 2.75, 3]
    assert [metrics["condition/change"] for _, metrics in answers[1:]] == [2, 0.75, 0.25]
    assert [metrics["condition/threshold"] for _, metrics in answers[1:]] == [0.75] * 3
    assert [holds for holds, _ in asked(trajectory, fraction=0.376)] == [False, False, True, True]
    assert [holds for holds, _ in asked(trajectory, fraction=0.1)] == [False] * 4
    back = [[0.0, 4.0], [8.0, 4.0], [0.0, 4.0]]  # a distance that falls changes, too
    assert asked(back, fraction=0.9)[2] == (False, pytest.approx(
        {"condition/distance": 0.0, "condition/change": 2.0, "condition/threshold": 1.8}
    ))  # fmt: skip


def test_the_distance_of_weights_does_not_depend_on_their_layout() -> None:
    first, later = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        _, _, notes = weights_settle(Moment({"w": first.contiguous(memory_format=layout)}, refused, {}), fraction=1)
        now = {"w": later.contiguous(memory_format=layout)}
        found.append(weights_settle(Moment(now, refused, notes), fraction=1)[1])
    assert found[0] == found[1]


@pytest.mark.parametrize(("num_masks", "max_distance"), [(2, 0.3), (3, 0.4), (5, 0.45)])
def test_masks_settle_where_the_newest_is_near_to_each_of_the_others(num_masks: int, max_distance: float) -> None:
    chance = np.random.default_rng(num_masks)
    history: list[Mask] = []
    notes: dict[str, Tensor] = {}
    held = []
    kept = chance.random(20) < 0.5
    for _ in range(40):
        kept = kept ^ (chance.random(20) < 0.15)
        mask = {"a": torch.from_numpy(kept[:8].reshape(2, 4)), "b": torch.from_numpy(kept[8:])}
        history.append(mask)
        moment = Moment({}, lambda mask=mask: mask, notes)  # type: ignore[misc]
        holds, metrics, notes = masks_settle(moment, num_masks=num_masks, max_distance=max_distance)
        others = history[-num_masks:-1]
        distances = [
            sum(int(x != y) for name in mask for x, y in zip(mask[name].flatten(), other[name].flatten(), strict=True))
            / 20
            for other in others
        ]
        assert holds == (len(others) == num_masks - 1 and max(distances) <= max_distance)
        assert metrics.get("condition/distance") == (max(distances) if others else None)
        sparsity = 1 - kept.mean()
        assert metrics["condition/chance"] == pytest.approx(2 * sparsity * (1 - sparsity))
        assert len(notes["masks"]) == min(len(history), num_masks)
        held.append(holds)
    assert any(held) and not all(held[num_masks - 1 :])


def test_random_masks_are_as_far_apart_as_chance_says() -> None:
    generator = torch.Generator().manual_seed(0)
    notes: dict[str, Tensor] = {}
    for _ in range(2):
        mask = {"w": torch.rand(100_000, generator=generator) < 0.7}
        _, metrics, notes = masks_settle(Moment({}, lambda mask=mask: mask, notes), num_masks=2, max_distance=0)  # type: ignore[misc]
    assert metrics["condition/chance"] == pytest.approx(0.42, abs=0.01)
    assert metrics["condition/distance"] == pytest.approx(metrics["condition/chance"], abs=0.01)


# The schedules --------------------------------------------------------------------------------------------------------


def crop(sparsity: float, **settings: Any) -> list[Round]:
    given = {"latest": 0.5, "threshold": None, "rounds": 4} | settings
    return list(schedules.early_crop(sparsity, LENGTH, **given))


def bird(sparsity: float, **settings: Any) -> list[Round]:
    given = {"latest": 1.0, "num_masks": 2, "max_distance": 0.1} | settings
    return list(schedules.early_bird(sparsity, LENGTH, **given))


def test_early_crop_goes_half_of_the_way_in_every_round_and_trains_before_the_first_alone() -> None:
    rounds = crop(0.9)
    assert [one.sparsity for one in rounds] == pytest.approx([0.5, 0.7, 0.8, 0.9]) and rounds[-1].sparsity == 0.9
    assert [one.until_epoch for one in rounds] == [3.0, 0.0, 0.0, 0.0]
    assert rounds[0].when is not None and not rounds[0].when.chooses
    assert all(one.when is None and one.rewind_epoch is None for one in rounds[1:])
    assert [one.sparsity for one in crop(0.4)] == [0.4]
    many = [one.sparsity for one in crop(0.98, rounds=102)]
    assert many == [0.98 - (0.98 - 0.5) * 0.5**i for i in range(101)] + [0.98]


def test_the_threshold_of_early_crop_falls_with_the_sparsity() -> None:
    weights = [{"w": torch.tensor([x])} for x in (1.0, 2.0, 2.25)]  # distances 0, 1, 1.25

    def held(rounds: list[Round]) -> bool:
        notes: dict[str, Tensor] = {}
        assert rounds[0].when is not None
        for now in weights:
            holds, _, notes = rounds[0].when.holds(Moment(now, refused, notes))
        return holds

    assert held(crop(0.7)) and not held(crop(0.8))
    assert held(crop(0.8, threshold=0.3)) and not held(crop(0.7, threshold=0.2))


def test_a_latest_time_at_which_no_condition_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule.latest=0.1: that is epoch 1 of training.epochs=6.*needs 3 epochs"):
        crop(0.9, latest=0.1)
    with pytest.raises(ConfigError, match=r"schedule.latest=0.5: that is epoch 3 .*schedule=early_bird needs 5 epochs"):
        bird(0.5, latest=0.5, num_masks=5)
    assert crop(0.9, latest=0.34)[0].until_epoch == 3.0  # whole epochs, rounded up


# Configs --------------------------------------------------------------------------------------------------------------

REFUSED = {
    "pruner=snip schedule=early_bird": "schedule=early_bird: it compares .*pruner=snip looks at images; choose one",
    "pruner=random schedule=early_bird": "pruner=random does not look at the weights",
    "pruner=ntk_sap schedule=early_bird": "pruner=ntk_sap does not look at the weights",
    "pruner=magnitude schedule=early_crop training.epochs=4": "schedule.latest=0.5: that is epoch 2 of",
    "pruner=magnitude schedule=early_crop rewire=rigl": "the mask is there from epoch 5 of training.epochs=10 on",
    "search=edge_popup schedule=early_crop": "schedule=early_crop: pruner=edge_popup has no score to prune by",
    "pruner=magnitude schedule=early_crop allocation=n_m": "allocation=n_m has one target",
    "pruner=magnitude schedule=early_bird schedule.num_masks=1": "schedule.num_masks=1: give",
    "training.batch_norm_l1=-1": "training.batch_norm_l1=-1: give 0 or more",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_with_a_condition_is_refused_in_one_line(words: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[words]) as raised:
        composed(*words.split(), "sparsity=0.75")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "pruner=gradient_preservation schedule=early_crop",
        "pruner=filter_batch_norm schedule=early_bird allocation=global",
        "pruner=synflow schedule=early_bird target=effective",
        "pruner=magnitude schedule=early_crop rewire=rigl rewire.begin=0.5 rewire.end=1",
        "pruner=snip schedule=early_crop ablation=invert_scores",
    ],
)
def test_what_goes_with_a_condition(words: str) -> None:
    assert composed(*words.split(), "sparsity=0.5").schedule.name.startswith("early_")


def test_a_run_trains_as_long_as_its_recipe_and_shares_no_training_with_others() -> None:
    run = composed("pruner=magnitude", "schedule=early_crop", "schedule.latest=1", "sparsity=0.9")
    assert epochs_to_train(trainings(run)) == 10 and not checks.trains_to_the_end(run)


def test_prune_from_python_refuses_what_trains() -> None:
    with pytest.raises(ConfigError, match="schedule=early_bird trains between its rounds, and prune does not train"):
        pb.prune(Chain(), "magnitude", sparsity=0.5, schedule="early_bird", input_shape=(3, 8, 8))


def test_a_penalty_of_zero_renames_no_run() -> None:
    plain = composed("pruner=snip", "sparsity=0.9")
    assert plain.id == composed("pruner=snip", "sparsity=0.9", "training.batch_norm_l1=0").id
    assert plain.id != composed("pruner=snip", "sparsity=0.9", "training.batch_norm_l1=1e-4").id
