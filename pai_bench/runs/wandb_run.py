"""A run in Weights & Biases."""

import hashlib
import logging
import netrc
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pai_bench.errors import PreemptedError
from pai_bench.runs import pictures
from pai_bench.runs.tracker import Run
from pai_bench.system import files

log = logging.getLogger(__name__)

# mask.json gets the agreement of signs at the end.
_AT_START, _WITH_MASK, _AT_END = ("config.yaml", "provenance.json"), ("mask.json",), ("mask.json", "result.json")
FOLDER = "pai_bench"
VARIABLES = ("WANDB_ERROR_REPORTING", "WANDB__SERVICE_WAIT", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")  # set by `started`
_OF_MASK = ("seed", "sparsity")  # and the names of these groups
_GROUPS = ("dataset", "model", "pruner", "allocation", "schedule", "ablation", "rewire", "transfer", "training")


class WandB:
    """Calls the W&B client.

    Args:
        client: the module wandb.
        started: a run of the client.
    """

    def __init__(self, client: Any, started: Any, run: Run) -> None:
        self._client, self._started, self._run = client, started, run
        self._num_known = 0  # how many of the next records W&B has already
        self._save(_AT_START)
        if run.curve is not None:
            self._go_on(run.curve)

    def _go_on(self, curve: list[dict[str, float]]) -> None:
        """Joins the records of an earlier attempt and those of this one: W&B gets every record exactly once."""
        if self._started.offline:  # the earlier attempt has its own folder, which misses its last second at most
            self._num_known = self._run.num_repeated
            return
        known = self._started.starting_step  # every record is a step
        for line in curve[known:]:
            self.record({key: value for key, value in line.items() if key != "epoch"}, line["epoch"])
        self._num_known = max(known - len(curve), 0)

    @property
    def delivers(self) -> bool:
        """Whether it is online."""
        return not self._started.offline

    def record(self, metrics: dict[str, float], epoch: float) -> None:
        """Sends a record that W&B lacks."""
        if self._num_known > 0:
            self._num_known -= 1
            return
        finite = {key: value for key, value in metrics.items() if files.valid(value) is not None}
        self._started.log({"epoch": epoch, **finite})

    def mask(self, file: Path) -> None:
        """Sends the mask as a version of the artifact of the run's group, so that all seeds are in one place."""
        config = self._run.config
        names = {key: (config.get(key) or {"name": "none"})["name"] for key in _GROUPS}  # transfer=none is null
        of_run = {key: config[key] for key in _OF_MASK} | names
        artifact = self._client.Artifact(
            fitting(f"mask-{self._run.group}"), type="mask", metadata={"run": self._run.id} | of_run
        )
        artifact.add_file(str(file))
        self._started.log_artifact(artifact, aliases=["latest", f"seed-{config['seed']}"])
        self._save(_WITH_MASK)

    def finish(self, row: dict[str, Any], exit_code: int) -> None:
        """Sends the row as the summary, and pictures of the mask. They come last, because every record is a step."""
        if exit_code == PreemptedError.exit_code:
            self._started.mark_preempting()
        if row:
            self._draw()
            self._save(_AT_END)
        self._started.summary.update({key: value for key, value in row.items() if value is not None})
        self._started.finish(exit_code=exit_code)

    def _save(self, names: tuple[str, ...]) -> None:
        """Sends copies of files of the run, in a folder, because W&B has a config.yaml of its own."""
        home = Path(self._started.dir)
        (home / FOLDER).mkdir(exist_ok=True)
        for name in names:
            if (self._run.directory / name).is_file():
                shutil.copyfile(self._run.directory / name, home / FOLDER / name)
                self._started.save(f"{home}/{FOLDER}/{name}", base_path=str(home), policy="now", glob=False)

    def _draw(self) -> None:
        """Sends the density of every layer as one curve, and a histogram of the scores if they were kept."""
        for number, layer in enumerate(pictures.layers(self._run.directory), start=1):
            self._started.log({"mask/layer": number, "mask/density": layer["density"]})
        scores = pictures.magnitudes(self._run.directory)
        if scores is not None and len(scores):
            counts = pictures.histogram(scores)
            self._started.log({"mask/scores_log10": self._client.Histogram(np_histogram=counts)})


def fitting(name: str, length: int = 128) -> str:
    """The name in a form that W&B accepts: fewer characters, not too long. Different names stay different."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return plain if len(plain) <= length else f"{plain[: length - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:  # with a path, as the client reads it: whoever owns the file, and whoever may read it
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False


def started(
    run: Run, project: str | None, entity: str | None, mode: str, tags: list[str], timeout_seconds: float
) -> WandB:
    """A W&B run that has begun. pai_bench.runs.tracking.wandb has the settings."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # The client's own process needs seconds to start, and more than its 30 s where many runs start at once.
    os.environ.setdefault("WANDB__SERVICE_WAIT", "300")
    # In the run directory, so that a sync from another machine finds the artifacts.
    os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_ARTIFACT_DIR"] = str(run.directory / "wandb")
    import wandb as client

    wanted: str = os.environ.get("WANDB_MODE") or mode
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if wanted == "online" and not _has_key(host):
        log.warning("tracker.mode=online: no W&B key for %s, going offline; run `wandb login` first", host)
        wanted = "offline"
    if wanted != "online" and os.environ.get("WANDB_SWEEP_ID"):
        log.warning("the agent of a W&B sweep sees no run that is %s; give tracker.mode=online", wanted)
    begun = _begun(
        client,
        {
            "id": fitting(run.id),
            "name": fitting(run.id),
            "group": fitting(run.group),
            "project": project or os.environ.get("WANDB_PROJECT") or "pai-bench",
            "entity": entity,
            "resume": "allow" if run.curve is not None else None,  # None replaces what W&B has under this id
            "config": run.config,
            "dir": str(run.directory),
            "job_type": "train",
            "tags": list(dict.fromkeys(fitting(tag, 64) for tag in [*run.tags, *tags] if tag)),
            "reinit": "create_new",
            "settings": _settings(client, timeout_seconds, wanted == "offline"),
        },
        wanted,
    )
    _define_axes(begun)
    if begun.id != fitting(run.id) and not begun.disabled:  # an agent of a sweep gives its own id
        log.warning("W&B calls this run %s, as an agent of a sweep says; wandb.json keeps that", begun.id)
        files.write_json(run.directory / "wandb.json", {"id": begun.id, "sweep": begun.sweep_id})
    return WandB(client, begun, run)


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


def _define_axes(begun: Any) -> None:
    """Makes the epoch the x-axis of all metrics, and the round that of the metrics of pruning and of layers.

    Layers get no panels of their own, as there may be hundreds. One panel shows the densities of all layers at the end;
    the curves of layers over rounds are there for whoever adds a panel.
    """
    begun.define_metric("epoch")
    begun.define_metric("*", step_metric="epoch")
    begun.define_metric("prune/round")
    begun.define_metric("prune/*", step_metric="prune/round")
    begun.define_metric("layer/*", step_metric="prune/round", hidden=True)
    begun.define_metric("mask/layer", hidden=True, summary="none")
    begun.define_metric("mask/density", step_metric="mask/layer", summary="none")


def _begun(client: Any, start: dict[str, Any], mode: str) -> Any:
    """The W&B run that `start` describes. It is offline, with a warning, if no server answers."""
    try:
        return client.init(**start | {"mode": mode})
    except client.errors.Error as error:
        if mode != "online":
            raise
        log.warning("W&B is unreachable (%s), going offline; `wandb sync` sends it later", type(error).__name__)
        client.teardown()
        return client.init(**start | {"mode": "offline"})
