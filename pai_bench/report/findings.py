"""What a report says first: what was compared, which method is best, and what a reader has to be warned of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pai_bench.report import names
from pai_bench.report.comparison import FEWEST, Difference, not_below_best, ranked
from pai_bench.report.configurations import Grid
from pai_bench.report.names import Look


@dataclass(frozen=True)
class Best:
    """The best method at one sparsity of a grid."""

    level: float
    methods: tuple[str, ...]  # ids; several if their means are equal, none if no ranked one is above chance
    mean: float | None  # percent
    words: str  # for people
    at_chance: bool = False  # all methods
    exceeded: bool = False  # whether a method that is not ranked has a higher mean


def compared(grid: Grid, looks: Mapping[str, Look]) -> str:
    """What a grid compares, in one sentence."""
    labels = [looks[method].label for method in grid.methods]
    numbers = {len(one.rows) for one in [*grid.configurations.values(), *grid.dense]}
    fewest = f"{min(numbers)} to " if len(numbers) > 1 else ""
    seeds = fewest + names.counted(max(numbers), "seed")
    if not labels:
        return f"The dense network, {seeds}."
    at = names.listed([names.compression(level) for level in grid.levels])
    kind = " (of filters)" if grid.filters else ""
    noun = "compressions" if len(grid.levels) > 1 else "compression"
    return f"{names.listed(labels)} at {noun} of {at}{kind}, {seeds}{' each' if max(numbers) > 1 else ''}."


def winners(grid: Grid, differences: Mapping[float, Sequence[Difference]], looks: Mapping[str, Look]) -> list[Best]:
    """The best method at each sparsity, the dense network aside.

    Args:
        differences: all comparisons at each sparsity.
    """
    found = []
    for level in grid.levels:
        means = ranked(grid, level)
        top = max((c.mean for c in means if c.mean is not None), default=None)
        leading = [c for c in means if c.mean == top]
        if top is None:
            found.append(Best(level, (), None, "no method was trained with every seed"))
        elif grid.near_chance(top):
            higher = _higher(grid, level, top, looks)
            ranked_ones = " with the most seeds" if higher else ""
            words = f"no method{ranked_ones} is above chance ({_percent(grid.chance)}){higher}"
            found.append(Best(level, (), None, words, at_chance=not higher, exceeded=bool(higher)))
        else:
            sd = leading[0].sd if len(leading) == 1 else None
            words = f"{names.listed([looks[c.method].label for c in leading])}, {names.percent(top)}"
            words += f" ± {names.percent(sd)} %" if sd is not None else " %"
            untold, untested = (
                names.listed([looks[method].label for method in grid.methods if method in methods])
                for methods in not_below_best(grid, level, differences.get(level, ()))
            )
            higher = _higher(grid, level, top, looks)
            words += higher
            words += f"; no test shows it above {untold}" if untold else ""
            words += f"; it was not tested against {untested}" if untested else ""
            found.append(Best(level, tuple(c.method for c in leading), 100 * top, words, exceeded=bool(higher)))
    return found


def _higher(grid: Grid, level: float, top: float, looks: Mapping[str, Look]) -> str:
    """The methods that are not ranked and whose mean is above chance and above that of those that are, in words."""
    above = [
        one
        for one in grid.at(level)
        if not one.dense and one.mean is not None and one.mean > top and not grid.near_chance(one.mean)
    ]
    fewer, partly = ([looks[c.method].label for c in above if bool(c.untrained) == some] for some in (False, True))
    words = f"; with fewer seeds {names.listed(fewer)} {_verb(fewer)} higher" if fewer else ""
    return words + (f"; without untrained runs {names.listed(partly)} {_verb(partly)} higher" if partly else "")


def warnings(grid: Grid, differences: Mapping[float, Sequence[Difference]], looks: Mapping[str, Look]) -> list[str]:
    """What a reader of the table must know first: too few seeds, no dense network, chance, collapsed networks.

    Args:
        differences: all comparisons at each sparsity.
    """
    found = []
    several = [level for level in grid.levels if sum(not one.dense for one in grid.at(level)) > 1]
    untested = [level for level in several if all(d.p is None for d in differences.get(level, ()))]
    if len(grid.seeds) < FEWEST and several:
        found.append(f"{names.counted(len(grid.seeds), 'seed')}: no test was made, because that takes {FEWEST}.")
    else:
        at: dict[str, list[str]] = {}
        for level in untested:
            at.setdefault(_untested(grid, level, differences.get(level, ())), []).append(names.compression(level))
        found += [f"No test was made at {names.listed(ratios)}: {reason}." for reason, ratios in at.items()]
    if not grid.dense:
        found.append("There is no run of the dense network.")
    for level in grid.levels:
        means = [c.mean for c in grid.at(level) if not c.dense and c.mean is not None]
        if means and grid.near_chance(max(means)):
            found.append(f"No method is above chance ({_percent(grid.chance)}) at {names.compression(level)}.")
    for level in grid.levels:
        collapsed = []
        for method in grid.methods:
            one = grid.configurations.get((method, level))
            if one is not None and (share := one.share("either")) > 0:
                some = f" ({round(share * len(one.rows))} of {len(one.rows)} seeds)" if share < 1 else ""
                collapsed.append(f"{looks[method].label}{some}")
        if collapsed:
            found.append(f"Networks collapsed at {names.compression(level)}: {names.listed(collapsed)}.")
    return found


def _untested(grid: Grid, level: float, differences: Sequence[Difference]) -> str:
    """Why no pair at a sparsity was tested."""
    if any(len(one.seeds) >= FEWEST for one in differences):
        return f"where two methods have {FEWEST} seeds in common, their difference is the same in every seed"
    reason = f"that takes {FEWEST} seeds which two methods have in common"
    seeds = [{*one.values, *one.untrained} for one in grid.at(level)]
    if any(len(first & second) >= FEWEST for first, second in combinations(seeds, 2)):
        reason += ", and no run of the two that on_collapse=stop left untrained"
    return reason


def _verb(subjects: Sequence[str]) -> str:
    return "is" if len(subjects) == 1 else "are"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
