"""One try at one run: nothing if it is finished, else the run, and its exit code."""

import atexit
import gc
import logging
import sys
from functools import cache

from pai_bench.config.schema import RunConfig
from pai_bench.errors import PreemptedError
from pai_bench.launch.terminal import count, report
from pai_bench.runs import status
from pai_bench.runs.summary import already
from pai_bench.system import preemption
from pai_bench.system.world import world

log = logging.getLogger(__name__)


@cache
def _spare_imports() -> None:
    """Keeps the collection of garbage, which follows every run, from walking through all that has been imported."""
    gc.freeze()
    atexit.register(gc.unfreeze)


def _done_before(completed: RunConfig) -> bool:
    """Whether a run is finished, and says so: experiment.run would say no more, after importing torch."""
    directory = completed.directory
    row = status.finished_and_clean(directory)
    if row is None or not completed.name_decides_images or world().size > 1:
        return False
    log.info("%s", already(row, directory, completed.keeps_weights))
    return True


def attempt(completed: RunConfig) -> int:
    """Runs what a completed config describes; says in one line what went wrong, if so, and returns the exit code."""
    try:
        if _done_before(completed):
            count(0, skipped=True)
            return 0
    except OSError as error:
        code = report(error)
        count(code)
        return code

    from pai_bench import experiment
    from pai_bench.system import devices, slurm_job

    _spare_imports()
    preemption.watch()
    skipped = status.finished(completed.directory) is not None
    code = 0
    try:
        experiment.run(completed)
    except Exception as error:
        code = report(error)
        if preemption.requested() and world().rank > 0:  # it has noticed that the first process is gone
            code = PreemptedError.exit_code
        if isinstance(error, PreemptedError):
            slurm_job.requeue()
    gc.collect()  # a failure keeps its tensors and worker processes in a cycle; the next run wants the memory
    devices.release()
    count(code, skipped)
    if code and world().size > 1:
        sys.exit(code)  # the processes may no longer stand at the same place
    return code
