"""The real W&B client against a server: one run for each run, whatever happens to the process or the network."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, RunCli, composed
from test_resume import RUNS, TINY, directory_of
from wandb_server import Server

from pai_bench.errors import ConfigError
from pai_bench.runs.wandb_run import fitting

ONLINE = [*[word for word in TINY if not word.startswith("tracker")], "tracker=wandb"]


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


def epochs(lines: list[dict[str, Any]], key: str = "test_top1") -> list[float]:
    return [line["epoch"] for line in lines if key in line]


def local(results: Path) -> list[float]:
    """The epochs in the curve of the only run."""
    path = next(results.glob("*/curve.jsonl"), None)
    return epochs([json.loads(line) for line in path.read_text().splitlines()]) if path else []


def runs_in(folder: Path) -> list[Path]:
    """The directories of runs; the cache beside them is none."""
    return sorted(path.parent for path in (folder / "results").glob("*/config.yaml"))


def test_a_sweep_in_reused_workers_is_one_run_each(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    launcher = ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]
    done = run_cli("-m", *launcher, *ONLINE, "pruner=snip", "sparsity=0.5", "seed=range(4)", env=server.env)
    assert done.returncode == 0 and "4 done, 0 skipped, 0 failed" in done.stdout, done.stderr
    names = {path.name for path in runs_in(tmp_path)}
    assert set(server.runs) == set(server.history) == names
    assert server.exit_codes == {name: [0] for name in names}
    for name in names:
        row = json.loads((tmp_path / "results" / name / "result.json").read_text())
        assert epochs(server.history[name]) == [0, 1, 2]
        assert server.runs[name]["summary"]["test_top1"] == row["test_top1"]
        assert server.runs[name]["config"]["seed"]["value"] == row["seed"]
        assert server.runs[name]["groupName"] == row["group"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_taken_up_again_goes_on_as_one(number: signal.Signals, server: Server, tmp_path: Path) -> None:
    results = tmp_path / "results"
    long = [word for word in ONLINE if "epochs=2" not in word] + ["training.epochs=30", "checkpoint_epochs=7"]
    command = [sys.executable, str(ROOT / "run.py"), *long, *RUNS["synflow"], f"results_dir={results}"]
    env = os.environ | server.env | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(local(results)) < 12:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else -number), said
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "going on from a checkpoint" in again.stdout, again.stderr
    name = directory_of(results).name
    assert epochs(server.history[name]) == local(results) == list(range(31))
    if number == signal.SIGTERM:
        assert name in server.preempting and server.exit_codes[name] == [75, 0]


def test_a_wrong_key_ends_no_run(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    server.refuse = True
    done = run_cli(*ONLINE, "pruner=snip", "sparsity=0.5", env=server.env)
    assert done.returncode == 0, done.stderr
    assert "going offline" in done.stdout
    assert list(directory_of(tmp_path / "results").glob("wandb/offline-run-*"))


def test_a_network_that_goes_away_ends_no_run_and_keeps_it_no_longer_than_allowed(tmp_path: Path) -> None:
    server = Server()
    long = [word for word in ONLINE if "epochs=2" not in word] + ["training.epochs=12", "tracker.timeout_seconds=3"]
    command = [sys.executable, str(ROOT / "run.py"), *long, *RUNS["synflow"], f"results_dir={tmp_path}"]
    env = os.environ | server.env | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not server.history:
        time.sleep(0.02)
    server.stop()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    curve = [json.loads(line) for line in (directory_of(tmp_path) / "curve.jsonl").read_text().splitlines()]
    assert epochs(curve) == list(range(13))


def test_runs_are_sent_later_from_their_directories(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    done = run_cli("-m", *TINY, "pruner=snip,magnitude", "sparsity=0.5")
    assert done.returncode == 0, done.stderr
    for _ in range(2):  # once more makes no difference
        server.history.clear()
        sent = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "wandb_sync.py"), str(tmp_path / "results"), "tracker.project=new"],
            env=os.environ | server.env | {"WANDB_MODE": "offline"},  # as clusters set it
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert sent.returncode == 0, sent.stderr
        assert len(server.history) == 2
        for directory in runs_in(tmp_path):
            curve = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
            assert epochs(server.history[directory.name]) == epochs(curve) == [0, 1, 2]
            assert server.runs[directory.name]["project"] == "new"
            row = json.loads((directory / "result.json").read_text())
            assert server.runs[directory.name]["summary"]["test_top1"] == row["test_top1"]


def test_what_could_not_be_sent_is_said(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    assert run_cli(*TINY, "pruner=snip", "sparsity=0.5").returncode == 0
    server.refuse = True
    sent = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "wandb_sync.py"), str(tmp_path / "results")],
        env=os.environ | server.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert sent.returncode == 1
    assert "NOT SENT" in sent.stdout and "error: 1 of 1 runs was not sent" in sent.stderr


def test_names_are_brought_into_the_form_that_wandb_takes() -> None:
    long = "a" * 80
    tag = fitting(long, 64)
    assert len(tag) == 64 and tag != fitting(long + "b", 64)
    assert fitting("mask-images of flowers/50%:ä") == "mask-images_of_flowers_50___"
    assert fitting("digits-lenet300_1.5") == "digits-lenet300_1.5"


def test_a_dataset_with_a_long_name_has_its_record(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    name = "flowers of " + 60 * "b"
    done = run_cli(
        "model=lenet300",
        "training.epochs=1",
        "pruner=magnitude",
        "sparsity=0.5",
        "dataset.validation=0.1",
        f"dataset.name='{name}'",
        env=server.env,
    )
    assert done.returncode == 0 and "cannot start" not in done.stdout, done.stdout + done.stderr
    (run,) = server.runs.values()
    assert all(len(tag) <= 64 for tag in run["tags"]) and run["summary"]["dataset"] == name


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["tracker.mode=onlien"], {}, "tracker.mode=onlien: give one of online, offline, disabled"),
        ([], {"WANDB_MODE": "onlien"}, "WANDB_MODE=onlien: give online, offline or disabled"),
        (["tracker.project=a/b"], {}, "tracker.project=a/b: give 1 to 128 characters"),
        (["tracker.project=''"], {}, "tracker.project=: give a text"),
        (["tracker.entity='my team?'"], {}, r"tracker.entity=my team\?: give 1 to 128 characters"),
    ],
)
def test_a_mode_or_project_that_cannot_be_is_refused(
    words: list[str], env: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("WANDB_MODE",):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=said):
        composed("tracker=wandb", *words, f"seed={len(said)}")


def test_an_agent_of_a_sweep_that_names_the_run_otherwise_is_told_and_kept(run_cli: RunCli, tmp_path: Path) -> None:
    agent = {"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "xyz", "WANDB_MODE": "offline"}
    done = run_cli("model=lenet300", "training.epochs=1", "pruner=magnitude", "sparsity=0.5", env=agent)
    assert done.returncode == 0 and "W&B calls this run xyz" in done.stdout, done.stderr
    kept = json.loads((directory_of(tmp_path / "results") / "wandb.json").read_text())
    assert kept == {"id": "xyz", "sweep": "abc"}


def test_a_damaged_run_keeps_no_other_from_being_sent(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    done = run_cli(
        "-m", "model=lenet300", "training.epochs=1", "tracker=none", "pruner=magnitude", "sparsity=0.5", "seed=range(4)"
    )
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = runs_in(tmp_path)
    (first / "result.json").write_text("[]")
    (second / "curve.jsonl").write_bytes(b"\x00[")
    (third / "config.yaml").write_bytes(b"\x00: [")
    sent = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "wandb_sync.py"), str(tmp_path / "results")],
        env=os.environ | server.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert sent.returncode == 4 and "error: 3 of 4 runs were not sent" in sent.stderr, sent.stderr
    for path in (first / "result.json", second / "curve.jsonl", third / "config.yaml"):
        assert f"{path.parent.name}: NOT SENT, {path}: it " in sent.stdout
    assert list(server.runs) == [fourth.name]
