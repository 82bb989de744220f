"""What a sweep or a search prints: a line when a run ends, with the time that is left, and a conclusion at the end."""

import json
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pai_bench.errors import PreemptedError
from pai_bench.launch.colours import Console
from pai_bench.runs import status, summary

log = logging.getLogger("pai_bench")

# Environment variables, because the runs of a sweep may be in other processes.
_OUTCOMES = "PAI_BENCH_OUTCOMES"  # a file to which every run of a sweep adds a line
_EXPECTED = "PAI_BENCH_EXPECTED"  # the number of runs of the sweep, when it started, and whose accuracy its lines show
_CONCLUSION = "PAI_BENCH_CONCLUSION"  # what a search says at the end
_OF_RUN = "pai_bench.experiment"  # its warnings are about one network; the line of the run has them, too


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended."""

    code: int  # exit code
    skipped: bool  # whether it was finished already
    directory: str | None  # None if the config is wrong


@dataclass
class Count:
    """The runs of a sweep that ended."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def worst(self) -> int:
        """The worst exit code."""
        return max((outcome.code for outcome in self.outcomes), default=0)


def expect(number: int, searches: bool = False) -> None:
    """Notes how many runs the sweep has. If there are several, each prints one line.

    Args:
        number: of runs.
        searches: the sweep chooses settings. Its lines show the accuracy on validation images, by which it chooses.
    """
    os.environ[_EXPECTED] = f"{number} {time.time()} {'validation' if searches else 'test'}"
    if number > 1:
        log.info("%d runs", number)
        quieten()


def quieten() -> None:
    """In a sweep of several runs, shows only their lines and warnings in the terminal. The run.log files get all."""
    if _expected() > 1:
        for handler in log.handlers:
            on_terminal = type(handler) in (logging.StreamHandler, Console)  # and no handler of pytest or of a file
            if on_terminal and handler.level <= logging.WARNING:
                handler.setLevel(logging.INFO)
                handler.addFilter(_belongs)


def conclude(text: str) -> None:
    """Notes the last line of a search. There is no table then, because its means would be over different settings."""
    os.environ[_CONCLUSION] = text


def forget() -> None:
    """Makes this process, and those that it starts, no part of a sweep."""
    for name in (_OUTCOMES, _EXPECTED, _CONCLUSION):
        os.environ.pop(name, None)


def _belongs(record: logging.LogRecord) -> bool:
    warning = record.levelno >= logging.WARNING and record.name != _OF_RUN
    return warning or getattr(record, "of_sweep", False)


def _say(text: str) -> None:
    log.info("%s", text, extra={"of_sweep": True})


def _expected() -> int:
    """The number of runs of this sweep; 0 if it is not known, or if this is no sweep."""
    return int(os.environ.get(_EXPECTED, "0").split()[0])


def count(code: int, skipped: bool = False, directory: Path | None = None) -> None:
    """Counts a run of this sweep, and prints its line if the sweep has several.

    Args:
        code: its exit code.
        skipped: whether it was finished already.
        directory: its run directory; None if the config is wrong.
    """
    if _OUTCOMES not in os.environ:
        return
    outcome = Outcome(code, skipped, None if directory is None else str(directory))
    path = Path(os.environ[_OUTCOMES])
    with path.open("a") as file:
        file.write(_written(outcome) + "\n")
    if _expected() > 1:
        _say(_line(outcome, path.read_text().splitlines()))


def _written(outcome: Outcome) -> str:
    return json.dumps(vars(outcome))


_SUCCESS = _written(Outcome(0, skipped=False, directory="")).partition(' "directory"')[0]  # how that of a run begins


def _read(text: str) -> list[Outcome]:
    return [Outcome(**json.loads(line)) for line in text.splitlines()]


def _line(outcome: Outcome, ended: list[str]) -> str:
    """What is said of a run: its number, accuracy, time and name, and the time that is left for the others.

    Args:
        ended: the runs that ended, as they were written: to parse all of them for every run would take long.
    """
    number, started, split = os.environ[_EXPECTED].split()
    own = len(ended) - ended[::-1].index(_written(outcome))  # others may have ended since
    words = [f"run {own:>{len(number)}} of {number}"]
    row = None if outcome.directory is None else status.finished(Path(outcome.directory))
    if outcome.code == PreemptedError.exit_code:
        words.append("preempted")
    elif row is None or outcome.code:
        words.append(f"failed with exit code {outcome.code}")
    else:
        words += [] if row["stopped"] else [f"{100 * row[f'{split}_top1']:.2f} % {split} accuracy"]
        words += _troubles(row)
        words.append("is finished already" if outcome.skipped else summary.duration(row["total_seconds"]))
    # A run that failed may have taken no time, and says nothing of the others.
    left, done = int(number) - len(ended), sum(one.startswith(_SUCCESS) for one in ended)
    if left > 0 and done:
        words.append(f"about {_rounded((time.time() - float(started)) / done * left)} left")
    words += [] if outcome.directory is None else [Path(outcome.directory).name]
    return "   ".join(words)


def _rounded(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _troubles(row: dict[str, object]) -> list[str]:
    found = ["layer collapse"] if row["collapsed_layers"] else []
    found += [] if row["output_depends_on_input"] else ["no signal"]
    return found + (["not trained"] if row["stopped"] else [])


@contextmanager
def counting() -> Iterator[Count]:
    """Counts the runs inside the block. At the end it prints how many there were of each outcome, and a conclusion."""
    result = Count()
    with tempfile.NamedTemporaryFile("r", prefix="pai_bench-") as file:
        os.environ[_OUTCOMES] = file.name
        try:
            yield result
        finally:
            conclusion = os.environ.get(_CONCLUSION)
            forget()
            result.outcomes = _read(file.read())
            if conclusion is not None:
                _say(f"\n{_counts(result.outcomes)}\n{conclusion}")
            elif len(result.outcomes) > 1:
                _say(_closing(result.outcomes))


def _counts(outcomes: list[Outcome]) -> str:
    preempted = sum(outcome.code == PreemptedError.exit_code for outcome in outcomes)
    skipped = sum(outcome.skipped for outcome in outcomes)
    failed = sum(outcome.code != 0 for outcome in outcomes) - preempted
    done = len(outcomes) - failed - skipped - preempted
    return f"{done} done, {skipped} skipped, {failed} failed" + (f", {preempted} preempted" if preempted else "")


def _closing(outcomes: list[Outcome]) -> str:
    counts = _counts(outcomes)
    directories = dict.fromkeys(Path(outcome.directory) for outcome in outcomes if outcome.directory is not None)
    rows = [row for directory in directories if (row := status.finished(directory)) is not None]
    if not rows:
        return counts
    folders = dict.fromkeys(str(directory.parent) for directory in directories)
    commands = [f"  pai-bench report {shlex.quote(folder)} -o report" for folder in folders]
    return "\n".join(["", *summary.accuracies(rows), "", "tables and figures:", *commands, "", counts])
