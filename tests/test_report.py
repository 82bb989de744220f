"""From rows to statistics: configurations, missing ones, paired differences, corrections, what seeds can tell apart."""

import itertools
from typing import Any

import numpy as np
import pytest
from report_rows import only, row, rows
from scipy import stats

from pai_bench.errors import ConfigError
from pai_bench.report import comparison
from pai_bench.report.comparison import Difference
from pai_bench.report.configurations import configurations, grids, spread

# Configurations -------------------------------------------------------------------------------------------------------


def test_a_configuration_is_mean_and_sample_deviation_over_seeds() -> None:
    (configuration,) = configurations(
        [row(seed=seed, accuracy=value) for seed, value in ((2, 0.9), (0, 0.8), (1, 0.94))]
    )
    assert configuration.values == {0: 0.8, 1: 0.94, 2: 0.9} and configuration.n == 3
    assert configuration.mean == pytest.approx(np.mean([0.8, 0.94, 0.9]))
    assert configuration.sd == pytest.approx(np.std([0.8, 0.94, 0.9], ddof=1))
    assert configuration.compression == 10
    assert [configurations([row(sparsity=s)])[0].compression for s in (0.966666666667, 0.996666666667)] == [30, 300]


def test_a_mask_from_a_file_is_no_dense_network() -> None:
    theirs = [row("theirs", seed, 0.9, mask="0123", num_rounds=0) for seed in range(3)]
    grid = only([*rows(), *theirs, row("dense")])
    assert [configuration.method for configuration in grid.dense] == ["dense-1111bbbb"]
    assert {configuration.method for configuration in grid.at(0.9) if configuration.given} == {"theirs-1111bbbb"}


def test_a_method_that_is_the_same_seed_by_seed_is_bold_with_the_best() -> None:
    same = [0.9, 0.91, 0.92]
    assert marked(a=same, b=same, c=[0.5, 0.51, 0.53]) == ({"a", "b"}, set())
    assert marked(a=same, b=same) == (set(), set())  # none is better


def test_one_seed_has_no_deviation() -> None:
    (configuration,) = configurations([row()])
    assert (configuration.n, configuration.mean, configuration.sd) == (1, 0.9, None)


@pytest.mark.parametrize(
    "other",
    [
        {"task": "digits-resnet20-ffff0000"},
        {"protocol": 2},
        {"dataset_checksum": "beef" * 16},
        {"method": "snip-22223333"},
        {"target_sparsity": 0.95},
        {"filter_sparsity": 0.9},
    ],
)
def test_what_differs_is_never_mixed(other: dict[str, Any]) -> None:
    assert [configuration.n for configuration in configurations([row(seed=0), row(seed=1) | other])] == [1, 1]


@pytest.mark.parametrize(
    "other", [{"task": "digits-resnet20-ffff0000"}, {"protocol": 2}, {"dataset_checksum": "beef" * 16}]
)
def test_what_cannot_be_compared_stands_in_another_table(other: dict[str, Any]) -> None:
    assert len(grids(configurations([row("snip"), row("synflow") | other]))) == 2


def test_filters_have_their_own_table_and_the_same_dense_network() -> None:
    weights, filters = grids(configurations([row("dense"), row("snip"), row("filter_loss", filter_sparsity=0.9)]))
    assert (weights.filters, filters.filters) == (False, True)
    assert weights.methods == ["snip-1111bbbb"] and filters.methods == ["filter_loss-1111bbbb"]
    assert weights.dense == filters.dense and len(weights.dense) == 1


def test_untrained_runs_are_in_the_configuration_and_not_in_its_mean() -> None:
    stopped = row(seed=1, accuracy=0.1, stopped="collapse", total_seconds=1.0)
    (configuration,) = configurations([row(seed=0), stopped])
    assert configuration.seconds == row(seed=0)["total_seconds"]
    (untrained,) = configurations([stopped])
    assert untrained.seconds is None
    assert configuration.values == {0: 0.9} and configuration.untrained == [1] and configuration.without_value == []


def test_collapse_is_a_share_of_all_seeds() -> None:
    (configuration,) = configurations(
        [
            row(seed=0, collapsed_layers=["conv.weight"]),
            row(seed=1, output_depends_on_input=False, stopped="collapse"),
            row(seed=2, collapsed_layers=["fc.weight"], output_depends_on_input=False),
            row(seed=3),
        ]
    )
    assert [configuration.share(what) for what in ("collapsed", "no_signal", "either")] == [0.5, 0.5, 0.75]


def test_the_statistic_is_the_one_asked_for() -> None:
    runs = [row(seed=0, test_top1_at_best_validation=0.7), row(seed=1)]
    assert configurations(runs, "best")[0].mean == pytest.approx(0.91)
    (selected,) = configurations(runs, "selected")
    assert selected.values == {0: 0.7} and selected.without_value == [1]
    (stopped,) = configurations([row(seed=0, test_top1_at_early_stop=0.6)], "early_stop")
    assert stopped.values == {0: 0.6}


def test_a_statistic_that_no_run_has_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"--statistic selected: no run has test_top1_at_best_validation.*dataset.validation"
    ):
        configurations([row()], "selected")


def test_missing_configurations_and_seeds_are_found() -> None:
    runs = [
        row("dense", 0),
        row("snip", 0),
        row("snip", 1),
        row("snip", 0, sparsity=0.99),
        row("synflow", 1),
    ]
    assert only(runs).missing() == [
        ("dense-1111bbbb", 0.0, [1]),
        ("snip-1111bbbb", 0.99, [1]),
        ("synflow-1111bbbb", 0.9, [0]),
        ("synflow-1111bbbb", 0.99, [0, 1]),
    ]
    assert only([row("snip", 0), row("snip", 2)]).missing() == [("dense", 0.0, [0, 2])]


def test_training_before_the_mask_is_part_of_its_cost() -> None:
    (configuration,) = configurations(
        [row(score_examples=10, search_train_examples=300, train_examples=100, prune_seconds=1.0, train_seconds=8.0)]
    )
    assert configuration.search("examples") == 310
    assert configuration.search("seconds") == pytest.approx(1 + 8 * 300 / 400)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_levels_are_spread_and_keep_their_ends(number: int) -> None:
    shown = spread(range(11), number)
    assert len(shown) == number and (shown[0], shown[-1]) == (0, 10)
    assert max(np.diff(shown)) - min(np.diff(shown)) <= 1
    assert spread([1, 2], number) == [1, 2]


# Differences ----------------------------------------------------------------------------------------------------------


def pair(first: list[float], second: list[float]) -> Difference:
    one, two = configurations(rows(a=first, b=second))
    found = comparison.difference(one, two)
    assert found is not None
    return found


def test_differences_are_those_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 5, 12):
        common = rng.normal(0.9, 0.02, n)
        first, second = (list(common + rng.normal(0, 0.005, n)) for _ in range(2))
        found, independent = pair(first, second), stats.ttest_rel(first, second)
        assert found.p == pytest.approx(independent.pvalue, rel=1e-9)
        assert found.mean == pytest.approx(np.mean(first) - np.mean(second))
        assert found.interval == pytest.approx(tuple(independent.confidence_interval(0.95)))


def test_only_seeds_that_both_have_are_paired() -> None:
    one = configurations([row("a", seed, 0.9 + 0.01 * seed) for seed in (0, 1, 2, 5)])[0]
    two = configurations([row("b", seed, 0.8 + 0.02 * seed) for seed in (1, 2, 3)])[0]
    found = comparison.difference(one, two)
    assert found is not None and found.seeds == (1, 2)
    assert found.mean == pytest.approx(((0.91 - 0.82) + (0.92 - 0.84)) / 2)
    assert comparison.difference(one, configurations([row("b", 7)])[0]) is None


def test_one_pair_and_equal_pairs_give_no_test() -> None:
    single = pair([0.9], [0.8])
    assert (single.interval, single.p, single.resolvable) == (None, None, None) and "one seed" in single.remark
    for second in ([0.8, 0.7, 0.6], [0.9, 0.8, 0.7]):  # 0.9 - 0.8 and 0.8 - 0.7 differ in the last bit
        equal = pair([0.9, 0.8, 0.7], second)
        assert (equal.sd, equal.interval, equal.p, equal.resolvable) == (0.0, None, None, None)
        assert "same difference" in equal.remark and not equal.significant


def test_holm_by_hand() -> None:
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.5, 0.9]) == [1.0, 1.0]
    assert comparison.holm([]) == []


def test_holm_is_the_closure_of_bonferroni() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        p = list(rng.uniform(0, 0.2, 5))
        closed = [
            max(
                min(1, len(subset) * min(p[j] for j in subset))
                for size in range(1, 6)
                for subset in itertools.combinations(range(5), size)
                if i in subset
            )
            for i in range(5)
        ]
        assert comparison.holm(p) == pytest.approx(closed)


def test_all_pairs_of_a_sparsity_are_one_family() -> None:
    grid = only(rows(a=[0.9, 0.91, 0.93], b=[0.8, 0.83, 0.82], c=[0.7, 0.74, 0.71]))
    found = comparison.comparisons(grid.at(0.9))
    assert len(found) == 3
    values = [d.p for d in found if d.p is not None]
    assert [d.p_holm for d in found] == pytest.approx(comparison.holm(values))


def test_configurations_with_untrained_runs_are_in_no_comparison() -> None:
    runs = [*rows(a=[0.9, 0.91], b=[0.8, 0.83]), row("a", 2, 0.1, stopped="collapse")]
    assert comparison.comparisons(only(runs).at(0.9)) == []


@pytest.mark.parametrize("n", [2, 3, 5])
def test_what_n_seeds_resolve_is_found_in_four_of_five_simulations(n: int) -> None:
    rng = np.random.default_rng(n)
    drawn = rng.normal(comparison.resolvable(n), 1, (40_000, n))
    found = stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05
    assert np.mean(found) == pytest.approx(0.8, abs=4.5 * (0.8 * 0.2 / len(drawn)) ** 0.5)


def test_power_without_an_effect_is_the_level() -> None:
    for n in (2, 3, 10):
        assert comparison.power(0, n) == pytest.approx(0.05)


def test_many_seeds_approach_the_normal_approximation_and_few_need_more() -> None:
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert comparison.resolvable(5000) == pytest.approx(z / 5000**0.5, rel=1e-3)
    assert comparison.resolvable(3) > 1.8 * z / 3**0.5


def test_seeds_needed_are_the_fewest_that_resolve_the_effect() -> None:
    for effect in (12.0, 3.0, 1.0, 0.3, 0.1):
        n = comparison.seeds_needed(effect)
        assert n is not None and comparison.resolvable(n) <= effect
        assert n == 3 or comparison.resolvable(n - 1) > effect
    assert comparison.seeds_needed(0.0) is None and comparison.seeds_needed(1e-4) is None


def test_a_difference_says_what_its_seeds_resolve() -> None:
    found = pair([0.91, 0.93, 0.92, 0.95], [0.90, 0.91, 0.91, 0.92])
    sd = np.std([0.01, 0.02, 0.01, 0.03], ddof=1)
    assert found.resolvable == pytest.approx(sd * comparison.resolvable(4))
    assert found.seeds_needed == comparison.seeds_needed(0.0175 / sd)


def marked(**accuracies: list[float]) -> tuple[set[str], set[str]]:
    """What is bold, and what a test cannot tell from it."""
    grid = only(rows(**accuracies))
    untold, _ = comparison.not_below_best(grid, 0.9, comparison.comparisons(grid.at(0.9)))
    bold, untold = ({m.removesuffix("-1111bbbb") for m in found} for found in (comparison.best(grid, 0.9), untold))
    return bold, untold


def test_bold_is_the_best_mean_and_another_mark_what_cannot_be_told_from_it() -> None:
    best, near = [0.90, 0.91, 0.92, 0.93], [0.901, 0.905, 0.922, 0.928]
    far = [0.70, 0.712, 0.718, 0.731]
    assert marked(a=best, b=near, c=far) == ({"a"}, {"b"})
    assert marked(a=best, b=near) == ({"a"}, {"b"})
    assert marked(a=best, c=far) == ({"a"}, set())
    assert marked(a=best) == (set(), set())  # better than nothing
    assert marked(dense=[0.99, 0.98, 0.97, 0.985], a=best, c=far) == ({"a"}, set())  # dense is no method
    assert marked(snip=[0.13, 0.10, 0.13], synflow=[0.35, 0.31, 0.48])[0] == {"synflow"}


def untested(**accuracies: list[float]) -> tuple[set[str], set[str], set[str]]:
    """What is bold, what a test does not show to be below it, and what was not tested against it."""
    grid = only(rows(**accuracies))
    marks = comparison.not_below_best(grid, 0.9, comparison.comparisons(grid.at(0.9)))
    bold, untold, others = (
        {m.removesuffix("-1111bbbb") for m in found} for found in (comparison.best(grid, 0.9), *marks)
    )
    return bold, untold, others


def test_a_method_with_fewer_seeds_is_not_ranked_and_no_test_is_said_to_be_none() -> None:
    best, near = [0.90, 0.91, 0.92, 0.93, 0.92], [0.901, 0.905, 0.922, 0.928, 0.92]
    far = [0.70, 0.712, 0.718, 0.731, 0.72]
    assert untested(a=best, b=near, c=far, d=[0.99]) == ({"a"}, {"b"}, {"d"})
    assert untested(a=best, b=near[:2], c=far) == ({"a"}, set(), {"b"})
    shifted = [value - 0.01 for value in best]  # by the same in every seed: its spread is not known
    assert untested(a=best, b=shifted, c=far) == ({"a"}, set(), {"b"})
    # With few seeds, and better in these: it may not look worse.
    assert untested(a=[0.940, 0.9412, 0.9419, 0.90, 0.90], b=[0.950, 0.9513, 0.9521], c=far) == ({"a"}, {"b"}, set())
    assert untested(a=best[:2], b=far[:2]) == ({"a"}, set(), set())  # nothing was tested, which a warning says
    tied = untested(a=best, b=[*best[1:], best[0]], c=far)
    assert tied == ({"a", "b"}, set(), set())


def test_fewer_than_three_seeds_are_not_tested() -> None:
    for n, words in ((1, "one seed"), (2, "two seeds")):
        found = pair([0.9, 0.91][:n], [0.1, 0.13][:n])
        assert (found.p, found.p_holm, found.interval, found.seeds_needed, found.resolvable) == (None,) * 5
        assert found.remark == f"{words}: no interval and no test"
        assert marked(a=[0.9, 0.91][:n], b=[0.1, 0.13][:n]) == ({"a"}, set())
