"""The sketching error of masks in linear regression on real digits: closed formulas, Monte Carlo, a study, its figure.

A linear model Xw = sum_i X_i w_i keeps the coordinates that a mask marks. Drawing s of them with replacement, with
probabilities p, and multiplying those drawn c times by c / (s p) is a sketch of the product, whose expected error is
known. The questions of the study: how much worse are probabilities taken from the initial weights, with or without the
data, when the mask is applied to the trained weights? And what does the rescaling do?

Reference: Bar and Giryes 2023, arXiv:2305.17559, "Pruning at Initialization - A Sketching Perspective", for masks as
sketches. The formulas are those of the literature on sampling matrix products, each checked by simulation.
Deviates: own protocol throughout; no official code exists and the details of the published experiments are not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pai_bench.errors import ConfigError, check_installed
from pai_bench.system.files import csv_text

Array = NDArray[np.float64]
Row = dict[str, Any]

_NUM_IMAGES, _NUM_HELD_OUT = 1797, 200
_LEAST_MASKS = 500  # behind every Monte-Carlo mean
_CHUNK = 2000  # masks held in memory at a time

# Name: what a legend calls it, colour (of Okabe and Ito, told apart by the colour-blind) and marker. In the order of
# tables and legends. A sketch is rescaled by c / (s p); a mask is binary.
SELECTIONS = {
    "sketch_initial_no_data": ("initial weights:  p ∝ |w⁰ᵢ|", "#56B4E9", "o"),
    "sketch_initial": ("initial weights and data:  p ∝ ‖Xᵢ‖ |w⁰ᵢ|", "#0072B2", "s"),
    "sketch_uniform": ("nothing:  p uniform", "#7F7F7F", "^"),
    "sketch_mixture": ("initial weights:  p half uniform, half ∝ |w⁰ᵢ|", "#009E73", "D"),
    "sketch_oracle": ("trained weights and data:  p ∝ ‖Xᵢ‖ |w*ᵢ|", "#D55E00", "v"),
    "mask_initial": ("initial weights:  at random, ∝ |w⁰ᵢ|", "#56B4E9", "o"),
    "mask_uniform": ("nothing:  at random, uniform", "#7F7F7F", "^"),
    "mask_top": ("initial weights:  largest |w⁰ᵢ|", "#CC79A7", "X"),
    "mask_oracle": ("trained weights and data:  largest ‖Xᵢ‖ |w*ᵢ|", "#D55E00", "v"),
}


# Probabilities --------------------------------------------------------------------------------------------------------


def optimal_probabilities(x: Array, w: Array) -> Array:
    """Those (d,) with the least expected error: p_i proportional to ||X_i|| |w_i|, for X (n, d) and w (d,)."""
    return _normalized(np.linalg.norm(x, axis=0) * np.abs(w))


def data_free_probabilities(w: Array) -> Array:
    """p_i proportional to |w_i|: what the optimum tends to when all columns of X have about the same norm."""
    return _normalized(np.abs(w))


def uniform_probabilities(num_coordinates: int) -> Array:
    """The same for every coordinate."""
    return np.full(num_coordinates, 1 / num_coordinates)


def mixture(p: Array, share: float) -> Array:
    """(1 - share) p + share / d: bounds the rescaling 1 / p, whose expectation diverges for p from Gaussian weights."""
    return (1 - share) * p + share / len(p)


def _normalized(sizes: Array) -> Array:
    total = sizes.sum()
    if not total > 0:
        raise ValueError("every coordinate has size zero: there is nothing to draw from")
    normalized: Array = sizes / total
    return normalized


# Closed formulas ------------------------------------------------------------------------------------------------------


def sketch_error(x: Array, w: Array, p: Array, s: int) -> float:
    """E||X(m * w) - Xw||^2 for m_i = c_i / (s p_i), c the counts of s draws with replacement from p.

    It is (1/s) (sum_i ||X_i||^2 w_i^2 / p_i - ||Xw||^2), whatever p was made from: with p from the initial weights and
    w the trained ones it is the error of a mask found at initialization. What p cannot draw is a bias, its error added.

    Args:
        x: (n, d).
        w: (d,), the weights that the mask is applied to.
        p: (d,), sums to one.
        s: number of draws.

    Reference: Drineas, Kannan and Mahoney 2006 (SIAM J. Comput. 36, 132), for matrix products drawn this way.
    """
    drawn = p > 0
    sizes = (x**2).sum(0)[drawn] * w[drawn] ** 2
    reached, bias = x[:, drawn] @ w[drawn], x[:, ~drawn] @ w[~drawn]
    return float(((sizes / p[drawn]).sum() - reached @ reached) / s + bias @ bias)


def bernoulli_error(x: Array, w: Array, p: Array, s: float) -> float:
    """The same for independent coins: i is kept with pi_i = min(1, s p_i) and multiplied by 1 / pi_i.

    It is sum_i ||X_i||^2 w_i^2 (1 / pi_i - 1), plus the bias of what is never kept.
    """
    inclusion = np.minimum(1, s * p)
    kept = inclusion > 0
    bias = x[:, ~kept] @ w[~kept]
    sizes = (x**2).sum(0)[kept] * w[kept] ** 2
    return float((sizes * (1 / inclusion[kept] - 1)).sum() + bias @ bias)


def uniform_mask_error(x: Array, w: Array, k: int) -> float:
    """E||X(m * w) - Xw||^2 for a binary mask that keeps k of the d coordinates, every set of k being as likely.

    With q = (d-k)/d, the chance that one is pruned, and r = q (d-k-1)/(d-1), that two are, it is
    (q - r) sum_i ||X_i||^2 w_i^2 + r ||Xw||^2.
    """
    d = len(w)
    q = (d - k) / d
    r = q * (d - k - 1) / max(d - 1, 1)
    product = x @ w
    return float((q - r) * ((x**2).sum(0) * w**2).sum() + r * (product @ product))


def optimal_bound(x: Array, w: Array, s: int) -> float:
    """(1/s) (sum_i ||X_i|| |w_i|)^2, above the error of the optimal p; 1/b times it, if p_i >= b times the optimum."""
    return float((np.linalg.norm(x, axis=0) @ np.abs(w)) ** 2 / s)


def norm_bound(x: Array, w: Array, s: int) -> float:
    """(1/s) ||X||_F^2 ||w||^2, above `optimal_bound`; p from ||X_i||^2 and p from w_i^2 stay ||Xw||^2 / s below it."""
    return float((x**2).sum() * (w @ w) / s)


def trained_bound(x: Array, initial: Array, trained: Array, s: int) -> float:
    """Above the error of p optimal for the initial weights (d,), applied to trained ones (d,), by the largest growth.

    ((1+g)^2 / s) (sum_i ||X_i|| |w0_i|)^2, where 1 + g is the largest |w*_i| / |w0_i|.
    """
    growth = float((np.abs(trained) / np.abs(initial)).max())
    return growth**2 * optimal_bound(x, initial, s)


def movement_bound(x: Array, initial: Array, trained: Array, s: int) -> float:
    """Above the same error, by how far the weights moved.

    (2/s) S^2 + (2/s) S sum_i ||X_i|| (w*_i - w0_i)^2 / |w0_i| with S = sum_i ||X_i|| |w0_i|. For Gaussian w0 its
    expectation is infinite: that of 1 / |w0_i| is.
    """
    norms = np.linalg.norm(x, axis=0)
    total = norms @ np.abs(initial)
    moved = (norms * (trained - initial) ** 2 / np.abs(initial)).sum()
    return float(2 / s * total * (total + moved))


def expected_distinct(p: Array, s: float) -> float:
    """How many different coordinates s draws with replacement reach: sum_i 1 - (1 - p_i)^s, below s for s > 1."""
    with np.errstate(divide="ignore"):
        return float(-np.expm1(s * np.log1p(-p)).sum())


def draws_for(p: Array, distinct: float) -> int:
    """The number of draws, at least one, whose expected number of different coordinates is closest to `distinct`.

    Raises:
        ConfigError: p has no more coordinates than that, so that no number of draws is enough.
    """
    if distinct > np.count_nonzero(p) - 0.5:
        raise ConfigError(
            f"{distinct:g} coordinates kept on average: only {np.count_nonzero(p)} can be drawn; lower the density"
        )
    low, high = 0, 1
    while expected_distinct(p, high) < distinct:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if expected_distinct(p, middle) >= distinct else (middle, high)
    closer_below = distinct - expected_distinct(p, low) < expected_distinct(p, high) - distinct
    return low if closer_below and low > 0 else high


def pair_inclusion(p: Array) -> Array:
    """The probabilities (d,) of being among two coordinates drawn without replacement, each draw in proportion to p.

    p_i (1 + sum_{j != i} p_j / (1 - p_j)), which is not 2 p_i: dividing by k p would not be unbiased.
    """
    odds = p / (1 - p)
    inclusion: Array = p * (1 + odds.sum() - odds)
    return inclusion


# Drawing --------------------------------------------------------------------------------------------------------------


def draw_sketches(p: Array, s: int, num_masks: int, rng: Generator) -> Array:
    """Rescaled masks (num_masks, d): counts of s draws with replacement from p, divided by s p; unbiased."""
    d = len(p)
    if s < d:  # a tenth of the time of the multinomial where draws are few
        drawn = rng.choice(d, size=(num_masks, s), p=p) + d * np.arange(num_masks)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_masks * d).reshape(num_masks, d)
    else:
        counts = rng.multinomial(s, p, size=num_masks)
    masks: Array = np.divide(counts, s * p, out=np.zeros(counts.shape), where=p > 0)
    return masks


def draw_bernoulli(p: Array, s: float, num_masks: int, rng: Generator) -> Array:
    """Rescaled masks (num_masks, d) of independent coins: kept with pi = min(1, s p), and then 1 / pi; unbiased."""
    inclusion = np.minimum(1, s * p)
    kept = rng.random((num_masks, len(p))) < inclusion
    masks: Array = np.divide(kept, inclusion, out=np.zeros(kept.shape), where=inclusion > 0)
    return masks


def draw_distinct(p: Array, k: int, num_masks: int, rng: Generator, beta: float = 1.0) -> NDArray[np.bool_]:
    """Binary masks (num_masks, d) of exactly k coordinates, drawn without replacement in proportion to p^beta.

    By Gumbel top-k: the k largest of beta log p plus Gumbel noise. beta 0 is uniform over the coordinates that p can
    draw, and a large beta is top-k.

    Raises:
        ConfigError: p can draw fewer than k.
    """
    if k > np.count_nonzero(p):
        raise ConfigError(f"{k} coordinates kept: only {np.count_nonzero(p)} can be drawn; lower the density")
    with np.errstate(divide="ignore"):
        logs = np.where(p > 0, beta * np.log(np.where(p > 0, p, 1)), -np.inf)
    keys = logs + rng.gumbel(size=(num_masks, len(p)))
    masks = np.zeros(keys.shape, bool)
    np.put_along_axis(masks, np.argpartition(-keys, k - 1, axis=1)[:, :k], True, axis=1)
    return masks


def top(sizes: Array, k: int) -> NDArray[np.bool_]:
    """The binary mask (d,) of the k largest; of equal ones the first."""
    mask = np.zeros(len(sizes), bool)
    mask[np.argsort(-sizes, kind="stable")[:k]] = True
    return mask


def errors(x: Array, w: Array, masks: NDArray[Any]) -> Array:
    """||X(m * w) - Xw||^2 (num_masks,) of masks (num_masks, d), for X (n, d) and w (d,)."""
    squared: Array = ((masks @ (x * w).T - x @ w) ** 2).sum(1)
    return squared


# The study ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """One linear regression, and the weights that gradient descent starts from and ends with."""

    train: Array  # (n, d), divided by sqrt(n): squared norms are means over images
    held_out: Array  # (200, d), divided by sqrt(200)
    target: Array  # (n,), divided by sqrt(n)
    initial: Array  # (d,)
    trained: Array  # (d,)

    @property
    def movement(self) -> float:
        """||w* - w0|| / ||w0||."""
        return float(np.linalg.norm(self.trained - self.initial) / np.linalg.norm(self.initial))


def regression(seed: int, num_features: int, num_images: int) -> Regression:
    """Is the image the digit `seed mod 10`? Asked of random ReLU features of scikit-learn's 8x8 digits.

    The features are those of a two-layer network with a frozen Gaussian first layer, without biases, scaled to a mean
    square of one on the training images, and without those that no training image activates. The weights are those of
    its second layer, N(0, 1/d) at first. The target is one column of the one-hot labels, centred and scaled to variance
    one, so that it is as large as the initial output. The trained weights are the limit of gradient descent on the
    squared error, w0 + X^+ (y - X w0). The seed decides the column, the images, the features and the initial weights.

    Raises:
        ConfigError: so few images that the digit is not among them.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    digit = seed % 10
    order = rng.permutation(len(pixels))[: num_images + _NUM_HELD_OUT]
    features = np.empty((len(order), 0))
    while features.shape[1] < num_features:
        drawn = np.maximum(pixels[order] @ rng.normal(size=(pixels.shape[1], num_features)), 0)
        features = np.hstack([features, drawn[:, drawn[:num_images].any(0)]])
    features = features[:, :num_features]
    features /= np.sqrt((features[:num_images] ** 2).mean())
    target = (labels[order[:num_images]] == digit).astype(np.float64)
    if not target.any():
        raise ConfigError(f"images={num_images}: none of those of seed {seed} is a {digit}; give more images")
    target = (target - target.mean()) / (target.std() * np.sqrt(num_images))
    train = features[:num_images] / np.sqrt(num_images)
    initial = rng.normal(size=num_features) / np.sqrt(num_features)
    step = np.linalg.lstsq(train, target - train @ initial, rcond=None)[0]
    return Regression(train, features[num_images:] / np.sqrt(_NUM_HELD_OUT), target, initial, initial + step)


def probabilities(problem: Regression) -> dict[str, Array]:
    """What the selections that draw draw from, by name; all but the oracle could be known before training."""
    free = data_free_probabilities(problem.initial)
    uniform = uniform_probabilities(len(free))
    return {
        "sketch_initial": optimal_probabilities(problem.train, problem.initial),
        "sketch_initial_no_data": free,
        "sketch_mixture": mixture(free, 0.5),
        "sketch_uniform": uniform,
        "sketch_oracle": optimal_probabilities(problem.train, problem.trained),
        "mask_initial": free,
        "mask_uniform": uniform,
    }


def study(densities: Sequence[float], num_seeds: int, num_draws: int, num_features: int, num_images: int) -> list[Row]:
    """Relative errors ||X(m * w*) - Xw*||^2 / ||Xw*||^2 of every selection, by density, seed and split.

    A mask that keeps nothing has error one. Density counts coordinates kept at least once: sketches take the number of
    draws whose expected density is closest, binary masks keep exactly round(density d).

    Args:
        densities: each in (0, 1).
        num_seeds: regressions, of seeds 0, 1, ...
        num_draws: coordinates drawn in all for the Monte-Carlo mean of a sketch: num_draws / s masks, if they are more
            than 500. Binary masks are always 500. The two splits share their masks.
        num_features: d.
        num_images: training images; 200 others are held out.

    Returns:
        Rows with `selection`, `density`, `seed`, `movement` of the weights, `split` ("train", "held_out"), `draws` (s
        for a sketch, the number kept for a mask), `kept` (the expected fraction kept), `closed_form` (None where there
        is no formula), `monte_carlo`, its `standard_error` (0 for the two masks that are not random) and `masks`.
        The Monte Carlo of a sketch from initial weights alone has heavy tails: draws of a coordinate with tiny p_i are
        rare and carry much of the expectation. With few draws it tends to lie below the closed form, and its standard
        error is too small.

    Raises:
        ConfigError: a density is out of reach, or there are too few seeds, draws, features or images.
    """
    check(densities, num_seeds, num_draws, num_features, num_images)
    rows: list[Row] = []
    for seed in range(num_seeds):
        problem = regression(seed, num_features, num_images)
        for density in dict.fromkeys(densities):
            # A stream of its own, so that a density's numbers do not depend on which others are asked for.
            rng = np.random.default_rng([seed, round(density * 1e9)])
            for selection in SELECTIONS:
                known = {"selection": selection, "density": density, "seed": seed, "movement": problem.movement}
                results = _measure(problem, selection, round(density * num_features), num_draws, rng)
                rows += [known | result for result in results]
    return rows


def check(densities: Sequence[float], num_seeds: int, num_draws: int, num_features: int, num_images: int) -> None:
    """Refuses what `study` cannot do, before anything is computed.

    Raises:
        ConfigError: a density is out of reach, or there are too few seeds, draws, features or images; or scikit-learn
            is missing.
    """
    check_installed("the study needs images of", "sklearn", "digits")
    for name, number, least in (("seeds", num_seeds, 1), ("draws", num_draws, 1), ("features", num_features, 10)):
        if number < least:
            raise ConfigError(f"{name}={number}: it must be at least {least}")
    most = _NUM_IMAGES - _NUM_HELD_OUT
    if not 10 <= num_images <= most:
        raise ConfigError(f"images={num_images}: give from 10 to {most}; {_NUM_HELD_OUT} of {_NUM_IMAGES} are held out")
    if not densities:
        raise ConfigError("densities: there are none; give at least one")
    for density in densities:
        if not 0 < density < 1:
            raise ConfigError(f"density {density:g}: it is the fraction kept; give a value above 0 and below 1")
        if not 1 <= round(density * num_features) < num_features:
            raise ConfigError(f"density {density:g} keeps none or all of {num_features} features; give more features")


def _measure(problem: Regression, selection: str, k: int, num_draws: int, rng: Generator) -> list[Row]:
    """Closed form and Monte Carlo of one selection, on both splits."""
    splits = {"train": problem.train, "held_out": problem.held_out}
    w, d = problem.trained, len(problem.trained)
    if selection in ("mask_top", "mask_oracle"):
        sizes = np.abs(problem.initial)
        if selection == "mask_oracle":
            sizes = np.linalg.norm(problem.train, axis=0) * np.abs(w)
        draws, kept, num_masks = k, k / d, 1
        mask = top(sizes, k)[None]
        found = {split: errors(x, w, mask) for split, x in splits.items()}
        closed = {split: float(error[0]) for split, error in found.items()}
    elif selection.startswith("mask"):
        p = probabilities(problem)[selection]
        draws, kept, num_masks = k, k / d, _LEAST_MASKS
        masks = draw_distinct(p, k, num_masks, rng)
        found = {split: errors(x, w, masks) for split, x in splits.items()}
        closed = {split: uniform_mask_error(x, w, k) for split, x in splits.items() if selection == "mask_uniform"}
    else:
        p = probabilities(problem)[selection]
        draws = draws_for(p, k)
        kept, num_masks = expected_distinct(p, draws) / d, max(_LEAST_MASKS, num_draws // draws)
        chunks = [min(_CHUNK, num_masks - start) for start in range(0, num_masks, _CHUNK)]
        parts: dict[str, list[Array]] = {split: [] for split in splits}
        for size in chunks:
            sketches = draw_sketches(p, draws, size, rng)
            for split, x in splits.items():
                parts[split].append(errors(x, w, sketches))
        found = {split: np.concatenate(part) for split, part in parts.items()}
        closed = {split: sketch_error(x, w, p, draws) for split, x in splits.items()}
    rows = []
    for split, x in splits.items():
        empty = float(((x @ w) ** 2).sum())
        spread = float(found[split].std(ddof=1) / np.sqrt(num_masks)) if num_masks > 1 else 0.0
        rows.append(
            {
                "split": split,
                "draws": draws,
                "kept": kept,
                "closed_form": closed[split] / empty if split in closed else None,
                "monte_carlo": float(found[split].mean()) / empty,
                "standard_error": spread / empty,
                "masks": num_masks,
            }
        )
    return rows


# What people look at --------------------------------------------------------------------------------------------------


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows, one to a line; an error without a formula is an empty field."""
    path.write_text(csv_text(rows, list(rows[0])))


def medians(rows: Sequence[Row], selection: str, split: str, column: str) -> dict[float, tuple[float, float, float]]:
    """Quartiles over seeds (lower, median, upper) of a column, by density, increasing; empty if a value is missing."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["selection"] == selection and row["split"] == split:
            if row[column] is None:
                return {}
            found.setdefault(row["density"], []).append(row[column])
    quartiles = {density: np.quantile(found[density], [0.25, 0.5, 0.75]) for density in sorted(found)}
    return {density: (float(a), float(b), float(c)) for density, (a, b, c) in quartiles.items()}


def table(rows: Sequence[Row], split: str) -> str:
    """Medians over seeds for the terminal: the closed form, then the Monte Carlo, by selection and density."""
    densities = sorted({row["density"] for row in rows})
    width = max(len(selection) for selection in SELECTIONS) + 2
    lines = ["density".ljust(width) + "".join(f"{density:>18g}" for density in densities)]
    for selection in SELECTIONS:
        closed, simulated = (medians(rows, selection, split, column) for column in ("closed_form", "monte_carlo"))
        cells = [
            f"{_short(closed[density][1]) if closed else '-':>8} /{_short(simulated[density][1]):>8}"
            for density in densities
        ]
        lines.append(selection.ljust(width) + "".join(cells))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.001 else f"{value:.0e}"


def figure(rows: Sequence[Row], path: Path, split: str = "train") -> None:
    """Draws error against density, log-log: sketches on the left, binary masks on the right.

    Lines are closed forms and markers Monte Carlo, both medians over seeds; bands are the middle half of the seeds.
    Where there is no closed form the line is dashed and joins the markers.

    Args:
        rows: of `study`.
        path: its suffix, such as .png or .svg, says in which format.
        split: "train" or "held_out".
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "pai_bench",
    }
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(9.6, 6), layout="constrained")
        FigureCanvasAgg(drawing)
        left, right = drawing.subplots(1, 2)
        _panel(left, rows, split, "sketch", "Sketches: kept weights multiplied by c / (s p)")
        _panel(right, rows, split, "mask", "Binary masks: kept weights as they are")
        where = {"train": "training", "held_out": "held-out"}[split]
        left.set_ylabel(f"relative error on {where} images\n‖X(m ⊙ w*) - Xw*‖² / ‖Xw*‖²")
        seeds = len({row["seed"] for row in rows})
        drawing.suptitle("What a mask found before training costs the trained weights", fontsize=12, fontweight="bold")
        drawing.supxlabel(
            f"{seeds} linear regressions on scikit-learn's digits; medians, and bands for the middle half. "
            "Solid lines: closed form.\nMarkers: Monte Carlo, joined by dashed lines where there is no closed form; "
            "low for p ∝ |w⁰ᵢ|, where rare draws carry much of the mean.",
            fontsize=8,
            color="0.3",
        )
        # Without the date that matplotlib writes by default, the same rows give the same file.
        drawing.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, rows: Sequence[Row], split: str, kind: str, title: str) -> None:
    """One kind of selection: lines, markers, bands, and a legend below."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    handles = []
    for selection, (label, colour, marker) in SELECTIONS.items():
        if not selection.startswith(kind):
            continue
        closed, simulated = (medians(rows, selection, split, column) for column in ("closed_form", "monte_carlo"))
        line = closed or simulated
        style: Any = "-" if closed else "--"
        low, middle, high = zip(*line.values(), strict=True)
        axes.fill_between(list(line), low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(list(line), middle, style, color=colour, linewidth=1.6)
        dots: dict[str, Any] = {"marker": marker, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.7}
        points = [median for _, median, _ in simulated.values()]
        axes.plot(list(simulated), points, color=colour, linestyle="none", zorder=3, **dots)
        handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=label, **dots))
    handles.append(axes.axhline(1, color="black", linewidth=0.9, linestyle=":", label="all weights pruned: error 1"))
    axes.set(xscale="log", yscale="log", xlabel="density: weights kept, each counted once", title=title)
    ticks: list[float] = []
    for density in sorted({row["density"] for row in rows}):
        if not ticks or density > 1.4 * ticks[-1]:  # nearer labels would overlap
            ticks.append(density)
    axes.set_xticks(ticks, [f"{100 * density:g} %" for density in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.16), "borderaxespad": 0, "alignment": "left"}
    axes.legend(handles=handles, title="mask found from", frameon=False, handlelength=2.6, **place)
