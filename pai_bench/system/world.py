"""The rank of this process among the processes of its run. Imports no torch."""

import multiprocessing
import os
import re
from dataclasses import dataclass, field

from pai_bench.errors import ConfigError


@dataclass(frozen=True)
class World:
    """The processes of this run, and the place of this one. Rank 0 writes the files of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    variable: str = field(default="", compare=False)  # the environment variable that gives the size
    local_size: int = field(default=1, compare=False)  # the processes on this machine, where the launcher says it


def world() -> World:
    """The place of this process, from the environment variables of torchrun or srun.

    Raises:
        ConfigError: the environment contradicts itself.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return _world("RANK", "WORLD_SIZE", "LOCAL_RANK", _number("LOCAL_WORLD_SIZE", 1))
    if "SLURM_PROCID" in env and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        alike = re.fullmatch(r"(\d+)(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))  # on every machine
        return _world("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", int(alike[1]) if alike else 1)
    return World()


def in_worker() -> bool:
    """Whether this process does runs of a sweep for another process. Such processes share one terminal."""
    return multiprocessing.current_process().name != "MainProcess"


def _world(rank: str, size: str, local_rank: str, local_size: int) -> World:
    result = World(_number(rank), _number(size), _number(local_rank, 0), size, local_size)
    if not 0 <= result.rank < result.size:
        raise ConfigError(f"{rank}={result.rank}, {size}={result.size}: no launcher sets them so; unset both")
    return result


def _number(variable: str, default: int | None = None) -> int:
    value = os.environ.get(variable, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(f"{variable}={value}: no launcher sets it so; unset it") from None
