"""Runs as SLURM arrays: submission on top of submitit, what the job does, requeueing, and a plain sbatch script."""

import io
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from pai_bench.config.composition import rerunnable
from pai_bench.config.schema import RunConfig
from pai_bench.errors import ConfigError, PreemptedError, UserError
from pai_bench.runs import status
from pai_bench.system import preemption
from pai_bench.system.slurm_job import REQUEUES

log = logging.getLogger(__name__)


def submit(cfgs: Sequence[RunConfig], *, folder: str, max_requeues: int, **sbatch: Any) -> dict[str, str]:
    """Submits the runs that are neither finished, running nor queued, in arrays of at most MaxArraySize, and returns.

    Each job runs the config as it is now, whatever becomes of the yaml files while it waits.

    Args:
        cfgs: the checked configs.
        folder: receives submitit's files and the jobs' output.
        max_requeues: how often a job goes back into the queue when its time is up or it is preempted.
        sbatch: submitit's settings: timeout_min, mem_gb, gpus_per_node, partition, and so on.

    Returns:
        The job of each run id that was submitted.

    Raises:
        ConfigError: there is no SLURM here, or a setting that submitit does not know.
        UserError: SLURM refuses.
    """
    submitit = _submitit()
    if shutil.which("sbatch") is None:
        raise ConfigError("hydra/launcher=slurm: no sbatch here; go to a login node, or add hydra.launcher.export=DIR")
    wanted = _to_do(cfgs)
    if not wanted:
        return {}
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=max_requeues)
        executor.update_parameters(**_native(sbatch, max_requeues))
    except ValueError as error:
        raise ConfigError(f"hydra.launcher: {' '.join(str(error).split())}") from error
    submitted: dict[str, str] = {}
    ids, size = list(wanted), _max_array_size()
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        since = time.time()
        try:
            with redirect_stderr(io.StringIO()):  # what sbatch says there, the error says too
                jobs = executor.submit_array([Job(wanted[run_id]) for run_id in part])
        except submitit.core.utils.FailedJobError as error:
            said = " ".join(str(error).split())
            raise UserError(f"SLURM took {len(submitted)} of {len(wanted)} runs, then refused: {said}") from error
        for run_id, job in zip(part, jobs, strict=True):
            status.mark_queued(wanted[run_id].directory, job.job_id, since, rerunnable(wanted[run_id]))
            submitted[run_id] = job.job_id
    arrays = ", ".join(dict.fromkeys(job.partition("_")[0] for job in submitted.values()))
    log.info("%d runs submitted as SLURM job %s; their output goes to %s", len(submitted), arrays, Path(folder).parent)
    return submitted


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigError("hydra/launcher=slurm: submitit is not installed; pip install submitit") from error
    return submitit


def _to_do(cfgs: Sequence[RunConfig]) -> dict[str, RunConfig]:
    """The configs of the runs that are to be submitted, by id."""
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
        log.info("%d of %d runs are the same as another", len(cfgs) - len(by_id), len(cfgs))
    for name, number in left_out.items():
        log.info("%d of %d runs are %s already", number, len(by_id), name)
    return wanted


def queue_states(directories: Mapping[str, Path]) -> dict[str, status.RunState]:
    """How runs stand, by their directories and the queue: one whose job waits there is queued, whatever befell it."""
    states = {name: status.state(directory) for name, directory in directories.items()}
    waiting = {name: state.job for name, state in states.items() if state.name in ("queued", "preempted", "killed")}
    there = alive([job for job in waiting.values() if job])
    if there is None:
        return states
    for name, job in waiting.items():
        if job in there:
            states[name] = replace(states[name], name="queued")
        elif states[name].name == "queued":
            states[name] = status.RunState("missing")
    return states


def wait(jobs: Sequence[str], seconds: float = 10.0) -> None:
    """Returns when none of the jobs is in the queue any more; asks every so many seconds."""
    pause = 1.0
    while alive(jobs) != set():
        if preemption.requested():
            raise PreemptedError("no longer waiting; the jobs go on without")
        time.sleep(pause)
        pause = min(seconds, 1.5 * pause)


def outcomes(cfgs: Sequence[RunConfig], submitted: Mapping[str, str]) -> list[tuple[int, bool]]:
    """Exit code, and whether there was nothing to do, of each run once its job is over; the log says what failed."""
    found = {}
    for cfg in cfgs:
        run_id, state = cfg.id, status.state(cfg.directory)
        found[run_id] = (0 if state.name == "finished" else max(state.exit_code, 1), run_id not in submitted)
        if state.name != "finished":
            log.info("%s: %s%s", run_id, state.name, f" ({state.error})" if state.error else "")
    return list(found.values())


def alive(jobs: Sequence[str]) -> set[str] | None:
    """Which of some jobs, like "12" or "12_3", are pending or running; None where SLURM does not tell.

    Needs no accounting.
    """
    arrays = sorted({job.partition("_")[0] for job in jobs})
    if not arrays:
        return set()
    if shutil.which("squeue") is None:
        return None
    there: set[str] = set()
    for array in arrays:
        # One by one: for a list, squeue fails as a whole over a job that is long gone.
        done = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={array}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            if "Invalid job id" in done.stderr:
                continue
            return None
        there |= set(done.stdout.split())
    return there & set(jobs)


def _max_array_size() -> int:
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and int(value) > 1:
            return int(value)
    return 1001  # SLURM's default


def _native(sbatch: Mapping[str, Any], max_requeues: int) -> dict[str, Any]:
    """Settings as submitit's SLURM executor takes them."""
    names = {"timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node", "name": "job_name"}
    native = {names.get(key, key): value for key, value in sbatch.items() if value is not None and value != {}}
    if "mem" in native:
        native["mem"] = f"{round(1024 * native['mem'])}MB"
    native.setdefault("wckey", None)  # submitit marks its jobs with one, which clusters that keep a list refuse
    native.setdefault("srun_args", ["--kill-on-bad-exit=1"])  # tasks that wait for one that has died
    if native.get("time") is None:
        raise ConfigError("hydra.launcher.timeout_min=null: give the minutes that a run may take")
    native["additional_parameters"] = {"requeue": True, **native.get("additional_parameters", {})}
    return native | {"setup": [*native.get("setup", []), f"export {REQUEUES}={max_requeues}"]}


def export(jobs: Sequence[Sequence[str]], folder: Path, *, max_requeues: int, **sbatch: Any) -> list[Path]:
    """Writes array scripts for sites where Python must not run on the login node: `sbatch FOLDER/array.sh`.

    Args:
        jobs: the overrides of each run; they are composed when its job starts.
        folder: receives the scripts, and in args/ the overrides of each run, one a line.
        max_requeues: as for `submit`.
        sbatch: as for `submit`.

    Returns:
        The scripts, one for each 1,000 runs.
    """
    _submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    shutil.rmtree(folder / "args", ignore_errors=True)
    for old in folder.glob("array*.sh"):
        old.unlink()
    (folder / "args").mkdir(parents=True)
    (folder / "logs").mkdir(exist_ok=True)
    scripts = []
    size = 1000
    for start in range(0, len(jobs), size):
        part = jobs[start : start + size]
        for number, overrides in enumerate(part, start=start):
            words = [*overrides, "hydra.mode=RUN"]  # an experiment among them has been expanded
            (folder / "args" / str(number)).write_text("".join(f"{word}\n" for word in words))
        here = shlex.quote(str(folder))
        read = f"mapfile -t ARGS < {here}/args/$(({start} + ${{SLURM_ARRAY_TASK_ID:-0}}))"
        script = folder / ("array.sh" if len(jobs) <= size else f"array-{start // size}.sh")
        native = _native(sbatch, max_requeues)
        native["setup"] = [*native["setup"], "set -euo pipefail", read]
        native["additional_parameters"] |= {"output": f"{folder}/logs/%A_%a.log"}
        try:
            text = _make_sbatch_string(
                command='exec srun --unbuffered --kill-on-bad-exit=1 python run.py "${ARGS[@]}"',
                folder=folder, use_srun=False, stderr_to_stdout=True, map_count=len(part), **native,
            )  # fmt: skip
        except TypeError as error:
            raise ConfigError(f"hydra.launcher: {error}") from error
        script.write_text(text.replace("export SUBMITIT_EXECUTOR=slurm\n", ""))
        scripts.append(script)
    log.info("%d runs written; submit them with sbatch %s", len(jobs), " and ".join(map(str, scripts)))
    return scripts


class Job:
    """What one task of an array does. Its exit code is that of the run, so that SLURM's states are true."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    def __call__(self) -> None:
        """Called by submitit in the job."""
        from pai_bench.launch import attempt, terminal

        os.environ.pop(terminal.OUTCOMES, None)  # of the process that submitted
        terminal.start_process()
        code = attempt.attempt(self.cfg)
        if code:
            raise SystemExit(code)

    def checkpoint(self) -> Any:
        """Called by submitit at a signal that comes before the run listens itself: the job starts over."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
