"""Runs as much of an experiment as fits into a given time, the most informative runs first.

    pai-bench fit --minutes 12 experiment=synflow_fig6 model=vgg16 compression=10,100
    pai-bench fit --minutes 12 --at-once 8 experiment=rewinding_or_fine_tuning

Takes the words of pai-bench -m. First come all methods at one density with one seed, then more seeds, then other
densities, then other networks; of runs that tell as much, the cheapest. A minute before the end, or a tenth of less
than ten minutes, it stops with everything written; what was under way goes on from its checkpoint at the next call. A
worker that writes none within a minute is killed. The exit code is 75 as long as runs are left. It suits short queues
and borrowed cards.
"""

import argparse
import sys

from pai_bench.errors import OwnedError, PreemptedError, UserError
from pai_bench.launch import compose, fitting, terminal
from pai_bench.runs import status
from pai_bench.system import preemption


def main() -> None:
    """Prints what it expects, then each run as it ends. Exits with 1 if a run failed, with 75 if runs are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="words of a sweep, such as experiment=NAME")
    parser.add_argument("--minutes", type=float, required=True, help="the whole time")
    parser.add_argument("--at-once", type=int, help="runs side by side; else one on each core, or four on each GPU")
    arguments = parser.parse_intermixed_args()
    if arguments.minutes <= 0 or (arguments.at_once is not None and arguments.at_once < 1):
        parser.error("--minutes, --at-once: give numbers above 0")
    terminal.start_process()
    preemption.watch()
    with terminal.one_line_errors():
        runs, _ = compose.expand([compose.as_group(word) for word in arguments.settings])
        at_once = arguments.at_once or fitting.runs_at_once()
        outcomes = fitting.fit(runs, arguments.minutes, at_once, lambda text: print(text, flush=True))
        again = (0, PreemptedError.exit_code, OwnedError.exit_code)  # another call has taken a run up
        if any(outcome.code not in again for outcome in outcomes):
            sys.exit(UserError.exit_code)
        sys.exit(0 if all(status.finished(run.directory) for run in runs) else PreemptedError.exit_code)
