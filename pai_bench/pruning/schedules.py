"""Schedules: in which rounds a sparsity is reached, before training or within it.

The density never increases, and the last round meets the target. Times within training are in epochs; n steps are
n / steps_per_epoch epochs. `rounding` says how a round before the last turns its density into a number of weights. The
last round always keeps the nearest number.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from pai_bench.core import (
    Condition,
    Count,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Round,
    Rounding,
    TrainingLength,
)
from pai_bench.errors import ConfigError
from pai_bench.pruning.conditions import masks_settle, weights_settle

Latest = Annotated[float, Gt(0), Le(1)]  # a part of the training
PerLevel = Annotated[float, Gt(0), Lt(1)]
_NEARLY_A_POWER = 1e-3  # targets are given with few digits: 0.107374 is 0.8**10


def none(sparsity: float, length: TrainingLength) -> Sequence[Round]:
    """No rounds: the network stays dense."""
    return []


def one_shot(sparsity: float, length: TrainingLength) -> Sequence[Round]:
    """One round, before training."""
    return [Round(sparsity)]


def exponential(
    sparsity: float, length: TrainingLength, *, rounds: Count, rounding: Literal["nearest", "up", "down"]
) -> Sequence[Round]:
    """Density d^(i/n) after round i of n: every round prunes the same fraction of the remaining weights.

    Args:
        rounding: of the number of weights to keep, in the rounds before the last. The code of Tanaka et al. rounds up,
            the code of de Jorge et al. 2021, arXiv:2006.09081, down.

    Reference: Tanaka et al. 2020, arXiv:2006.05467, Algorithm 1.
    Deviates: the last round keeps the nearest number, and ties are broken by order. The authors round the last number
        as the others, and drop (Tanaka) or keep (de Jorge) all weights that equal the threshold.
    """
    return _rounded([Round(reached) for reached in _exponential(sparsity, rounds)], rounding)


def linear(
    sparsity: float, length: TrainingLength, *, rounds: Count, rounding: Literal["nearest", "up", "down"]
) -> Sequence[Round]:
    """Sparsity s i/n after round i of n: every round prunes the same number of weights.

    Args:
        rounding: as in `exponential`.
    """
    return _rounded([Round(sparsity * i / rounds) for i in range(1, rounds)] + [Round(sparsity)], rounding)


def constant(sparsity: float, length: TrainingLength, *, rounds: Count) -> Sequence[Round]:
    """The target sparsity in every round, for methods that move the mask or the weights from round to round."""
    return [Round(sparsity)] * rounds


def early(
    sparsity: float,
    length: TrainingLength,
    *,
    epoch: NonNegative | None,
    step: NonNegativeInt | None,
    rounds: Count,
    rounding: Literal["nearest", "up", "down"],
) -> Sequence[Round]:
    """Pruning early in training: at an epoch or a step, in exponential rounds. Then training goes on.

    Args:
        rounding: as in `exponential`.

    Reference: Frankle et al. 2021, arXiv:2009.08576, section 6 (pruning later in training).

    Raises:
        ConfigError: both epoch and step are given, or neither; or the time lies outside training.
    """
    time = _time("schedule.epoch", epoch, "schedule.step", step, length)
    return _rounded([Round(reached, until_epoch=time) for reached in _exponential(sparsity, rounds)], rounding)


def iterative(
    sparsity: float,
    length: TrainingLength,
    *,
    levels: Count | None,
    keep_per_level: PerLevel | None,
    rewind_epoch: NonNegative | None,
    rewind_step: NonNegativeInt | None,
    rewind_weights: bool,
) -> Sequence[Round]:
    """Train to the end, prune, rewind, level by level. The last training is the result; all before it is the search.

    With rewind_weights (to epoch 0 or shortly after) this is iterative magnitude pruning as in the lottery ticket
    papers. Without, it is learning-rate rewinding: the clock is put back and the weights stay.

    Args:
        levels: how many. Each keeps the same fraction of the weights that are left, so that the last meets the target.
        keep_per_level: this fraction, in place of their number: there are as many levels as the target takes. The last
            one prunes less if the target is no power of it.

    Reference: Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671, for rewinding to an
        early step; Renda et al. 2020, arXiv:2003.02389, for learning-rate rewinding.
    Deviates: the target is met exactly. The papers prune 20 % per level. open_lth keeps n - ceil(n / 5) - 1 of n
        remaining weights, so its levels keep a few weights less than 0.8^level. It also begins the momentum of its
        first training anew at the step to which it rewinds; here that training runs through.

    Raises:
        ConfigError: both rewind_epoch and rewind_step are given, or neither, or both levels and keep_per_level, or
            neither; or the time lies outside training.
    """
    time = _time("schedule.rewind_epoch", rewind_epoch, "schedule.rewind_step", rewind_step, length)
    end = float(length.epochs)
    return [Round(reached, end, time, rewind_weights) for reached in _levels(sparsity, levels, keep_per_level)]


def fine_tune(
    sparsity: float,
    length: TrainingLength,
    *,
    levels: Count | None,
    keep_per_level: PerLevel | None,
    epochs: Count,
) -> Sequence[Round]:
    """Train to the end; then, level by level, prune and train for `epochs` more at the last learning rate.

    Args:
        levels: as in `iterative`.
        keep_per_level: as in `iterative`.

    Reference: Han et al. 2015, arXiv:1506.02626; as in Renda et al. 2020, arXiv:2003.02389, section 3.

    Raises:
        ConfigError: there are more epochs than the recipe has at its last learning rate; or both levels and
            keep_per_level are given, or neither.
    """
    if length.last_rate_epochs == 0:
        raise ConfigError(
            "schedule=fine_tune: the learning rate of training.lr_schedule=cosine or linear ends at zero; "
            "set training.lr_schedule=step, or use schedule=lr_rewind"
        )
    last = min(length.epochs, length.last_rate_epochs)
    if epochs > last:
        raise ConfigError(
            f"schedule.epochs={epochs}: the last learning rate holds for {last:g} epochs; "
            "give at most that, or use schedule=lr_rewind"
        )
    end = float(length.epochs)
    reached = _levels(sparsity, levels, keep_per_level)
    return [Round(sparsity, end, end - epochs, rewind_weights=False) for sparsity in reached]


def gradual(
    sparsity: float, length: TrainingLength, *, start_epoch: NonNegative, end_epoch: NonNegative, every_steps: Count
) -> Sequence[Round]:
    """Gradual pruning during training: sparsity s (1 - (1 - t)^3), t from 0 to 1 between two epochs.

    Reference: Zhu and Gupta 2017, arXiv:1710.01878, section 3.
    Deviates: a pruned weight does not return, and by default the network is ranked as a whole. The paper prunes each
        layer alike, and weights may return: `rewire=gradual`.

    Raises:
        ConfigError: the epochs are not in order, or lie outside training.
    """
    if not 0 <= start_epoch < end_epoch <= length.epochs:
        raise ConfigError(
            f"schedule.start_epoch={start_epoch:g}, end_epoch={end_epoch:g}: give 0 <= start_epoch < end_epoch <= "
            f"training.epochs={length.epochs}"
        )
    first, last = (round(epoch * length.steps_per_epoch) for epoch in (start_epoch, end_epoch))
    if first == last:
        raise ConfigError(
            f"schedule.start_epoch={start_epoch:g}, end_epoch={end_epoch:g}: both are step {first} of training; give "
            f"epochs that are at least a step apart (an epoch has {length.steps_per_epoch} steps)"
        )
    steps = [*range(first + every_steps, last, every_steps), last]
    rounds = []
    for step in steps:
        reached = sparsity * (1 - (1 - (step - first) / (last - first)) ** 3)
        rounds.append(Round(sparsity if step == last else reached, until_epoch=step / length.steps_per_epoch))
    return rounds


def front_loaded(sparsity: float, length: TrainingLength, *, rounds: Count, warmup_epochs: Count) -> Sequence[Round]:
    """Density n d / (n d + i (1 - d)) after round i of n, with one epoch of training before every round.

    Round j prunes the fraction p / (j p + n d) of the remaining weights, with p = 1 - d: the first rounds prune most.

    Args:
        warmup_epochs: epochs of training before the first round, at least 1.

    Reference: Lubana and Dick 2021, arXiv:2009.11839, and their released code.
    Deviates: for residual networks their code truncates the cumulative percentage to an integer in every round, which
        misses the target. Here the last round meets it. They drop the momentum after every round. Here it is kept.

    Raises:
        ConfigError: the rounds do not fit into training.
    """
    if not 1 <= warmup_epochs <= length.epochs - rounds + 1:
        raise ConfigError(
            f"schedule.rounds={rounds}, warmup_epochs={warmup_epochs}: one epoch goes before every round; "
            f"training.epochs={length.epochs} must hold them"
        )
    density = 1 - sparsity
    reached = [1 - rounds * density / (rounds * density + i * sparsity) for i in range(1, rounds)] + [sparsity]
    return [Round(s, until_epoch=float(warmup_epochs + i)) for i, s in enumerate(reached)]


def early_crop(
    sparsity: float,
    length: TrainingLength,
    *,
    latest: Latest,
    threshold: NonNegative | None,
    rounds: Count,
) -> Sequence[Round]:
    """Pruning where the weights have settled: all rounds after one epoch, at sparsity s - (s - 1/2) / 2^i, then s.

    It is the first epoch that changes the distance of the weights from those after epoch 1 by less than a threshold.
    Up to sparsity 1/2 there is one round.

    Args:
        latest: the rounds take place after this part of the training (whole epochs, rounded up) at the latest.
        threshold: as a part of the distance after epoch 2. None: 1 - sparsity.
        rounds: how many, the last one included.

    Reference: Rachwan et al. 2022, arXiv:2206.10451, and their released code, whose scores are |w (Hg)|
        (`pruner=gradient_preservation`).
    Deviates: their code scores test images; here they are training images. It has 102 rounds, most of which prune
        nothing. For filters their threshold is smaller: give min(1 - s - 0.1, 0.99). They name no latest time.

    Raises:
        ConfigError: the training is too short for the condition.
    """
    end = _latest("early_crop", latest, length, least=3)
    fraction = 1 - sparsity if threshold is None else threshold
    settled = Condition(partial(weights_settle, fraction=fraction))
    halfway = [sparsity - (sparsity - 0.5) * 0.5**i for i in range(rounds - 1)] if sparsity > 0.5 else []
    first, *others = [*halfway, sparsity]
    return [Round(first, until_epoch=end, when=settled), *map(Round, others)]


def early_bird(
    sparsity: float,
    length: TrainingLength,
    *,
    latest: Latest,
    num_masks: Annotated[int, Ge(2)],
    max_distance: Fraction,
) -> Sequence[Round]:
    """Pruning where the mask has settled: one round, after the first epoch whose mask is near to those before it.

    The masks are those that the pruner would choose after each epoch. Training then goes on.

    Args:
        latest: as in `early_crop`.
        num_masks: how many of the last masks are compared: the newest with each of the others.
        max_distance: the share of weights (or filters) in which two of them may differ.

    Reference: You et al. 2020, arXiv:1909.11957, and their released code, whose masks are of filters by the scales of
        batch norms (`pruner=filter_batch_norm allocation=global`), with `training.batch_norm_l1=1e-4`.
    Deviates: their first mask is that of the initialization, where all scales are equal. They prune one filter more
        than the sparsity says. They name no latest time.

    Raises:
        ConfigError: the training is too short for the condition.
    """
    end = _latest("early_bird", latest, length, least=num_masks)
    settled = partial(masks_settle, num_masks=num_masks, max_distance=max_distance)
    return [Round(sparsity, until_epoch=end, when=Condition(settled, chooses=True))]


def _latest(schedule: str, latest: float, length: TrainingLength, least: int) -> float:
    """The latest time of a round with a condition, in whole epochs.

    Raises:
        ConfigError: the condition cannot hold by then.
    """
    end = math.ceil(round(latest * length.epochs, 9))
    if end < least:
        raise ConfigError(
            f"schedule.latest={latest:g}: that is epoch {end} of training.epochs={length.epochs}, and "
            f"schedule={schedule} needs {least} epochs to decide; give a later time or train longer"
        )
    return float(end)


def _rounded(rounds: list[Round], rounding: Rounding) -> list[Round]:
    # The last round takes the nearest number, and an earlier one that rounds down could fall below it.
    final = rounds[-1].sparsity if rounding == "down" else None
    return [replace(this, rounding=rounding, final_sparsity=final) for this in rounds[:-1]] + rounds[-1:]


def _exponential(sparsity: float, rounds: int) -> list[float]:
    density = 1 - sparsity
    return [1 - density ** (i / rounds) for i in range(1, rounds)] + [sparsity]


def _levels(sparsity: float, levels: int | None, keep: float | None) -> list[float]:
    """The sparsity after each level."""
    if (levels is None) == (keep is None):
        raise ConfigError(
            f"schedule.levels={levels}, schedule.keep_per_level={keep}: give one of the two and null the other"
        )
    if keep is None:
        assert levels is not None
        return _exponential(sparsity, levels)
    needed = math.log(1 - sparsity) / math.log(keep)
    number = max(math.ceil(needed - _NEARLY_A_POWER), 1)
    # As many digits as a target has, so that a level is the target of the chain that ends there.
    return [round(1 - keep**level, 12) for level in range(1, number)] + [sparsity]


def _time(
    epoch_setting: str, epoch: float | None, step_setting: str, step: int | None, length: TrainingLength
) -> float:
    """A time in epochs, from an epoch or a step."""
    if (epoch is None) == (step is None):
        raise ConfigError(f"{epoch_setting}={epoch}, {step_setting}={step}: give one of the two and null the other")
    time = epoch if epoch is not None else (step or 0) / length.steps_per_epoch
    if not 0 <= time <= length.epochs:
        setting, value = (epoch_setting, epoch) if step is None else (step_setting, step)
        most = length.epochs if step is None else length.epochs * length.steps_per_epoch
        raise ConfigError(f"{setting}={value}: it lies outside the training; give a time from 0 to {most:g}")
    return time
