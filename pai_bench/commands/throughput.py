"""Measures how many images per second a run can load and train on, and which of the two is the limit.

    pai-bench throughput dataset=imagenet model=resnet50 training=imagenet training.precision=bfloat16

Takes the settings of a run. Writes nothing.
"""

import argparse

from pai_bench.launch import compose, terminal, throughput


def main() -> None:
    """Measures the loader alone, training on one batch alone, and both together. Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings of a run, such as dataset=imagenet num_workers=8")
    parser.add_argument("--seconds", type=float, default=20, help="for each of the three, and half as much before it")
    arguments = parser.parse_intermixed_args()
    if arguments.seconds <= 0:
        parser.error("--seconds: give a number above 0")
    terminal.start_process()
    with terminal.one_line_errors():
        cfg = compose.compose(["tracker=none", *arguments.settings])
        rates = throughput.measure(cfg, arguments.seconds)
        print(f"{'':12}images/s")
        for name, rate in rates.items():
            print(f"{name:10}{rate:>10,.0f}")
        limit, other = sorted(("loader", "training"), key=rates.__getitem__)
        print(f"{limit} is the limit: {other} alone does {rates[other] / rates[limit]:.1f} times as many")
