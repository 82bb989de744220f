"""Hydra's basic sweeper, with paired settings, exclusions and a scale."""

import shutil
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class GridSweeperConf:
    """The settings of hydra.sweeper."""

    _target_: str = "hydra_plugins.pai_bench_plugins.grid.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    paired: list[Any] | None = None
    exclude: list[dict[str, Any]] | None = None
    drop: list[dict[str, Any]] | None = None
    scale: dict[str, Any] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="pai_bench")


class GridSweeper(BasicSweeper):
    """The sweeper. pai_bench.launch.sweeps says which runs a sweep has."""

    def __init__(self, paired: Any, exclude: Any, drop: Any, scale: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.rules = (paired or [], exclude or [], drop or [], scale)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        from pai_bench.launch import sweeps

        loader = sweeps.SweepLoader(hydra_context.config_loader.get_search_path())
        context = HydraContext(loader, hydra_context.callbacks)
        super().setup(hydra_context=context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Called by Hydra with the words of the command line."""
        from pai_bench.config.composition import SCRATCH

        parsed = OverridesParser.create().parse_overrides(arguments)
        self.given = {override.get_key_element() for override in parsed}
        SCRATCH.mkdir(mode=0o700)
        try:
            return super().sweep(arguments)
        finally:
            shutil.rmtree(SCRATCH, ignore_errors=True)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:  # type: ignore[override]
        """The overrides of every job, in batches."""
        from pai_bench.launch import sweep_progress, sweeps

        found = sweeps.overrides_of_jobs(overrides, *self.rules, self.given)
        if not getattr(self.launcher, "composes_all", False):
            sweep_progress.expect(len(found))
        return list(self.split_overrides_to_chunks(found, max_batch_size))

    def validate_batch_is_legal(self, batch: Any) -> None:
        """Composes every job before the first starts, unless the launcher does that itself."""
        from pai_bench.system import preemption

        if not getattr(self.launcher, "composes_all", False):
            for overrides in batch:
                preemption.check()  # composing thousands of jobs takes a while
                super().validate_batch_is_legal([overrides])
