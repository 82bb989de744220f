"""What a tracker is: it receives what a run records, beside the run directory. Its failures never end a run."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pai_bench.config.schema import RunConfig, plain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a tracker gets to know about a run at its start.

    The directory of the run has its files as they come: config.yaml and provenance.json at the start, mask.json with
    the mask, result.json with the row.
    """

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


def described(
    run: RunConfig,
    directory: Path,
    provenance: dict[str, Any],
    curve: list[dict[str, float]] | None = None,
    num_repeated: int = 0,
) -> Run:
    """A run as trackers get to know it, whether it begins now or is sent later.

    All sizes in its config are targets: what has been achieved is in the row.
    """
    targets = {"density": round(1 - run.sparsity, 12), "compression": 1 / (1 - run.sparsity)}
    config = {key: value for key, value in plain(run).items() if key != "tracker"}
    return Run(
        directory.name,
        run.group,
        directory,
        config | targets | {"provenance": provenance},
        run.tags,
        curve,
        num_repeated,
    )


class Guarded:
    """A tracker whose failures end nothing. After the first one it warns once, and receives nothing more.

    Args:
        name: of the tracker, for the warning.
        start: the function that starts the tracker.
    """

    def __init__(self, name: str, start: Callable[[Run], Tracker], run: Run) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._safely("start", lambda: setattr(self, "_tracker", start(run)))

    def _safely(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            log.warning("tracker=%s failed to %s (%s); the run goes on without it", self._name, what, said)
            self._tracker = None

    def record(self, metrics: dict[str, float], epoch: float) -> None:
        """Hands metrics on."""
        if (tracker := self._tracker) is not None:
            self._safely("record metrics", lambda: tracker.record(metrics, epoch))

    def mask(self, file: Path) -> None:
        """Hands the mask on."""
        if (tracker := self._tracker) is not None:
            self._safely("store the mask", lambda: tracker.mask(file))

    def finish(self, row: dict[str, Any], exit_code: int) -> None:
        """Hands the row on."""
        if (tracker := self._tracker) is not None:
            self._safely("finish", lambda: tracker.finish(row, exit_code))

    @property
    def delivers(self) -> bool:
        """Whether nothing has failed, and the tracker delivers."""
        return self._tracker is not None and self._tracker.delivers


class Several:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def record(self, metrics: dict[str, float], epoch: float) -> None:
        """Hands metrics on to all."""
        for tracker in self._trackers:
            tracker.record(metrics, epoch)

    def mask(self, file: Path) -> None:
        """Hands the mask on to all."""
        for tracker in self._trackers:
            tracker.mask(file)

    def finish(self, row: dict[str, Any], exit_code: int) -> None:
        """Hands the row on to all."""
        for tracker in self._trackers:
            tracker.finish(row, exit_code)

    @property
    def delivers(self) -> bool:
        """Whether all of them deliver."""
        return all(tracker.delivers for tracker in self._trackers)
