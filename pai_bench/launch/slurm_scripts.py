"""Runs as plain sbatch scripts of SLURM arrays, for sites where Python must not run on the login node."""

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pai_bench.errors import ConfigError, PreemptedError
from pai_bench.launch import slurm

log = logging.getLogger(__name__)

# What a task of an exported array does: a run after another, on after a failure, but not after a preemption, with which
# the task goes back into the queue. The first code that is not 0 is that of the task. A SIGTERM is for the run, which
# gets it too; the shell waits for its end.
_TASK = """\
trap : TERM
CODE=0
for FILE in {folder}/args/$(({start} + ${{SLURM_ARRAY_TASK_ID:-0}}))-*; do
  mapfile -t ARGS < "$FILE"
  LAST=0
  srun --unbuffered --kill-on-bad-exit=1 python -m pai_bench "${{ARGS[@]}}" || LAST=$?
  if [ $CODE = 0 ] || [ $LAST = {preempted} ]; then CODE=$LAST; fi
  if [ $LAST = {preempted} ]; then break; fi
done
exit $CODE"""


def export(
    tasks: Sequence[Sequence[Sequence[str]]],
    folder: Path,
    first: Sequence[str] = (),
    *,
    max_requeues: int,
    **resources: Any,
) -> list[Path]:
    """Writes array scripts, for sites where Python must not run on the login node: `sbatch FOLDER/array.sh`.

    Args:
        tasks: the overrides of each run, by the task that does them, one after another. They are composed when the run
            starts.
        folder: receives the scripts and, in args/, a file for each run with one override a line: TASK-RUN.
        first: words before those of every run, such as --config-dir=PATH.
        max_requeues: as in `submit`.
        resources: see `native`.

    Returns:
        The scripts, one for each 1,000 tasks.
    """
    slurm.imported_submitit()
    _remove_exported(folder)
    (folder / "args").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    for task, jobs in enumerate(tasks):
        for number, overrides in enumerate(jobs):
            words = [*first, *overrides, "hydra.mode=RUN"]  # an experiment has MULTIRUN, but is expanded already
            # The shell sorts the names as text.
            (folder / "args" / f"{task}-{number:06}").write_text("".join(f"{word}\n" for word in words))
    scripts = []
    size = 1000
    for start in range(0, len(tasks), size):
        script = folder / ("array.sh" if len(tasks) <= size else f"array-{start // size}.sh")
        settings = {"max_requeues": max_requeues} | resources
        script.write_text(_script(folder, start, len(tasks[start : start + size]), settings))
        scripts.append(script)
    number = sum(map(len, tasks))
    runs = "1 run" if number == 1 else f"{number} runs"
    log.info("%s written%s; submit with sbatch %s", runs, slurm.in_tasks(tasks), " and ".join(map(str, scripts)))
    return scripts


def _remove_exported(folder: Path) -> None:
    """Removes what an earlier export has written.

    Raises:
        ConfigError: a script of one of these names is somebody else's.
    """
    scripts = [path for path in folder.glob("array*.sh") if re.fullmatch(r"array(-\d+)?\.sh", path.name)]
    for path in scripts:
        if "srun --unbuffered --kill-on-bad-exit=1 python -m pai_bench" not in path.read_text(errors="replace"):
            raise ConfigError(
                f"hydra.launcher.export={folder}: {path} was not written by an export; give another folder"
            )
    arguments = [path for path in folder.glob("args/*") if re.fullmatch(r"\d+-\d{6,}", path.name)]
    for path in (*scripts, *arguments):
        path.unlink()


def _script(folder: Path, start: int, number: int, settings: Mapping[str, Any]) -> str:
    """The script of an array.

    Args:
        start: its first task.
        number: how many tasks it has.
        settings: of the launcher.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    native_settings = slurm.checked(settings)
    native_settings["setup"] += ["set -euo pipefail"]
    native_settings["additional_parameters"] |= {"output": f"{folder}/logs/%A_%a.log"}
    try:
        text = _make_sbatch_string(
            command=_TASK.format(folder=shlex.quote(str(folder)), start=start, preempted=PreemptedError.exit_code),
            folder=folder,
            use_srun=False,
            stderr_to_stdout=True,
            map_count=number,
            **native_settings,
        )
    except TypeError as error:
        raise ConfigError(f"hydra.launcher: {error}") from error
    return text.replace("export SUBMITIT_EXECUTOR=slurm\n", "")
