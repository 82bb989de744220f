"""From rows to statistics: configurations, missing ones, paired differences, corrections, what seeds can tell apart."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from pai_bench.config.composition import CONF
from pai_bench.errors import ConfigError, DataError
from pai_bench.report import comparison, evidence, names, palette, reading
from pai_bench.report.comparison import Difference
from pai_bench.report.configurations import Configuration, Grid, configurations, grids, spread


def row(method: str = "snip", seed: int = 0, accuracy: float | None = 0.9, sparsity: float = 0.9, **others: Any) -> Any:
    """A result row as a run writes it; the pruner called dense is one without rounds."""
    dense = method == "dense"
    target = 0.0 if dense else sparsity
    made = {
        "task": "digits-resnet20-0000aaaa",
        "method": f"{method}-1111bbbb",
        "protocol": 1,
        "seed": seed,
        "group": "",
        "dataset": "digits",
        "model": "resnet20",
        "pruner": method.split("@")[0],
        "allocation": "global",
        "schedule": "none" if dense else "one_shot",
        "ablation": "none",
        "training": "digits",
        "target_sparsity": target,
        "sparsity": target,
        "density": 1 - target,
        "filter_sparsity": None,
        "effective_sparsity": target,
        "num_rounds": 0 if dense else 1,
        "epochs": 2,
        "num_classes": 10,
        "collapsed_layers": [],
        "output_depends_on_input": True,
        "stopped": None,
        "mask": None,
        "weights": None,
        "test_top1": accuracy,
        "best_test_top1": None if accuracy is None else accuracy + 0.01,
        "test_top1_at_best_validation": None,
        "macs_masked": 1000,
        "score_examples": 0 if dense else 100,
        "search_train_examples": 0,
        "train_examples": 400,
        "score_flops": 10**9,
        "search_train_flops": 0,
        "train_flops": 10**12,
        "prune_seconds": 0.5,
        "train_seconds": 8.0,
        "total_seconds": 10.0,
        "hardware": "a cpu",
        "dataset_checksum": "cafe" * 16,
    } | others
    name = f"{made['task']}-{made['method']}-s{made['target_sparsity']:g}-seed{seed}-{made['dataset_checksum'][:4]}"
    return {"id": name, **made}


ACCURACIES = {"snip": [0.91, 0.93, 0.92], "synflow": [0.95, 0.955, 0.945], "random": [0.80, 0.84, 0.83]}


def rows(sparsities: tuple[float, ...] = (0.9,), **accuracies: list[float]) -> list[Any]:
    return [
        row(method, seed, accuracy, sparsity)
        for method, values in (accuracies or ACCURACIES).items()
        for seed, accuracy in enumerate(values)
        for sparsity in sparsities
    ]


def only(rows: list[Any], statistic: str = "last") -> Grid:
    (grid,) = grids(configurations(rows, statistic))
    return grid


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
    (configuration,) = configurations([row(seed=0), row(seed=1, accuracy=0.1, stopped="collapse")])
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
    untold = comparison.not_told_from_best(grid, 0.9, comparison.comparisons(grid.at(0.9)))
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


def test_fewer_than_three_seeds_are_not_tested() -> None:
    for n, words in ((1, "one seed"), (2, "two seeds")):
        found = pair([0.9, 0.91][:n], [0.1, 0.13][:n])
        assert (found.p, found.p_holm, found.interval, found.seeds_needed, found.resolvable) == (None,) * 5
        assert found.remark == f"{words}: no interval and no test"
        assert marked(a=[0.9, 0.91][:n], b=[0.1, 0.13][:n]) == ({"a"}, set())


# What lies beside the rows --------------------------------------------------------------------------------------------


def directory(parent: Path, run: dict[str, Any], mask: dict[str, Any] | None = None, curve: Any = ()) -> Path:
    """A run directory: its row, its mask, and its test accuracy by epoch."""
    path = parent / run["id"]
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(run))
    mask = mask or {"conv.weight": np.array([[1, 0], [1, 1]]), "fc.weight": np.array([1, 0, 0, 0, 0])}
    layers = [{"name": n, "size": m.size, "kept": int(m.sum()), "density": float(m.mean())} for n, m in mask.items()]
    (path / "mask.json").write_text(json.dumps({"layers": layers}))
    norms = {"norm.weight": np.ones(2, bool)}  # held at zero too where filters are pruned
    save_file({name: m.astype(bool) for name, m in mask.items()} | norms, path / "mask.safetensors")
    lines = ["epoch,test_loss,test_top1", *(f"{epoch},1.5,{accuracy}" for epoch, accuracy in curve)]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    return path


def masked(tmp_path: Path, **masks: list[int]) -> tuple[Grid, dict[str, Path]]:
    runs = {method: row(method) for method in masks}
    paths = {r["id"]: directory(tmp_path, r, {"w": np.array(masks[method])}) for method, r in runs.items()}
    return only(list(runs.values())), paths


def test_overlap_by_hand(tmp_path: Path) -> None:
    grid, paths = masked(tmp_path, a=[1, 1, 1, 0, 0, 0, 0, 0], b=[0, 1, 1, 1, 1, 0, 0, 0])
    unreadable = evidence.Unreadable()
    seed, (pair,) = evidence.overlaps(grid, 0.9, paths, unreadable)
    assert seed == 0 and not unreadable.paths
    assert (pair.kept_first, pair.kept_second, pair.common) == (3, 4, 2)
    assert pair.jaccard == pytest.approx(2 / 5) and pair.of_smaller == pytest.approx(2 / 3)


def test_chance_is_what_random_masks_of_the_same_layers_have_in_common(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes, kept = (40, 200), {"a": (30, 20), "b": (10, 60)}

    def drawn(method: str) -> dict[str, Any]:
        return {str(i): rng.permutation(np.arange(size) < kept[method][i]) for i, size in enumerate(sizes)}

    runs = [row("a"), row("b")]
    paths = {r["id"]: directory(tmp_path, r, drawn(r["pruner"])) for r in runs}
    _, (pair,) = evidence.overlaps(only(runs), 0.9, paths, evidence.Unreadable())
    trials = [(drawn("a"), drawn("b")) for _ in range(2000)]
    counts = [sum(int((a[name] & b[name]).sum()) for name in a) for a, b in trials]
    assert pair.common_by_chance == pytest.approx(np.mean(counts), abs=4.5 * np.std(counts) / 2000**0.5)


def test_overlaps_take_the_seed_that_most_methods_have(tmp_path: Path) -> None:
    runs = [row("a", 0), row("a", 1), row("b", 1), row("c", 2)]
    paths = {r["id"]: directory(tmp_path, r) for r in runs}
    seed, found = evidence.overlaps(only(runs), 0.9, paths, evidence.Unreadable())
    assert seed == 1 and [(pair.first[0], pair.second[0]) for pair in found] == [("a", "b")]
    assert evidence.overlaps(only([row("a", 0), row("b", 1)]), 0.9, paths, evidence.Unreadable()) == (None, [])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    grid, paths = masked(tmp_path, a=[1, 0], b=[1, 0], c=[0, 1])
    first, second, _ = paths.values()
    (first / "mask.safetensors").unlink()
    (second / "mask.json").write_text("{")
    unreadable = evidence.Unreadable()
    _, found = evidence.overlaps(grid, 0.9, paths, unreadable)
    assert found == [] and set(unreadable.paths) == {first / "mask.safetensors", second / "mask.json"}


def test_layers_are_means_over_seeds(tmp_path: Path) -> None:
    densities = {0: [1, 1, 0, 0], 1: [1, 0, 0, 0], 2: [1, 1, 1, 1]}
    runs = [row(seed=seed) for seed in densities]
    paths = {r["id"]: directory(tmp_path, r, {"w": np.array(densities[r["seed"]])}) for r in runs}
    (layer,) = evidence.layers(configurations(runs)[0], paths, evidence.Unreadable())
    assert (layer.name, layer.size, layer.density.seeds) == ("w", 4, (0, 1, 2))
    assert layer.density.mean == pytest.approx(np.mean([0.5, 0.25, 1]))
    assert layer.density.sd == pytest.approx(np.std([0.5, 0.25, 1], ddof=1))


def test_curves_are_means_over_the_seeds_that_reached_an_epoch(tmp_path: Path) -> None:
    curves = {0: [(0.0, 0.1), (1.0, 0.5), (2.0, 0.9)], 1: [(0.0, 0.2), (1.0, 0.7)]}
    runs = [row(seed=seed) for seed in curves]
    paths = {r["id"]: directory(tmp_path, r, curve=curves[r["seed"]]) for r in runs}
    found = evidence.curve(configurations(runs)[0], paths, evidence.Unreadable())
    assert {epoch: value.mean for epoch, value in found.items()} == pytest.approx({0.0: 0.15, 1.0: 0.6, 2.0: 0.9})
    assert found[2.0].sd is None and found[2.0].seeds == (0,)


def test_long_curves_keep_their_ends(tmp_path: Path) -> None:
    run = row()
    path = directory(tmp_path, run, curve=[(float(epoch), 0.5) for epoch in range(1001)])
    found = list(evidence.curve(configurations([run])[0], {run["id"]: path}, evidence.Unreadable()))
    assert len(found) == evidence.EPOCHS_SHOWN and (found[0], found[-1]) == (0.0, 1000.0)


# Names ----------------------------------------------------------------------------------------------------------------


def labels(tmp_path: Path, *runs: dict[str, Any]) -> list[str]:
    paths = {r["id"]: tmp_path / r["id"] for r in runs}
    looks = names.looks(configurations(runs), paths)
    return [looks[r["method"]].label for r in runs]


def test_methods_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    alone = row("snip")
    assert labels(tmp_path, alone, row("synflow")) == ["snip", "synflow"]
    shuffled = row("snip@2", ablation="shuffle_mask")
    assert labels(tmp_path, alone, shuffled) == ["snip", "snip, shuffle_mask"]
    rounds = row("snip@3", schedule="exponential")
    assert labels(tmp_path, alone, rounds) == ["snip, one_shot", "snip, exponential"]


def test_methods_are_called_by_the_label_of_their_pruner(tmp_path: Path) -> None:
    runs = [row("snip"), row("synflow"), row("mine")]
    for label, run in zip(("SNIP", "SynFlow", "null"), runs, strict=True):
        (tmp_path / run["id"]).mkdir()
        (tmp_path / run["id"] / "config.yaml").write_text(f"pruner: {{name: {run['pruner']}, label: {label}}}\n")
    assert labels(tmp_path, *runs) == ["SNIP", "SynFlow", "mine"]


def test_methods_that_differ_in_a_setting_are_called_by_it(tmp_path: Path) -> None:
    runs = [row("snip@1"), row("snip@2")]
    for total, run in zip((100, 256), runs, strict=True):
        (tmp_path / run["id"]).mkdir()
        text = f"pruner:\n  name: snip\n  mode: eval\n  scoring_data: {{total: {total}}}\nseed: {total}\n"
        (tmp_path / run["id"] / "config.yaml").write_text(text)
    assert labels(tmp_path, *runs) == ["snip, pruner.scoring_data.total=100", "snip, pruner.scoring_data.total=256"]


def test_methods_without_a_config_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    runs = [row("snip@1") | {"method": "snip-aaaa0000"}, row("snip@2") | {"method": "snip-bbbb0000"}]
    assert labels(tmp_path, *runs) == ["snip, aaaa0000", "snip, bbbb0000"]


def test_tasks_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [row(), row(task="digits-resnet20-ffff0000"), row(model="vgg16", task="digits-vgg16-00001111")]
    runs += [row(task="digits-resnet20-ffff0000", dataset_checksum="beef" * 16)]
    paths = {}
    for epochs, run in zip((20, 40, 20, 40), runs, strict=True):
        paths[run["id"]] = tmp_path / run["id"]
        paths[run["id"]].mkdir()
        (paths[run["id"]] / "config.yaml").write_text(f"training: {{epochs: {epochs}}}\n")
    found = names.tasks(grids(configurations(runs)), paths)
    assert set(found.values()) == {
        "digits, resnet20, training.epochs=20",
        "digits, resnet20, training.epochs=40, images cafecafe",
        "digits, resnet20, training.epochs=40, images beefbeef",
        "digits, vgg16",
    }


def test_no_two_methods_look_alike(tmp_path: Path) -> None:
    runs = [row(f"method{i}") for i in range(42)]
    looks = names.looks(
        configurations([*runs, row("dense")]), {r["id"]: tmp_path for r in runs} | {row("dense")["id"]: tmp_path}
    )
    assert len({(look.colour, look.marker) for look in looks.values()}) == 43


def look(tmp_path: Path, *runs: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    found = names.looks(configurations(list(runs)), {run["id"]: tmp_path for run in runs})
    return {run["method"]: (one.colour, one.marker, one.dash) for run in runs for one in [found[run["method"]]]}


def test_a_method_looks_the_same_whatever_stands_beside_it(tmp_path: Path) -> None:
    pruners = ["random", "magnitude", "snip", "grasp", "synflow", "force", "iter_snip"]
    together = look(tmp_path, *(row(pruner) for pruner in pruners))
    for pruner in pruners:
        assert (
            look(tmp_path, row(pruner), row("a"), row("mine"))[f"{pruner}-1111bbbb"] == together[f"{pruner}-1111bbbb"]
        )
    assert len({colour for colour, _, _ in together.values()}) == len(pruners)
    shuffled = row("snip@2", ablation="shuffle_mask")
    assert look(tmp_path, row("snip"), shuffled)["snip-1111bbbb"] == together["snip-1111bbbb"]


def test_an_unknown_method_has_a_stable_look_that_nothing_shown_has(tmp_path: Path) -> None:
    alone = look(tmp_path, row("mine"))["mine-1111bbbb"]
    assert alone == look(tmp_path, row("mine"))["mine-1111bbbb"] and alone[2] == "solid"
    known = ["random", "magnitude", "snip", "grasp", "synflow"]  # one colour is free
    found = look(tmp_path, row("mine"), *(row(pruner) for pruner in known))
    assert len({colour for colour, _, _ in found.values()}) == 6


def test_every_pruner_has_a_look_of_its_own() -> None:
    assert set(palette.OF_PRUNER) == {path.stem for path in (CONF / "pruner").glob("*.yaml")} - {"dense"}
    assert len({style[:2] for style in palette.OF_PRUNER.values()}) == len(palette.OF_PRUNER)


def test_sparsities_are_written_with_the_digits_they_need() -> None:
    assert [names.compression(s) for s in (0.9, 0.98, 0.966666666667, 0.9999, 1 - 1 / 12345)] == [
        "10×",
        "50×",
        "30×",
        "10,000×",
        "12,345×",
    ]
    assert [names.sparsity(s) for s in (0.5, 0.98, 0.966666666667, 0.996666666667, 0.9999)] == [
        "50 %",
        "98 %",
        "96.7 %",
        "99.67 %",
        "99.99 %",
    ]


# Reading --------------------------------------------------------------------------------------------------------------


def test_broken_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    directory(tmp_path, row(seed=0))
    for seed, text in enumerate(
        [
            "{",
            "[]",
            json.dumps(row(seed=9) | {"test_top1": "high"}),
            json.dumps({"id": "x"}),
            json.dumps(row(seed=9)).replace("0.5", "NaN"),
            json.dumps(row(seed=9, task="../../evil")),
            json.dumps(row(seed=9, dataset="\ud800")),
        ],
        1,
    ):
        path = directory(tmp_path, row(seed=seed))
        (path / "result.json").write_text(text)
    results = reading.read(tmp_path)
    assert [r["seed"] for r in results.rows] == [0]
    reasons = " ".join(results.refused.values())
    assert len(results.refused) == 7 and "its test_top1 is 'high'" in reasons and "it holds no row" in reasons


def test_a_copy_of_a_run_counts_once(tmp_path: Path) -> None:
    directory(tmp_path, row())
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "result.json").write_text(json.dumps(row()))
    results = reading.read(tmp_path)
    assert len(results.rows) == 1
    ((name, reason),) = results.refused.items()
    assert {name, *reason.split()} >= {"copy"} and "the same run" in reason


def test_unfinished_runs_are_named_with_their_state(tmp_path: Path) -> None:
    directory(tmp_path, row())
    for name, state in (("one", {"state": "failed", "error": "no luck"}), ("two", {"state": "preempted"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps(state))
    (tmp_path / ".cache").mkdir()
    found = reading.read(tmp_path).unfinished
    assert {name: state.name for name, state in found.items()} == {"one": "failed", "two": "preempted"}


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no runs"):
        reading.read(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        reading.read(tmp_path / "nowhere")
    path = directory(tmp_path, row())
    with pytest.raises(DataError, match="a run's own directory"):
        reading.read(path)
    with pytest.raises(DataError, match="no run has the task"):
        reading.read(tmp_path, lambda row: False)


def test_configurations_are_usable_without_a_report() -> None:
    found = {
        (configuration.rows[0]["pruner"], configuration.sparsity): configuration.mean
        for configuration in configurations(rows((0.9, 0.99)))
    }
    assert isinstance(found["snip", 0.99], float) and len(found) == 6
    assert all(isinstance(configuration, Configuration) for configuration in configurations(rows()))
