"""The command line of a run: the folder of configs, the flags, and one job of Hydra."""

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from pai_bench.config import composition
from pai_bench.config.schema import RunConfig
from pai_bench.errors import ConfigError, PreemptedError
from pai_bench.launch import attempt, compose, overrides, sweep_progress, terminal, usage
from pai_bench.runs import status
from pai_bench.system import preemption
from pai_bench.system.world import in_worker

log = logging.getLogger("pai_bench")


def _run(composed: DictConfig) -> float | None:
    """One job of Hydra, in this process or in a worker of a launcher. Its failure does not end a sweep.

    Returns:
        The validation accuracy, if there is one. Sweepers that search maximize it, and never see the test accuracy.
    """
    terminal.start_process()
    if preemption.requested() and in_worker():  # the first process reports it
        sweep_progress.count(PreemptedError.exit_code)
        return None
    try:
        preemption.check()
        completed = overrides.complete(composed, HydraConfig.get())
        _check_figure(completed)
        directory = completed.directory
    except Exception as error:
        code = terminal.report(error)
        sweep_progress.count(code)
        if code == PreemptedError.exit_code:
            _stop()
        return None
    code = attempt.attempt(completed)
    if code == PreemptedError.exit_code:
        _stop()
    row = status.finished(directory) if code == 0 else None
    return None if row is None or row["validation_top1"] is None else float(row["validation_top1"])


def _check_figure(completed: RunConfig) -> None:
    """Refuses a sweeper that searches if the run has no validation images."""
    hydra_config = HydraConfig.get()
    searches = hydra_config.mode == RunMode.MULTIRUN and not overrides.tries_all(hydra_config.sweeper)
    if searches and not completed.dataset.settings.get("validation"):
        sweeper = hydra_config.runtime.choices["hydra/sweeper"]
        raise ConfigError(
            f"hydra/sweeper={sweeper}: it searches by the validation accuracy, and dataset.validation is 0; "
            "give a fraction, as in dataset.validation=0.1"
        )


def _stop() -> None:
    """Ends a sweep that was preempted. A worker does nothing, because its end would kill the other workers."""
    if not in_worker():
        sys.exit(PreemptedError.exit_code)


def main() -> None:
    """Runs what the command line says. Exits with the worst exit code of its runs.

    0: finished, now or before. 1: failure. 2: config error, nothing was written. 4: data missing or damaged.
    6: another live process is doing the run. 75: preempted, a checkpoint is written.
    """
    # By default Hydra prints errors itself and exits with code 1. This makes it raise them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with terminal.one_line_errors():
        composition.register()
        terminal.start_process()
        preemption.watch()
    with terminal.counted():
        arguments = _arguments(sys.argv[1:])
        folder, name = Path(arguments.config_path or composition.CONF).resolve(), arguments.config_name or "config"
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            loader = overrides.loader_here()
            if arguments.config_dir:
                search_path = loader.get_search_path()
                search_path.prepend("command line", f"file://{Path(arguments.config_dir).absolute()}")
                loader = type(loader)(search_path)
            overrides.check(arguments.overrides, loader)
            if arguments.help:
                print(usage.text(arguments.overrides, loader, resolve=arguments.resolve), end="")
                return
        if folder != composition.CONF and not arguments.trust:
            _check_stored(folder, name)
        with overrides.explained(arguments.overrides, loader, name):
            try:
                hydra.main(version_base="1.3", config_path=str(composition.CONF), config_name="config")(_run)()
            finally:
                shutil.rmtree(composition.SCRATCH, ignore_errors=True)


def _arguments(words: list[str]) -> argparse.Namespace:
    """The parsed command line. Removes --trust from sys.argv, because Hydra reads that again and does not know --trust.

    Raises:
        ConfigError: a flag is wrong.
    """
    parser = get_args_parser()
    parser.add_argument("--trust", action="store_true")

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(words)}: {message}; see --hydra-help")

    parser.error = refuse  # type: ignore[method-assign]
    words = [compose.as_group(word) for word in words]
    arguments = parser.parse_args(words)
    sys.argv[1:] = [word for word in words if word != "--trust"]
    modes = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(arguments, name)]
    if len(modes) > 1:
        refuse(f"--{modes[0]} and --{modes[1]} exclude each other")
    if arguments.resolve and not (arguments.cfg or arguments.help):
        refuse("--resolve goes with --cfg job or --help")
    if arguments.experimental_rerun:
        refuse("--experimental-rerun is not for runs; give -cp results/NAME -cn config")
    for flag, folder in (("-cp", arguments.config_path), ("-cd", arguments.config_dir)):
        if folder is not None and not Path(folder).is_dir():
            refuse(f"{flag} {folder}: there is no such folder")
    return arguments


def _check_stored(folder: Path, name: str) -> None:
    """Refuses a config of another folder that could run foreign code.

    Raises:
        ConfigError: the config names such a function, or changes Hydra's settings.
    """
    with hydra.initialize_config_dir(str(composition.CONF), version_base="1.3"):
        ours = hydra.compose("config", return_hydra_config=True).hydra
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        theirs = hydra.compose(name, return_hydra_config=True)
    where = folder / f"{name}.yaml"
    for key in theirs.hydra:
        if key not in ("runtime", "job", "overrides", "mode") and theirs.hydra._get_node(key) != ours._get_node(key):
            raise ConfigError(f"hydra.{key}: {where} sets it; add --trust if it is yours")
    with open_dict(theirs):
        del theirs["hydra"]
    composition.check_origin(OmegaConf.to_container(theirs, resolve=True), where)
