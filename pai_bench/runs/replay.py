"""Tells a tracker about runs that are over, from their directories."""

import json
from collections.abc import Callable
from pathlib import Path

from pai_bench.config.schema import RunConfig, plain
from pai_bench.errors import DataError
from pai_bench.runs import status
from pai_bench.runs.tracking import Run, Tracker


def replay(directory: Path, run: RunConfig, tracker: Callable[[Run], Tracker]) -> bool:
    """Gives a tracker the config, curve, mask and row of a run, as if it had followed it.

    Args:
        directory: of one run.
        run: its config.
        tracker: a function of pai_bench.runs.tracking with its settings given.

    Returns:
        Whether it got there.

    Raises:
        DataError: the curve is damaged.
    """
    stands = status.state(directory)
    if stands.name == "broken":
        raise DataError(f"{stands.error}; run it again")
    try:
        lines = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
        for line in lines:
            line["epoch"] + 0
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{directory / 'curve.jsonl'}: it cannot be read ({error}); run it again") from error
    told = tracker(Run(directory.name, run.group, directory, plain(run), run.tags))
    for line in lines:
        told.record({key: value for key, value in line.items() if key != "epoch" and value is not None}, line["epoch"])
    if (directory / "mask.safetensors").is_file():
        told.mask(directory / "mask.safetensors")
    told.finish(status.finished(directory) or {}, 0 if stands.name == "finished" else max(stands.exit_code, 1))
    return told.delivers
