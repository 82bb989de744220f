"""A study: the sketching error of masks in linear regression on real digits.

The mask is found from the initial weights, with or without the data, and applied to the trained weights. How much worse
is it than a mask found from the trained weights? And what does the rescaling do?

Reference: Bar and Giryes 2023, arXiv:2305.17559, "Pruning at Initialization - A Sketching Perspective".
Deviates: the whole protocol is our own. There is no official code, and the details of the published experiments are not
known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from pai_bench.errors import ConfigError
from pai_bench.studies import sketches
from pai_bench.studies.sketches import Array

Row = dict[str, Any]

_NUM_IMAGES, _NUM_HELD_OUT = 1797, 200
_LEAST_MASKS = 500  # every Monte-Carlo mean takes at least this many masks
_CHUNK = 2000  # masks in memory at a time

# Name: label in the legend, colour (of Okabe and Ito, which colour-blind readers can distinguish) and marker. In the
# order of tables and legends. A sketch is rescaled by c / (s p); a mask is binary.
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


@dataclass(frozen=True)
class Regression:
    """One linear regression, with the weights before and after gradient descent."""

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
    """A regression on random ReLU features of scikit-learn's 8x8 digits: is the image the digit `seed mod 10`?

    The network has two layers. The first layer is Gaussian, fixed, and has no biases. Its outputs are the features,
    without those that no training image activates, and scaled to a mean square of one on the training images. The
    weights of the second layer are N(0, 1/d) at first. The target is one column of the one-hot labels, centred and
    scaled to variance one, so that it is as large as the initial output. The trained weights are the limit of gradient
    descent on the squared error, w0 + X^+ (y - X w0). The seed decides the column, the images, the features and the
    initial weights.

    Raises:
        ConfigError: there are so few images that the digit is not among them.
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
    """The probabilities of the random selections, by name. All except the oracle can be known before training."""
    free = sketches.data_free_probabilities(problem.initial)
    uniform = sketches.uniform_probabilities(len(free))
    return {
        "sketch_initial": sketches.optimal_probabilities(problem.train, problem.initial),
        "sketch_initial_no_data": free,
        "sketch_mixture": sketches.mixture(free, 0.5),
        "sketch_uniform": uniform,
        "sketch_oracle": sketches.optimal_probabilities(problem.train, problem.trained),
        "mask_initial": free,
        "mask_uniform": uniform,
    }


def study(densities: Sequence[float], num_seeds: int, num_draws: int, num_features: int, num_images: int) -> list[Row]:
    """Relative errors ||X(m * w*) - Xw*||^2 / ||Xw*||^2 of every selection, by density, seed and split.

    A mask that keeps nothing has error one. Density counts each kept coordinate once. A sketch takes the number of
    draws with the closest expected density; a binary mask keeps exactly round(density d).

    Args:
        densities: each in (0, 1).
        num_seeds: the number of regressions, with seeds 0, 1, ...
        num_draws: the number of drawn coordinates, in all masks together, for the Monte-Carlo mean of a sketch. This
            gives num_draws / s masks, but at least 500. There are always 500 binary masks. Both splits use the same
            masks.
        num_features: d.
        num_images: the number of training images; 200 other images are held out.

    Returns:
        Rows with `selection`, `density`, `seed`, `movement` of the weights, `split` ("train", "held_out"), `draws` (s
        for a sketch, the number kept for a mask), `kept` (the expected fraction kept), `closed_form` (None if there is
        no formula), `monte_carlo`, its `standard_error` (0 for the two masks that are not random) and `masks`.
        The Monte-Carlo mean of a sketch from initial weights alone has heavy tails: coordinates with a tiny p_i are
        drawn rarely, but carry much of the expectation. With few draws the mean tends to lie below the closed form, and
        its standard error is too small.

    Raises:
        ConfigError: a density cannot be reached, or there are too few seeds, draws, features or images.
    """
    check(densities, num_seeds, num_draws, num_features, num_images)
    rows: list[Row] = []
    for seed in range(num_seeds):
        problem = regression(seed, num_features, num_images)
        for density in dict.fromkeys(densities):
            # Each density has its own stream, so that its numbers do not depend on the other densities.
            rng = np.random.default_rng([seed, round(density * 1e9)])
            for selection in SELECTIONS:
                known = {"selection": selection, "density": density, "seed": seed, "movement": problem.movement}
                results = _measure(problem, selection, round(density * num_features), num_draws, rng)
                rows += [known | result for result in results]
    return rows


def check(densities: Sequence[float], num_seeds: int, num_draws: int, num_features: int, num_images: int) -> None:
    """Refuses settings that `study` cannot use, before anything is computed.

    Raises:
        ConfigError: a density cannot be reached, or there are too few seeds, draws, features or images.
    """
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
        mask = sketches.top(sizes, k)[None]
        found = {split: sketches.errors(x, w, mask) for split, x in splits.items()}
        closed = {split: float(error[0]) for split, error in found.items()}
    elif selection.startswith("mask"):
        p = probabilities(problem)[selection]
        draws, kept, num_masks = k, k / d, _LEAST_MASKS
        masks = sketches.draw_distinct(p, k, num_masks, rng)
        found = {split: sketches.errors(x, w, masks) for split, x in splits.items()}
        closed = {
            split: sketches.uniform_mask_error(x, w, k) for split, x in splits.items() if selection == "mask_uniform"
        }
    else:
        p = probabilities(problem)[selection]
        draws = sketches.draws_for(p, k)
        kept, num_masks = sketches.expected_distinct(p, draws) / d, max(_LEAST_MASKS, num_draws // draws)
        chunks = [min(_CHUNK, num_masks - start) for start in range(0, num_masks, _CHUNK)]
        parts: dict[str, list[Array]] = {split: [] for split in splits}
        for size in chunks:
            drawn = sketches.draw_sketches(p, draws, size, rng)
            for split, x in splits.items():
                parts[split].append(sketches.errors(x, w, drawn))
        found = {split: np.concatenate(part) for split, part in parts.items()}
        closed = {split: sketches.sketch_error(x, w, p, draws) for split, x in splits.items()}
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
