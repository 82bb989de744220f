"""Which runs share trainings: tickets of one chain, which differ only in how deep they prune."""

from collections.abc import Sequence

from pai_bench.config import checks
from pai_bench.config.schema import RunConfig


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
