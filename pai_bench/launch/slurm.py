"""Runs as SLURM arrays: submission through submitit, the queue, and what a job does."""

import io
import logging
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from pai_bench.config import signatures
from pai_bench.config.composition import rerunnable
from pai_bench.config.schema import RunConfig
from pai_bench.core import Count, NonNegativeInt, Positive
from pai_bench.errors import ConfigError, OwnedError, PreemptedError, UserError
from pai_bench.launch import chains
from pai_bench.runs import status
from pai_bench.system import preemption
from pai_bench.system.slurm_job import REQUEUES

log = logging.getLogger(__name__)

_SILENCE = 1800  # seconds without an answer of squeue after which nobody waits any more


def submit(cfgs: Sequence[RunConfig], *, folder: str, max_requeues: int, **resources: Any) -> dict[str, str]:
    """Submits all runs that are not finished, running or queued. Does not wait for them.

    A task of an array does one run, or the runs of one chain of tickets one after another, because they share their
    trainings. An array has at most MaxArraySize tasks. Each runs its configs as they are now. Later changes of the yaml
    files have no effect on it.

    Args:
        cfgs: the checked configs.
        folder: receives submitit's files and the jobs' output.
        max_requeues: how often a job may go back into the queue when its time is up or it is preempted.
        resources: see `native`.

    Returns:
        The job id of each submitted run, by run id.

    Raises:
        ConfigError: this machine has no SLURM, or a setting is wrong.
        UserError: SLURM refuses the jobs.
    """
    submitit = imported_submitit()
    if shutil.which("sbatch") is None:
        raise ConfigError("hydra/launcher=slurm: no sbatch here; go to a login node, or add hydra.launcher.export=DIR")
    wanted = _to_do(cfgs)
    if not wanted:
        return {}
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=max_requeues)
        executor.update_parameters(**checked({"max_requeues": max_requeues} | resources))
    except ValueError as error:
        raise ConfigError(f"hydra.launcher: {' '.join(str(error).split())}") from error
    submitted: dict[str, str] = {}
    tasks, size = chains.grouped(list(wanted.values())), _max_array_size()
    for start in range(0, len(tasks), size):
        part = tasks[start : start + size]
        since = time.time()
        try:
            with redirect_stderr(io.StringIO()):  # the error repeats what sbatch prints
                jobs = executor.submit_array([Job(task) for task in part])
        except submitit.core.utils.FailedJobError as error:
            said = " ".join(str(error).split())
            raise UserError(f"SLURM took {len(submitted)} of {len(wanted)} runs, then refused: {said}") from error
        for task, job in zip(part, jobs, strict=True):
            for cfg in task:
                status.mark_queued(cfg.directory, job.job_id, since, rerunnable(cfg))
                submitted[cfg.id] = job.job_id
    arrays = ", ".join(dict.fromkeys(job.partition("_")[0] for job in submitted.values()))
    runs = "1 run" if len(submitted) == 1 else f"{len(submitted)} runs"
    log.info(
        "%s submitted%s as SLURM job %s; the output goes to %s", runs, in_tasks(tasks), arrays, Path(folder).parent
    )
    return submitted


def imported_submitit() -> Any:
    """The library that submits jobs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigError("hydra/launcher=slurm: submitit is not installed; pip install submitit") from error
    return submitit


def _to_do(cfgs: Sequence[RunConfig]) -> dict[str, RunConfig]:
    """The configs of the runs to submit, by run id. The log says how many are left out, and why."""
    by_id = {cfg.id: cfg for cfg in cfgs}
    states = queue_states({run_id: cfg.directory for run_id, cfg in by_id.items()})
    left_out: dict[str, int] = {}
    wanted = {}
    for run_id, state in states.items():
        if state.name in ("finished", "running", "queued"):
            left_out[state.name] = left_out.get(state.name, 0) + 1
        else:
            wanted[run_id] = by_id[run_id]
    if len(by_id) < len(cfgs):
        number = len(cfgs) - len(by_id)
        log.info("%d of %d runs %s the same as another", number, len(cfgs), _are(number))
    for name, number in left_out.items():
        log.info("%d of %d runs %s %s already", number, len(by_id), _are(number), name)
    return wanted


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def queue_states(directories: Mapping[str, Path]) -> dict[str, status.RunState]:
    """The states of runs, from their directories and from SLURM's queue.

    A run whose job is in the queue counts as queued, even if its last attempt was preempted or killed.
    """
    states = {name: status.state(directory) for name, directory in directories.items()}
    waiting = {name: state.job for name, state in states.items() if state.name in ("queued", "preempted", "killed")}
    in_queue = alive([job for job in waiting.values() if job])
    if in_queue is None:
        return states
    for name, job in waiting.items():
        if job in in_queue:
            states[name] = replace(states[name], name="queued")
        elif states[name].name == "queued":
            states[name] = status.RunState("missing")
    return states


def wait(jobs: Sequence[str], cfgs: Sequence[RunConfig] = (), seconds: float = 10.0) -> None:
    """Returns when no job is in the queue any more. Asks SLURM at growing intervals, at most `seconds` long.

    Args:
        cfgs: what the jobs do. When all of it is finished, a job that goes on does something else.

    Raises:
        PreemptedError: this process was told to end.
        UserError: SLURM does not answer for half an hour.
    """
    pause, answered = 1.0, time.monotonic()
    while (left := alive(jobs)) != set() and not (cfgs and all(status.finished(cfg.directory) for cfg in cfgs)):
        if preemption.requested():
            raise PreemptedError("no longer waiting; the jobs go on without")
        if left is not None:
            answered = time.monotonic()
        elif time.monotonic() - answered > _SILENCE:
            raise UserError(
                f"squeue has not answered for {_SILENCE // 60} minutes; the jobs go on without; when SLURM answers "
                "again, give the same command"
            )
        time.sleep(pause)
        pause = min(seconds, 1.5 * pause)


def waiting(cfgs: Sequence[RunConfig]) -> list[str]:
    """The jobs of those runs that are queued or running, whoever has submitted them."""
    states = queue_states({cfg.id: cfg.directory for cfg in cfgs}).values()
    return list(dict.fromkeys(state.job for state in states if state.job and state.name in ("queued", "running")))


def outcomes(cfgs: Sequence[RunConfig], submitted: Mapping[str, str]) -> list[tuple[int, bool, Path]]:
    """For each run whose job is over: its exit code, whether there was nothing to do, and its directory.

    The log names failures, and runs that another process still does.
    """
    codes = {}
    for cfg in cfgs:
        run_id, state = cfg.id, status.state(cfg.directory)
        finished, elsewhere = state.name == "finished", state.name == "running" and run_id not in submitted
        code = 0 if finished else OwnedError.exit_code if elsewhere else max(state.exit_code, 1)
        codes[run_id] = (code, finished and run_id not in submitted, cfg.directory)
        if not finished:
            log.info("%s: %s%s", run_id, state.name, f" ({state.error})" if state.error else "")
    return list(codes.values())


def alive(jobs: Sequence[str]) -> set[str] | None:
    """Those of the jobs, like "12" or "12_3", that are pending or running. None if SLURM does not answer.

    Does not need SLURM's accounting database.
    """
    arrays = sorted({job.partition("_")[0] for job in jobs})
    if not arrays:
        return set()
    if shutil.which("squeue") is None:
        return None
    in_queue: set[str] = set()
    for array in arrays:
        # One by one: for a list of jobs, squeue fails as a whole if one of them is long gone.
        done = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={array}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            if "Invalid job id" in done.stderr:
                continue
            return None
        in_queue |= set(done.stdout.split())
    return in_queue & set(jobs)


def _max_array_size() -> int:
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and int(value) > 1:
            return int(value)
    return 1001  # SLURM's default


def native(
    *,
    max_requeues: NonNegativeInt,
    timeout_min: Count,
    gpus_per_node: NonNegativeInt | str | None,
    cpus_per_task: Count | None,
    mem_gb: Positive | None,
    nodes: Count,
    tasks_per_node: Count,
    partition: str | None,
    array_parallelism: Count,
    name: str,
    setup: list[str] | None,
    additional_parameters: dict[str, Any] | None,
    signal_delay_s: NonNegativeInt,
    **more: Any,
) -> dict[str, Any]:
    """The settings of the launcher in the form that submitit's SLURM executor accepts.

    Args:
        more: settings of submitit that the launcher has no name for.

    Raises:
        ConfigError: one of them has another name in the launcher.
    """
    same = {"time": "timeout_min", "mem": "mem_gb", "ntasks_per_node": "tasks_per_node", "job_name": "name"}
    for key in more.keys() & same.keys():
        raise ConfigError(f"hydra.launcher.{key}={more[key]}: give hydra.launcher.{same[key]} instead")
    # Some versions of srun do not take the cores of a task over from sbatch.
    cores = [] if cpus_per_task is None else [f"export SRUN_CPUS_PER_TASK={cpus_per_task}"]
    settings = {
        "time": timeout_min,
        "gpus_per_node": gpus_per_node,
        "cpus_per_task": cpus_per_task,
        "mem": None if mem_gb is None else f"{round(1024 * mem_gb)}MB",
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "partition": partition,
        "array_parallelism": array_parallelism,
        "job_name": name,
        "setup": [*(setup or []), *cores, f"export {REQUEUES}={max_requeues}"],
        "additional_parameters": {"requeue": True, **(additional_parameters or {})},
        "signal_delay_s": signal_delay_s,
        "srun_args": ["--kill-on-bad-exit=1"],  # else tasks wait for ever for a task that died
    } | more
    # By default submitit sets a wckey, which some clusters refuse.
    return {"wckey": None} | {key: value for key, value in settings.items() if value is not None}


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`native` of settings, after a check of their values.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """
    for key, setting in signatures.settings_of(f"{__name__}.{native.__name__}").items():
        if key in settings:
            signatures.check_value(f"hydra.launcher.{key}", settings[key], setting.annotation, setting.module)
    return native(**settings)


def in_tasks(tasks: Sequence[Sequence[Any]]) -> str:
    """In how many tasks the runs are; nothing if each has its own."""
    if all(len(task) == 1 for task in tasks):
        return ""
    return f" in {len(tasks)} task{'' if len(tasks) == 1 else 's'}"


class Job:
    """What one task of an array does. It exits with the code of a run that failed, so that SLURM shows the state."""

    def __init__(self, cfgs: Sequence[RunConfig]) -> None:
        self.cfgs = cfgs

    def __call__(self) -> None:
        """Called by submitit in the job."""
        from pai_bench.launch import attempt, sweep_progress, terminal

        sweep_progress.forget()  # the file of outcomes belongs to the process that submitted the job
        terminal.start_process()
        codes = []
        for cfg in self.cfgs:
            codes.append(attempt.attempt(cfg))
            if codes[-1] == PreemptedError.exit_code:  # the task goes back into the queue, and on with this run
                raise SystemExit(PreemptedError.exit_code)
        if any(codes):
            raise SystemExit(next(code for code in codes if code))

    def checkpoint(self) -> Any:
        """Called by submitit if a signal comes before the run watches for signals. The job then starts again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
