"""Numbers of papers: typed without slips and in reach of experiments; verdicts whose statistics hold."""

import csv
import json
import math
import random
import runpy
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import published_runs
import pytest
from conftest import ROOT
from published_runs import NUMBERS, written
from scipy import stats

from pai_bench.config import identity
from pai_bench.config.schema import plain
from pai_bench.errors import ConfigError, DataError
from pai_bench.launch import compose, terminal
from pai_bench.published import matching, numbers
from pai_bench.published.matching import MISSING, NO_EXPERIMENT, NOT_COMPARABLE
from pai_bench.published.numbers import Number
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

FIGURE_6 = [n for n in NUMBERS if n.table.name.startswith("Figure 6") and n.table.quantity == "best_test_top1"]
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}


def exponent(number: Number) -> float:
    assert number.target
    return float(number.target.removeprefix("log10_compression="))


def find(table: str, *values: str) -> Number:
    (number,) = [n for n in NUMBERS if n.table.name == table and {*values} <= {*n.settings.values(), n.target}]
    return number


# The data -------------------------------------------------------------------------------------------------------------


def test_every_number_says_where_it_is_from() -> None:
    for number in NUMBERS:
        assert number.table.source and number.table.title and number.table.evidence in numbers.EVIDENCE
        assert number.num_runs is None or number.num_runs >= 1
        assert number.sd is None or number.sd >= 0
        assert math.isfinite(number.value) and number.value >= 0
        assert (number.density is None) == (number.table.quantity in ("critical_compression", "collapse_threshold"))
        assert (number.layer is not None) == (number.table.quantity == "layer_density")
        if number.table.quantity in ("layer_density", "multiply_adds"):
            assert number.value <= 1 and number.rounding <= max(0.25 * number.value, 1e-4)


def test_the_last_digit_is_that_which_is_written() -> None:
    halves = {text: numbers._half_digit(text) for text in ("92.1", "1", "1.000", "1e-3", "2.5e-4")}
    assert halves == pytest.approx({"92.1": 0.05, "1": 0.5, "1.000": 5e-4, "1e-3": 5e-4, "2.5e-4": 5e-6})


def test_no_number_is_there_twice() -> None:
    count = Counter((n.table.paper, n.table.name, n.label) for n in NUMBERS)
    twice = {key for key, times in count.items() if times > 1}
    assert {name for _, name, _ in twice} == set()


def test_layer_densities_make_up_the_target() -> None:
    """VGG-16 for 100 classes: what is typed of its layers adds up to the compression of its row."""
    sizes = [1728, 36864, 73728, 147456, 294912, 589824, 589824, 1179648, *[2359296] * 5, 51200]
    of_vgg16 = [n for n in NUMBERS if n.table.name.startswith("Layer densities of VGG-16")]
    for (_, _, target), row in groupby(of_vgg16, key=lambda n: (n.table.name, n.settings["pruner"], n.target)):
        layers = list(row)
        assert [n.layer for n in layers] == list(range(1, 15)), target
        kept = sum(n.value * size for n, size in zip(layers, sizes, strict=True))
        assert kept / sum(sizes) == pytest.approx(layers[0].density, rel=0.03), target


def test_figure_6_has_every_cell() -> None:
    assert len(FIGURE_6) == 12 * 5 * 13
    assert all(n.num_runs == 3 and n.sd is not None and n.table.evidence == "V" for n in FIGURE_6)
    grid = {step / 4 for step in range(13)}
    rows = Counter(
        (n.settings["dataset"], n.settings["model"], n.settings["pruner"], "Wide" in n.table.name) for n in FIGURE_6
    )
    assert set(rows.values()) == {13} and len(rows) == 60
    assert {exponent(n) for n in FIGURE_6} == grid


def test_a_spread_of_zero_is_that_of_chance() -> None:
    for number in FIGURE_6:
        chance = 1 / NUM_CLASSES[number.settings["dataset"]]
        assert number.value >= chance - 1e-9
        if number.sd == 0:
            assert number.value == pytest.approx(chance, abs=1e-9), number.label


def test_as_many_cells_sit_at_chance_as_were_counted_in_the_arrays() -> None:
    at_chance = [n for n in FIGURE_6 if n.value < 1 / NUM_CLASSES[n.settings["dataset"]] + 0.001]
    assert Counter(n.settings["pruner"] for n in at_chance) == {"magnitude": 77, "grasp": 16, "random": 12}


@pytest.mark.parametrize(
    ("pruner", "medians", "greatest"),
    [
        ("random", (0.18, 0.33, 1.48), None),
        ("magnitude", (0.16, 0, 0), 9.9),
        ("snip", (0.22, 1.04, 2.47), None),
        ("grasp", (0.20, 0.30, 0.89), 26.9),
        ("synflow", (0.17, 0.21, 0.20), None),
    ],
)
def test_the_spreads_have_the_medians_that_were_computed_from_the_arrays(
    pruner: str, medians: tuple[float, ...], greatest: float | None
) -> None:
    """Over panels, at log10 compression 0 to 1, to 2 and to 3: a slip of the pen would move one."""
    of_pruner = [n for n in FIGURE_6 if n.settings["pruner"] == pruner]
    for (low, high), expected in zip(((0, 1), (1.25, 2), (2.25, 3)), medians, strict=True):
        found = median(100 * (n.sd or 0) for n in of_pruner if low <= exponent(n) <= high)
        assert found == pytest.approx(expected, abs=0.011)
    if greatest:
        assert 100 * max(n.sd or 0 for n in of_pruner) == pytest.approx(greatest, abs=0.05)


def test_resnet18_and_what_is_called_wide_differ_by_chance_alone() -> None:
    """Up to compression 10 their mean difference over methods and datasets is nil, as of two draws from one network."""

    def mean_accuracy(wide: bool) -> float:
        return fmean(
            n.value
            for n in FIGURE_6
            if n.settings["model"] == "resnet18" and ("Wide" in n.table.name) == wide and exponent(n) <= 1
        )

    assert mean_accuracy(True) == pytest.approx(mean_accuracy(False), abs=2e-4)


def test_published_curves_fall() -> None:
    """Means of three runs fall with compression but for their spread; a digit too many would stand out."""
    for _, curve in groupby(FIGURE_6, key=lambda n: (n.table.name, tuple(n.settings.items()))):
        points = sorted(curve, key=exponent)
        for before, after in pairwise(points):
            room = 0.005 + 3 * max(before.sd or 0, after.sd or 0)
            assert after.value <= before.value + room, after.label


def test_the_wheel_has_the_papers() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    globs = settings["package-data"]["pai_bench.published"]
    folder = numbers.PAPERS.parent
    packaged = {path for pattern in globs for path in folder.glob(pattern)}
    assert packaged == set(numbers.PAPERS.iterdir())


# The recipes ----------------------------------------------------------------------------------------------------------

CURVES = {}
for _number in NUMBERS:
    if _number.table.recipe is not None:
        CURVES.setdefault(matching.overrides(_number), []).append(_number)
EXPERIMENTS = sorted({w for words in CURVES for w in words if w.startswith("experiment=")})


def some(curves: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first and the last of the curves of each recipe: composing all takes as long as a sweep's submission."""
    return [curves[0], *curves[-1:]] if len(curves) > 1 else curves


def options_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a recipe that choose options. The others only give values."""
    return tuple(word for word in words if "." not in word.partition("=")[0] and not word.startswith("density="))


# Numbers of one recipe and the same options differ in values alone: the first and the last stand for all.
PLAIN = {}
for _words in (words for words in CURVES if not words[0].startswith("experiment=")):
    PLAIN.setdefault((CURVES[_words][0].table.recipe, options_of(_words)), []).append(_words)


@pytest.mark.parametrize("words", [w for alike in PLAIN.values() for w in some(alike)], ids=" ".join)
def test_recipes_without_an_experiment_compose(words: tuple[str, ...]) -> None:
    (cfg,) = compose.expand(list(words))[0]
    assert 1 - cfg.sparsity == pytest.approx(CURVES[words][0].density)


SAMPLED = [
    words
    for _, group in groupby(
        sorted(w for w in CURVES if w[0].startswith("experiment=")), key=lambda w: CURVES[w][0].table.recipe
    )
    for words in some(list(group))
]


@pytest.mark.parametrize("words", SAMPLED, ids=" ".join)
def test_a_published_number_is_a_run_of_its_experiment(words: tuple[str, ...]) -> None:
    cfgs, _ = compose.expand(list(words))
    for cfg in cfgs:  # one curve and not several
        assert identity.differences(plain(cfgs[0]), plain(cfg), {"sparsity"}) == {}
    for number in CURVES[words]:
        for key, value in matching.settings(number).items():
            if key in numbers.NETWORK:
                assert getattr(cfgs[0], key).name == value
        if number.density is not None:
            found = [cfg for cfg in cfgs if math.isclose(1 - cfg.sparsity, number.density, rel_tol=0.002)]
            assert len(found) == 1, number.label


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_of_papers_exist(experiment: str) -> None:
    assert (ROOT / "conf" / "experiment" / f"{experiment.partition('=')[2]}.yaml").is_file()


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


def test_numbers_without_training_are_judged_by_their_tolerance() -> None:
    assert judge_exactly(0.4138, 0.42, 0.003, 0.005).name == REPRODUCED
    assert judge_exactly(0.4138, 0.42, 0.001, 0.005).name == DEVIATES
    assert judge_exactly(2.75, 3.0, 0.25).name == REPRODUCED
    assert judge_exactly(2.5, 3.0, 0.25).name == DEVIATES


# Runs and numbers -----------------------------------------------------------------------------------------------------

Write = Callable[..., list[dict[str, Any]]]
LAST_EPOCH = [n for n in NUMBERS if n.table.name == "Figure 6, last epoch"]
DENSITIES = [n for n in NUMBERS if n.table.name == "Layer densities of VGG-16"]
SYNFLOW = find("Figure 6", "cifar100", "vgg16", "synflow", "log10_compression=1")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes finished runs of a number's recipe."""
    return partial(written, tmp_path)


def compared(rows: list[dict[str, Any]], root: Path, chosen: list[Number] = NUMBERS) -> dict[str, matching.Comparison]:
    return published_runs.compared(rows, root, chosen)


def test_runs_of_the_recipe_are_judged_by_the_papers_statistic(write: Write, tmp_path: Path) -> None:
    rows = write(SYNFLOW, [0.7200, 0.7225, 0.7210, 0.7205, 0.7215])
    found = compared(rows, tmp_path, FIGURE_6 + LAST_EPOCH)
    best, last = found[f"Figure 6: {SYNFLOW.label}"], found[f"Figure 6, last epoch: {SYNFLOW.label}"]
    assert best.name == REPRODUCED and best.ours == sample([row["best_test_top1"] for row in rows])
    assert last.ours == sample([row["test_top1"] for row in rows])
    assert len(found) == 2


def test_a_smoke_run_is_no_reproduction(write: Write, tmp_path: Path) -> None:
    rows = write(SYNFLOW, [0.72, 0.721, 0.7205], {"training.epochs": 2, "training.lr": 0.2})
    comparison = compared(rows, tmp_path, [SYNFLOW])[f"Figure 6: {SYNFLOW.label}"]
    assert comparison.name == NOT_COMPARABLE and comparison.verdict is None
    assert comparison.reason == "training.epochs=2, published 160; training.lr=0.2, published 0.1"


def test_what_cannot_change_a_result_makes_no_difference(write: Write, tmp_path: Path) -> None:
    changes = {"device": "cpu", "results_dir": "elsewhere", "training.compact": "off", "training.name": "mine"}
    rows = write(SYNFLOW, [0.72, 0.721, 0.7205], changes)
    assert compared(rows, tmp_path, [SYNFLOW])[f"Figure 6: {SYNFLOW.label}"].name != NOT_COMPARABLE


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.95},
        {"dataset.name": "cifar10"},
        {"pruner.name": "snip"},
        {"ablation.name": "shuffle_mask", "ablation.mask": {"_target_": "pai_bench.pruning.ablations.shuffle_mask"}},
    ],
)
def test_what_is_another_experiment_is_not_listed_beside_a_number(
    changes: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    rows = write(SYNFLOW, [0.72], changes)
    assert matching.compare([SYNFLOW], rows, tmp_path / "results", Rule())[0].name == MISSING


def test_at_compression_1_every_method_is_the_dense_network(write: Write, tmp_path: Path) -> None:
    dense = find("Figure 6", "cifar10", "vgg16", "magnitude", "log10_compression=0")
    rows = write(dense, [0.935, 0.936, 0.934])
    assert rows[0]["pruner"] == "dense"
    found = compared(rows, tmp_path)
    assert len(found) == 5 and all(comparison.name in (REPRODUCED, UNDERPOWERED) for comparison in found.values())


def test_one_resnet18_stands_beside_both_panels(write: Write, tmp_path: Path) -> None:
    number = find("Figure 6", "cifar10", "resnet18", "synflow", "log10_compression=2")
    found = compared(write(number, [0.904, 0.903, 0.905]), tmp_path)
    assert [name.split(":")[0] for name in found] == ["Figure 6", "Figure 6, panels called WideResNet-18"]


def test_the_reversed_grasp_is_not_grasp(write: Write, tmp_path: Path) -> None:
    number = find("Figure 6, GraSP of reversed sign", "cifar10", "vgg16", "log10_compression=1")
    rows = write(number, [0.92], {"pruner.score.temperature": 200.0, "ablation.scores": None, "ablation.name": "none"})
    (comparison,) = compared(rows, tmp_path).values()
    assert comparison.name == NOT_COMPARABLE and "pruner.score.temperature=200, published 1" in comparison.reason
    assert compared(write(number, [0.92]), tmp_path).popitem()[1].name != NOT_COMPARABLE


def mask_json(rows: list[dict[str, Any]], root: Path, layers: list[tuple[int, float]]) -> None:
    for row in rows:
        content = {"layers": [{"size": size, "density": density} for size, density in layers]}
        (root / "results" / row["id"] / "mask.json").write_text(json.dumps(content))


def test_densities_of_layers_are_verified_whatever_the_training(write: Write, tmp_path: Path) -> None:
    layers = DENSITIES[56:70]
    assert {n.label.partition(" layer")[0] for n in layers} == {
        "dataset=cifar100 model=vgg16 pruner=synflow log10_compression=2"
    }
    rows = write(layers[0], [0.1], {"training.epochs": 1, "on_collapse": "stop"})
    mask_json(rows, tmp_path, [(10**6, n.value) for n in layers[:-1]] + [(10**6, 1.1 * layers[-1].value)])
    found = list(compared(rows, tmp_path, layers).values())
    assert [c.name for c in found] == [REPRODUCED] * 13 + [DEVIATES]
    assert found[-1].ours and found[-1].ours.mean == pytest.approx(1.1 * layers[-1].value)
    rows = write(layers[0], [0.1], {"pruner.dtype": "float32"})
    assert compared(rows, tmp_path, layers[:1]).popitem()[1].name == NOT_COMPARABLE


def test_a_mask_that_was_trained_twice_counts_once(write: Write, tmp_path: Path) -> None:
    rows = write(DENSITIES[0], [0.1, 0.2]) + write(DENSITIES[0], [0.1], {"training.epochs": 1})
    mask_json(rows, tmp_path, [(1728, DENSITIES[0].value)])
    comparison = compared(rows, tmp_path, DENSITIES[:1]).popitem()[1]
    assert comparison.ours and comparison.ours.num == 2 and len(comparison.groups) == 2


def test_a_run_whose_mask_file_is_gone_is_no_reason_to_stop(write: Write, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    mask.write_bytes(b"a mask")
    rows = write(SYNFLOW, [0.72], {"allocation.mask": str(mask)})
    mask.unlink()
    comparison = compared(rows, tmp_path, [SYNFLOW]).popitem()[1]
    assert comparison.name == NOT_COMPARABLE and "cannot be read" in comparison.reason


def test_chance_moves_small_layers(write: Write, tmp_path: Path) -> None:
    layer = DENSITIES[-1]
    rows = write(layer, [0.1])
    for size, expected in ((100, REPRODUCED), (10**7, DEVIATES)):
        mask_json(rows, tmp_path, [(size, 2 * layer.value)] * 14)
        assert compared(rows, tmp_path, [layer]).popitem()[1].name == expected
    mask_json(rows, tmp_path, [(100, 0.1)] * 3)
    with pytest.raises(DataError, match="it has 3 layers"):
        compared(rows, tmp_path, [layer])


def test_multiply_adds_are_a_share_of_the_dense_network(write: Write, tmp_path: Path) -> None:
    number = find("Inference FLOPs of ERK", "sparsity=0.8")
    found = compared(write(number, [0.7], {"training.epochs": 0}, macs_masked=41.4), tmp_path, [number])
    assert found.popitem()[1].name == REPRODUCED
    found = compared(write(number, [0.7], {"allocation.kernel": False}), tmp_path, [number])
    assert found.popitem()[1].reason == "allocation.kernel=False, published True"


def curve(
    write: Write, tmp_path: Path, number: Number, last_whole: list[float], grid: list[float]
) -> list[dict[str, Any]]:
    """Runs of seeds whose layers are whole up to some log10 compression each."""
    rows = []
    for step in grid:
        cells = write(replace(number, density=10**-step), [0.1] * len(last_whole))
        for row, last in zip(cells, last_whole, strict=True):
            row["collapsed_layers"] = [] if step <= last else ["fc.weight"]
        mask_json(cells, tmp_path, [(1000, 0.1)] * 14)
        rows += cells
    return rows


def test_critical_compression_is_the_last_without_an_empty_layer(write: Write, tmp_path: Path) -> None:
    number = find("Figure 1, critical compression", "magnitude")
    grid = [2.25, 2.5, 2.75, 3.0]
    comparison = compared(curve(write, tmp_path, number, [2.75, 2.75, 2.5], grid), tmp_path, [number]).popitem()[1]
    assert comparison.name == REPRODUCED and comparison.ours
    assert comparison.ours.mean == pytest.approx(fmean([2.75, 2.75, 2.5])) and comparison.ours.num == 3


@pytest.mark.parametrize("grid", [[2.0, 2.25], [3.0], [2.0, 3.0]])
def test_a_collapse_that_no_run_brackets_is_missing(grid: list[float], write: Write, tmp_path: Path) -> None:
    number = find("Figure 1, critical compression", "magnitude")
    comparison = compared(curve(write, tmp_path, number, [2.5], grid), tmp_path, [number]).popitem()[1]
    assert comparison.name == MISSING and "known too roughly; seed 0" in comparison.reason


def test_fewer_weights_than_layers_leave_one_empty(write: Write, tmp_path: Path) -> None:
    """14,000,000 weights in 14 layers: beyond 10^6 no run is needed to know."""
    number = find("Figure 1, critical compression", "synflow")
    rows = curve(write, tmp_path, number, [6.0, 6.0, 5.75], [5.5, 5.75, 6.0])
    comparison = compared(rows, tmp_path, [number]).popitem()[1]
    assert comparison.ours and comparison.ours.mean == pytest.approx(17.75 / 3) and comparison.name == REPRODUCED


@pytest.mark.parametrize(("last_whole", "expected"), [(1.0, REPRODUCED), (1.25, DEVIATES)])
def test_a_threshold_lies_between_the_last_whole_and_the_first_empty_layer(
    last_whole: float, expected: str, write: Write, tmp_path: Path
) -> None:
    number = find("Where magnitude pruning empties the classifier of ResNet-18", "cifar10")
    rows = curve(write, tmp_path, number, [last_whole], [0.75, 1.0, 1.25, 1.5])
    assert compared(rows, tmp_path, [number]).popitem()[1].name == expected


def test_numbers_of_methods_that_are_not_here_say_why() -> None:
    found = [c for c in matching.compare(NUMBERS, [], Path(), Rule()) if c.name == NO_EXPERIMENT]
    assert found and all(c.reason for c in found)
    assert {c.number.table.paper for c in found} >= {"rigl", "jaxpruner", "rigl_reproducibility", "grasp"}


def test_what_is_asked_for_is_counted_missing_and_recalled_numbers_are_not() -> None:
    found = matching.compare(NUMBERS, [], Path(), Rule())
    assert {c.name for c in found} == {MISSING, NO_EXPERIMENT}
    failing = matching.not_reproduced(found)
    assert failing and all(c.name == MISSING and c.number.table.evidence != "R" for c in failing)


# The command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Verify = Callable[..., Ended]


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Runs the script on the results folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        terminal, "start_process", lambda: None
    )  # it is done once for a process, and other tests share it

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["verify.py", "results", *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
        except SystemExit as error:
            code = int(error.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


def test_the_command_prints_and_writes_verdicts(write: Write, tmp_path: Path, verify: Verify) -> None:
    write(SYNFLOW, [0.7200, 0.7225, 0.7210, 0.7205, 0.7215])
    other = find("Figure 6", "cifar100", "vgg16", "snip", "log10_compression=1")
    write(other, [0.60, 0.61], {"training.epochs": 1})
    done = verify("--only", "Figure 6", "vgg16", "-o", "verdicts.csv")
    assert done.code == 0 and done.err == ""
    assert "cifar100 vgg16 synflow log10_compression=1  72.11 ±0.10 (5)  72.08 ±0.35 (3)" in done.out
    assert "training.epochs=1, published 160" in done.out
    assert "margin 0.5 points" in done.out and "1 NOT COMPARABLE" in done.out
    with (tmp_path / "verdicts.csv").open() as file:
        records = list(csv.DictReader(file))
    assert {r["verdict"] for r in records} >= {REPRODUCED, NOT_COMPARABLE}
    (record,) = [r for r in records if r["pruner"] == "synflow" and r["quantity"] == "best_test_top1"]
    assert float(record["ours"]) == pytest.approx(0.7211) and float(record["published"]) == pytest.approx(0.7208)
    assert float(record["low"]) < float(record["difference"]) < float(record["high"])
    for name in ("verdicts.json", "verdicts.md"):
        assert verify("--only", "Figure 6", "-o", name).code == 0
    assert json.loads((tmp_path / "verdicts.json").read_text())["rule"]["margin"] == 0.005
    assert "| cifar100 vgg16 synflow log10_compression=1 | 72.11" in (tmp_path / "verdicts.md").read_text()


def test_exit_codes(write: Write, tmp_path: Path, verify: Verify) -> None:
    nothing = verify()
    assert nothing.code == 4 and "there are no finished runs" in nothing.err
    write(SYNFLOW, [0.7200, 0.7225, 0.7210, 0.7205, 0.7215])
    chosen = ["--only", "Figure 6, last epoch", "log10_compression=1"]
    loose = verify(*chosen, "--margin", "3", "--strict")
    assert loose.code == 0, loose.err
    strict = verify("--only", "Figure 6, last epoch", "--margin", "3", "--strict")
    assert strict.code == 5 and "3 of 4 numbers were not reproduced" in strict.err
    for wrong, says in (
        (["--only", "nonsense"], "--only nonsense"),
        (["-o", "verdicts.txt"], "ends in .csv"),
        (["-o", "nowhere/verdicts.csv"], "cannot be written"),
        (["--margin", "-1"], "--margin -1"),
        (["--papers", "results"], "no papers"),
    ):
        done = verify(*(chosen if "--only" not in wrong else []), *wrong)
        assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.err


def test_without_scipy_a_line_says_so(
    write: Write, tmp_path: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(SYNFLOW, [0.7200, 0.7225])
    monkeypatch.setitem(sys.modules, "scipy", None)
    done = verify("-o", "verdicts.csv")
    assert done.code == 2 and not (tmp_path / "verdicts.csv").exists()
    assert done.err == (
        "config error: intervals of verdicts need scipy, which is not installed: pip install scipy "
        "(it belongs to 'pai_bench[report]')\n"
    )


def test_nothing_heavy_is_imported(write: Write, tmp_path: Path) -> None:
    write(SYNFLOW, [0.72, 0.721])
    code = (
        "import sys, runpy; sys.argv = ['verify.py', 'results', '--only', 'Figure 6, last epoch'];"
        f"runpy.run_path({str(ROOT / 'scripts' / 'verify.py')!r}, run_name='__main__'); print(sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "UNDERPOWERED" in done.stdout or "DEVIATES" in done.stdout
    loaded = done.stdout.rsplit("[", 1)[1]
    assert "'torch'" not in loaded and "'wandb'" not in loaded


def test_damaged_files_are_named(write: Write, tmp_path: Path, verify: Verify) -> None:
    (row,) = write(SYNFLOW, [0.72])
    (tmp_path / "results" / row["id"] / "config.yaml").write_text("{")
    done = verify()
    assert done.code == 4 and f"{row['id']}/config.yaml: it is damaged" in done.err
    (tmp_path / "results" / row["id"] / "result.json").write_text("{")
    done = verify()
    assert done.code == 4 and f"{row['id']}/result.json: it is damaged" in done.err
