"""Settings of SLURM, the scripts that are exported, and jobs of others: without a SLURM."""

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RunCli, composed
from omegaconf import OmegaConf

from pai_bench.config import composition
from pai_bench.errors import ConfigError, UserError
from pai_bench.launch import slurm, slurm_scripts, sweep_progress
from pai_bench.runs import status


@pytest.mark.parametrize(
    ("given", "lines"),
    [({}, []), ({"wckey": None}, []), ({"wckey": "thesis", "qos": None}, ["#SBATCH --wckey=thesis"])],
    ids=["not given", "null", "given"],
)
def test_a_setting_of_slurm_that_is_null_is_not_given(given: dict[str, Any], lines: list[str], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (script,) = slurm_scripts.export([[["seed=0"]]], tmp_path / "x", **resources() | {"timeout_min": 5} | given)
    found = script.read_text().splitlines()
    assert [line for line in found if "wckey" in line or "qos" in line] == lines
    assert "#SBATCH --time=5" in found


@pytest.mark.parametrize(("cores", "lines"), [(4, ["export SRUN_CPUS_PER_TASK=4"]), (None, [])])
def test_srun_is_told_the_cores_of_a_task(cores: int | None, lines: list[str], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (script,) = slurm_scripts.export([[["seed=0"]]], tmp_path / "x", **resources() | {"cpus_per_task": cores})
    before_srun = script.read_text().partition("srun --unbuffered")[0].splitlines()
    assert [line for line in before_srun if "SRUN" in line] == lines
    assert f"#SBATCH --cpus-per-task={cores}" in before_srun or cores is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"setup": "module load cuda"}, r"hydra\.launcher\.setup=module load cuda: give a list, such as \[a,b\]"),
        ({"max_requeues": None}, r"hydra\.launcher\.max_requeues=null: give a whole number"),
        ({"timeout_min": None}, r"hydra\.launcher\.timeout_min=null: give a whole number"),
        ({"mem_gb": "16G"}, r"hydra\.launcher\.mem_gb=16G: give a number"),
        ({"mem": "32GB"}, r"hydra\.launcher\.mem=32GB: give hydra\.launcher\.mem_gb instead"),
    ],
)
def test_a_wrong_setting_of_slurm_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=said):
        slurm_scripts.export([[["seed=0"]]], tmp_path / "x", **resources() | given)


def resources() -> dict[str, Any]:
    """What hydra/launcher=slurm asks SLURM for."""
    yaml: Any = OmegaConf.to_container(OmegaConf.load(composition.CONF / "hydra" / "launcher" / "slurm.yaml"))
    return {key: yaml[key] for key in yaml if key not in ("_target_", "folder", "wait", "export")}


@pytest.mark.parametrize(
    ("codes", "done", "ends_with"),
    [({}, 3, 0), ({"seed=1": 4}, 3, 4), ({"seed=1": 75}, 2, 75), ({"seed=0": 1, "seed=1": 75}, 2, 75)],
    ids=["all well", "on after a failure", "not after a preemption", "a preemption counts more than a failure"],
)
def test_a_task_of_an_exported_array_does_its_runs_one_after_another(
    codes: dict[str, int], done: int, ends_with: int, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    tasks = [[["seed=9"]], [["seed=0"], ["seed=1", "name=with a space"], ["seed=2"]]]
    (script,) = slurm_scripts.export(tasks, tmp_path / "an array", ["--config-dir=mine"], **resources())
    assert "#SBATCH --array=0-1%2" in script.read_text().splitlines()
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    cases = "".join(f"*{word}*) exit {code};; " for word, code in codes.items())
    srun.write_text(f'#!/bin/sh\nprintf "%s|" "$@"; echo\ncase "$*" in {cases}esac\n')
    srun.chmod(0o755)
    env = {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    ended = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, check=False)
    command = "--unbuffered|--kill-on-bad-exit=1|python|-m|pai_bench|--config-dir=mine|"
    words = ["seed=0|", "seed=1|name=with a space|", "seed=2|"]
    assert ended.stdout.splitlines() == [f"{command}{some}hydra.mode=RUN|" for some in words[:done]], ended.stderr
    assert ended.returncode == ends_with


def test_an_exported_array_has_a_task_for_each_chain(run_cli: RunCli, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    words = ["model=lenet300", "pruner=magnitude", "schedule=rewind", "schedule.levels=null"]
    words += ["schedule.keep_per_level=0.5", "density=0.25,0.5", "seed=0,1", "hydra/launcher=slurm_cpu"]
    done = run_cli("-m", *words, f"hydra.launcher.export={tmp_path / 'sweep'}")
    assert done.returncode == 0 and done.stdout.startswith("4 runs written in 2 tasks; submit with "), done.stderr
    files = sorted((tmp_path / "sweep" / "args").iterdir())
    assert [path.name for path in files] == ["0-000000", "0-000001", "1-000000", "1-000001"]
    told = [[w for w in path.read_text().splitlines() if w.startswith(("density", "seed"))] for path in files]
    assert told == [[f"density={d}", f"seed={s}"] for s in (0, 1) for d in (0.5, 0.25)]


def test_an_export_removes_what_an_earlier_one_wrote_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    slurm_scripts.export([[["seed=0"]], [["seed=1"]]], tmp_path, **resources())
    for name in ("args/mine.txt", "array_of_mine.sh"):
        (tmp_path / name).write_text("mine")
    slurm_scripts.export([[["seed=2"]]], tmp_path, **resources())
    assert sorted(path.name for path in (tmp_path / "args").iterdir()) == ["0-000000", "mine.txt"]
    assert (tmp_path / "array_of_mine.sh").read_text() == "mine"
    (tmp_path / "array.sh").write_text("mine")
    with pytest.raises(ConfigError, match=r"array\.sh was not written by an export; give another folder"):
        slurm_scripts.export([[["seed=3"]]], tmp_path, **resources())
    assert (tmp_path / "array.sh").read_text() == "mine"
    assert (tmp_path / "args" / "0-000000").read_text().startswith("seed=2\n")


def test_waiting_ends_where_slurm_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(slurm.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(slurm, "alive", lambda jobs: set(jobs) if now[0] < 3600 else None)
    with pytest.raises(UserError, match="squeue has not answered for 30 minutes; the jobs go on without"):
        slurm.wait(["7"])
    assert 5400 < now[0] < 5420


def test_runs_that_others_do_are_waited_for_and_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [composed("pruner=snip", "sparsity=0.5", f"seed={n}", f"results_dir={tmp_path}") for n in range(3)]
    for number, run in enumerate(runs):
        status.mark_queued(run.directory, f"7_{number}", time.time(), "seed: 0\n")
    monkeypatch.setattr(slurm, "alive", lambda jobs: set(jobs))
    assert slurm.waiting(runs) == ["7_0", "7_1", "7_2"]
    preempted = tmp_path / "preempted"
    preempted.mkdir()
    (preempted / "status.json").write_text('{"state": "preempted", "exit_code": 75, "job": "8"}')
    again: Any = SimpleNamespace(id="preempted", directory=preempted)
    assert slurm.waiting([again]) == ["8"]  # its job is back in the queue
    assert {state.name for state in slurm.queue_states({run.id: run.directory for run in runs}).values()} == {"queued"}
    with sweep_progress.counting() as count:
        for code, skipped, directory in slurm.outcomes(runs, {}):
            sweep_progress.count(code, skipped, directory)
    assert [outcome.skipped for outcome in count.outcomes] == [False] * 3 and count.worst == 1


def test_an_exported_job_finds_the_configs_of_the_user(run_cli: RunCli, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "mine" / "training").mkdir(parents=True)
    (tmp_path / "mine" / "training" / "short.yaml").write_text("defaults: [digits, _self_]\nname: short\nepochs: 1\n")
    words = ["pruner=snip", "sparsity=0.5", "training=short", "seed=0,1", "hydra/launcher=slurm_cpu"]
    done = run_cli("-cd", str(tmp_path / "mine"), "-m", *words, f"hydra.launcher.export={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "sweep" / "args" / "1-000000").read_text().splitlines()
    assert f"--config-dir={tmp_path / 'mine'}" in words
    shown = run_cli("--cfg", "job", *words)
    assert shown.returncode == 0 and "name: short" in shown.stdout, shown.stderr
