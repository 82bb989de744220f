"""What a call from Python leaves as it was: random states, and the settings of torch and of the process."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from pai_bench.runs import wandb_run
from pai_bench.system import devices


@contextmanager
def random_states(seed: int | None = None) -> Iterator[None]:
    """Runs a block and restores the global random states of Python, NumPy and torch afterwards.

    Args:
        seed: seeds all of them for the block. None: the block goes on from the present states.
    """
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs that are not in use yet
            if of_gpus:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)


@contextmanager
def untouched() -> Iterator[None]:
    """Runs a block that computes gradients, whatever the caller has set, and restores random states and settings."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(random_states())
        stack.enter_context(devices.settings_restored())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def process_settings() -> Iterator[None]:
    """Runs a block, and restores what a run sets for its process: variables, the current GPU, a flag of logging."""
    variables = {name: os.environ.get(name) for name in wandb_run.VARIABLES}
    raises = logging.raiseExceptions
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.raiseExceptions = raises
        if gpu is not None:
            torch.cuda.set_device(gpu)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
