"""Masks as sketches of a matrix product: closed formulas against simulation in float64, the study, the sampled mask."""

import csv
import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from numpy.random import default_rng

from pai_bench.errors import ConfigError
from pai_bench.studies import sketches, sketching, sketching_figure
from pai_bench.studies.sketches import Array

NUM_MASKS = 200_000


@pytest.fixture
def x() -> Array:
    """(6, 12), columns of unlike norms."""
    rng = default_rng(1)
    return rng.normal(size=(6, 12)) * rng.uniform(0.3, 3, size=12)


@pytest.fixture
def initial() -> Array:
    """(12,), no weight near zero: then 1 / |w| has no tail, and a simulation converges."""
    rng = default_rng(2)
    return rng.uniform(0.4, 2, size=12) * rng.choice([-1, 1], size=12)


@pytest.fixture
def trained(initial: Array) -> Array:
    return initial + default_rng(3).normal(size=12)


def simulated(x: Array, w: Array, masks: Array) -> float:
    return float(sketches.errors(x, w, masks).mean())


def distributions(x: Array, w: Array) -> dict[str, Array]:
    norms = np.linalg.norm(x, axis=0)
    return {
        "optimal": sketches.optimal_probabilities(x, w),
        "data_free": sketches.data_free_probabilities(w),
        "uniform": sketches.uniform_probabilities(len(w)),
        "mixture": sketches.mixture(sketches.data_free_probabilities(w), 0.5),
        "squared_norms": norms**2 / (norms**2).sum(),
        "squared_weights": w**2 / (w**2).sum(),
    }


# The sketch -----------------------------------------------------------------------------------------------------------


def test_sketches_are_unbiased_with_the_variances_and_covariances_of_a_multinomial(x: Array, initial: Array) -> None:
    p, s = sketches.optimal_probabilities(x, initial), 6
    masks = sketches.draw_sketches(p, s, NUM_MASKS, default_rng(0))
    covariance = np.where(np.eye(12) > 0, (1 - p) / (s * p), -1 / s)
    deviation = np.sqrt(covariance.diagonal() / NUM_MASKS)
    assert (np.abs(masks.mean(0) - 1) < 4.5 * deviation).all()
    np.testing.assert_allclose(np.cov(masks.T), covariance, rtol=0.05, atol=0.03)
    product, spread = masks @ (x * initial).T, np.sqrt(sketches.sketch_error(x, initial, p, s) / NUM_MASKS)
    assert np.linalg.norm(product.mean(0) - x @ initial) < 4.5 * spread


@pytest.mark.parametrize("name", ["optimal", "data_free", "uniform", "mixture", "squared_norms", "squared_weights"])
@pytest.mark.parametrize("s", [3, 20], ids=["few_draws", "more_draws_than_coordinates"])
def test_error_of_a_sketch(x: Array, initial: Array, name: str, s: int) -> None:
    p = distributions(x, initial)[name]
    masks = sketches.draw_sketches(p, s, NUM_MASKS, default_rng(0))
    assert (np.abs(masks * s * p - np.round(masks * s * p)) < 1e-9).all()
    np.testing.assert_allclose((masks * s * p).sum(1), s)
    assert simulated(x, initial, masks) == pytest.approx(sketches.sketch_error(x, initial, p, s), rel=0.015)


def test_error_of_a_mask_from_the_start_at_the_end_of_training(x: Array, initial: Array, trained: Array) -> None:
    p, s = sketches.optimal_probabilities(x, initial), 5
    norms, product = np.linalg.norm(x, axis=0), x @ trained
    total = norms @ np.abs(initial)
    expected = (total * (norms * trained**2 / np.abs(initial)).sum() - product @ product) / s
    assert sketches.sketch_error(x, trained, p, s) == pytest.approx(expected)
    masks = sketches.draw_sketches(p, s, NUM_MASKS, default_rng(0))
    assert simulated(x, trained, masks) == pytest.approx(expected, rel=0.015)


def test_what_cannot_be_drawn_is_a_bias(x: Array, initial: Array) -> None:
    p = sketches.optimal_probabilities(x, np.where(np.arange(12) < 9, initial, 0))
    for s in (4, 30):
        masks = sketches.draw_sketches(p, s, NUM_MASKS, default_rng(0))
        assert not masks[:, 9:].any()
        assert simulated(x, initial, masks) == pytest.approx(sketches.sketch_error(x, initial, p, s), rel=0.015)
    coins = sketches.draw_bernoulli(p, 4, NUM_MASKS, default_rng(0))
    assert simulated(x, initial, coins) == pytest.approx(sketches.bernoulli_error(x, initial, p, 4), rel=0.015)


def test_probabilities_are_optimal(x: Array, initial: Array) -> None:
    p, s, rng = sketches.optimal_probabilities(x, initial), 5, default_rng(0)
    least, product = sketches.sketch_error(x, initial, p, s), x @ initial
    assert least == pytest.approx(sketches.optimal_bound(x, initial, s) - product @ product / s)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            other = p * np.exp(size * rng.normal(size=12))
            assert sketches.sketch_error(x, initial, other / other.sum(), s) > least
    assert all(sketches.sketch_error(x, initial, q, s) >= least for q in distributions(x, initial).values())


def test_one_coordinate_is_sketched_without_error(x: Array) -> None:
    w = np.zeros(12)
    w[4] = -1.7
    p = sketches.optimal_probabilities(x, w)
    assert sketches.sketch_error(x, w, p, 1) == pytest.approx(0, abs=1e-12)
    assert not sketches.errors(x, w, sketches.draw_sketches(p, 1, 10, default_rng(0))).round(12).any()


def test_squared_norms_and_squared_weights_have_the_same_error(x: Array, initial: Array) -> None:
    named, product = distributions(x, initial), x @ initial
    expected = sketches.norm_bound(x, initial, 7) - product @ product / 7
    for name in ("squared_norms", "squared_weights"):
        assert sketches.sketch_error(x, initial, named[name], 7) == pytest.approx(expected)


def test_bounds_hold(x: Array, initial: Array, trained: Array) -> None:
    p, s = sketches.optimal_probabilities(x, initial), 5
    bound = sketches.optimal_bound(x, initial, s)
    assert sketches.sketch_error(x, initial, p, s) <= bound <= sketches.norm_bound(x, initial, s)
    for q in distributions(x, initial).values():
        assert sketches.sketch_error(x, initial, q, s) <= bound / (q / p).min()
    for share in (0, 0.1, 1):
        w = initial + share * (trained - initial)
        error = sketches.sketch_error(x, w, p, s)
        assert error <= sketches.trained_bound(x, initial, w, s)
        assert error <= sketches.movement_bound(x, initial, w, s)
    assert sketches.trained_bound(x, initial, initial, s) == pytest.approx(bound)
    assert sketches.movement_bound(x, initial, initial, s) == pytest.approx(2 * bound)


def test_scaling_changes_what_it_should(x: Array, initial: Array) -> None:
    p, s = sketches.optimal_probabilities(x, initial), 5
    error = sketches.sketch_error(x, initial, p, s)
    np.testing.assert_allclose(sketches.optimal_probabilities(x, -3 * initial), p)
    np.testing.assert_allclose(sketches.data_free_probabilities(-3 * initial), np.abs(initial) / np.abs(initial).sum())
    factors = default_rng(0).uniform(0.1, 10, size=12)
    np.testing.assert_allclose(sketches.optimal_probabilities(x * factors, initial / factors), p)
    assert sketches.sketch_error(x * factors, initial / factors, p, s) == pytest.approx(error)
    assert sketches.sketch_error(x, 3 * initial, p, s) == pytest.approx(9 * error)
    assert sketches.sketch_error(x, initial, p, 4 * s) == pytest.approx(error / 4)


def test_optimal_sketch_makes_kept_contributions_equal(x: Array, initial: Array) -> None:
    p, s = sketches.optimal_probabilities(x, initial), 4
    masks, norms = sketches.draw_sketches(p, s, 100, default_rng(0)), np.linalg.norm(x, axis=0)
    sizes = np.abs(masks * initial) * norms * s / (norms @ np.abs(initial))
    np.testing.assert_allclose(sizes, masks * s * p)  # c S / (s ||X_i||): only how often it was drawn tells them apart


def test_a_mixture_bounds_the_rescaling(initial: Array) -> None:
    p = sketches.data_free_probabilities(initial * np.where(np.arange(12) == 0, 1e-12, 1))
    mixed = sketches.mixture(p, 0.25)
    assert mixed.sum() == pytest.approx(1)
    assert mixed.min() >= 0.25 / 12
    with pytest.raises(ValueError, match="nothing to draw"):
        sketches.data_free_probabilities(np.zeros(3))


def test_independent_coins(x: Array, initial: Array) -> None:
    p = sketches.optimal_probabilities(x, initial)
    for s in (3, 8):  # of eight, some are certain
        masks = sketches.draw_bernoulli(p, s, NUM_MASKS, default_rng(0))
        inclusion = np.minimum(1, s * p)
        assert (np.abs(masks.mean(0) - 1) <= 4.5 * np.sqrt((1 / inclusion - 1) / NUM_MASKS)).all()
        assert simulated(x, initial, masks) == pytest.approx(sketches.bernoulli_error(x, initial, p, s), rel=0.015)
    assert (8 * p > 1).any()


# Counting -------------------------------------------------------------------------------------------------------------


def test_number_of_distinct_coordinates(x: Array, initial: Array) -> None:
    p = sketches.optimal_probabilities(x, initial)
    for s in (1, 4, 30):
        masks = sketches.draw_sketches(p, s, NUM_MASKS, default_rng(0))
        assert np.count_nonzero(masks, axis=1).mean() == pytest.approx(sketches.expected_distinct(p, s), rel=0.01)
    assert sketches.expected_distinct(p, 1) == pytest.approx(1)
    assert sketches.expected_distinct(p, 4) < 4
    assert sketches.expected_distinct(np.eye(3)[0], 5) == 1


def test_number_of_draws_for_a_density(initial: Array) -> None:
    p = sketches.data_free_probabilities(initial)
    for distinct in np.arange(0.5, 11.5, 0.1):
        draws = sketches.draws_for(p, distinct)
        gaps = [abs(sketches.expected_distinct(p, s) - distinct) for s in (draws - 1, draws, draws + 1) if s > 0]
        assert min(gaps) == abs(sketches.expected_distinct(p, draws) - distinct)
    large = sketches.data_free_probabilities(default_rng(0).normal(size=100_000))
    draws = sketches.draws_for(large, 99_000)
    assert sketches.expected_distinct(large, draws) == pytest.approx(99_000, abs=0.5)
    with pytest.raises(ConfigError, match="only 2 can be drawn"):
        sketches.draws_for(np.array([0.5, 0, 0.5]), 2)


# Without replacement --------------------------------------------------------------------------------------------------


def test_inclusion_of_two_draws_without_replacement(initial: Array) -> None:
    p = sketches.data_free_probabilities(initial**3)  # far from uniform
    expected = sketches.pair_inclusion(p)
    enumerated = np.zeros(12)
    for i, j in itertools.permutations(range(12), 2):
        enumerated[[i, j]] += p[i] * p[j] / (1 - p[i])
    np.testing.assert_allclose(expected, enumerated)
    masks = sketches.draw_distinct(p, 2, NUM_MASKS, default_rng(0))
    assert (np.abs(masks.mean(0) - expected) < 4.5 * np.sqrt(expected * (1 - expected) / NUM_MASKS)).all()
    assert np.abs(expected - 2 * p).max() > 0.03


def test_gumbel_draws_the_first_in_proportion(initial: Array) -> None:
    p = sketches.data_free_probabilities(initial)
    masks = sketches.draw_distinct(p, 1, NUM_MASKS, default_rng(0))
    assert (np.abs(masks.mean(0) - p) < 4.5 * np.sqrt(p * (1 - p) / NUM_MASKS)).all()


def test_gumbel_keeps_exactly_k_and_tends_to_uniform_and_to_the_largest(initial: Array) -> None:
    p = sketches.data_free_probabilities(initial)
    for k in (1, 5, 11, 12):
        masks = sketches.draw_distinct(p, k, 1000, default_rng(0))
        assert (masks.sum(1) == k).all()
        assert (sketches.draw_distinct(p, k, 1000, default_rng(0)) == masks).all()
        assert (sketches.draw_distinct(p, k, 1000, default_rng(0), beta=1e6) == sketches.top(p, k)).all()
    frequency = sketches.draw_distinct(p, 5, NUM_MASKS, default_rng(0), beta=0).mean(0)
    np.testing.assert_allclose(frequency, 5 / 12, atol=4.5 * 0.5 / np.sqrt(NUM_MASKS))


def test_gumbel_never_keeps_what_has_no_probability() -> None:
    p = np.array([0.5, 0, 0.3, 0.2, 0])
    for beta in (0.0, 1.0, 50.0):
        assert not sketches.draw_distinct(p, 3, 1000, default_rng(0), beta)[:, [1, 4]].any()
    with pytest.raises(ConfigError, match="only 3 can be drawn"):
        sketches.draw_distinct(p, 4, 1, default_rng(0))


def test_error_of_a_uniform_binary_mask(x: Array, initial: Array) -> None:
    for k in (1, 4, 12):
        kept = [list(indices) for indices in itertools.combinations(range(12), k)]
        masks = np.array([np.isin(np.arange(12), indices) for indices in kept])
        assert sketches.uniform_mask_error(x, initial, k) == pytest.approx(simulated(x, initial, masks), abs=1e-9)


# The study ------------------------------------------------------------------------------------------------------------


def test_regression_ends_where_gradient_descent_does() -> None:
    problem = sketching.regression(3, 40, 30)
    assert (problem.train.shape, problem.held_out.shape) == ((30, 40), (200, 40))
    assert (problem.train**2).sum(0).mean() == pytest.approx(1)
    assert (problem.target @ problem.target, problem.target.sum()) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert problem.train.any(0).all()
    np.testing.assert_allclose(problem.train @ problem.trained, problem.target, atol=1e-9)
    w, step = problem.initial.copy(), 1 / np.linalg.norm(problem.train, 2) ** 2
    for _ in range(100_000):
        w -= step * (problem.train.T @ (problem.train @ w - problem.target))
    np.testing.assert_allclose(w, problem.trained, atol=0.02 * np.abs(problem.trained).max())


def test_closed_forms_and_simulation_agree_on_real_digits() -> None:
    # Few features and many draws: with tiny p_i hardly ever drawn, the standard error would not tell the spread.
    rows = sketching.study([0.05, 0.2, 0.6], num_seeds=2, num_draws=400_000, num_features=60, num_images=40)
    assert len(rows) == 3 * 2 * 9 * 2
    compared = 0
    for row in rows:
        assert row["kept"] == pytest.approx(row["density"], abs=0.51 / 60)
        if row["selection"] == "mask_initial":
            assert row["closed_form"] is None
        elif row["selection"] in ("mask_top", "mask_oracle"):
            assert (row["monte_carlo"], row["standard_error"]) == (row["closed_form"], 0)
        else:
            assert abs(row["monte_carlo"] - row["closed_form"]) < 4 * row["standard_error"], row
            compared += 1
    assert compared == 3 * 2 * 6 * 2


def test_study_says_what_it_is_known_for() -> None:
    rows = sketching.study([0.2], num_seeds=5, num_draws=1000, num_features=500, num_images=60)
    for split in ("train", "held_out"):
        error = {
            selection: sketching_figure.medians(rows, selection, split, "monte_carlo")[0.2][1]
            for selection in sketching.SELECTIONS
        } | {
            selection: sketching_figure.medians(rows, selection, split, "closed_form")[0.2][1]
            for selection in sketching.SELECTIONS
            if selection.startswith("sketch")
        }
        assert error["sketch_oracle"] == min(error[name] for name in error if name.startswith("sketch"))
        assert error["mask_oracle"] == min(error.values())
        assert error["sketch_oracle"] > 1  # worse than an empty mask: the price of being unbiased
        assert error["sketch_initial_no_data"] > error["sketch_mixture"]  # the tail of 1 / |w0|


def test_a_density_has_the_same_numbers_whatever_else_is_asked_for() -> None:
    one = sketching.study([0.3], 1, 1000, 40, 40)
    both = sketching.study([0.1, 0.3, 0.3], 1, 1000, 40, 40)
    assert one == [row for row in both if row["density"] == 0.3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (([0.1, 1.0], 1, 100, 50, 50), "density 1:"),
        (([-0.1], 1, 100, 50, 50), "density -0.1:"),
        (([float("nan")], 1, 100, 50, 50), "density nan:"),
        (([0.001], 1, 100, 50, 50), "more features"),
        (([], 1, 100, 50, 50), "at least one"),
        (([0.1], 0, 100, 50, 50), "seeds=0"),
        (([0.1], 1, 0, 50, 50), "draws=0"),
        (([0.1], 1, 100, 2, 50), "features=2"),
        (([0.1], 1, 100, 50, 1700), "images=1700"),
        (([0.1], 20, 100, 50, 10), "none of those of seed"),
    ],
)
def test_study_refuses_what_it_cannot_do(settings: tuple[list[float], int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sketching.study(*settings)


def run_script(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / "sketching.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_script_writes_errors_and_figures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    quick = ["--seeds", "2", "--draws", "2000", "--features", "80", "--images", "40"]
    done = run_script("-o", str(folder), "--densities", "0.1", "0.5", *quick)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(selection in done.stdout for selection in sketching.SELECTIONS)
    with (folder / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 9 * 2
    expected = sketching.study([0.1, 0.5], 2, 2000, 80, 40)
    for row, other in zip(rows, expected, strict=True):
        assert float(row["monte_carlo"]) == pytest.approx(other["monte_carlo"], rel=1e-9)
        assert row["closed_form"] == "" if other["closed_form"] is None else float(row["closed_form"]) > 0
    assert (folder / "error.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "error.svg").read_text()
    sketching_figure.figure(expected, tmp_path / "again.svg")
    sketching_figure.figure(expected, tmp_path / "held_out.svg", "held_out")
    assert (tmp_path / "again.svg").read_bytes() != (tmp_path / "held_out.svg").read_bytes()


def test_a_library_that_is_missing_is_named_before_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["sketching.py", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "sketching.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1
    assert "matplotlib, which is not installed: pip install matplotlib" in said and not (tmp_path / "out").exists()


def test_script_refuses_bad_input_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["-o", str(tmp_path / "out"), "--densities", "0.1", "1.5"], "density 1.5:"),
        (["-o", str(tmp_path / "out"), "--seeds", "0"], "seeds=0:"),
        (["-o", str(tmp_path / "file" / "out")], "give another folder"),
    ):
        done = run_script(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert (done.stderr.count("\n"), done.stdout) == (1, "")
    assert not (tmp_path / "out").exists()
