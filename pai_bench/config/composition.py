"""Between Hydra and a checked config: where the yaml files lie, and plain values out of what Hydra composes."""

import secrets
import tempfile
from pathlib import Path
from typing import Any, cast

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pai_bench.config import schema
from pai_bench.config.schema import RunConfig, plain
from pai_bench.config.signatures import shown
from pai_bench.errors import ConfigError, DataError
from pai_bench.system import cores

# In a checkout pai_bench/conf is a link to conf/. In an installed package it is the folder itself.
CONF = (Path(__file__).resolve().parents[1] / "conf").resolve()


def _runs_at_once() -> int:
    """How many runs this machine does at once: one on each GPU, or else one on each core."""
    import torch

    return torch.cuda.device_count() or cores.num_allowed()


# What of a config tells of the machine and its user, and not of the numbers. Of a path, only its last name is shown.
_SHARED = {"results_dir": "results", "data_dir": "data", "tracker.entity": None}
_PATHS = ("dataset.root", "mask", "weights", "allocation.mask", "allocation.file", "transfer.weights")

# Hydra insists on writing multirun.yaml somewhere; nothing reads it. A folder of this process, which the sweeper makes.
SCRATCH = Path(tempfile.gettempdir()) / f"pai_bench-{secrets.token_hex(16)}"


def register() -> None:
    """Stores the defaults of records, and tells Hydra to use our sweeper and to write nothing: see pai_bench.runs.

    They replace Hydra's own defaults, so they hold for any primary config, that of an earlier run included.
    """
    OmegaConf.register_new_resolver("runs_at_once", _runs_at_once, replace=True)
    store = ConfigStore.instance()
    store.store(name="record_defaults", node=schema.defaults())
    ours = {"output": "no_files", "job_logging": "none", "sweeper": "grid"}
    nothing = {"run": {"dir": "."}, "sweep": {"dir": str(SCRATCH), "subdir": "."}}
    store.store(group="hydra/output", name="no_files", node=nothing, package="hydra")
    hydra = HydraConf(output_subdir=None)
    hydra.defaults = [next(({k: ours[k]} for k in d if k in ours), d) for d in hydra.defaults]
    store.store(group="hydra", name="config", node=hydra, provider="pai_bench")


def resolved(composed: DictConfig) -> dict[str, Any]:
    """A composed config as plain values."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is missing: add {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        remedy = "what it names in ${} is not there, or of another kind; give a value"
        raise ConfigError(f"{error.full_key}: {remedy}") from error
    except RecursionError as error:
        raise ConfigError("a setting names itself in ${}; give it a value") from error


def check_origin(cfg: object, where: object) -> None:
    """Refuses a config from elsewhere that names functions of other packages: to call them is to run a program.

    Raises:
        ConfigError: it does.
    """
    if isinstance(cfg, dict):
        target = cfg.get("_target_", "pai_bench.")
        if not isinstance(target, str) or not target.startswith("pai_bench."):
            raise ConfigError(
                f"_target_={shown(target)}: {where} names a function that is not ours; add --trust if it is yours"
            )
    for item in cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, list) else ():
        check_origin(item, where)


def read(path: Path, trusted: bool = False) -> RunConfig:
    """The config of a run, from the file that the run has left.

    Args:
        trusted: it may name functions of any package.

    Raises:
        ConfigError: this version has no such settings, or it names functions that are not ours.
        DataError: it is missing or damaged.
    """
    settings = _loaded(path)
    if not trusted:
        check_origin(settings, path)
    schema.check(settings)
    return schema.made(settings)


def _loaded(path: Path) -> dict[Any, Any]:
    """The settings in a file, unchecked.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # whatever yaml, OmegaConf and the file system say
        raise DataError(f"{path}: it cannot be read ({type(error).__name__}); run it again") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: it holds no settings; run it again")
    return settings


def shareable(path: Path) -> str:
    """The config of a run for others, as a yaml file: without the places and names of the machine that it ran on.

    Args:
        path: the file that the run has left.

    Raises:
        DataError: it is missing or damaged.
    """
    return OmegaConf.to_yaml(OmegaConf.create(_placeless(_loaded(path))))


def _placeless(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _placeless(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_placeless(item, key) for item in value]
    if key in _SHARED:
        return _SHARED[key]
    # Functions from elsewhere have settings of their own: a whole path is one, whatever the setting is called.
    is_path = isinstance(value, str) and (key in _PATHS or value.startswith(("/", "~/")))
    return Path(value).name or "root" if is_path else value


def rerunnable(run: RunConfig) -> str:
    """A config as a yaml file: `pai-bench -cp DIRECTORY -cn config` runs it again."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(run)))
