"""The launcher of hydra/launcher=parallel: that of joblib, with CUDA MPS where several runs share a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class ParallelLauncher(Launcher):
    """Runs jobs in processes of this machine. The settings are those of joblib.

    The jobs of one chain of tickets go one after another, because they share their trainings.
    """

    def __init__(self, **joblib: Any) -> None:
        self.joblib = joblib

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra."""
        from pai_bench.launch import chains
        from pai_bench.system import mps

        tasks = chains.positions([self._composed(overrides) for overrides in job_overrides])
        at_once, num_gpus = int(self.joblib.get("n_jobs", 1)), 0
        if at_once < 0:  # joblib counts from the number of cores down
            at_once = len(tasks)
        if str(self.config.device) != "cpu" and at_once > 1:
            import torch

            num_gpus = torch.cuda.device_count()  # makes no context, which would not be one of MPS
        with mps.shared(min(at_once, len(tasks)), num_gpus) as started:
            try:
                return self._launch(tasks, job_overrides, initial_job_idx)
            finally:
                if started:
                    _end_workers()

    def _composed(self, overrides: Sequence[str]) -> Any:
        """The checked config of a job; None if something is wrong with it, which the job will say itself."""
        from pai_bench.config import checks, composition
        from pai_bench.system import preemption

        preemption.check()
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                composed.pop("hydra", None)
            return checks.complete(composition.resolved(composed))
        except Exception:
            return None

    def _launch(
        self, tasks: Sequence[Sequence[int]], job_overrides: Sequence[Sequence[str]], first: int
    ) -> Sequence[JobReturn]:
        """What the launcher of joblib does, with several jobs in one task.

        Args:
            tasks: the positions of jobs that go one after another.
        """
        from hydra_plugins.hydra_joblib_launcher._core import process_joblib_cfg
        from joblib import Parallel, delayed

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        process_joblib_cfg(self.joblib)
        shared = (self.hydra_context, self.config, self.task_function, Singleton.get_state())
        done = Parallel(**self.joblib | {"backend": "loky"})(
            delayed(_one_after_another)([(first + job, job_overrides[job]) for job in task], *shared) for task in tasks
        )
        returned = {
            job: each for task, some in zip(tasks, done, strict=True) for job, each in zip(task, some, strict=True)
        }
        return [returned[job] for job in range(len(job_overrides))]


def _one_after_another(jobs: Sequence[tuple[int, Sequence[str]]], *shared: Any) -> list[JobReturn]:
    """What a process does: the jobs of a task, by their number in the sweep."""
    from hydra_plugins.hydra_joblib_launcher._core import execute_job

    return [execute_job(number, overrides, *shared) for number, overrides in jobs]


def _end_workers() -> None:
    """Ends the idle workers of joblib: the daemon of MPS would wait for them."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)
