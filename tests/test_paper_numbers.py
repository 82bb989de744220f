"""Numbers of papers: typed without slips, and in reach of experiments."""

import math
import tomllib
from collections import Counter
from itertools import groupby, pairwise
from statistics import fmean, median

import pytest
from conftest import ROOT
from published_runs import FIGURE_6, NUM_CLASSES, NUMBERS, exponent

from pai_bench.config import identity
from pai_bench.config.schema import plain
from pai_bench.launch import compose
from pai_bench.published import matching, numbers

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
