"""Masks as sketches of a matrix product: probabilities, closed formulas of the error, bounds, and random masks.

A mask keeps some coordinates of a linear model Xw = sum_i X_i w_i. Draw s coordinates with replacement and with
probabilities p, and multiply a coordinate that was drawn c times by c / (s p). This is a sketch of the product. Its
expected error is known.

Reference: Bar and Giryes 2023, arXiv:2305.17559, "Pruning at Initialization - A Sketching Perspective". The formulas
come from the literature on sampling matrix products. Each was checked by simulation.
"""

from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pai_bench.errors import ConfigError

Array = NDArray[np.float64]


# Probabilities --------------------------------------------------------------------------------------------------------


def optimal_probabilities(x: Array, w: Array) -> Array:
    """The probabilities (d,) with the least expected error: p_i ~ ||X_i|| |w_i|, for X (n, d) and w (d,)."""
    return _normalized(np.linalg.norm(x, axis=0) * np.abs(w))


def data_free_probabilities(w: Array) -> Array:
    """p_i proportional to |w_i|: nearly the optimum if all columns of X have about the same norm."""
    return _normalized(np.abs(w))


def uniform_probabilities(num_coordinates: int) -> Array:
    """The same probability for every coordinate."""
    return np.full(num_coordinates, 1 / num_coordinates)


def mixture(p: Array, share: float) -> Array:
    """(1 - share) p + share / d. It bounds the rescaling 1 / p, whose mean is infinite for p from Gaussian weights."""
    return (1 - share) * p + share / len(p)


def _normalized(sizes: Array) -> Array:
    total = sizes.sum()
    if not total > 0:
        raise ValueError("every coordinate has size zero: there is nothing to draw from")
    normalized: Array = sizes / total
    return normalized


# Closed formulas ------------------------------------------------------------------------------------------------------


def sketch_error(x: Array, w: Array, p: Array, s: int) -> float:
    """E||X(m * w) - Xw||^2 for m_i = c_i / (s p_i). c counts how often each coordinate is drawn in s draws from p.

    It is (1/s) (sum_i ||X_i||^2 w_i^2 / p_i - ||Xw||^2) for any p. With p from the initial weights and w the trained
    weights, it is the error of a mask found at initialization. Coordinates that p cannot draw give a bias; the square
    of its norm is added.

    Args:
        x: (n, d).
        w: (d,), the weights to which the mask is applied.
        p: (d,), with sum one.
        s: the number of draws.

    Reference: Drineas, Kannan and Mahoney 2006 (SIAM J. Comput. 36, 132), for matrix products drawn this way.
    """
    drawn = p > 0
    sizes = (x**2).sum(0)[drawn] * w[drawn] ** 2
    reached, bias = x[:, drawn] @ w[drawn], x[:, ~drawn] @ w[~drawn]
    return float(((sizes / p[drawn]).sum() - reached @ reached) / s + bias @ bias)


def bernoulli_error(x: Array, w: Array, p: Array, s: float) -> float:
    """The same error for independent draws: i is kept with probability pi_i = min(1, s p_i), and scaled by 1 / pi_i.

    It is sum_i ||X_i||^2 w_i^2 (1 / pi_i - 1), plus the squared bias of coordinates that are never kept.
    """
    inclusion = np.minimum(1, s * p)
    kept = inclusion > 0
    bias = x[:, ~kept] @ w[~kept]
    sizes = (x**2).sum(0)[kept] * w[kept] ** 2
    return float((sizes * (1 / inclusion[kept] - 1)).sum() + bias @ bias)


def uniform_mask_error(x: Array, w: Array, k: int) -> float:
    """E||X(m * w) - Xw||^2 for a binary mask that keeps k of the d coordinates. All sets of k are equally likely.

    It is (q - r) sum_i ||X_i||^2 w_i^2 + r ||Xw||^2. Here q = (d-k)/d is the probability that one given coordinate is
    pruned, and r = q (d-k-1)/(d-1) the probability that two given coordinates are pruned.
    """
    d = len(w)
    q = (d - k) / d
    r = q * (d - k - 1) / max(d - 1, 1)
    product = x @ w
    return float((q - r) * ((x**2).sum(0) * w**2).sum() + r * (product @ product))


def optimal_bound(x: Array, w: Array, s: int) -> float:
    """An upper bound on the error of the optimal p: (1/s) (sum_i ||X_i|| |w_i|)^2.

    If p_i >= b times the optimum, 1/b times this is an upper bound for p.
    """
    return float((np.linalg.norm(x, axis=0) @ np.abs(w)) ** 2 / s)


def norm_bound(x: Array, w: Array, s: int) -> float:
    """(1/s) ||X||_F^2 ||w||^2, an upper bound on `optimal_bound`.

    The errors of p ~ ||X_i||^2 and of p ~ w_i^2 are ||Xw||^2 / s below it.
    """
    return float((x**2).sum() * (w @ w) / s)


def trained_bound(x: Array, initial: Array, trained: Array, s: int) -> float:
    """An upper bound on the error of p that is optimal for the initial weights (d,), for the trained weights (d,).

    It is ((1+g)^2 / s) (sum_i ||X_i|| |w0_i|)^2, where 1 + g is the largest growth |w*_i| / |w0_i|.
    """
    growth = float((np.abs(trained) / np.abs(initial)).max())
    return growth**2 * optimal_bound(x, initial, s)


def movement_bound(x: Array, initial: Array, trained: Array, s: int) -> float:
    """Another upper bound on the error of `trained_bound`, by how far the weights moved.

    It is (2/s) S^2 + (2/s) S sum_i ||X_i|| (w*_i - w0_i)^2 / |w0_i| with S = sum_i ||X_i|| |w0_i|. For Gaussian w0 its
    expectation is infinite, because the expectation of 1 / |w0_i| is infinite.
    """
    norms = np.linalg.norm(x, axis=0)
    total = norms @ np.abs(initial)
    moved = (norms * (trained - initial) ** 2 / np.abs(initial)).sum()
    return float(2 / s * total * (total + moved))


def expected_distinct(p: Array, s: float) -> float:
    """The expected number of different coordinates in s draws with replacement: sum_i 1 - (1 - p_i)^s."""
    with np.errstate(divide="ignore"):
        return float(-np.expm1(s * np.log1p(-p)).sum())


def draws_for(p: Array, distinct: float) -> int:
    """The number of draws, at least one, whose expected number of different coordinates is closest to `distinct`.

    Raises:
        ConfigError: p has so few coordinates that no number of draws is enough.
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
    """The probability (d,) of each coordinate to be drawn in two draws without replacement, each in proportion to p.

    It is p_i (1 + sum_{j != i} p_j / (1 - p_j)), and not 2 p_i. So dividing by k p would give a biased result.
    """
    odds = p / (1 - p)
    inclusion: Array = p * (1 + odds.sum() - odds)
    return inclusion


# Drawing --------------------------------------------------------------------------------------------------------------


def draw_sketches(p: Array, s: int, num_masks: int, rng: Generator) -> Array:
    """Rescaled masks (num_masks, d): the counts of s draws with replacement from p, divided by s p. Unbiased."""
    d = len(p)
    if s < d:  # for few draws this takes a tenth of the time of the multinomial
        drawn = rng.choice(d, size=(num_masks, s), p=p) + d * np.arange(num_masks)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_masks * d).reshape(num_masks, d)
    else:
        counts = rng.multinomial(s, p, size=num_masks)
    masks: Array = np.divide(counts, s * p, out=np.zeros(counts.shape), where=p > 0)
    return masks


def draw_bernoulli(p: Array, s: float, num_masks: int, rng: Generator) -> Array:
    """Rescaled masks (num_masks, d): independently 1 / pi with probability pi = min(1, s p), else 0. Unbiased."""
    inclusion = np.minimum(1, s * p)
    kept = rng.random((num_masks, len(p))) < inclusion
    masks: Array = np.divide(kept, inclusion, out=np.zeros(kept.shape), where=inclusion > 0)
    return masks


def draw_distinct(p: Array, k: int, num_masks: int, rng: Generator, beta: float = 1.0) -> NDArray[np.bool_]:
    """Binary masks (num_masks, d) of exactly k coordinates, drawn without replacement in proportion to p^beta.

    The method is Gumbel top-k: the k largest values of beta log p plus Gumbel noise. beta=0 draws uniformly from the
    coordinates with p > 0; a large beta gives top-k.

    Raises:
        ConfigError: p can draw fewer than k coordinates.
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
    """The binary mask (d,) of the k largest sizes. Of equal sizes, the first ones are kept."""
    mask = np.zeros(len(sizes), bool)
    mask[np.argsort(-sizes, kind="stable")[:k]] = True
    return mask


def errors(x: Array, w: Array, masks: NDArray[Any]) -> Array:
    """||X(m * w) - Xw||^2 (num_masks,) for masks (num_masks, d), X (n, d) and w (d,)."""
    squared: Array = ((masks @ (x * w).T - x @ w) ** 2).sum(1)
    return squared
