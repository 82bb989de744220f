"""What trackers draw of a run, from its directory."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pai_bench.system import files

LAYER = ("name", "size", "kept", "density")
_BINS = 64


def layers(directory: Path) -> list[dict[str, Any]]:
    """Name, size, number of kept weights and density of each prunable tensor."""
    found = files.read_json(directory / "mask.json", layers=list)["layers"]
    return [{key: layer[key] for key in LAYER} for layer in found]


def magnitudes(directory: Path) -> NDArray[np.float64] | None:
    """log10 |score| of the last round, (n,); scores of zero are left out. None if the run kept no scores."""
    if not (directory / "scores.safetensors").is_file():
        return None
    from safetensors.numpy import load_file

    scores: dict[str, NDArray[np.float64]] = load_file(directory / "scores.safetensors")
    sizes = np.concatenate([np.abs(array).ravel() for array in scores.values()]).astype(np.float64)
    found: NDArray[np.float64] = np.log10(sizes[(sizes > 0) & np.isfinite(sizes)])
    return found


def histogram(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The counts in 64 bins of one width, (64,), and the edges of the bins, (65,)."""
    counts, edges = np.histogram(values, _BINS)
    return counts.astype(np.int64), edges
