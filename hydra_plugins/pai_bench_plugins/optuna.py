"""The sweeper of hydra/sweeper=optuna. conf/hydra/sweeper/optuna.yaml has its settings.

The plugin hydra-optuna-sweeper needs an Optuna below 3, so this one takes its place. It takes the same search spaces.
"""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Asks Optuna for settings, has the launcher run them, and tells Optuna what they were worth."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        from pai_bench.launch import sweeps

        context = HydraContext(
            sweeps.SweepLoader(hydra_context.config_loader.get_search_path()), hydra_context.callbacks
        )
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra with the words of the command line."""
        from pai_bench.errors import ConfigError
        from pai_bench.launch import search

        if getattr(self.launcher, "composes_all", False):
            raise ConfigError(
                "hydra/sweeper=optuna: it waits for the result of every run, and hydra/launcher=slurm does not; leave "
                "the launcher out, or give hydra/launcher=parallel"
            )
        search.search(arguments, self.launcher.launch, **self.settings)
