"""Who this process is among those of its run. Imports no torch."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The processes of this run; rank 0 writes its files."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine


def world() -> World:
    """Who this process is, by the environment that torchrun or srun gave it."""
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return World()
