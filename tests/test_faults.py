"""What goes wrong around a run: it says so in a line, and nothing that was done is lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, RunCli
from test_data import photographs
from test_resume import RUNS, TINY, assert_equal, config_of, directory_of, in_child, outcome, whole

from pai_bench import experiment, files, status

__all__ = ["photographs", "whole"]  # fixtures

PROCESSES = int(os.environ.get("PAI_PROCESSES", "8"))  # side by side in one results folder


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_disk_that_fills_up_and_has_room_again(
    whole: Callable[[str], dict[str, Any]], run_cli: RunCli, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=112k", "tmpfs", results], check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        command = [*TINY, *RUNS["gradual"], "checkpoint_minutes=0"]
        first = run_cli(*command)
        assert first.returncode == 1
        assert len(first.stderr.splitlines()) == 1 and "No space left on device" in first.stderr
        assert status.read(results) == []
        assert (directory_of(results) / "checkpoint.pt").is_file()
        subprocess.run(["mount", "-o", "remount,size=10m", results], check=True)
        second = run_cli(*command)
        assert second.returncode == 0 and "going on from a checkpoint" in second.stdout, second.stderr
        assert_equal(outcome(results), whole("gradual"))
    finally:
        subprocess.run(["umount", results], check=True)


def test_a_results_folder_that_vanishes(tmp_path: Path) -> None:
    results = tmp_path / "results"
    long = [word for word in TINY if "epochs=2" not in word] + ["training.epochs=100"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *long, *RUNS["synflow"], f"results_dir={results}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list(results.glob("*/checkpoint.pt")):
        time.sleep(0.02)
    shutil.rmtree(results, ignore_errors=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and str(results) in said, said


def test_too_little_memory_names_what_to_lower(tmp_path: Path) -> None:
    more = ["model.widths=[512,512]", "training.batch_size=1400", "save_scores=false", "reuse_gb=0"]
    cfg = config_of("synflow", tmp_path, *more)

    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
        experiment.run(cfg)

    assert os.WEXITSTATUS(os.waitpid(in_child(work), 0)[1]) == 1
    found = json.loads((directory_of(tmp_path) / "status.json").read_text())
    assert found["state"] == "failed"
    assert found["error"] == "UserError: out of memory on cpu: lower training.batch_size=1400, or run fewer at once"


def test_memory_for_tensors_is_asked_for_before_safetensors_ends_the_process() -> None:
    tensors = {"a": torch.zeros(2**28, dtype=torch.uint8)}

    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
        try:
            files.tensor_bytes(tensors)
        except MemoryError:
            os._exit(3)

    assert os.WEXITSTATUS(os.waitpid(in_child(work), 0)[1]) == 3


def streamed(photographs: Path, results: Path, *more: str) -> list[str]:
    """The command of a run whose images are decoded by worker processes."""
    return [
        sys.executable, str(ROOT / "run.py"), "dataset=imagenet", f"data_dir={photographs}", "dataset.subset=true",
        "dataset.size=32", "dataset.resize=36", "model=resnet20", "model.widths=[4,6]", "model.blocks=[1,1]",
        "training=digits", "training.batch_size=2", "training.epochs=12", "tracker=none", f"results_dir={results}",
        "save_model=true", "save_scores=true", "pruner=snip", "sparsity=0.5", "pruner.examples.total=8", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_notice_to_every_process_of_a_job_is_no_failure(
    number: signal.Signals, photographs: Path, tmp_path: Path
) -> None:
    command = streamed(photographs, tmp_path / "results", "num_workers=2")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not list((tmp_path / "results").glob("*/checkpoint.pt")):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "going on from a checkpoint" in again.stdout, again.stderr
    whole = streamed(photographs, tmp_path / "whole", "num_workers=0")
    subprocess.run(whole, env=env, capture_output=True, timeout=120, check=True)
    assert_equal(outcome(tmp_path / "results"), outcome(tmp_path / "whole"))


def test_a_damaged_image_is_named_in_a_line_although_a_worker_met_it(photographs: Path, tmp_path: Path) -> None:
    (photographs / "imagenet" / "train" / "n01" / "2.JPEG").write_bytes(b"no image")
    command = streamed(photographs, tmp_path / "results", "num_workers=2")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("data error: ") and len(done.stderr.splitlines()) == 1
    assert "n01/2.JPEG: not a readable image" in done.stderr


def test_a_killed_decoder_is_named_and_the_run_goes_on(photographs: Path, tmp_path: Path) -> None:
    command = streamed(photographs, tmp_path / "results", "num_workers=1", "checkpoint_minutes=0")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killed = False
    while process.poll() is None:
        if list((tmp_path / "results").glob("*/checkpoint.pt")):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
                killed = True
        time.sleep(0.01)
    assert killed and process.returncode == 1
    assert process.stderr is not None
    said = process.stderr.read()
    assert said.startswith("error: num_workers=1: a process that decodes images was killed"), said
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "going on from a checkpoint" in again.stdout, again.stderr


def test_a_killed_process_of_a_sweep_loses_nothing_that_is_done(run_cli: RunCli, tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "run.py"), "-m", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2", *TINY,
        *RUNS["synflow"], "seed=range(6)", f"results_dir={tmp_path / 'results'}",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running: list[int] = []
    while process.poll() is None and not (running and list((tmp_path / "results").glob("*/result.json"))):
        time.sleep(0.02)
        states = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/status.json")]
        running = [state["pid"] for state in states if state["state"] == "running"]
    os.kill(running[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a process of the sweep was killed" in said
    before = {path: path.read_bytes() for path in (tmp_path / "results").glob("*/result.json")}
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{6 - len(before)} done, {len(before)} skipped, 0 failed" in again.stdout
    assert all(path.read_bytes() == content for path, content in before.items())


def test_many_processes_write_into_one_results_folder(tmp_path: Path) -> None:
    """Each run twice at once: one of the two does it, the other says who has it or finds it done."""
    cfgs = [config_of("synflow", tmp_path, f"seed={seed}", "schedule.rounds=2") for seed in range(PROCESSES)]
    children = [in_child(lambda cfg=cfg: experiment.run(cfg)) for cfg in cfgs for _ in range(2)]  # type: ignore[misc]
    codes = [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 6} and codes.count(0) >= PROCESSES
    rows = status.read(tmp_path)
    assert sorted(row["seed"] for row in rows) == list(range(PROCESSES))
    for directory in tmp_path.iterdir():
        curve = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in curve if "test/top1" in line] == [0, 1, 2]
        assert not list(directory.glob("*.tmp-*")) and not (directory / "owner.json").exists()
