"""Shows the states of the runs of a sweep or of a results folder. With --retry, does unsuccessful runs again.

  pai-bench status results
  pai-bench status experiment=NAME                      # missing runs too
  pai-bench status pruner=snip,synflow 'seed=range(3)'  # the same words as after pai-bench -m
  pai-bench status results --retry                      # here, one after another
  pai-bench status experiment=NAME --retry hydra/launcher=slurm hydra.launcher.timeout_min=60

Finished and running runs are never touched. A killed run ended without a record of it. Killed and preempted runs go on
from their checkpoints. A broken run has damaged records, and starts again.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pai_bench.config.schema import RunConfig
from pai_bench.errors import ConfigError, DataError, PreemptedError, UserError
from pai_bench.launch import attempt, colours, compose, slurm, terminal
from pai_bench.runs import status
from pai_bench.system import files

ORDER = ("finished", "running", "queued", "preempted", "killed", "failed", "broken", "missing")
RETRIED = ("preempted", "killed", "failed", "broken", "missing")


def table(states: dict[str, status.RunState]) -> str:
    """The counts by state, then a line for each run that is not finished."""
    counts = [(name, sum(state.name == name for state in states.values())) for name in ORDER]
    lines = [f"{len(states)} run{'s' * (len(states) > 1)}: " + ", ".join(f"{n} {name}" for name, n in counts if n)]
    width = max(len(run_id) for run_id in states)
    for name in ORDER[1:]:
        for run_id, state in sorted(states.items()):
            if state.name == name:
                when = files.moment(state.updated).rpartition(":")[0] if state.updated else ""
                words = [f"job {state.job}" if state.job else "", f"attempt {state.attempt}" if state.attempt else ""]
                reason = [state.error.partition("\n")[0]] if state.error else []
                details = "  ".join([when, *filter(None, words), *reason])
                lines.append(f"{name:<10} {run_id:<{width}}  {details}".rstrip())
    return "\n".join(lines)


@dataclass
class Asked:
    """The runs that are asked for, by their ids."""

    directories: dict[str, Path]
    runs: dict[str, RunConfig]  # only those of a sweep; those of a folder have their settings in config.yaml
    launcher: Any  # hydra.launcher


def of_sweep(words: list[str]) -> Asked:
    """The runs of a sweep."""
    runs, launcher = compose.expand(words)
    return Asked({run.id: run.directory for run in runs}, {run.id: run for run in runs}, launcher)


def of_folder(folders: list[Path], words: list[str]) -> Asked:
    """The runs that lie in a results folder. The words can only choose the launcher."""
    (folder,) = folders if len(folders) == 1 else (None,)
    if folder is None or not folder.is_dir():
        raise DataError(f"{' '.join(map(str, folders))}: give one results folder, or settings as key=value")
    for word in words:
        if not word.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher.")):
            raise ConfigError(f"{word}: it has no effect beside a results folder; leave it out, or leave {folder} out")
    directories = {path.parent.name: path.parent for path in folder.glob("*/*.json")}
    return Asked(directories, {}, compose.launcher(words, folder))


def runs_again(asked: Asked, wanted: list[str], *, trusted: bool) -> list[RunConfig]:
    """The wanted runs with their settings. One that left none is named, and left out."""
    again = []
    for run_id in wanted:
        directory = asked.directories[run_id]
        try:
            if run_id in asked.runs:
                again.append(asked.runs[run_id])
            elif (directory / "config.yaml").is_file():
                again.append(replace(compose.stored(directory, trusted=trusted), results_dir=str(directory.parent)))
            else:
                print(f"{run_id}: it left no config.yaml to run again; name its sweep instead")
        except UserError as error:
            print(f"{run_id}: {error}; name its sweep instead")
    return again


def launch(runs: list[RunConfig], launcher: Any) -> None:
    """Does the runs one after another, or submits them to SLURM."""
    kind = launcher._target_.rpartition(".")[2]
    if kind == "SlurmLauncher":
        compose.instantiated(launcher).submit(runs)
    elif kind == "BasicLauncher":
        for run in runs:
            if attempt.attempt(run) == PreemptedError.exit_code:
                break
    else:
        raise ConfigError("hydra/launcher: --retry runs one after another or on slurm; else give the sweep again")


def main() -> None:
    """Prints the states. Exits with 1 if a run is failed, killed or broken; with --retry exits like a sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="a results folder, or the overrides of a sweep")
    parser.add_argument("--retry", action="store_true", help=f"run what is {', '.join(RETRIED)}")
    parser.add_argument("--trust", action="store_true", help="what is run again may name functions of other packages")
    arguments = parser.parse_intermixed_args()
    terminal.start_process()
    words = [compose.as_group(word) for word in arguments.what if "=" in word]
    folders = [Path(word) for word in arguments.what if "=" not in word]
    if arguments.trust and not (arguments.retry and folders):
        parser.error("--trust: it is for --retry of a results folder, whose configs are read; leave it out")
    if folders and words and not arguments.retry:
        parser.error(f"{words[0]}: it plays no part without --retry; leave it out, or leave {folders[0]} out")
    with terminal.counted():
        asked = of_folder(folders, words) if folders else of_sweep(words)
        if not asked.directories:
            raise DataError(
                f"{' '.join(arguments.what)}: there are no runs; give the results_dir of a sweep, or its words"
            )
        states = slurm.queue_states(asked.directories)
        print(colours.wrapped(table(states), sys.stdout))
        if not arguments.retry:
            sys.exit(int(any(state.name in ("failed", "killed", "broken") for state in states.values())))
        wanted = [run_id for run_id, state in states.items() if state.name in RETRIED]
        again = runs_again(asked, wanted, trusted=arguments.trust)
        launch(again, asked.launcher)
        if len(again) < len(wanted):
            raise DataError(f"{len(wanted) - len(again)} of {len(wanted)} runs could not be run again")
