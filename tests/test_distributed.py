"""One run by several processes: the same mask and the same numbers as by one."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, RunCli
from image_data import all_images, all_labels, numbered
from safetensors.torch import load_file
from whole_runs import TINY, directory_of

from pai_bench.core import Shard
from pai_bench.errors import ConfigError, PreemptedError
from pai_bench.system import distributed, preemption
from pai_bench.system.world import World, world

# Shares of 51 and 50. A small step, or training would amplify what rounding makes different.
SETTINGS = [*TINY, "training.batch_size=101", "training.lr=0.001", "sparsity=0.6", "dataset.validation=0.1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def start(results: Path, *settings: str, processes: int = 2) -> "subprocess.Popen[str]":
    """Starts run.py in one process, or by torchrun in several."""
    command = TORCHRUN if processes > 1 else [sys.executable]
    flags = [word for word in settings if word.startswith("-")]
    settings = tuple(word for word in settings if word not in flags)
    return subprocess.Popen(
        [*command, str(ROOT / "run.py"), *flags, *SETTINGS, *settings, f"results_dir={results}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(results: Path, *settings: str, processes: int = 2) -> str:
    out, err = start(results, *settings, processes=processes).communicate(timeout=300)
    assert list(results.glob("*/result.json")) and out, err
    return out


@pytest.mark.parametrize(
    "settings",
    [
        ["pruner=snip", "schedule=constant", "schedule.rounds=1"],
        ["pruner=magnitude", "schedule=rewind", "schedule.levels=2", "schedule.rewind_epoch=1"],
        [
            "pruner=magnitude",
            "schedule=early_bird",
            "schedule.num_masks=2",
            "schedule.max_distance=1",
            "schedule.latest=1",
            "training.epochs=3",
        ],
        ["search=iterand", "search.epochs=2", "search.lr=0.001", "search.method.every_steps=7"],
    ],
    ids=["snip", "rewinding", "early bird", "learned"],
)
def test_two_processes_give_the_mask_and_the_accuracy_of_one(settings: list[str], tmp_path: Path) -> None:
    run(tmp_path / "one", *settings, processes=1)
    said = run(tmp_path / "two", *settings)
    one, two = (directory_of(tmp_path / name) for name in ("one", "two"))
    assert one.name == two.name
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert said.count("test accuracy after the last epoch") == 1
    rows = [json.loads((path / "result.json").read_text()) for path in (one, two)]
    assert [row["num_processes"] for row in rows] == [1, 2]
    exact = ["num_kept", "train_examples", "search_train_examples", "score_examples", "dataset_checksum"]
    assert [rows[0][key] for key in exact] == [rows[1][key] for key in exact]
    curves = [[json.loads(line) for line in (path / "curve.jsonl").read_text().splitlines()] for path in (one, two)]
    assert [line["epoch"] for line in curves[0]] == [line["epoch"] for line in curves[1]]
    evaluated = [next(line for line in curve if "test_top1" in line) for curve in curves]
    for key in ("test_loss", "test_top1", "test_top5", "validation_top1"):  # untrained: only the order of sums differs
        assert evaluated[1][key] == pytest.approx(evaluated[0][key], rel=1e-6)
    masks = [load_file(path / "mask.safetensors") for path in (one, two)]
    weights = [load_file(path / "model.safetensors") for path in (one, two)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-3, msg=name)
    for key in ("test_top1", "test_loss", "train_loss", "train_top1"):
        assert curves[1][-1][key] == pytest.approx(curves[0][-1][key], abs=0.003), key


def test_a_preempted_run_of_two_processes_goes_on_with_one(tmp_path: Path) -> None:
    settings = ["pruner=snip", "training.epochs=30"]
    process = start(tmp_path, *settings)
    while process.poll() is None and not list(tmp_path.glob("*/curve.jsonl")):
        time.sleep(0.05)
    while process.poll() is None and len((directory_of(tmp_path) / "curve.jsonl").read_text().splitlines()) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    _, said = process.communicate(timeout=120)
    status = json.loads((directory_of(tmp_path) / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75), said
    assert "going on from a checkpoint" in run(tmp_path, *settings, processes=1)


def test_processes_with_different_settings_are_not_taken_for_one_run(tmp_path: Path) -> None:
    """As with `srun -n2 bash -c 'pai-bench ... seed=$SLURM_PROCID'`."""
    words = [*SETTINGS, "pruner=snip", f"results_dir={tmp_path}"]
    shell = ["bash", "-c", f'exec {sys.executable} {ROOT / "run.py"} "$@" seed=$RANK', "-"]
    done = subprocess.run(
        [*TORCHRUN, "--no-python", *shell, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and not list(tmp_path.glob("*/result.json"))
    assert "WORLD_SIZE=2: the processes of one run have different settings (" in done.stderr


def test_a_sweep_under_torchrun_runs_what_is_not_finished(tmp_path: Path) -> None:
    run(tmp_path, "pruner=snip", processes=1)
    said = run(tmp_path, "-m", "pruner=snip,magnitude")
    assert "is finished already" in said and "1 done, 1 skipped, 0 failed" in said
    assert len(list(tmp_path.glob("*/result.json"))) == 2


def test_two_processes_that_meet_a_wrong_setting_say_it_once(tmp_path: Path) -> None:
    process = start(tmp_path, "pruner=snip", "compile=true")
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in said.splitlines() if "config error" in line]
    assert len(lines) == 1 and "compile=true" in lines[0], said
    assert not list(tmp_path.iterdir())


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return tensor.clone()


@pytest.mark.parametrize("architecture", ["resnet10t", "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002"])
def test_norms_that_do_more_than_normalise_do_it_over_processes_too(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5).double().train()
    other = copy.deepcopy(model)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    monkeypatch.setattr(distributed, "total", alone)
    monkeypatch.setattr(distributed, "_alone", lambda: False)
    outputs = []
    for net in (model, other):
        torch.manual_seed(1)  # of dropout
        with distributed.synchronised_norms(net) if net is other else contextlib.nullcontext():
            logits = net(images)
            logits.square().sum().backward()
        outputs.append(logits.detach())
    assert_near(outputs[1], outputs[0])
    for name, tensor in model.state_dict().items():
        assert_near(other.state_dict()[name], tensor)
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and twin.grad is not None, name
        assert_near(twin.grad, parameter.grad)
    assert torch.nn.functional.batch_norm.__module__ == "torch.nn.functional"


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_a_norm_whose_statistics_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean((0, 2, 3), keepdim=True)

    monkeypatch.setattr(distributed, "_alone", lambda: False)
    norm = Own(3)
    with distributed.synchronised_norms(norm), pytest.raises(ConfigError, match=r"^Own: this batch norm does not call"):
        norm(torch.randn(2, 3, 4, 4))


def test_shares_cover_every_image_once() -> None:
    whole, parts = numbered(10), [numbered(10, Shard(rank, 3)) for rank in range(3)]
    assert sorted(label for part in parts for label in all_labels(part, "train")) == sorted(all_labels(whole, "train"))

    def epoch(data: Any) -> list[torch.Tensor]:
        chance = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        return [images for images, _ in data.train(4, *chance)]

    shares = [epoch(part) for part in parts]
    for step, batch in enumerate(epoch(whole)):
        together = torch.empty_like(batch)
        for rank in range(3):
            together[rank::3] = shares[rank][step]
        assert torch.equal(together, batch)
    assert all_images(whole, "train").shape[0] == 10


def test_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert world() == World(0, 1, 0)
    for name, value in (("SLURM_PROCID", "5"), ("SLURM_LOCALID", "1"), ("SLURM_STEP_NUM_TASKS", "8")):
        monkeypatch.setenv(name, value)
    assert world() == World(5, 8, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert world() == World(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert world() == World(3, 4, 3)


@pytest.mark.parametrize(
    ("step", "port"),
    [
        ({}, "20012"),
        ({"SLURM_STEP_ID": "0"}, "20012"),
        ({"SLURM_STEP_ID": "1"}, "25011"),
        ({"SLURM_STEP_ID": "8"}, "20004"),
    ],
)
def test_steps_of_one_job_have_ports_of_their_own(
    step: dict[str, str], port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "80012", **step}
    monkeypatch.setattr(os, "environ", slurm)
    shown = subprocess.CompletedProcess([], 0, stdout="node7\nnode8\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: shown)
    monkeypatch.setattr(distributed, "_meet", lambda here, join: None)
    distributed.start(torch.device("cpu"))
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node7", port)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_processes_that_do_not_come_says_so_and_ends_on_a_signal(
    rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "_SILENT_SECONDS", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "1234")
    never = threading.Event()

    def join() -> None:
        monkeypatch.setattr(preemption, "_received", ["SIGTERM"])
        never.wait()

    with pytest.raises(PreemptedError, match="SIGTERM came before the run began"):
        distributed._meet(World(rank, 4, 0, "SLURM_STEP_NUM_TASKS"), join)
    never.set()
    caplog.clear()
    monkeypatch.setattr(preemption, "_received", [])
    distributed._meet(World(rank, 4, 0, "SLURM_STEP_NUM_TASKS"), lambda: time.sleep(0.3))
    said = f"process {rank} of 4 waits for the others at node7:1234; if there are none, unset SLURM_STEP_NUM_TASKS"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_who_cannot_join_fails_as_joining_did() -> None:
    def join() -> None:
        raise RuntimeError("the network is down")

    with pytest.raises(RuntimeError, match="the network is down"):
        distributed._meet(World(0, 2), join)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WORLD_SIZE": "x", "RANK": "0"}, "WORLD_SIZE=x: no launcher"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, WORLD_SIZE=2: no launcher"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=4: scontrol does not tell"),
    ],
)
def test_stray_variables_of_a_launcher_are_named(env: dict[str, str], said: str, run_cli: RunCli) -> None:
    done = run_cli("model=lenet300", "pruner=magnitude", "sparsity=0.5", "tracker=none", env=env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"config error: {said}") and len(done.stderr.splitlines()) == 1
