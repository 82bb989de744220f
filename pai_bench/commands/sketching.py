"""Measures the error of masks that were found before training, in linear regression on real digits.

Writes errors.csv (every selection, density, seed and split), error.png and error.svg. Prints medians: of the closed
form, then of the Monte-Carlo mean. Needs no download, and takes about a minute.

  pai-bench sketching -o sketching/
  pai-bench sketching -o sketching/ --densities 0.05 0.1 0.2 --seeds 20 --images 500
"""

import argparse
import os
from pathlib import Path

from pai_bench.errors import ConfigError, check_installed
from pai_bench.launch import terminal
from pai_bench.studies import sketching, sketching_figure


def prepared(folder: Path) -> Path:
    """The folder. It is made if it is missing.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: it cannot be made ({error.strerror}); give another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {folder}: it is not writable; give another folder")
    return folder


def main() -> None:
    """Checks the settings, runs the study and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write to; made if need be")
    parser.add_argument(
        "--densities",
        type=float,
        nargs="+",
        default=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8],
        metavar="F",
        help="fractions of weights kept, each weight counted once (%(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="regressions (%(default)s)")
    parser.add_argument(
        "--draws",
        type=int,
        default=100_000,
        metavar="N",
        help="coordinates drawn, in all masks together, for each Monte-Carlo mean (%(default)s)",
    )
    parser.add_argument("--features", type=int, default=1000, metavar="D", help="random features (%(default)s)")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="training images (%(default)s)")
    arguments = parser.parse_args()
    with terminal.one_line_errors():
        settings = (arguments.densities, arguments.seeds, arguments.draws, arguments.features, arguments.images)
        sketching.check(*settings)
        check_installed("error.png and error.svg need", "matplotlib", "report")
        folder = prepared(arguments.output)
        rows = sketching.study(*settings)
        sketching_figure.write_csv(rows, folder / "errors.csv")
        for suffix in ("png", "svg"):
            sketching_figure.figure(rows, folder / f"error.{suffix}")
        for split, where in (("train", "training"), ("held_out", "held-out")):
            print(f"\nRelative error on {where} images, median over seeds: closed form / Monte Carlo")
            print(sketching_figure.table(rows, split))
        print(f"\nWritten: {folder}/errors.csv, error.png, error.svg")
