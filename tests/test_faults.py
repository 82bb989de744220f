"""What goes wrong around a run: it says so in a line, and nothing that was done is lost."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TWO_RUNS, RunCli, composed
from image_data import photographs
from processes import in_child
from whole_runs import RUNS, TINY, assert_equal, config_of, directory_of, outcome, whole

from pai_bench import experiment
from pai_bench.errors import DataError, UserError
from pai_bench.masks import masks
from pai_bench.published import pages
from pai_bench.published.verdicts import Rule
from pai_bench.report.tables import as_csv
from pai_bench.runs import export, ownership, status
from pai_bench.runs.attempt import attempt
from pai_bench.runs.directory import NullRunDirectory, RunDirectory
from pai_bench.runs.summary import already
from pai_bench.studies import sketching_figure
from pai_bench.system import files, seeding

__all__ = ["photographs", "whole"]  # fixtures

PROCESSES = int(os.environ.get("PAI_PROCESSES", "8"))  # side by side in one results folder


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_disk_that_fills_up_and_has_room_again(
    whole: Callable[[str], dict[str, Any]], run_cli: RunCli, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=124k", "tmpfs", results], check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        command = [*TINY, *RUNS["gradual"], "checkpoint_minutes=0"]
        first = run_cli(*command)
        assert first.returncode == 1
        (line,) = first.stderr.splitlines()
        assert line.startswith(f"error: results_dir={results}: ") and "No space left on device" in line
        assert line.endswith("make room, or lift the limit; the same command goes on from the last checkpoint")
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
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(results.glob("*/checkpoint.pt")):
        time.sleep(0.02)
    shutil.rmtree(results, ignore_errors=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and str(results) in said, said


def test_too_little_memory_names_what_to_lower(tmp_path: Path) -> None:
    more = ["model.widths=[512,512]", "training.batch_size=1400", "save_scores=false", "cache_gb=0"]
    cfg = config_of("synflow", tmp_path, *more)

    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
        experiment.run(cfg)

    assert os.WEXITSTATUS(os.waitpid(in_child(work), 0)[1]) == 1
    found = json.loads((directory_of(tmp_path) / "status.json").read_text())
    assert found["state"] == "failed"
    assert found["error"] == "UserError: out of memory on cpu: lower training.batch_size=1400, or run fewer at once"


@pytest.mark.parametrize(
    "said",
    ["[enforce fail] DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "could not create a primitive"],
)
def test_what_libraries_say_without_memory_is_explained(said: str) -> None:
    cfg = composed(*TINY, *RUNS["synflow"])
    with (
        pytest.raises(UserError, match="out of memory on cpu: lower training"),
        attempt(cfg, torch.device("cpu"), NullRunDirectory(Path(), None)),
    ):
        raise RuntimeError(said)


def test_memory_for_tensors_is_asked_for_before_safetensors_ends_the_process() -> None:
    # Larger than any hole that earlier tests have left in the heap. No page of it is touched.
    tensors = {"a": torch.from_numpy(np.zeros(2**31, np.uint8))}

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
        sys.executable,
        str(ROOT / "run.py"),
        "dataset=imagenet",
        f"data_dir={photographs}",
        "dataset.subset=true",
        "dataset.size=32",
        "dataset.resize=36",
        "model=resnet20",
        "model.widths=[4,6]",
        "model.blocks=[1,1]",
        "training=digits",
        "training.batch_size=2",
        "training.epochs=12",
        "tracker=none",
        f"results_dir={results}",
        "save_model=true",
        "save_scores=true",
        "pruner=snip",
        "sparsity=0.5",
        "pruner.scoring_data.total=8",
        *more,
    ]


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
                if "second_signal" not in Path(f"/proc/{child}/cmdline").read_text():  # that one decodes nothing
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
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        "hydra/launcher=parallel",
        "hydra.launcher.n_jobs=2",
        *TINY,
        *RUNS["synflow"],
        "seed=range(6)",
        f"results_dir={tmp_path / 'results'}",
    ]
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
        assert [line["epoch"] for line in curve if "test_top1" in line] == [0, 1, 2]
        assert not list(directory.glob("*.tmp-*")) and not (directory / "owner.json").exists()


def test_a_folder_of_this_user_alone(tmp_path: Path) -> None:
    mine = files.private_folder(tmp_path / "mine")
    assert mine.stat().st_mode & 0o777 == 0o700 and files.private_folder(mine) == mine
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name in ("link", "open"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*; remove it, or set TMPDIR"):
            files.private_folder(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(UserError, match="others can write to it"):
        files.private_folder(tmp_path / "theirs")


def test_a_sweep_writes_through_nobodys_link_and_leaves_no_folder(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "temporary" / f"pai_bench-{os.getuid()}").symlink_to(tmp_path / "theirs")
    done = run_cli(*TWO_RUNS, env={"TMPDIR": str(tmp_path / "temporary")})
    assert done.returncode == 0 and "2 done" in done.stdout, done.stderr
    assert list((tmp_path / "theirs").iterdir()) == []
    assert [path.name for path in (tmp_path / "temporary").glob("pai_bench*")] == [f"pai_bench-{os.getuid()}"]


@pytest.mark.parametrize(
    ("value", "cell"),
    [("=1+1", "'=1+1"), ("+x", "'+x"), ("-x", "'-x"), ("@x", "'@x"), ("\t=x", "'\t=x"), ("snip", "snip"), (-0.5, -0.5)],
)
def test_texts_are_no_formulas_in_csv_files(
    value: object, cell: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.csv_cell(value) == cell
    text = as_csv([{"label": value, "list": [value]}], ["label", "list"])
    assert next(csv.DictReader(text.splitlines()))["label"] == str(cell)
    sketching_figure.write_csv([{"label": value}], tmp_path / "errors.csv")
    assert next(csv.DictReader((tmp_path / "errors.csv").open()))["label"] == str(cell)
    monkeypatch.setattr(pages, "records", lambda found: [{"label": value}])
    monkeypatch.setattr(pages, "_record", lambda found: {"label": value})
    pages.write([None], tmp_path / "verdicts.csv", Rule())  # type: ignore[list-item]
    assert (tmp_path / "verdicts.csv").read_text() == (tmp_path / "errors.csv").read_text()


def test_one_function_writes_csv_files() -> None:
    writers = [
        path for path in (ROOT / "pai_bench").rglob("*.py") if re.search(r"csv\.(Dict)?[wW]riter", path.read_text())
    ]
    assert writers == [ROOT / "pai_bench" / "system" / "files.py"]


def test_metrics_of_a_run_are_no_formulas(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.record({"test_top1": -0.5, "=cmd": 1.0}, 1.0)
    run.finish({"id": "run", "test_top1": 0.5, "sparsity": 0.0})
    run.close()
    assert (tmp_path / "run" / "metrics.csv").read_text() == "epoch,test_top1,'=cmd\n1.0,-0.5,1.0\n"


def test_checkpoints_hold_the_random_state_of_the_device_in_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[tuple[torch.Tensor, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.append((state, device)))
    taken = seeding.states(torch.device("cuda", 3))
    assert [state.tolist() for state in taken[1:]] == [[7]]
    seeding.set_states(taken, torch.device("cuda", 0))  # where there are fewer
    seeding.set_states(taken, torch.device("cpu"))
    assert [(state.tolist(), device) for state, device in put] == [([7], torch.device("cuda", 0))]
    assert len(seeding.states(torch.device("cpu"))) == 1


def test_final_weights_are_kept_whole_or_in_half_precision(tmp_path: Path) -> None:
    sizes = {}
    for kept in ("true", "half", "false"):
        small = ["model=lenet300", "training.epochs=1", "tracker=none", "pruner=magnitude", "sparsity=0.5"]
        cfg = composed(*small, f"save_model={kept}", f"results_dir={tmp_path / kept}")
        row = experiment.run(cfg)
        path = cfg.directory / "model.safetensors"
        sizes[kept] = path.stat().st_size if path.is_file() else 0
        if kept == "false":
            with pytest.raises(
                DataError, match=r"final weights were not kept; .*remove .*result.json, or give another res"
            ):
                export.trained(path.parent)
            assert "final weights were not kept" in already(row, replace(cfg, save_model=True))
        else:
            model, _ = export.trained(path.parent)
            assert next(model.parameters()).dtype == torch.float32
            assert sum(int(weight.count_nonzero()) for weight in masks.prunable(model).values()) == row["num_kept"]
            assert "not kept" not in already(row, replace(cfg, save_model=True))
    assert 0 == sizes["false"] < sizes["half"] < 0.52 * sizes["true"]


def test_workers_of_a_sweep_end_with_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        "hydra/launcher=parallel",
        "hydra.launcher.n_jobs=2",
        "model=lenet300",
        "training.epochs=5000",
        "tracker=none",
        "pruner=magnitude",
        "sparsity=0.5",
        "seed=0,1",
        f"results_dir={tmp_path}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("*/checkpoint.pt"))) < 2:
        time.sleep(0.05)
    workers = [json.loads(path.read_text())["pid"] for path in tmp_path.glob("*/status.json")]
    assert process.pid not in workers and len(workers) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while any(ownership._started(worker) for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert [worker for worker in workers if ownership._started(worker)] == []
