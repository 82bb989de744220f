"""Groups runs that differ only in their seed, and computes their statistics."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Any

from pai_bench.errors import ConfigError

STATISTICS = {
    "last": "test_top1",
    "best": "best_test_top1",
    "selected": "test_top1_at_best_validation",
    "early_stop": "test_top1_at_early_stop",
}

Row = Mapping[str, Any]


def compression(sparsity: float) -> float:
    """1 / (1 - sparsity), without the error from rounding sparsities to twelve digits: 0.966666666667 gives 30."""
    return float(f"{1 / (1 - sparsity):.8g}")


def deviation(values: Collection[float]) -> float | None:
    """Standard deviation of a sample (n - 1). None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = fmean(values)  # statistics.stdev computes with fractions, which takes fifty times as long
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def is_dense(row: Row) -> bool:
    """Whether nothing was pruned: neither in rounds, nor by a mask that was given or learned, nor in training."""
    found = row["num_rounds"] == 0 and row["mask"] is None and row.get("rewire", "none") == "none"
    return bool(found and row["target_sparsity"] == 0)


NO_DENSE = "dense"  # stands for the unknown id of a dense network that has no run


@dataclass(frozen=True)
class Configuration:
    """The runs of a method at a sparsity in a task: one for each seed, sorted by seed.

    Runs that `on_collapse=stop` left untrained, and runs without the wanted accuracy, are in `rows`, not in `values`.
    """

    rows: tuple[Row, ...]
    statistic: str  # a key of STATISTICS

    @cached_property
    def values(self) -> dict[int, float]:
        """The accuracy of each trained seed, as a fraction."""
        column = STATISTICS[self.statistic]
        return {row["seed"]: row[column] for row in self.rows if not row["stopped"] and row.get(column) is not None}

    @property
    def n(self) -> int:
        """The number of seeds in the statistics."""
        return len(self.values)

    @cached_property
    def mean(self) -> float | None:
        """Mean accuracy over the seeds. None if there are none."""
        return fmean(self.values.values()) if self.values else None

    @cached_property
    def sd(self) -> float | None:
        """Standard deviation of the sample (n - 1). None for fewer than two seeds."""
        return deviation(self.values.values())

    @property
    def untrained(self) -> list[int]:
        """Seeds whose network was not trained, because of on_collapse=stop."""
        return [row["seed"] for row in self.rows if row["stopped"]]

    @property
    def without_value(self) -> list[int]:
        """Trained seeds that lack the wanted accuracy, because there was no validation split."""
        return [row["seed"] for row in self.rows if not row["stopped"] and row["seed"] not in self.values]

    @property
    def method(self) -> str:
        """The method's id."""
        return str(self.rows[0]["method"])

    @property
    def task(self) -> str:
        """The task's id."""
        return str(self.rows[0]["task"])

    @property
    def checksum(self) -> str:
        """The checksum of the dataset."""
        return str(self.rows[0]["dataset_checksum"])

    @property
    def dense(self) -> bool:
        """Whether nothing was pruned."""
        return is_dense(self.rows[0])

    @property
    def given(self) -> bool:
        """Whether the mask came from a file. The cost of finding it is unknown then."""
        return self.rows[0]["mask"] is not None

    @property
    def filters(self) -> bool:
        """Whether the sparsity counts filters."""
        return self.rows[0]["filter_sparsity"] is not None

    @property
    def sparsity(self) -> float:
        """The target sparsity, of weights or of filters."""
        return float(self.rows[0]["target_sparsity"])

    @property
    def compression(self) -> float:
        """1 / (1 - sparsity)."""
        return compression(self.sparsity)

    def share(self, happened: str) -> float:
        """The fraction of all runs, trained or not, with a "collapsed" layer, "no_signal", or "either"."""
        seen = [(bool(row["collapsed_layers"]), not row["output_depends_on_input"]) for row in self.rows]
        chosen = {"collapsed": lambda pair: pair[0], "no_signal": lambda pair: pair[1], "either": any}[happened]
        return fmean(map(chosen, seen))

    def average(self, column: str) -> float:
        """Mean of a numeric column over all runs."""
        return fmean(row[column] for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """The mean time of the trained runs, from their start to their end. None if there is none."""
        values = [row["total_seconds"] for row in self.rows if not row["stopped"]]
        return fmean(values) if values else None

    @property
    def effective_sparsity(self) -> float | None:
        """Mean over all runs. None if it is unknown for a run."""
        values = [row["effective_sparsity"] for row in self.rows]
        return None if None in values else fmean(values)

    def search(self, cost: str) -> float:
        """The mean cost of finding the mask over all runs, in `examples`, `flops` or `seconds`.

        Training before the mask counts. Its seconds are not recorded separately. They are estimated from the time of
        all training, in proportion to the number of images.
        """
        if cost != "seconds":
            return self.average(f"score_{cost}") + self.average(f"search_train_{cost}")
        return fmean(
            row["prune_seconds"]
            + row["train_seconds"]
            * row["search_train_examples"]
            / max(1, row["search_train_examples"] + row["train_examples"])
            for row in self.rows
        )


@dataclass(frozen=True)
class Grid:
    """The configurations of one table, by method and sparsity.

    They have the same task and the same images, and all prune weights or all prune filters.
    """

    configurations: dict[tuple[str, float], Configuration]
    dense: tuple[Configuration, ...]  # dense networks of the same task and images
    filters: bool

    @property
    def first(self) -> Configuration:
        """One of the configurations."""
        return next(iter(self.configurations.values())) if self.configurations else self.dense[0]

    @cached_property
    def methods(self) -> list[str]:
        """The ids of the methods that prune, by falling mean accuracy at the highest compression.

        Where that is equal, the next lower compression decides. All means near chance are equal. Methods without a mean
        at a compression come after those with one.
        """
        found = dict.fromkeys(method for method, _ in self.configurations)

        def order(method: str) -> list[float]:
            at = [self.configurations.get((method, level)) for level in reversed(self.levels)]
            means = [None if one is None else one.mean for one in at]
            return [-1.0 if m is None else self.chance if self.near_chance(m) else m for m in means]

        return sorted(found, key=order, reverse=True)  # sorted keeps the order of equals, also if reversed

    @property
    def chance(self) -> float:
        """The accuracy of guessing, one over the number of classes; 0 for a regression."""
        row = self.first.rows[0]
        return 0.0 if row.get("regression") else 1.0 / float(row["num_classes"])

    @cached_property
    def levels(self) -> list[float]:
        """The sparsities, in rising order."""
        return sorted({level for _, level in self.configurations})

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds of all configurations."""
        return sorted(
            {
                row["seed"]
                for configuration in [*self.configurations.values(), *self.dense]
                for row in configuration.rows
            }
        )

    def near_chance(self, accuracy: float) -> bool:
        """Whether an accuracy is hardly above chance: by less than half of chance and than 5 % of the rest.

        With 10 classes that is below 14.5 %.
        """
        return accuracy < self.chance + min(self.chance / 2, 0.05 * (1 - self.chance))

    def at(self, level: float) -> list[Configuration]:
        """The dense configurations, then the configurations at a sparsity."""
        return [
            *self.dense,
            *(configuration for (_, sparsity), configuration in self.configurations.items() if sparsity == level),
        ]

    def missing(self) -> list[tuple[str, float, list[int]]]:
        """Method, sparsity and missing seeds: those that another configuration of the grid has.

        If the dense network has no run at all, its method is NO_DENSE.
        """
        expected: dict[tuple[str, float], Configuration | None] = {
            (configuration.method, 0.0): configuration for configuration in self.dense
        }
        expected = expected or {(NO_DENSE, 0.0): None}
        expected |= {place: self.configurations.get(place) for place in product(self.methods, self.levels)}
        found = []
        for (method, level), configuration in expected.items():
            present = {row["seed"] for row in configuration.rows} if configuration else set()
            if absent := [seed for seed in self.seeds if seed not in present]:
                found.append((method, level, absent))
        return found


def configurations(rows: Iterable[Row], statistic: str = "last") -> list[Configuration]:
    """Groups rows into configurations: in each task first dense, then by pruner, method and rising sparsity.

    Runs of different tasks, protocols or images never share a configuration.

    Args:
        rows: from `status.read`; at most one for each seed of a configuration.
        statistic: "last" epoch, "best" test epoch, or the epoch that a validation split chooses, "selected" by accuracy
            or "early_stop" by loss.

    Raises:
        ConfigError: no trained run has this accuracy.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        places = ("task", "protocol", "dataset_checksum", "pruner", "method", "target_sparsity")
        groups[tuple(row[key] for key in places) + (row["filter_sparsity"] is not None,)].append(row)
    found = [
        Configuration(tuple(sorted(group, key=lambda row: row["seed"])), statistic)
        for _, group in sorted(groups.items())
    ]
    found.sort(
        key=lambda configuration: (
            configuration.task,
            configuration.rows[0]["protocol"],
            configuration.checksum,
            not configuration.dense,
        )
    )
    trained = [configuration for configuration in found if len(configuration.untrained) < len(configuration.rows)]
    if trained and not any(configuration.values for configuration in trained):
        raise ConfigError(
            f"--statistic {statistic}: no run has {STATISTICS[statistic]}, which takes a validation split; "
            "run with dataset.validation=0.1, or give last or best"
        )
    return found


def grids(configurations: Sequence[Configuration]) -> list[Grid]:
    """One grid for each task, set of images, and kind of sparsity (of weights, of filters)."""
    by_task: dict[tuple[Any, ...], list[Configuration]] = defaultdict(list)
    for configuration in configurations:
        by_task[configuration.task, configuration.rows[0]["protocol"], configuration.checksum].append(configuration)
    found = []
    for group in by_task.values():
        dense = tuple(configuration for configuration in group if configuration.dense)
        kinds = sorted({configuration.filters for configuration in group if not configuration.dense}) or [False]
        for filters in kinds:
            pruned = [
                configuration for configuration in group if not configuration.dense and configuration.filters == filters
            ]
            found.append(
                Grid(
                    {(configuration.method, configuration.sparsity): configuration for configuration in pruned},
                    dense,
                    filters,
                )
            )
    return found


def spread(levels: Sequence[float], number: int) -> list[float]:
    """At most `number` of the levels, evenly spaced, with the first and the last."""
    if len(levels) <= number:
        return list(levels)
    return [levels[math.floor(i * (len(levels) - 1) / (number - 1) + 0.5)] for i in range(number)]
