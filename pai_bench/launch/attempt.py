"""One attempt at one run. It returns an exit code. A run that is finished already is not done again."""

import atexit
import gc
import logging
import os
import sys
from functools import cache

from pai_bench.config.schema import RunConfig
from pai_bench.config.value_checks import OF_WANDB
from pai_bench.errors import PreemptedError, UserError
from pai_bench.launch.sweep_progress import count
from pai_bench.launch.terminal import report
from pai_bench.runs import status
from pai_bench.runs.replay import replay
from pai_bench.runs.summary import already
from pai_bench.system import preemption
from pai_bench.system.world import world

log = logging.getLogger(__name__)


@cache
def _spare_imports() -> None:
    """Hides all imported modules from the garbage collection after each run, which is faster then."""
    gc.freeze()
    atexit.register(gc.unfreeze)


def _tell_agent(completed: RunConfig) -> None:
    """Reports a run that was finished before to the agent of a W&B sweep, which waits for the result of its trial."""
    if "WANDB_SWEEP_ID" not in os.environ or completed.tracker.target not in OF_WANDB or world().rank > 0:
        return
    log.info("its result goes to the agent of the W&B sweep")
    try:
        replay(completed.directory, completed, completed.tracker)
    except UserError as error:
        log.warning("the agent of the W&B sweep gets no result: %s", error)


def _done_before(completed: RunConfig) -> bool:
    """Whether a run is finished; if so, the log says it. `experiment.run` would do the same, but imports torch."""
    directory = completed.directory
    row = status.finished_and_clean(directory)
    if row is None or not completed.name_decides_images or world().size > 1:
        return False
    log.info("%s", already(row, completed))
    return True


def attempt(completed: RunConfig) -> int:
    """Does one run, and returns its exit code. A failure is reported in one line."""
    try:
        if _done_before(completed):
            _tell_agent(completed)
            count(0, skipped=True, directory=completed.directory)
            return 0
    except OSError as error:
        code = report(error)
        count(code, directory=completed.directory)
        return code

    from pai_bench import experiment
    from pai_bench.system import devices, slurm_job

    _spare_imports()
    preemption.watch()
    skipped = status.finished(completed.directory) is not None
    code = 0
    try:
        experiment.run(completed)
        if skipped:
            _tell_agent(completed)
    except Exception as error:
        code = report(error)
        if preemption.requested() and world().rank > 0:  # the error only says that the first process is gone
            code = PreemptedError.exit_code
        if isinstance(error, PreemptedError):
            slurm_job.requeue()
    gc.collect()  # after a failure, a cycle of objects keeps tensors and workers; the next run needs the memory
    devices.release()
    count(code, skipped, completed.directory)
    if code and world().size > 1:
        sys.exit(code)  # the processes of the run may be at different places in the code now
    return code
