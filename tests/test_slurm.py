"""Sweeps on a real SLURM: states that are true, requeueing, and nothing done twice."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, RunCli
from slurm_cluster import MISSING, Cluster, until
from whole_runs import TINY

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here: {', '.join(MISSING)} missing"),
    pytest.mark.xdist_group("slurm"),
]

LAUNCHER = ["hydra/launcher=slurm_cpu", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]
LONG = 60  # epochs of a tiny network: enough to be caught in the middle, by a busy machine too


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster(cpus=4)
    yield started
    started.stop()


def jobs_of(results: Path) -> dict[str, str]:
    """The job that each run was submitted as."""
    return {path.parent.name: json.loads(path.read_text())["job"] for path in results.glob("*/queued.json")}


def state(directory: Path) -> dict[str, object]:
    path = directory / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def epochs(directory: Path) -> int:
    path = directory / "curve.jsonl"
    return path.read_text().count("test_top1") if path.is_file() else 0


def freeze(*directories: Path) -> None:
    """Stops runs a few epochs after their start, so that none is over before what shall befall it, however fast."""
    waiting = set(directories)

    def caught() -> bool:
        for directory in [one for one in waiting if epochs(one) > 2]:
            os.kill(pid_of(directory), signal.SIGSTOP)
            waiting.discard(directory)
        return not waiting

    until(caught)


def pid_of(directory: Path) -> int:
    return int(str(state(directory)["pid"]))


def met(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process to go on, or has let it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    fields = dict(line.split(":", 1) for line in lines)
    return bool(int(fields["ShdPnd"], 16) >> (number - 1) & 1) or fields["State"].split()[0] != "T"


def over(cluster: Cluster, jobs: list[str]) -> bool:
    return all(cluster.show(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") for job in jobs)


def test_a_sweep_with_a_failure_a_kill_and_a_time_limit(cluster: Cluster, run_cli: RunCli, tmp_path: Path) -> None:
    results = tmp_path / "results"
    # Seeds 0 to 4 end quickly; 5 diverges; 6 and 7 are long: one is killed, one reaches its time limit.
    pairs = {
        "seed": list(range(8)),
        "training.epochs": [2, 2, 2, 2, 2, 2, LONG, LONG],
        "training.lr": [0.1, 0.1, 0.1, 0.1, 0.1, 1e30, 0.1, 0.1],
    }
    sweep = [
        "-m",
        *LAUNCHER,
        *[word for word in TINY if "epochs=2" not in word],
        "pruner=snip",
        "sparsity=0.8",
        "hydra.launcher.signal_delay_s=50",
        f"hydra.sweeper.paired=[{json.dumps(pairs).replace(chr(34), '')}]",
    ]
    done = run_cli(*sweep, "hydra.launcher.additional_parameters={hold:true}", env=cluster.env)
    assert done.returncode == 0, done.stderr
    assert "8 runs submitted as SLURM job " in done.stdout
    jobs = jobs_of(results)
    assert len(jobs) == 8
    arrays = {job.partition("_")[0] for job in jobs.values()}
    assert len(arrays) == 2, "MaxArraySize is 6"
    by_seed = {name.split("-seed")[1][0]: name for name in jobs}

    again = run_cli(*sweep, env=cluster.env)
    assert (again.returncode, again.stdout) == (0, "8 of 8 runs are queued already\n")
    cluster.run("scontrol", "release", ",".join(arrays))

    killed, limited = (results / by_seed[seed] for seed in "67")
    freeze(killed, limited)
    os.kill(pid_of(killed), signal.SIGKILL)
    cluster.run("scontrol", "update", f"JobId={jobs[limited.name]}", "TimeLimit=1")
    stopped = pid_of(limited)
    until(lambda: met(stopped, signal.SIGUSR2), 120)
    with suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGCONT)
    until(lambda: over(cluster, list(jobs.values())), 240)

    shown = {seed: cluster.show(jobs[name]) for seed, name in by_seed.items()}
    assert [shown[seed]["JobState"] for seed in "01234"] == ["COMPLETED"] * 5
    assert (shown["5"]["JobState"], shown["5"]["ExitCode"]) == ("FAILED", "1:0")
    assert shown["6"]["JobState"] == "FAILED"
    assert shown["7"]["JobState"] == "COMPLETED" and int(shown["7"]["Restarts"]) >= 1
    assert state(limited)["attempt"] == int(shown["7"]["Restarts"]) + 1
    assert epochs(limited) == LONG + 1
    assert state(results / by_seed["5"])["exit_code"] == 1

    status = [sys.executable, str(ROOT / "scripts" / "status.py"), str(results)]
    said = subprocess.run(status, env=cluster.env, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert said.stdout.startswith("8 runs: 6 finished, 1 killed, 1 failed\n"), said.stdout
    assert "training diverged" in said.stdout

    retried = subprocess.run(
        [*status, "--retry", *LAUNCHER, "hydra.launcher.wait=true"],
        env=cluster.env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "2 runs submitted" in retried.stdout and "1 done, 0 skipped, 1 failed" in retried.stdout, retried.stderr
    assert retried.returncode == 1
    assert epochs(killed) == LONG + 1 and state(killed)["attempt"] == 2


def test_a_job_runs_the_config_of_its_submission(cluster: Cluster, run_cli: RunCli, tmp_path: Path) -> None:
    hold = "hydra.launcher.additional_parameters={hold:true}"
    env = cluster.env | {"PAI_DATA": "before"}
    done = run_cli("-m", *LAUNCHER, hold, *TINY, "pruner=magnitude", "sparsity=0.5", env=env)
    assert done.returncode == 0, done.stderr
    (job,) = jobs_of(tmp_path / "results").values()
    submitted = tmp_path / "results" / "slurm" / job / f"{job}_submitted.pkl"
    cfg = pickle.loads(submitted.read_bytes()).function.cfgs[0]
    assert (cfg.data_dir, cfg.sparsity, cfg.model.settings["widths"]) == ("before", 0.5, [4, 6])
    cluster.run("scancel", job)


def test_what_slurm_or_submitit_refuses_is_said_in_a_line(cluster: Cluster, run_cli: RunCli, tmp_path: Path) -> None:
    for setting, said in (
        ("hydra.launcher.partition=nowhere", r"invalid partition"),
        ("+hydra.launcher.gpus=2", "gpus"),
        ("sparsity=1.5", "sparsity=1.5"),
    ):
        done = run_cli("-m", *LAUNCHER, *TINY, "pruner=snip", "sparsity=0.5", setting, env=cluster.env)
        assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1, done.stderr
        assert said in done.stderr
        assert not list((tmp_path / "results").glob("digits*"))
    without = os.environ | {"PATH": str(Path(sys.executable).parent)}
    done = run_cli("-m", *LAUNCHER, *TINY, "pruner=snip", "sparsity=0.5", env=without)
    assert done.returncode == 2 and "no sbatch here" in done.stderr


def test_a_preempted_job_saves_and_comes_back(cluster: Cluster, run_cli: RunCli, tmp_path: Path) -> None:
    results = tmp_path / "results"
    long = [word for word in TINY if "epochs=2" not in word] + [f"training.epochs={LONG}", "checkpoint_epochs=10000"]
    done = run_cli("-m", *LAUNCHER, *long, "pruner=snip", "sparsity=0.8", env=cluster.env)
    assert done.returncode == 0, done.stderr
    ((run_id, job),) = jobs_of(results).items()
    freeze(results / run_id)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 2\n")
    cluster.run("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", str(urgent))
    until(lambda: state(results / run_id).get("state") == "preempted")  # SLURM's SIGTERM comes with a SIGCONT
    before = epochs(results / run_id)
    assert before < LONG
    until(lambda: over(cluster, [job]), 240)
    shown = cluster.show(job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1")
    assert epochs(results / run_id) == LONG + 1


def test_an_exported_array_needs_no_python_where_it_is_submitted(
    cluster: Cluster, run_cli: RunCli, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    done = run_cli(
        "-m",
        *LAUNCHER,
        *TINY,
        "pruner=snip,magnitude",
        "sparsity=0.5,0.8",
        f"hydra.launcher.export={folder}",
        env=os.environ | {"PATH": str(Path(sys.executable).parent)},
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "results").exists()
    env = cluster.env | {"PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", str(folder / "array.sh")]
    job = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()
    until(lambda: not cluster.run("squeue", "--noheader", f"--jobs={job}", check=False).strip(), 120)
    logs = "".join(path.read_text() for path in (folder / "logs").iterdir())
    assert len(list((tmp_path / "results").glob("*/result.json"))) == 4, logs


def test_a_preempted_task_of_an_exported_array_comes_back_and_does_the_rest(
    cluster: Cluster, run_cli: RunCli, tmp_path: Path
) -> None:
    long = [word for word in TINY if "epochs=2" not in word] + [f"training.epochs={LONG}", "checkpoint_epochs=10000"]
    chain = ["pruner=magnitude", "schedule=rewind", "schedule.levels=null", "schedule.keep_per_level=0.5"]
    folder, results = tmp_path / "sweep", tmp_path / "results"
    done = run_cli("-m", *LAUNCHER, *long, *chain, "density=0.25,0.5", f"hydra.launcher.export={folder}")
    assert done.returncode == 0 and "2 runs written in 1 task;" in done.stdout, done.stderr
    env = cluster.env | {"PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", str(folder / "array.sh")]
    job = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()
    until(lambda: bool(list(results.glob("digits-*"))))
    (first,) = results.glob("digits-*")
    assert "s0.5" in first.name
    freeze(first)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 2\n")
    cluster.run("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", str(urgent))
    until(lambda: state(first).get("state") == "preempted")  # SLURM's SIGTERM comes with a SIGCONT
    assert len(list(results.glob("digits-*"))) == 1
    until(lambda: over(cluster, [f"{job}_0"]), 240)
    shown = cluster.show(f"{job}_0")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1")
    assert len(list(results.glob("digits-*/result.json"))) == 2


def test_tasks_of_one_job_train_one_network(cluster: Cluster, run_cli: RunCli, tmp_path: Path) -> None:
    more = ["hydra.launcher.tasks_per_node=2", "hydra.launcher.wait=true"]
    done = run_cli("-m", *LAUNCHER, *more, *TINY, "pruner=snip", "sparsity=0.5", "seed=0,1", env=cluster.env)
    assert done.returncode == 0 and "2 done, 0 skipped, 0 failed" in done.stdout, done.stderr + done.stdout
    rows = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/result.json")]
    assert [row["num_processes"] for row in rows] == [2, 2]
