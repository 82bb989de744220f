"""The trackers that conf/tracker/ names. Each mirrors the run directory, which stays the whole record."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pai_bench.core import Positive
from pai_bench.runs.tracker import Guarded, Run, Several, Tracker


class _NoTracker:
    delivers = False

    def record(self, metrics: dict[str, float], epoch: float) -> None: ...
    def mask(self, file: Path) -> None: ...
    def finish(self, row: dict[str, Any], exit_code: int) -> None: ...


def none(run: Run) -> Tracker:
    """Records nothing: the run directory is the only record."""
    return _NoTracker()


def wandb(
    run: Run,
    *,
    project: str | None,
    entity: str | None,
    mode: Literal["online", "offline", "disabled"],
    tags: list[str],
    timeout_seconds: Positive,
) -> Tracker:
    """A W&B run with the id of the run, in its directory. It is offline by default.

    WANDB_MODE, if set, overrides `mode`. A run that should be online, but has no key or no network, goes offline with
    a warning. `pai-bench sync` sends it later.

    Args:
        mode: "offline", "online" or "disabled".
        tags: in addition to those of the run.
        timeout_seconds: how long the start and the end of a run wait for a server that does not answer.
    """
    from pai_bench.runs import wandb_run

    return wandb_run.started(run, project, entity, mode, tags, timeout_seconds)


def tensorboard(run: Run) -> Tracker:
    """Event files in the folder `tensorboard` of the run directory: `tensorboard --logdir results` shows all runs."""
    from pai_bench.runs import event_files

    return event_files.EventFiles(run)


def wandb_and_tensorboard(
    run: Run,
    *,
    project: str | None,
    entity: str | None,
    mode: Literal["online", "offline", "disabled"],
    tags: list[str],
    timeout_seconds: Positive,
) -> Tracker:
    """Both. If one fails, the other goes on. The settings are those of `wandb`."""
    of_wandb = partial(wandb, project=project, entity=entity, mode=mode, tags=tags, timeout_seconds=timeout_seconds)
    return Several([Guarded("wandb", of_wandb, run), Guarded("tensorboard", tensorboard, run)])
