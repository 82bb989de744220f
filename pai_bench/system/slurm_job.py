"""The SLURM job of this process, and its way back into the queue."""

import logging
import os
import subprocess

log = logging.getLogger(__name__)


REQUEUES = "PAI_BENCH_REQUEUES"  # environment variable of a job: how often it may go back into the queue


def requeue() -> bool:
    """Puts this job back into the queue, and returns whether it did.

    It does so only if the job asked for it, and is neither cancelled nor requeued already.
    """
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
        if state != "RUNNING":  # the job is cancelled, or requeued already
            return False
        log.info("job %s goes back into the queue", job)
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        log.warning("job %s could not be requeued: %s", job, said)
        return False
    return True


def job_id() -> str | None:
    """The id of the SLURM job of this process, like 12 or 12_3. The id of an array alone would mean all its tasks."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often SLURM has put this job back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))
