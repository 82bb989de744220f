"""The launcher of hydra/launcher=parallel: that of joblib, with CUDA MPS where several runs share a GPU."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ParallelLauncher(Launcher):
    """Runs jobs in processes of this machine. The settings are those of joblib."""

    def __init__(self, **joblib: Any) -> None:
        self.joblib = joblib

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra."""
        from hydra_plugins.hydra_joblib_launcher import _core

        from pai_bench.system import mps

        at_once, num_gpus = int(self.joblib.get("n_jobs", 1)), 0
        if at_once < 0:  # joblib counts from the number of cores down
            at_once = len(job_overrides)
        if str(self.config.device) != "cpu" and at_once > 1:
            import torch

            num_gpus = torch.cuda.device_count()  # makes no context, which would not be one of MPS
        with mps.shared(min(at_once, len(job_overrides)), num_gpus) as started:
            try:
                done: Sequence[JobReturn] = _core.launch(self, job_overrides, initial_job_idx)  # type: ignore[arg-type]
            finally:
                if started:
                    _end_workers()
        return done


def _end_workers() -> None:
    """Ends the idle workers of joblib: the daemon of MPS would wait for them."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)
