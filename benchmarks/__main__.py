"""Measures the claims about speed, each as a ratio within this run.

    python -m benchmarks                    # all of them, in minutes on two cores
    python -m benchmarks synflow compact    # some of them
    python -m benchmarks --gpu              # those of a GPU

Exits with 1 if a target is missed or something that is claimed to be equal is not.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import data, gpu, measure, rewiring, score_rounds, scoring, startup, table, training
from benchmarks.subjects import Setting
from benchmarks.table import Row
from pai_bench.errors import UserError

Benchmark = Callable[[Setting], Iterator[Row]]

CPU: dict[str, Benchmark] = {
    "selection": scoring.selection,
    "synflow": scoring.synflow,
    "resnet50": scoring.resnet50,
    "gradients": scoring.gradients,
    "memory": scoring.memory,
    "masks": training.masking,
    "loop": training.loop,
    "compact": training.compact,
    "rewiring": rewiring.rewiring,
    "batches": data.batches,
    "photographs": data.photographs,
    "startup": startup.processes,
    "sweep": startup.sweep,
    "replicas": gpu.replicas,
}
GPU: dict[str, Benchmark] = {  # what matters most comes first: the time may be up before the end
    "images": gpu.images,
    "synflow": gpu.synflow,
    "scores": score_rounds.rounds,
    "evaluation": gpu.evaluation,
    "compact": gpu.compact,
    "replicas": gpu.replicas,
    "selection": scoring.selection,
    "compiled": gpu.compiled,
    "gradients": scoring.gradients,
    "masks": training.masking,
    "rewiring": rewiring.rewiring,
    "resnet50": scoring.resnet50,
    "memory": scoring.memory,
}
_GPU_MINUTES = 8.0

_STEADY = 0.8  # of the rate at the start of a run and that at its end, or floors and figures mean little


def main() -> None:
    """Runs what the command line names, prints a table, and exits with 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CPU)}; with --gpu of {', '.join(GPU)}")
    parser.add_argument("--gpu", action="store_true", help="on a GPU")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="everything small: equality is checked, speed is not judged")
    size.add_argument("--full", action="store_true", help="SynFlow in its 100 rounds")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"begin no row after so many minutes; {_GPU_MINUTES:g} with --gpu, or else no limit",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as a page")
    arguments = parser.parse_args()
    benchmarks = GPU if arguments.gpu else CPU
    if unknown := [name for name in arguments.names if name not in benchmarks]:
        parser.error(f"{unknown[0]}: there is no such benchmark; choose from {', '.join(benchmarks)}")
    on_gpu = arguments.gpu and torch.cuda.is_available()
    if arguments.gpu and not on_gpu and not arguments.quick:
        print(f"--gpu: torch {torch.__version__} finds no GPU here; leave it out", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    minutes = _GPU_MINUTES if arguments.minutes is None and arguments.gpu else arguments.minutes
    end = math.inf if minutes is None else time.perf_counter() + 60 * minutes

    measured = measure.rates(device, arguments.quick)
    machine = measure.machine(device, measured)
    for name, value in machine.items():
        print(f"{name}: {value}")
    setting = Setting(device, measured, quick=arguments.quick, full=arguments.full)
    speed = not arguments.quick
    rows: list[Row] = []
    for row in _rows(arguments.names or list(benchmarks), benchmarks, setting, end):
        rows.append(row)
        print(table.line(row, speed), flush=True)
        _write_json(arguments.json, machine, rows, speed)  # as it goes: a borrowed machine may be gone at any time
    slowest, fastest = sorted(each.gemm["float32"] for each in (measured, measure.rates(device, arguments.quick)))
    if slowest < _STEADY * fastest:
        machine["disturbed"] = f"other programs ran: GEMM from {slowest / 1e9:,.0f} to {fastest / 1e9:,.0f} GFLOP/s"
        print(machine["disturbed"])
        _write_json(arguments.json, machine, rows, speed)
    print("", table.text(rows, speed), sep="\n")
    missed = [row.name for row in rows if not row.passed(speed)]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} rows pass" + "".join(f"\nmissed: {name}" for name in missed))
    if arguments.markdown:
        flags = [f"--{flag}" for flag in ("gpu", "quick", "full") if getattr(arguments, flag)]
        command = " ".join(["python -m benchmarks", *arguments.names, *flags, "--markdown", str(arguments.markdown)])
        arguments.markdown.write_text(table.markdown(rows, machine, command))
    sys.exit(1 if missed else 0)


def _rows(names: Sequence[str], benchmarks: Mapping[str, Benchmark], setting: Setting, end: float) -> Iterator[Row]:
    """The rows of the named benchmarks, each as soon as it is known, until the clock says `end`."""
    for number, name in enumerate(names):
        started = time.perf_counter()
        try:
            for row in benchmarks[name](setting):
                yield row
                if time.perf_counter() > end:
                    left = f"the time is up; what is left of {name} is left out"
                    print(left, *names[number + 1 :], sep=", ", flush=True)
                    return
        except UserError as error:  # a library that is missing must not end the others
            print(f"{name} ended: {error}", flush=True)
            yield Row(f"{name} ended with an error", 1, unit="", target=0, at_most=True, timed=False, note=str(error))
        print(f"{name} took {time.perf_counter() - started:.0f} s", flush=True)


def _write_json(path: Path | None, machine: dict[str, str], rows: Sequence[Row], speed: bool) -> None:
    if path is not None:
        found = [asdict(row) | {"passed": row.passed(speed)} for row in rows]
        path.write_text(json.dumps({"machine": machine, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
