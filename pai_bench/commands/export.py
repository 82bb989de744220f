"""Writes the mask or the physically smaller network of a finished run, for other programs.

    pai-bench pruner=filter_magnitude sparsity=0.5
    pai-bench export results/<run> -o mask.pt    # for torch.nn.utils.prune; also .npz, .safetensors
    pai-bench export results/<run> -o small.pt2
    pai-bench export results/<run> --hub USER/NAME    # weights, mask, config, row and a card to Hugging Face

A .pt file is a state dict with NAME_mask and NAME_orig. It holds the initial weights, or with --weights final those at
the end of the run. A .pt2 file is a torch.export program without the pruned filters;
torch.export.load("small.pt2").module() runs it without this package. A table shows what it saves.
"""

import argparse
from pathlib import Path

from pai_bench.launch import terminal
from pai_bench.masks import masks
from pai_bench.runs.export import export, export_mask
from pai_bench.runs.hub import push

ENDINGS = (".pt2", ".pt", ".npz", ".safetensors")


def main() -> None:
    """Exports one run, and prints what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", type=Path, help="file to write: " + ", ".join(ENDINGS))
    where.add_argument("--hub", metavar="USER/NAME", help="repository of the Hugging Face Hub to upload to")
    parser.add_argument("--private", action="store_true", help="a new repository of --hub is private")
    parser.add_argument("--weights", choices=("initial", "final"), help="what a .pt holds")
    parser.add_argument("--batch-size", type=int, help="images in the batch that a .pt2 is measured with (64)")
    parser.add_argument("--repeats", type=int, help="its measured forward passes, of which the median counts (20)")
    parser.add_argument("--trust", action="store_true", help="the run may name functions of other packages")
    arguments = parser.parse_args()
    _check(parser, arguments)
    if arguments.hub is not None:
        with terminal.one_line_errors():
            print(f"uploaded to {push(arguments.run, arguments.hub, arguments.private, arguments.trust)}")
        return
    with terminal.one_line_errors():
        if arguments.output.suffix != ".pt2":
            mask = export_mask(arguments.run, arguments.output, arguments.weights or "initial", arguments.trust)
            kept, total = masks.kept(mask), masks.total(mask)
            print(f"a mask of {len(mask)} tensors that keeps {kept:,} of {total:,}; written to {arguments.output}")
            return
        masked, small = export(
            arguments.run, arguments.output, arguments.batch_size or 64, arguments.repeats or 20, arguments.trust
        )
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


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with one line if an option is wrong, or plays no part beside the others."""
    ending = None if arguments.output is None else arguments.output.suffix
    if ending is not None and ending not in ENDINGS:
        parser.error(f"-o {arguments.output}: it must end in one of {', '.join(ENDINGS)}")
    if arguments.weights and ending != ".pt":
        parser.error(f"--weights {arguments.weights}: only a .pt holds weights beside a mask; leave it out")
    if arguments.private and arguments.hub is None:
        parser.error("--private: a file is no repository; leave it out, or give --hub")
    for option, number in (("--batch-size", arguments.batch_size), ("--repeats", arguments.repeats)):
        if number is not None and ending != ".pt2":
            parser.error(f"{option} {number}: only a .pt2 is measured; leave it out")
        if number is not None and number < 1:
            parser.error(f"{option} {number}: give 1 or more")
