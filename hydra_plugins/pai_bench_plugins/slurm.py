"""The launcher of hydra/launcher=slurm. conf/hydra/launcher/slurm.yaml has its settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SlurmLauncher(Launcher):
    """Composes every run of a sweep immediately, and submits the runs that are still to be done."""

    composes_all = True

    def __init__(self, *, wait: bool, export: str | None, folder: str, max_requeues: int, **sbatch: Any) -> None:
        self.wait, self.export = wait, export
        self.settings = {"max_requeues": max_requeues} | {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in sbatch.items()
        }
        self.folder = folder

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra."""
        from pai_bench.errors import ConfigError
        from pai_bench.launch import chains, slurm_scripts
        from pai_bench.launch.overrides import complete
        from pai_bench.system import preemption

        cfgs = []
        for overrides in job_overrides:
            preemption.check()
            composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            cfgs.append(complete(composed, composed.hydra))
        if self.export is not None and self.config.hydra.sweeper.max_batch_size is not None:
            raise ConfigError("hydra.launcher.export: not with hydra.sweeper.max_batch_size; leave one out")
        if self.export is not None:
            tasks = [[job_overrides[number] for number in chain] for chain in chains.positions(cfgs)]
            slurm_scripts.export(tasks, Path(self.export), self._folders_of_configs(), **self.settings)
            return []
        self.submit(cfgs)
        return []

    def _folders_of_configs(self) -> list[str]:
        """The words that say where the user's own configs lie."""
        hydra = self.config.hydra
        sources = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
        return [
            *(f"--config-dir={Path(path).resolve()}" for path in sources),
            *(word for word in hydra.overrides.hydra if word.startswith("hydra.searchpath=")),
        ]

    def submit(self, cfgs: Sequence[dict[str, Any]]) -> None:
        """Submits checked configs, and waits for their jobs if `wait` is set."""
        from pai_bench.errors import ConfigError
        from pai_bench.launch import slurm, sweep_progress

        if self.export is not None:
            raise ConfigError(f"hydra.launcher.export={self.export}: only with pai-bench -m or an experiment")
        jobs = slurm.submit(cfgs, folder=self.folder, **self.settings)
        if self.wait:
            slurm.wait([*jobs.values(), *slurm.waiting(cfgs)], cfgs)
            for code, skipped, directory in slurm.outcomes(cfgs, jobs):
                sweep_progress.count(code, skipped, directory)
