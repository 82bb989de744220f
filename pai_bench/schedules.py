"""Sparsity -> rounds: in which steps a sparsity is reached. Density never rises, and the last round hits the target."""

from collections.abc import Sequence

from pai_bench.core import Round


def none(sparsity: float) -> Sequence[Round]:
    """No rounds: the network stays dense."""
    return []


def one_shot(sparsity: float) -> Sequence[Round]:
    """One round."""
    return [Round(sparsity)]


def exponential(sparsity: float, *, rounds: int) -> Sequence[Round]:
    """Density d^(i/n) after round i of n, so that every round prunes the same fraction of what is left.

    Reference: Tanaka et al. 2020, arXiv:2006.05467, Algorithm 1.
    """
    density = 1 - sparsity
    return [Round(1 - density ** (i / rounds)) for i in range(1, rounds)] + [Round(sparsity)]


def linear(sparsity: float, *, rounds: int) -> Sequence[Round]:
    """Sparsity i/n of the target after round i of n, so that every round prunes the same number of weights."""
    return [Round(sparsity * i / rounds) for i in range(1, rounds)] + [Round(sparsity)]
