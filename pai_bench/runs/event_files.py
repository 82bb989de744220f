"""A run in TensorBoard."""

import json
import shutil
from pathlib import Path
from typing import Any

from pai_bench.runs import pictures
from pai_bench.runs.tracker import Run
from pai_bench.system import files

FOLDER = "tensorboard"


class EventFiles:
    """Writes event files. A run that goes on writes its whole curve anew, so every record is there once.

    The step of a record is its epoch, rounded, or the round of pruning.
    """

    delivers = True

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        folder = run.directory / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2)}\n```")
        for line in run.curve or ():
            self.record({key: value for key, value in line.items() if key != "epoch"}, line["epoch"])

    def record(self, metrics: dict[str, float], epoch: float) -> None:
        """Writes the metrics. Those of layers are left out: their densities are in a table."""
        step = metrics.get("prune/round", round(epoch))
        for name, value in metrics.items():
            if files.valid(value) is not None and name != "prune/round" and not name.startswith("layer/"):
                self._writer.add_scalar(name, value, int(step))
        self._writer.flush()

    def mask(self, file: Path) -> None:
        """Writes the density of every layer as a table and a chart, and a histogram of the scores if they were kept."""
        layers = pictures.layers(self._run.directory)
        lines = [pictures.LAYER, ["---"] * len(pictures.LAYER), *(layer.values() for layer in layers)]
        self._writer.add_text("layers", "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))
        for number, layer in enumerate(layers, start=1):
            self._writer.add_scalar("density by layer", layer["density"], number)
        scores = pictures.magnitudes(self._run.directory)
        if scores is not None and len(scores):
            self._writer.add_histogram("scores (log10)", scores)
        self._writer.flush()

    def finish(self, row: dict[str, Any], exit_code: int) -> None:
        """Writes the row: its numbers stand beside the settings of the run in the tab of hyperparameters."""
        if row:
            numbers = {key: float(value) for key, value in row.items() if _is_number(value)}
            self._writer.add_hparams(_flat(self._run.config), numbers, run_name=".")
        self._writer.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Settings by dotted keys, as TensorBoard takes them: numbers, truths and texts."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{path}{key}.")
        elif value is not None:
            found[f"{path}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
