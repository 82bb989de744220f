"""Whether a number was reproduced: from the difference of two means, its uncertainty, and the allowed margin."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pai_bench.errors import ConfigError, check_installed

REPRODUCED = "REPRODUCED"
DEVIATES = "DEVIATES"
UNDERPOWERED = "UNDERPOWERED"

_MOST_RUNS = 1000  # no reason asks for more runs than this


@dataclass(frozen=True)
class Sample:
    """A mean over runs."""

    mean: float
    sd: float | None  # None: not known, for example with one run
    num: int | None  # None: the paper does not say


@dataclass(frozen=True)
class Rule:
    """When two means count as the same. Accuracies are fractions.

    Args:
        margin: the allowed difference.
        spread: the difference may also be this many published standard deviations, if that is more.
        confidence: the probability of the interval of the difference.
    """

    margin: float = 0.005
    spread: float = 2.0
    confidence: float = 0.95

    def check(self) -> None:
        """Checks that the settings make sense.

        Raises:
            ConfigError: a setting makes no sense, or a library is missing.
        """
        check_installed("intervals of verdicts need", "scipy", "report")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"--margin {100 * self.margin:g}: give 0 or more percentage points")
        if not 0 <= self.spread < math.inf:
            raise ConfigError(f"--spread {self.spread:g}: give 0 or more standard deviations")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"--confidence {self.confidence:g}: give a probability between 0 and 1")

    def margin_for(self, theirs: Sample) -> float:
        """The margin for one number."""
        return max(self.margin, self.spread * (theirs.sd or 0.0))


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison. Differences are our value minus the published value."""

    name: str
    difference: float
    margin: float
    interval: tuple[float, float] | None = None  # None: no spread is known, or no interval is needed
    num_needed: int | None = None  # how many of our runs would decide, if difference and spread stay the same
    reason: str = ""


def sample(values: Sequence[float]) -> Sample:
    """The mean of some runs, and their sample standard deviation if there are two or more."""
    return Sample(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def judge(ours: Sample, theirs: Sample, rule: Rule, unit: float = 0.0) -> Verdict:
    """The verdict on two means of runs.

    The interval is Student's interval for two samples with a common variance. The question is whether both samples come
    from one experiment, and three published runs alone say little about the variance. If only one side has a spread, it
    is used for both sides. A side without a number of runs counts as one run.

    REPRODUCED: the interval lies within the margin. DEVIATES: the interval does not contain zero, and the difference
    exceeds the margin. UNDERPOWERED: neither is the case.

    Args:
        unit: half a unit of the last printed digit of their mean. It is allowed in addition.
    """
    difference, margin = ours.mean - theirs.mean, rule.margin_for(theirs) + unit
    pooled = _pooled(ours, theirs)
    if pooled is None:
        whose = (
            "neither side has a spread" if theirs.sd is None else "the published spread is of an unknown number of runs"
        )
        return Verdict(UNDERPOWERED, difference, margin, reason=f"{whose}; two runs of ours are the least")
    sd, _ = pooled
    if sd == 0 and theirs.sd is None and (ours.num or 1) < 3:
        reason = "the paper tells no spread, and two equal runs of ours show none; three are the least"
        return Verdict(UNDERPOWERED, difference, margin, reason=reason)
    margin += 1e-12  # in floating point, 0.935 - 0.93 exceeds 0.005
    if sd == 0 and theirs.sd is None and abs(difference) > margin:  # ours are at chance, and theirs need not be
        reason = "the paper tells no spread, and equal runs of ours show none"
        return Verdict(UNDERPOWERED, difference, margin, reason=reason)
    half = _half_width(sd, ours.num or 1, theirs, rule.confidence)
    interval = difference - half, difference + half
    if max(map(abs, interval)) <= margin:
        return Verdict(REPRODUCED, difference, margin, interval)
    if abs(difference) > margin and half < abs(difference):
        return Verdict(DEVIATES, difference, margin, interval)
    needed = num_needed(sd, theirs, difference, margin, rule.confidence)
    reason = f"{needed} runs would decide" if needed else f"not even {_MOST_RUNS} runs would decide"
    return Verdict(UNDERPOWERED, difference, margin, interval, needed, reason)


def judge_exactly(ours: float, published: float, allowed: float, unit: float = 0.0) -> Verdict:
    """The verdict on a number that needs no training: whether the difference is small enough.

    Args:
        allowed: the allowed difference.
        unit: half a unit of the last printed digit. It is allowed in addition.
    """
    difference, margin = ours - published, allowed + unit
    within = abs(difference) <= margin or math.isclose(abs(difference), margin)
    return Verdict(REPRODUCED if within else DEVIATES, difference, margin)


def num_needed(sd: float, theirs: Sample, difference: float, margin: float, confidence: float) -> int | None:
    """How many of our runs would decide, if difference and spread stay the same. None: more than 1000."""
    room = margin - abs(difference) if abs(difference) <= margin else abs(difference)
    for num in range(2, _MOST_RUNS + 1):
        if _half_width(sd, num, theirs, confidence) <= room:
            return num
    return None


def _pooled(ours: Sample, theirs: Sample) -> tuple[float, int] | None:
    """The common standard deviation and its degrees of freedom. None if no side has a standard deviation."""
    parts = [(side.sd, (side.num or 1) - 1) for side in (ours, theirs) if side.sd is not None]
    freedom = sum(number for _, number in parts)
    if not freedom:
        return None
    return math.sqrt(sum(number * sd**2 for sd, number in parts) / freedom), freedom


def _half_width(sd: float, num: int, theirs: Sample, confidence: float) -> float:
    from scipy.special import stdtrit

    num_theirs = theirs.num or 1
    freedom = num - 1 + (num_theirs - 1 if theirs.sd is not None else 0)
    quantile = float(stdtrit(freedom, (1 + confidence) / 2))
    return quantile * sd * math.sqrt(1 / num + 1 / num_theirs)
