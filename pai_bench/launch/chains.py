"""Which runs share trainings: tickets of one chain, which differ only in how deep they prune."""

from collections.abc import Sequence

from pai_bench.config import checks
from pai_bench.config.schema import RunConfig
from pai_bench.core import HOOKS

Training = tuple[str | float, ...]  # what tells a training from others: trainings that runs share are equal

_DIGITS = 6  # of a sparsity; levels that are given with so many keep the same weights


def chain_of(run: RunConfig) -> str:
    """What runs that share trainings have in common. A run that shares none is a chain of its own."""
    return run.chain if run.cache_gb and checks.trains_to_the_end(run) else run.id


def positions(runs: Sequence[RunConfig | None]) -> list[list[int]]:
    """The positions of runs by chain, in the order in which the chains begin; within a chain the least sparse first.

    Args:
        runs: None for one of which nothing is known: it is a chain of its own.
    """
    chains: dict[str | int, list[tuple[float, int]]] = {}
    for number, run in enumerate(runs):
        chains.setdefault(chain_of(run) if run else number, []).append((run.sparsity if run else 0.0, number))
    return [[number for _, number in sorted(chain)] for chain in chains.values()]


def grouped(runs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Runs by chain, in the order of `positions`."""
    return [[runs[number] for number in chain] for chain in positions(runs)]


def trainings(run: RunConfig) -> dict[Training, float]:
    """All trainings of a run, those of its search included, and how many epochs each takes."""
    chain, end = chain_of(run), run.training.epochs
    found: dict[Training, float] = {}
    clock, reached = 0.0, list[float]()
    for one in checks.rounds_of(run, run.sparsity):
        if one.until_epoch > clock:
            found[(chain if one.until_epoch >= end else run.id, *reached)] = one.until_epoch - clock
        clock = max(clock, one.until_epoch) if one.rewind_epoch is None else one.rewind_epoch
        reached.append(round(one.sparsity, _DIGITS))
    # Nobody else trains what is broken at the end.
    own = run.rewires or run.transfer or any(getattr(run.ablation, hook) is not None for hook in HOOKS)
    found[(run.id if own else chain, *reached)] = end - clock
    return found
