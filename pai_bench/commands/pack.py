"""Packs the finished runs of a results folder into one small file, which report, verify and load read like a folder.

  pai-bench pack results -o results.tar.gz
  pai-bench pack results -o results.tar.gz --curves  # with what was recorded in every epoch
  pai-bench verify results.tar.gz

It holds the row, the config and the layer densities of every run, but no weights and no masks.
"""

import argparse
from pathlib import Path

from pai_bench.launch import terminal
from pai_bench.runs import archive


def main() -> None:
    """Writes the file, and says how many runs it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a results folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write; it ends in .tar.gz")
    parser.add_argument("--curves", action="store_true", help="add the curves, for figures of them")
    given = parser.parse_args()
    with terminal.one_line_errors():
        num_runs = archive.pack(given.folder, given.output, given.curves)
        print(f"{num_runs} runs packed: {given.output} ({given.output.stat().st_size / 1e3:.0f} kB)")
