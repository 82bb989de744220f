"""Verdicts on published numbers, whose statistics hold."""

import math
import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from scipy import stats

from pai_bench.errors import ConfigError
from pai_bench.published.verdicts import (
    DEVIATES,
    REPRODUCED,
    UNDERPOWERED,
    Rule,
    Sample,
    judge,
    judge_exactly,
    num_needed,
    sample,
)

# The statistics -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_students_two_sample_test() -> None:
    draw = random.Random(0)
    for num_ours, num_theirs in ((3, 3), (2, 3), (10, 3), (5, 5)):
        ours = [draw.gauss(0.9, 0.004) for _ in range(num_ours)]
        theirs = [draw.gauss(0.902, 0.002) for _ in range(num_theirs)]
        verdict = judge(sample(ours), Sample(fmean(theirs), stdev(theirs), num_theirs), Rule(confidence=0.9))
        expected = stats.ttest_ind(ours, theirs, equal_var=True).confidence_interval(0.9)
        assert verdict.interval == pytest.approx((expected.low, expected.high))
        assert verdict.difference == pytest.approx(fmean(ours) - fmean(theirs))


def test_one_run_borrows_the_published_spread() -> None:
    """Student's interval of a new observation beside three others, by its definition."""
    verdict = judge(sample([0.93]), Sample(0.935, 0.002, 3), Rule())
    half = stats.t.ppf(0.975, 2) * 0.002 * math.sqrt(1 + 1 / 3)
    assert verdict.interval == pytest.approx((-0.005 - half, -0.005 + half))


def test_a_paper_without_a_spread_counts_as_one_run_with_ours() -> None:
    ours = [0.931, 0.934, 0.932, 0.933]
    verdict = judge(sample(ours), Sample(0.93, None, None), Rule())
    half = stats.t.ppf(0.975, 3) * stdev(ours) * math.sqrt(1 / 4 + 1)
    assert verdict.interval == pytest.approx((0.0025 - half, 0.0025 + half))


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(1000):
        ours = sample([draw.gauss(0.905, 0.003) for _ in range(4)])
        theirs = sample([draw.gauss(0.9, 0.003) for _ in range(3)])
        interval = judge(ours, theirs, Rule(confidence=0.9)).interval
        assert interval is not None
        held += interval[0] <= 0.005 <= interval[1]
    assert 0.87 < held / 1000 < 0.93  # three standard deviations of the count


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (Sample(0.9330, 0.001, 5), Sample(0.9326, 0.0012, 3), REPRODUCED),
        (Sample(0.9130, 0.001, 5), Sample(0.9326, 0.0012, 3), DEVIATES),
        (Sample(0.9290, 0.004, 3), Sample(0.9326, 0.0012, 3), UNDERPOWERED),
        # Certainly different, but by less than matters.
        (Sample(0.9300, 0.0001, 20), Sample(0.9326, 0.0001, 20), REPRODUCED),
        # A noisy number: two of its own standard deviations are the margin.
        (Sample(0.3400, 0.04, 40), Sample(0.3291, 0.0989, 3), REPRODUCED),
        # Chance on both sides, where no run has a spread, and on one side only.
        (Sample(0.1, None, 1), Sample(0.1, 0.0, 3), REPRODUCED),
        (Sample(0.1, 0.0, 3), Sample(0.1, 0.0, 3), REPRODUCED),
        (Sample(0.6, None, 1), Sample(0.1, 0.0, 3), DEVIATES),
        (Sample(0.1, None, 1), Sample(0.9326, 0.0012, 3), DEVIATES),
        # One run on each side tells nothing of a spread.
        (Sample(0.5, None, 1), Sample(0.9326, None, None), UNDERPOWERED),
        # A spread over an unknown number of runs sets the margin, and is nothing to build an interval on.
        (Sample(0.9326, None, 1), Sample(0.9326, 0.001, None), UNDERPOWERED),
    ],
)
def test_verdicts(ours: Sample, theirs: Sample, expected: str) -> None:
    verdict = judge(ours, theirs, Rule())
    assert verdict.name == expected
    mirrored = judge(replace(ours, mean=1 - ours.mean), replace(theirs, mean=1 - theirs.mean), Rule())
    assert mirrored.name == expected and mirrored.difference == pytest.approx(-verdict.difference)


def test_a_spread_of_an_unknown_number_of_runs_is_called_so() -> None:
    ours = Sample(0.9326, None, 1)
    assert judge(ours, Sample(0.9326, 0.001, None), Rule()).reason == (
        "the published spread is of an unknown number of runs; two runs of ours are the least"
    )
    assert judge(ours, Sample(0.9326, None, None), Rule()).reason.startswith("neither side has a spread; ")


def test_the_margin_can_be_set_and_grows_with_the_published_spread() -> None:
    assert Rule().margin_for(Sample(0.9, 0.001, 3)) == 0.005
    assert Rule().margin_for(Sample(0.9, 0.01, 3)) == 0.02
    assert Rule().margin_for(Sample(0.9, None, None)) == 0.005
    assert Rule(margin=0.03, spread=0).margin_for(Sample(0.9, 0.5, 3)) == 0.03
    for wrong in (Rule(margin=-0.01), Rule(spread=math.nan), Rule(confidence=1.0), Rule(confidence=0)):
        with pytest.raises(ConfigError, match="give"):
            wrong.check()


@pytest.mark.parametrize("difference", [0.001, 0.002, 0.006, 0.02])
def test_the_runs_said_to_decide_do_and_one_less_does_not(difference: float) -> None:
    theirs = Sample(0.9, 0.004, 10)
    needed = num_needed(0.004, theirs, difference, 0.005, 0.95)
    assert needed is not None
    rule = Rule(spread=0)

    def with_runs(num: int) -> str:
        return judge(Sample(0.9 + difference, 0.004, num), theirs, rule).name

    assert with_runs(needed) == (REPRODUCED if difference < 0.005 else DEVIATES)
    assert needed == 2 or with_runs(needed - 1) == UNDERPOWERED


def test_it_is_said_when_no_number_of_runs_would_decide() -> None:
    verdict = judge(Sample(0.9, 0.01, 3), Sample(0.9049, 0.01, 3), Rule(spread=0))
    assert verdict.name == UNDERPOWERED and verdict.num_needed is None
    assert "not even" in verdict.reason


def test_a_difference_of_the_margin_is_within_it() -> None:
    assert judge(Sample(0.935, 0.0, 3), Sample(0.93, 0.0, 3), Rule(margin=0.005)).name == REPRODUCED


def test_two_equal_runs_beside_a_paper_without_a_spread_decide_nothing() -> None:
    assert judge(sample([0.93, 0.93]), Sample(0.93, None, None), Rule()).name == UNDERPOWERED
    assert judge(sample([0.93] * 3), Sample(0.93, None, None), Rule()).name == REPRODUCED


@pytest.mark.parametrize("num_theirs", [None, 3])
def test_equal_runs_of_ours_tell_nothing_of_the_spread_of_others(num_theirs: int | None) -> None:
    """Ours collapsed in all seeds. Three published runs of 1, 1 and 6.1 % have the mean 2.7 %, too."""
    verdict = judge(sample([0.01] * 5), Sample(0.027, None, num_theirs), Rule())
    assert (verdict.name, verdict.interval) == (UNDERPOWERED, None) and "show none" in verdict.reason


def test_half_of_the_last_printed_digit_is_allowed_in_addition() -> None:
    ours = Sample(0.9245, 0.0002, 5)  # 92.5 is printed as 93, too
    assert judge(ours, Sample(0.93, None, None), Rule()).name == DEVIATES
    verdict = judge(ours, Sample(0.93, None, None), Rule(), unit=0.005)
    assert (verdict.name, verdict.margin) == (REPRODUCED, pytest.approx(0.01))


def test_numbers_without_training_are_judged_by_their_tolerance() -> None:
    assert judge_exactly(0.4138, 0.42, 0.003, 0.005).name == REPRODUCED
    assert judge_exactly(0.4138, 0.42, 0.001, 0.005).name == DEVIATES
    assert judge_exactly(2.75, 3.0, 0.25).name == REPRODUCED
    assert judge_exactly(2.5, 3.0, 0.25).name == DEVIATES
