"""Sends runs that are over to a tracker, from their directories."""

import json
from pathlib import Path
from typing import Any

from pai_bench.config.schema import RunConfig
from pai_bench.core import Call
from pai_bench.errors import DataError
from pai_bench.runs import status
from pai_bench.runs.tracker import Guarded, described
from pai_bench.system import files


def replay(directory: Path, run: RunConfig, tracker: Call) -> bool:
    """Gives a tracker all that it would have received during the run.

    Args:
        directory: the directory of one run.
        run: the config of the run.
        tracker: a function of pai_bench.runs.tracking, with its settings.

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
    started = Guarded(tracker.name, tracker, described(run, directory, _provenance(directory)))
    for line in lines:
        started.record({key: value for key, value in line.items() if key != "epoch"}, line["epoch"])
    if (directory / "mask.safetensors").is_file():
        started.mask(directory / "mask.safetensors")
    started.finish(status.finished(directory) or {}, 0 if state.name == "finished" else max(state.exit_code, 1))
    return started.delivers


def _provenance(directory: Path) -> dict[str, Any]:
    try:
        return files.read_json(directory / "provenance.json")
    except (OSError, ValueError):  # of a run that failed early
        return {}
