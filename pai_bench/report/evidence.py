"""Other files of runs, read only for what the figures show: densities of layers, training curves, masks."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from pai_bench.report.configurations import Configuration, Grid, deviation

LEVELS_SHOWN = 4  # sparsities at which layers, curves and overlaps are shown
SEEDS_SHOWN = 5  # seeds whose layers and curves are read
EPOCHS_SHOWN = 60  # points of a curve


class Unreadable:
    """Collects the files that cannot be read, each once."""

    def __init__(self) -> None:
        self.paths: dict[Path, str] = {}

    def note(self, path: Path, error: Exception) -> None:
        """Adds a file and the reason."""
        gone = isinstance(error, FileNotFoundError)  # safetensors raises this error without strerror
        self.paths[path] = "No such file" if gone else f"it cannot be read ({error})"


@dataclass(frozen=True)
class Measured:
    """A mean over seeds."""

    mean: float
    sd: float | None
    seeds: tuple[int, ...]


def measured(values: Mapping[int, float]) -> Measured:
    """Mean and sample standard deviation of a value, given by seed."""
    return Measured(fmean(values.values()), deviation(values.values()), tuple(values))


@dataclass(frozen=True)
class Layer:
    """One prunable tensor of a configuration."""

    name: str
    size: int
    density: Measured


def _shown(configuration: Configuration) -> list[Mapping[str, Any]]:
    return list(configuration.rows[:SEEDS_SHOWN])


def layers(configuration: Configuration, directories: Mapping[str, Path], unreadable: Unreadable) -> list[Layer]:
    """The prunable layers in a configuration's masks, in the order of the network. Empty without mask.json."""
    sizes: dict[str, int] = {}
    densities: dict[str, dict[int, float]] = {}
    for row in _shown(configuration):
        path = directories[row["id"]] / "mask.json"
        try:
            for layer in json.loads(path.read_text())["layers"]:
                sizes[layer["name"]] = layer["size"]
                densities.setdefault(layer["name"], {})[row["seed"]] = float(layer["density"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            unreadable.note(path, error)
    return [Layer(name, sizes[name], measured(by_seed)) for name, by_seed in densities.items()]


def curve(
    configuration: Configuration, directories: Mapping[str, Path], unreadable: Unreadable
) -> dict[float, Measured]:
    """Test accuracy by epoch from metrics.csv, over the seeds that have a record of that epoch.

    Of a long training it takes evenly spaced epochs, with the first and the last. Epochs count all training, also
    training before the mask.
    """
    by_epoch: dict[float, dict[int, float]] = {}
    for row in _shown(configuration):
        path = directories[row["id"]] / "metrics.csv"
        try:
            with path.open(newline="") as file:
                lines = csv.reader(file)
                header = next(lines, [])
                epoch, accuracy = header.index("epoch"), header.index("test_top1")
                for line in lines:
                    if line[accuracy]:
                        by_epoch.setdefault(float(line[epoch]), {})[row["seed"]] = float(line[accuracy])
        except (OSError, ValueError, IndexError, csv.Error) as error:
            unreadable.note(path, error)
    epochs = sorted(by_epoch)
    if len(epochs) > EPOCHS_SHOWN:
        epochs = [epochs[round(i * (len(epochs) - 1) / (EPOCHS_SHOWN - 1))] for i in range(EPOCHS_SHOWN)]
    return {epoch: measured(by_epoch[epoch]) for epoch in epochs}


@dataclass(frozen=True)
class Overlap:
    """The overlap of two masks of one seed."""

    first: str  # ids of methods
    second: str
    seed: int
    kept_first: int
    kept_second: int
    common: int
    common_by_chance: float  # expected for random masks that keep as many weights of each layer

    @property
    def jaccard(self) -> float:
        """The number of weights that both masks keep, divided by the number that at least one keeps."""
        return self.common / (self.kept_first + self.kept_second - self.common)

    @property
    def jaccard_by_chance(self) -> float:
        """The Jaccard index that chance would give."""
        return self.common_by_chance / (self.kept_first + self.kept_second - self.common_by_chance)

    @property
    def of_smaller(self) -> float:
        """The number of weights that both masks keep, divided by the number that the smaller mask keeps."""
        return self.common / min(self.kept_first, self.kept_second)


def seed_of_overlaps(configurations: Sequence[Configuration]) -> int | None:
    """The seed that most configurations have; the lowest of equals. None if no two configurations share a seed."""
    counts: dict[int, int] = {}
    for configuration in configurations:
        for row in configuration.rows:
            counts[row["seed"]] = counts.get(row["seed"], 0) + 1
    best = max(counts, key=lambda seed: (counts[seed], -seed), default=None)
    return best if best is not None and counts[best] > 1 else None


def overlaps(
    grid: Grid, level: float, directories: Mapping[str, Path], unreadable: Unreadable
) -> tuple[int | None, list[Overlap]]:
    """The compared seed, and the overlap of every pair of methods at a sparsity, without dense networks."""
    import numpy as np

    configurations = [configuration for configuration in grid.at(level) if not configuration.dense]
    seed = seed_of_overlaps(configurations)
    if seed is None:
        return None, []
    masks: dict[str, dict[str, tuple[int, int, Any]]] = {}  # by method and layer: size, kept, packed bits
    for configuration in configurations:
        row = next((row for row in configuration.rows if row["seed"] == seed), None)
        if row is not None:
            mask = _packed(directories[row["id"]], unreadable)
            if mask:
                masks[configuration.method] = mask
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # set in each byte; numpy 2 has it
    found = []
    for first, second in combinations(masks, 2):
        a, b = masks[first], masks[second]
        if a.keys() != b.keys():
            continue
        common = sum(int(bits[a[name][2] & b[name][2]].sum()) for name in a)
        chance = sum(a[name][1] * b[name][1] / a[name][0] for name in a)
        kept = [sum(layer[1] for layer in mask.values()) for mask in (a, b)]
        if min(kept):
            found.append(Overlap(first, second, seed, kept[0], kept[1], common, chance))
    return seed, found


def _packed(directory: Path, unreadable: Unreadable) -> dict[str, tuple[int, int, Any]]:
    """Size, number kept and packed bits of each prunable layer of a run's mask. Empty if the mask cannot be read."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    path = directory / "mask.json"
    try:
        names = [layer["name"] for layer in json.loads(path.read_text())["layers"]]
        path = directory / "mask.safetensors"
        found = {}
        with safe_open(path, "numpy") as file:
            for name in names:  # the file also holds the norms of pruned filters
                kept = file.get_tensor(name)
                found[name] = (kept.size, int(np.count_nonzero(kept)), np.packbits(kept.astype(bool)))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        unreadable.note(path, error)
        return {}
    return found
