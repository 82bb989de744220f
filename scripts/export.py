"""Writes the physically smaller network of a finished run, and says what it saves.

    python run.py pruner=filter_magnitude sparsity=0.5 save_model=true
    python scripts/export.py results/<run> -o small.pt2

The file is a torch.export program: torch.export.load("small.pt2").module() runs it, without this package.
"""

import argparse
from pathlib import Path

from pai_bench import cli
from pai_bench.export import export


def main() -> None:
    """Exports one run and prints a table of the masked and the small network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run with save_model=true")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, .pt2")
    parser.add_argument("--batch-size", type=int, default=64, help="images in the measured batch")
    parser.add_argument("--repeats", type=int, default=20, help="measured forward passes, of which the median counts")
    arguments = parser.parse_args()
    if arguments.batch_size < 1 or arguments.repeats < 1:
        parser.error("--batch-size and --repeats: give 1 or more")
    with cli.one_line_errors():
        masked, small = export(arguments.run, arguments.output, arguments.batch_size, arguments.repeats)
        print(f"{'':14}{'masked':>15}{'small':>15}{'ratio':>9}")
        for key, digits in (
            ("parameters", 0),
            ("prunable", 0),
            ("nonzero", 0),
            ("multiply_adds", 0),
            ("latency_ms", 2),
        ):
            ratio = masked[key] / small[key]
            print(f"{key:14}{masked[key]:>15,.{digits}f}{small[key]:>15,.{digits}f}{ratio:>8.2f}x")
        print(f"the same outputs to {small['difference']:.1e}; written to {arguments.output}")


if __name__ == "__main__":
    main()
