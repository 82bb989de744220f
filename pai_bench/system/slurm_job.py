"""The SLURM job that this process belongs to, and how it goes back into the queue."""

import logging
import os
import subprocess

log = logging.getLogger(__name__)


REQUEUES = "PAI_BENCH_REQUEUES"  # in a job's environment: how often it may be put back into the queue


def requeue() -> bool:
    """Puts this job back into the queue, if it asked for that and is neither cancelled nor on its way there already."""
    allowed, done = int(os.environ.get(REQUEUES, 0)), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    job = job_id()
    if job is None or not allowed or int(os.environ.get("SLURM_PROCID", 0)) > 0:
        return False
    if done >= allowed:
        log.warning("not requeued: it has been %d times already, see hydra.launcher.max_requeues", done)
        return False
    try:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        state = next((word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState=")), "")
        if state != "RUNNING":  # cancelled, or on its way back already
            return False
        log.info("job %s goes back into the queue", job)
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        log.warning("job %s could not be requeued: %s", job, said)
        return False
    return True


def job_id() -> str | None:
    """The SLURM job of this process, like 12 or 12_3; the id of an array alone would mean every task of it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often SLURM has put this job back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))
