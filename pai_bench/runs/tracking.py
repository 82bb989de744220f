"""Weights & Biases, or no tracker. It mirrors the run directory. Its failures never end a run."""

import hashlib
import logging
import netrc
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

from pai_bench.core import Positive
from pai_bench.errors import PreemptedError
from pai_bench.system import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a tracker gets to know about a run at its start."""

    id: str
    group: str
    directory: Path
    config: dict[str, Any]
    tags: list[str]
    # Of a run that goes on: the curve up to its checkpoint, and the number of lines that an earlier attempt wrote after
    # the checkpoint. The run records these lines once more, unchanged.
    curve: list[dict[str, float]] | None = None
    num_repeated: int = 0


class Tracker(Protocol):
    """Receives what a run records."""

    def record(self, metrics: dict[str, float], epoch: float) -> None:
        """Receives metrics at a time, in epochs."""

    def mask(self, file: Path) -> None:
        """Receives the file of the mask."""

    def finish(self, row: dict[str, Any], exit_code: int) -> None:
        """Receives the result row (empty after a failure) and the exit code, at the end of the run."""

    @property
    def delivers(self) -> bool:
        """Whether everything so far has reached a place where others can see it."""


class _NoTracker:
    delivers = False

    def record(self, metrics: dict[str, float], epoch: float) -> None: ...
    def mask(self, file: Path) -> None: ...
    def finish(self, row: dict[str, Any], exit_code: int) -> None: ...


def none(run: Run) -> Tracker:
    """Records nothing: the run directory is the only record."""
    return _NoTracker()


class _WandB:
    """Calls the W&B client. After the first failure it warns once and does nothing more."""

    def __init__(self, client: Any, run: Any, name: str) -> None:
        self._client, self._run, self._name = client, run, name
        self._num_known = 0  # how many of the next records W&B has already

    def go_on(self, curve: list[dict[str, float]], num_repeated: int, online: bool) -> None:
        """Joins the records of an earlier attempt and those of this one: W&B gets every record exactly once."""
        if not online:  # the earlier attempt has its own folder, which misses its last second at most
            self._num_known = num_repeated
            return
        known = self._run.starting_step  # every record is a step
        for line in curve[known:]:
            self.record({key: value for key, value in line.items() if key != "epoch"}, line["epoch"])
        self._num_known = max(known - len(curve), 0)

    @property
    def delivers(self) -> bool:
        """Whether it is online and nothing has failed."""
        return self._run is not None and not self._run.offline

    def _safely(self, what: str, call: Any) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            log.warning("W&B failed to %s (%s: %s); the run goes on without it", what, type(error).__name__, error)
            self._run = None

    def record(self, metrics: dict[str, float], epoch: float) -> None:
        if self._num_known > 0:
            self._num_known -= 1
            return
        self._safely("record metrics", lambda: self._run.log({"epoch": epoch, **metrics}))

    def mask(self, file: Path) -> None:
        def log_artifact() -> None:
            artifact = self._client.Artifact(_fitting(f"mask-{self._name}"), type="mask")
            artifact.add_file(str(file))
            self._run.log_artifact(artifact)

        self._safely("store the mask", log_artifact)

    def finish(self, row: dict[str, Any], exit_code: int) -> None:
        def end() -> None:
            if exit_code == PreemptedError.exit_code:
                self._run.mark_preempting()
            self._run.summary.update({key: value for key, value in row.items() if value is not None})
            self._run.finish(exit_code=exit_code)

        self._safely("finish", end)


def _fitting(name: str, length: int = 128) -> str:
    """The name in a form that W&B accepts: fewer characters, not too long. Different names stay different."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return plain if len(plain) <= length else f"{plain[: length - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb(
    run: Run,
    *,
    project: str,
    entity: str | None,
    mode: Literal["online", "offline", "disabled"],
    tags: list[str],
    timeout_seconds: Positive,
) -> Tracker:
    """A W&B run with the id of the run, in its directory. It is offline by default.

    WANDB_MODE, if set, overrides `mode`. A run that should be online, but has no key or no network, goes offline with
    a warning. `wandb sync` sends it later.

    Args:
        mode: "offline", "online" or "disabled".
        timeout_seconds: how long the start and the end of a run wait for a server that does not answer.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # In the run directory, so that a sync from another machine finds the artifacts.
    os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_ARTIFACT_DIR"] = str(run.directory / "wandb")
    try:
        import wandb as client

        wanted: str = os.environ.get("WANDB_MODE") or mode
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        if wanted == "online" and not _has_key(host):
            log.warning("tracker.mode=online: no W&B key for %s, going offline; run `wandb login` first", host)
            wanted = "offline"
        keep = "allow" if run.curve is not None else None  # None replaces what W&B has under this id
        start: dict[str, Any] = {
            "id": _fitting(run.id),
            "name": _fitting(run.id),
            "group": _fitting(run.group),
            "project": project,
            "entity": entity,
            "resume": keep,
            "config": run.config,
            "dir": str(run.directory),
            "job_type": "train",
            "tags": [_fitting(tag, 64) for tag in [*run.tags, *tags] if tag],
            "reinit": "create_new",
            "settings": _settings(client, timeout_seconds, wanted == "offline"),
        }
        started = _started(client, start, wanted)
        _define_axes(started)
        if started.id != start["id"] and not started.disabled:  # an agent of a sweep gives its own id
            log.warning("W&B calls this run %s, as an agent of a sweep says; wandb.json keeps that", started.id)
            files.write_json(run.directory / "wandb.json", {"id": started.id, "sweep": started.sweep_id})
        tracker = _WandB(client, started, run.id)
        if run.curve is not None:
            tracker.go_on(run.curve, run.num_repeated, not started.offline)
        return tracker
    except Exception as error:
        log.warning("W&B cannot start (%s: %s); the run directory is the only record", type(error).__name__, error)
        return _NoTracker()


def _settings(client: Any, timeout_seconds: float, offline: bool) -> Any:
    """The settings of the W&B client: it is silent, looks at nothing but the run, and loses nothing."""
    return client.Settings(
        console="off",
        disable_git=True,
        silent=True,
        init_timeout=timeout_seconds,
        finish_timeout=timeout_seconds,
        finish_timeout_raises=True,
        x_disable_machine_info=offline,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1,  # its 15 s would lose the last epochs of a run that is killed
    )


def _define_axes(started: Any) -> None:
    """Makes the epoch the x-axis of all metrics, and the round that of the metrics of pruning and of layers."""
    started.define_metric("epoch")
    started.define_metric("*", step_metric="epoch")
    started.define_metric("prune/round")
    started.define_metric("prune/*", step_metric="prune/round")
    started.define_metric("layer/*", step_metric="prune/round")


def _started(client: Any, start: dict[str, Any], mode: str) -> Any:
    """The W&B run that `start` describes. It is offline, with a warning, if no server answers."""
    try:
        return client.init(**start | {"mode": mode})
    except client.errors.Error as error:
        if mode != "online":
            raise
        log.warning("W&B is unreachable (%s), going offline; `wandb sync` sends it later", type(error).__name__)
        client.teardown()
        return client.init(**start | {"mode": "offline"})
