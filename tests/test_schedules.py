"""Schedules: in which rounds a sparsity is reached."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest

from pai_bench.core import TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.pruning import schedules

LENGTH = TrainingLength(epochs=160, steps_per_epoch=391)


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


@pytest.mark.parametrize(
    ("num_prunable", "density", "rounds"), [(101, 0.9, 100), (266_200, 1.7e-5, 200), (10, 0.06, 9)]
)
def test_no_round_that_rounds_down_keeps_fewer_than_the_last(num_prunable: int, density: float, rounds: int) -> None:
    for make in (schedules.exponential, schedules.linear):
        found = make(1 - density, LENGTH, rounds=rounds, rounding="down")
        kept = [masks.num_kept_after(this, num_prunable) for this in found]
        assert kept == sorted(kept, reverse=True) and kept[-1] == round(density * num_prunable)


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
    settings = {
        "levels": 3, "keep_per_level": None, "rewind_epoch": None, "rewind_step": 1000, "rewind_weights": True,
    }  # fmt: skip
    rounds = schedules.iterative(0.488, LENGTH, **settings)
    assert [round(1 - this.sparsity, 6) for this in rounds] == [0.8, 0.64, 0.512]  # the papers' 20 % at a time
    assert {this.until_epoch for this in rounds} == {160.0}
    assert {round(this.rewind_epoch * LENGTH.steps_per_epoch) for this in rounds} == {1000}


def test_levels_that_keep_a_fraction_each_are_as_many_as_the_target_takes() -> None:
    def reached(density: float) -> list[float]:
        of = {"rewind_epoch": 0.0, "rewind_step": None, "rewind_weights": True}
        rounds = schedules.iterative(round(1 - density, 12), LENGTH, levels=None, keep_per_level=0.8, **of)
        return [this.sparsity for this in rounds]

    chain = reached(0.8**18)
    assert len(chain) == 18 and chain == [round(1 - 0.8**level, 12) for level in range(1, 19)]
    for level in range(1, 18):  # so that chains share their levels
        assert reached(0.8**level) == chain[:level]
    assert reached(0.107374)[:-1] == chain[:9] and len(reached(0.107374)) == 10
    assert reached(0.7) == [chain[0], 0.3] and reached(0.9) == [0.1]


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
            "schedule.epoch=161.0: it lies outside the training; give a time from 0 to 160",
        ),
        ("gradual", {"start_epoch": 5, "end_epoch": 5, "every_steps": 1}, "start_epoch=5, end_epoch=5"),
        ("front_loaded", {"rounds": 161, "warmup_epochs": 1}, "schedule.rounds=161, warmup_epochs=1"),
        (
            "fine_tune",
            {"levels": 2, "keep_per_level": 0.8, "epochs": 1},
            "schedule.levels=2, schedule.keep_per_level=0.8: give one of the two",
        ),
        (
            "fine_tune",
            {"levels": 1, "keep_per_level": None, "epochs": 161},
            "schedule.epochs=161: the last learning rate holds for 160 epochs",
        ),
    ],
)
def test_times_outside_training_are_refused(schedule: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        getattr(schedules, schedule)(0.5, LENGTH, **settings)
