"""Is one method better than another? Differences are paired by seed, and corrected for the number of tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from statistics import fmean

from pai_bench.report.configurations import Configuration, Grid, deviation

LEVEL = 0.05  # of significance, two-sided; the intervals are 95 % intervals
POWER = 0.8
FEWEST = 3  # a test needs this many seeds: with two, the spread is a single number
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """The accuracy of one method minus that of another one, over the seeds that both have.

    Numbers that need more seeds are None, and `remark` says why.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    mean: float
    sd: float | None = None  # of the paired differences
    interval: tuple[float, float] | None = None  # 95 % interval of Student's t, for this difference alone
    p: float | None = None  # of the paired t test, two-sided
    p_holm: float | None = None  # p, corrected for all comparisons at this sparsity
    resolvable: float | None = None  # the true difference that this many seeds find with a probability of 80 %
    seeds_needed: int | None = None  # how many seeds find a true difference of this size with that probability
    remark: str = ""

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at 5 % after the correction."""
        return self.p_holm is not None and self.p_holm < LEVEL


def difference(first: Configuration, second: Configuration) -> Difference | None:
    """The paired difference of two configurations, uncorrected. None if they have no seed in common."""
    seeds = tuple(seed for seed in first.values if seed in second.values)
    if not seeds:
        return None
    pairs = [first.values[seed] - second.values[seed] for seed in seeds]
    found = Difference(first.method, second.method, seeds, fmean(pairs))
    if len(pairs) < FEWEST:
        words = "one seed" if len(pairs) == 1 else "two seeds"
        return replace(found, sd=deviation(pairs), remark=f"{words}: no interval and no test")
    sd = deviation(pairs) or 0.0
    if sd <= 1e-9 * max(1e-12, abs(found.mean)) or sd < 1e-12:  # equal except for rounding
        return replace(found, sd=0.0, remark="the same difference for every seed: its spread is unknown, no test")
    from scipy.special import stdtr

    n, error = len(pairs), sd / math.sqrt(len(pairs))
    half = critical(n) * error
    return replace(
        found,
        sd=sd,
        interval=(found.mean - half, found.mean + half),
        p=float(2 * stdtr(n - 1, -abs(found.mean) / error)),
        resolvable=sd * resolvable(n),
        seeds_needed=seeds_needed(abs(found.mean) / sd),
    )


@cache
def critical(n: int) -> float:
    """The two-sided 5 % point of Student's t with n - 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - LEVEL / 2))


def power(effect: float, n: int) -> float:
    """Probability that a paired t test of n seeds finds a difference.

    Args:
        effect: the true mean difference over the standard deviation of the paired differences.
    """
    from scipy.stats import nct

    point, shift = critical(n), effect * math.sqrt(n)
    # For larger shifts the other tail is below one millionth, and scipy may return NaN for it.
    other = nct.cdf(-point, n - 1, shift) if shift < 5 else 0.0
    return float(nct.sf(point, n - 1, shift) + other)


@cache
def resolvable(n: int) -> float:
    """The difference that n >= 2 seeds find with a probability of 80 %, over the standard deviation of the pairs."""
    from scipy.optimize import brentq

    high = 2 * critical(n) / math.sqrt(n)  # for any n, this is found with more than 80 %
    return float(brentq(lambda effect: power(effect, n) - POWER, 0, high))


def seeds_needed(effect: float) -> int | None:
    """How many seeds find a difference with a probability of 80 %. At least three; None if a thousand are too few.

    Args:
        effect: as in `power`.
    """
    if effect <= 0 or resolvable(_MOST_SEEDS) > effect:
        return None
    low, high = FEWEST - 1, FEWEST  # low is too few
    while resolvable(high) > effect:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if resolvable(middle) > effect else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """P values, corrected for their number by Holm's step-down procedure, in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def comparisons(configurations: Sequence[Configuration]) -> list[Difference]:
    """Every pair of configurations at one sparsity, corrected for the number of tests.

    A configuration with untrained runs is left out, because its trained seeds are a favourable choice. Pairs with fewer
    than three seeds are not tested.
    """
    pairs = combinations([configuration for configuration in configurations if not configuration.untrained], 2)
    found = [pair for first, second in pairs if (pair := difference(first, second)) is not None]
    tested = [pair for pair in found if pair.p is not None]
    corrected = dict(zip(map(id, tested), holm([pair.p for pair in tested if pair.p is not None]), strict=True))
    return [replace(pair, p_holm=corrected.get(id(pair))) for pair in found]


def best(grid: Grid, level: float) -> set[str]:
    """The methods to print in bold: those with the best mean, if other methods are below it.

    None if the best mean is near chance. See `ranked`.
    """
    means = {one.method: one.mean for one in ranked(grid, level) if one.mean is not None}
    top = max(means.values(), default=0.0)
    if grid.near_chance(top):
        return set()
    found = {method for method, mean in means.items() if mean == top}
    return found if len(found) < len(means) else set()


def not_below_best(grid: Grid, level: float, differences: Sequence[Difference]) -> tuple[set[str], set[str]]:
    """The other methods that no test shows to be below the best mean, after the correction.

    Returns:
        those that were tested against every method with the best mean, and those that were not. Both are empty where
        nothing was tested.
    """
    leading = best(grid, level)
    tests = {(d.first, d.second): d for d in differences if d.p_holm is not None}
    untold, untested = set[str](), set[str]()
    for method in {one.method for one in with_means(grid, level)} - leading if leading and tests else ():
        found = [tests.get((method, other), tests.get((other, method))) for other in leading]
        below = [d for d in found if d and d.significant and (d.mean < 0) == (d.first == method)]
        if None in found and not below:
            untested.add(method)
        elif not below:
            untold.add(method)
    return untold, untested


def ranked(grid: Grid, level: float) -> list[Configuration]:
    """The configurations whose means are ranked: those with the most seeds, because means of others are less certain.

    The dense network does not count as a method.
    """
    found = with_means(grid, level)
    most = max((configuration.n for configuration in found), default=0)
    return [configuration for configuration in found if configuration.n == most]


def with_means(grid: Grid, level: float) -> list[Configuration]:
    """The configurations that prune, without those that have untrained runs."""
    return [
        configuration
        for configuration in grid.at(level)
        if not configuration.dense and configuration.mean is not None and not configuration.untrained
    ]
