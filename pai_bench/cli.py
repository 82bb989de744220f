"""The command line: compose, run, and end with one clear line and an exit code that says what happened."""

import argparse
import atexit
import gc
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pai_bench import config, overrides, preemption, status, sweeps, usage
from pai_bench.errors import ConfigError, DataError, PreemptedError, UserError
from pai_bench.summary import already
from pai_bench.world import world

CONF = config.CONF
log = logging.getLogger("pai_bench")

OUTCOMES = "PAI_BENCH_OUTCOMES"  # a file to which every run of a sweep, in whatever process, adds a line


def _one_line(error: BaseException) -> str:
    """The reason for a failure in a line: the setting that it names, or the error's own words."""
    if type(error).__name__ == "TerminatedWorkerError":
        return (
            "a process of the sweep was killed, perhaps for want of memory; the same command goes on with what is left "
            "(fewer at once: hydra.launcher.n_jobs=)"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file == "hydra/launcher/joblib":
        return "hydra/launcher=parallel: hydra-joblib-launcher is not installed; pip install hydra-joblib-launcher"
    reason = error.__cause__ if isinstance(error, HydraException) and error.__cause__ is not None else error
    lines = [line.strip() for line in f"{error}\n{reason}".splitlines() if line.strip()]
    details = [
        line for line in dict.fromkeys(lines) if not line.startswith(("object_type", "full_key", "reference_type"))
    ]
    text = "; ".join(details)
    return (
        text
        if isinstance(error, (UserError, HydraException, OmegaConfBaseException))
        else f"{type(error).__name__}: {text}"
    )


def _run(composed: DictConfig) -> float | None:
    """One job of Hydra, in this process or in a worker of a launcher. Its failure does not end a sweep."""
    start_process()
    if preemption.requested() and _in_worker():  # the first process says it
        count(PreemptedError.exit_code)
        return None
    try:
        preemption.check()
        completed = overrides.complete(composed, HydraConfig.get())
        _check_figure(completed)
        directory = config.directory(completed)
    except Exception as error:
        code = _report(error)
        count(code)
        if code == PreemptedError.exit_code:
            _stop()
        return None
    code = attempt(completed)
    if code == PreemptedError.exit_code:
        _stop()
    row = status.finished(directory) if code == 0 else None
    if row and _in_worker():
        print(f"{row['id']}: {100 * row['test_top1']:.2f} % test accuracy", flush=True)
    # What a sweeper that searches makes larger: never the test accuracy.
    return None if row is None or row["validation_top1"] is None else float(row["validation_top1"])


def _check_figure(completed: dict[str, Any]) -> None:
    """Refuses a sweeper that searches where no images are held out for it."""
    hydra_config = HydraConfig.get()
    searches = hydra_config.mode == RunMode.MULTIRUN and not str(hydra_config.sweeper._target_).endswith("GridSweeper")
    if searches and not completed["dataset"].get("validation"):
        sweeper = hydra_config.runtime.choices["hydra/sweeper"]
        raise ConfigError(
            f"hydra/sweeper={sweeper}: it searches by the validation accuracy, and dataset.validation is 0; "
            "give a fraction, as in dataset.validation=0.1"
        )


def _stop() -> None:
    """Ends a sweep that was preempted. A worker leaves that to the first process, or it would kill the others."""
    if not _in_worker():
        sys.exit(PreemptedError.exit_code)


def _in_worker() -> bool:
    """Whether this is one of several processes that work on a sweep; what they say must fit on one terminal."""
    return multiprocessing.current_process().name != "MainProcess"


@cache
def _spare_imports() -> None:
    """Keeps the collection of garbage, which follows every run, from walking through all that has been imported."""
    gc.freeze()
    atexit.register(gc.unfreeze)


def _done_before(completed: dict[str, Any]) -> bool:
    """Whether a run is finished, and says so: experiment.run would say no more, after importing torch."""
    directory = config.directory(completed)
    row = status.finished_and_clean(directory)
    if row is None or not config.name_decides_images(completed) or world().size > 1:
        return False
    log.info("%s", already(row, directory, completed["save_model"] is not False))
    return True


def attempt(completed: dict[str, Any]) -> int:
    """Runs what a completed config describes; says in one line what went wrong, if so, and returns the exit code."""
    try:
        if _done_before(completed):
            count(0, skipped=True)
            return 0
    except OSError as error:
        code = _report(error)
        count(code)
        return code

    from pai_bench import devices, experiment, slurm

    _spare_imports()
    preemption.watch()
    skipped = status.finished(config.directory(completed)) is not None
    code = 0
    try:
        experiment.run(completed)
    except Exception as error:
        code = _report(error)
        if preemption.requested() and world().rank > 0:  # it has noticed that the first process is gone
            code = PreemptedError.exit_code
        if isinstance(error, PreemptedError):
            slurm.requeue()
    gc.collect()  # a failure keeps its tensors and worker processes in a cycle; the next run wants the memory
    devices.release()
    count(code, skipped)
    if code and world().size > 1:
        sys.exit(code)  # the processes may no longer stand at the same place
    return code


def count(code: int, skipped: bool = False) -> None:
    """Counts a run of this sweep by its exit code."""
    if OUTCOMES in os.environ:
        with Path(os.environ[OUTCOMES]).open("a") as file:
            file.write(f"{code} {int(skipped)}\n")


def _rank() -> int:
    """The number of this process; 0 also where the environment makes no sense, which is what there is to report."""
    try:
        return world().rank
    except ConfigError:
        return 0


def _report(error: Exception) -> int:
    """Says in one line what went wrong, and returns the exit code."""
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(error, InstantiationException):
        code = ConfigError.exit_code
    else:
        code = getattr(error, "exit_code", UserError.exit_code)
    rank = _rank()
    if rank > 0 and (getattr(error, "shared", False) or code in (2, 75) or preemption.requested()):
        return code  # the first process says it
    kind = {2: "config error", 4: "data error", 6: "owned", 75: "preempted"}.get(code, "error")
    where = f"process {rank}: " if rank else ""
    print(f"{kind}: {where}{'; '.join([_one_line(error), *getattr(error, '__notes__', [])])}", file=sys.stderr)
    return code


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a failure inside the block into one line on stderr and the exit code of its kind."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(_report(error))


def _composed(words: list[str]) -> DictConfig:
    """The config of a command line with Hydra's part of it, inside hydra.initialize_config_dir."""
    loader = overrides.loader_here()
    overrides.check(words, loader)
    with overrides.explained(words, loader):
        return hydra.compose("config", words, return_hydra_config=True)


def compose(words: list[str]) -> dict[str, Any]:
    """The completed config that a command line with these overrides would run.

    Raises:
        ConfigError: a word is wrong.
    """
    config.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = _composed(words)
        return overrides.complete(composed, composed.hydra)


def expand(
    words: list[str], choose: Callable[[list[list[str]]], list[list[str]]] = list
) -> tuple[list[dict[str, Any]], DictConfig]:
    """The completed configs of all runs of `python run.py -m` with these overrides, and hydra.launcher.

    Args:
        choose: which of the runs, given the overrides of each; to compose one takes some hundredths of a second.

    Raises:
        ConfigError: a word is wrong.
    """
    config.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        overrides.check(words, overrides.loader_here())
        parsed = overrides.parsed(words)
        fixed = [o.input_line for o in parsed if o.input_line and not o.is_sweep_override()]
        base = _composed(fixed)
        of_hydra = [o.input_line for o in parsed if o.key_or_group.startswith("hydra") and o.input_line]
        params = [f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()]
        swept = overrides.parsed([*params, *(line for line in words if line not in of_hydra)])
        overrides.check_scale(base.hydra.runtime.choices)
        sweeper, given = base.hydra.sweeper, {override.get_key_element() for override in parsed}
        jobs = sweeps.overrides_of_jobs(
            swept, sweeper.paired or [], sweeper.exclude or [], sweeper.drop or [], sweeper.scale, given
        )
        loader = sweeps.SweepLoader(overrides.loader_here().get_search_path())
        runs = [loader.load_sweep_config(base, job) for job in choose(jobs)]
        launcher = OmegaConf.create(OmegaConf.to_container(base.hydra.launcher, resolve=True))
        assert isinstance(launcher, DictConfig)
        return [overrides.complete(run, run.hydra) for run in runs], launcher


def without_plus(override: str) -> str:
    """An experiment is a group like any other, so the + that Hydra's examples put before it changes nothing."""
    return override.removeprefix("+") if override.startswith("+experiment=") else override


def stored(directory: Path, tracker: dict[str, Any] | None = None, trusted: bool = False) -> dict[str, Any]:
    """The completed config of a run, from its directory.

    Args:
        tracker: takes the place of the one that it had.
        trusted: it may name functions of any package.

    Raises:
        ConfigError: this version has no such settings, or it names functions that are not ours.
        DataError: config.yaml is missing or damaged.
    """
    config.register()
    try:
        with hydra.initialize_config_dir(str(directory.resolve()), version_base="1.3"):
            composed = hydra.compose("config")
            if tracker is not None:
                composed.tracker = tracker
            if not trusted:
                config.check_origin(OmegaConf.to_container(composed), directory / "config.yaml")
            return config.complete(composed)
    except UserError:
        raise
    except Exception as error:  # it may hold anything, and yaml, OmegaConf and Hydra each have words for that
        said = _one_line(error).partition(";")[0]
        raise DataError(f"{directory / 'config.yaml'}: it is damaged ({said})") from error


@contextmanager
def counted() -> Iterator[None]:
    """Counts the runs inside the block, says how many there were of each kind, and exits with the worst code."""
    with tempfile.NamedTemporaryFile("r", prefix="pai_bench-") as outcomes:
        os.environ[OUTCOMES] = outcomes.name
        try:
            with one_line_errors():
                yield
        finally:
            del os.environ[OUTCOMES]
            runs = [tuple(map(int, line.split())) for line in outcomes]
            if len(runs) > 1:
                preempted = sum(code == PreemptedError.exit_code for code, _ in runs)
                failed, skipped = sum(code != 0 for code, _ in runs) - preempted, sum(skipped for _, skipped in runs)
                done = len(runs) - failed - skipped - preempted
                rest = f", {preempted} preempted" if preempted else ""
                log.info("%d done, %d skipped, %d failed%s", done, skipped, failed, rest)
    sys.exit(max((code for code, _ in runs), default=0))


def start_process() -> None:
    """Makes this process ready for runs, once.

    Sends what a person follows to the terminal; run.log, where there is one, gets everything.
    """
    if log.handlers:
        return
    logging.raiseExceptions = False  # a log line that cannot be written (full disk) must not hide the real failure
    log.setLevel(logging.DEBUG)
    log.propagate = False
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.ERROR if world().rank > 0 else logging.WARNING if _in_worker() else logging.INFO)
    log.handlers = [console]
    if _in_worker():
        preemption.end_with_parent()


def main() -> None:
    """Runs what the command line says. Exits with the worst code of its runs.

    0: finished, now or before. 1: failure. 2: config error, nothing was written. 4: data missing or damaged.
    6: another live process is running it. 75: preempted, a checkpoint is written.
    """
    # Hydra reports errors itself, in its own words and with exit code 1, unless it is told to raise them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with one_line_errors():
        config.register()
        start_process()
        preemption.watch()
    with counted():
        arguments = _arguments(sys.argv[1:])
        folder, name = Path(arguments.config_path or CONF).absolute(), arguments.config_name or "config"
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
        if folder != CONF and not arguments.trust:
            _check_stored(folder, name)
        with overrides.explained(arguments.overrides, loader, name):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_run)()


def _arguments(words: list[str]) -> argparse.Namespace:
    """The command line, which Hydra reads again from sys.argv: without --trust, which it does not know.

    Raises:
        ConfigError: a flag is wrong.
    """
    parser = get_args_parser()
    parser.add_argument("--trust", action="store_true")

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(words)}: {message}; see python run.py --hydra-help")

    parser.error = refuse  # type: ignore[method-assign]
    words = [without_plus(word) for word in words]
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
    """Refuses a config of another folder that is a program: it names functions that are not ours, or sets Hydra up.

    Raises:
        ConfigError: it does.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        ours = hydra.compose("config", return_hydra_config=True).hydra
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        theirs = hydra.compose(name, return_hydra_config=True)
    where = folder / f"{name}.yaml"
    for key in theirs.hydra:
        if key not in ("runtime", "job", "overrides", "mode") and theirs.hydra._get_node(key) != ours._get_node(key):
            raise ConfigError(f"hydra.{key}: {where} sets it; add --trust if it is yours")
    with open_dict(theirs):
        del theirs["hydra"]
    config.check_origin(OmegaConf.to_container(theirs, resolve=True), where)
