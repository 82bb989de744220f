"""Layer densities that depend on sizes alone, and densities from a file. `allocation.py` has ERK and others."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

from torch import Generator

from pai_bench.core import Fraction, Mask, Scores, Selection
from pai_bench.errors import ConfigError
from pai_bench.masks.allocation import asked, by_density, require_weights


def igq(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
    """Ideal-gas quotas, by score within the layer: the density of a layer with n weights is 1 / (f n + 1).

    The force f is the same for all layers, and makes the total exact. No density exceeds 1. At high sparsity every
    layer keeps about the same number of weights.

    Reference: Vysogorets and Kempe 2023, arXiv:2107.02306, and the released code.
    Deviates: the total is exact; theirs is exact up to rounding.
    """
    require_weights(candidates, "igq")
    sizes = {name: mask.numel() for name, mask in candidates.items()}
    if keep == 0:
        return by_density(scores, candidates, keep, dict.fromkeys(sizes, 1.0))
    # The total falls from all weights at f = 0 to less than keep at f = L / keep.
    force = _root(lambda f: sum(size / (f * size + 1) for size in sizes.values()) - keep, 0.0, len(sizes) / keep)
    return by_density(scores, candidates, keep, {name: 1 / (force * size + 1) for name, size in sizes.items()})


def balanced(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
    """The same number of weights in every layer, by score within the layer.

    A layer that has fewer is kept whole, and the others share the rest.

    Reference: "balanced" in Gadhikar et al. 2023, arXiv:2210.02412.
    Deviates: what a full layer has no room for goes to all others; in their code it is lost.
    """
    require_weights(candidates, "balanced")
    return by_density(scores, candidates, keep, {name: 1 / mask.numel() for name, mask in candidates.items()})


def pyramid(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
    """Densities r, r^2, r^3, ... in the order of the layers, by score within the layer. The ratio r follows from keep.

    Reference: "pyramidal" in Gadhikar et al. 2023, arXiv:2210.02412.
    Deviates: the total is exact.
    """
    require_weights(candidates, "pyramid")
    sizes = [mask.numel() for mask in candidates.values()]
    ratio = _root(lambda r: keep - sum(size * r**layer for layer, size in enumerate(sizes, start=1)), 0.0, 1.0)
    shares = {name: ratio**layer for layer, name in enumerate(candidates, start=1)}
    return by_density(scores, candidates, keep, shares if ratio > 0 else dict.fromkeys(candidates, 1.0))


def erk_plus(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, last: Fraction) -> Selection:
    """Erdos-Renyi-kernel densities of all layers but the last, whose density is given; by score within the layer.

    Args:
        last: the density of the last layer.

    Reference: "ERK+" in Liu et al. 2022, arXiv:2202.02643.
    Deviates: the total is exact; they draw each weight by itself.

    Raises:
        ConfigError: the last layer alone would keep more than the sparsity allows.
    """
    require_weights(candidates, "erk_plus")
    shares = {name: sum(mask.shape) / math.prod(mask.shape) for name, mask in candidates.items()}
    name = list(candidates)[-1]
    return by_density(scores, candidates, keep, shares | {name: last}, fixed={name})


def densities_of_file(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, file: str) -> Selection:
    """Layer densities from a CSV file, by score within the layer. One factor for all layers makes the total exact.

    Args:
        file: a table with the columns name (of the parameter) and density (0 to 1), one row a layer.

    Reference: such tables are published with STR, Kusupati et al. 2020, arXiv:2002.03231.

    Raises:
        ConfigError: the file cannot be read, lacks a layer, or has a density outside 0 to 1.
    """
    where = f"allocation.file={file}"
    try:
        with Path(file).open(newline="") as opened:
            rows = list(csv.DictReader(opened))
        densities = {row["name"]: float(row["density"]) for row in rows}
    except OSError as error:
        raise ConfigError(f"{where}: it cannot be read ({error.strerror}); give a CSV file") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: it needs the columns name and density, with a number in each row") from error
    for name in candidates:
        if name not in densities:
            raise ConfigError(f"{where}: it has no row for {name}; every prunable layer needs one")
        if not 0 <= densities[name] <= 1:
            raise ConfigError(f"{where}: the density of {name} is {densities[name]:g}; give one from 0 to 1")
    if keep and not any(densities[name] for name in candidates):
        raise ConfigError(f"{where}: all densities are 0, and {asked(keep, candidates)} keeps {keep} weights")
    return by_density(scores, candidates, keep, {name: densities[name] for name in candidates})


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero, to the precision of floats."""
    while low < (middle := (low + high) / 2) < high:
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return high
