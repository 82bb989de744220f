"""Sends runs that are over to a tracker, from their directories."""

import json
from collections.abc import Callable
from pathlib import Path

from pai_bench.config.schema import RunConfig, plain
from pai_bench.errors import DataError
from pai_bench.runs import status
from pai_bench.runs.tracking import Run, Tracker


def replay(directory: Path, run: RunConfig, tracker: Callable[[Run], Tracker]) -> bool:
    """Gives a tracker the config, curve, mask and row of a run, as if the tracker had been there during the run.

    Args:
        directory: the directory of one run.
        run: the config of the run.
        tracker: a function of pai_bench.runs.tracking, with its settings given.

    Returns:
        Whether the data reached the server.

    Raises:
        DataError: the curve is damaged.
    """
    state = status.state(directory)
    if state.name == "broken":
        raise DataError(f"{state.error}; run it again")
    try:
        lines = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
        for line in lines:
            line["epoch"] + 0
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{directory / 'curve.jsonl'}: it cannot be read ({error}); run it again") from error
    started = tracker(Run(directory.name, run.group, directory, plain(run), run.tags))
    for line in lines:
        metrics = {key: value for key, value in line.items() if key != "epoch" and value is not None}
        started.record(metrics, line["epoch"])
    if (directory / "mask.safetensors").is_file():
        started.mask(directory / "mask.safetensors")
    started.finish(status.finished(directory) or {}, 0 if state.name == "finished" else max(state.exit_code, 1))
    return started.delivers
