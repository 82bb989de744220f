"""Whole runs on digits, as a user starts them, and what they leave behind."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RunCli, composed
from image_data import image_folder, save_image
from processes import run_script
from safetensors.torch import load_file
from whole_runs import SMALL, only_run, read

from pai_bench import experiment
from pai_bench.errors import PreemptedError
from pai_bench.runs import status
from pai_bench.runs.checkpoints import Checkpoints
from pai_bench.runs.provenance import provenance
from pai_bench.system import files


def test_one_run_leaves_a_whole_record(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(
        *SMALL,
        "pruner=synflow",
        "sparsity=0.9",
        "schedule.rounds=5",
        "save_scores=true",
        "save_model=true",
        "dataset.validation=0.1",
    )
    assert done.returncode == 0, done.stderr
    directory = only_run(tmp_path)
    page = (ROOT / "docs" / "results.md").read_text().split("## A run directory\n")[1].split("\n## ")[0]
    named = {
        name.rstrip("/") for row in re.findall(r"^\|(.*?)\|", page, re.M) for name in re.findall(r"`([^`]+)`", row)
    }
    assert {path.name for path in directory.iterdir()} == named - {
        "queued.json",
        "checkpoint.pt",
        "result.json.damaged",
        "wandb.json",
        "tensorboard",
    }
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.yaml",
        "curve.jsonl",
        "mask.json",
        "mask.safetensors",
        "metrics.csv",
        "model.safetensors",
        "provenance.json",
        "result.json",
        "run.log",
        "scores.safetensors",
        "status.json",
        "wandb",
    ]

    row = read(directory, "result.json")
    mask, scores = load_file(directory / "mask.safetensors"), load_file(directory / "scores.safetensors")
    kept = sum(int(tensor.sum()) for tensor in mask.values())
    assert row["id"] == directory.name
    assert row["num_kept"] == kept == round(0.1 * row["num_prunable"])
    assert row["sparsity"] == pytest.approx(1 - kept / row["num_prunable"])
    assert (row["target_sparsity"], row["num_rounds"], row["seed"], row["protocol"]) == (0.9, 5, 0, 2)
    assert row["density"] * row["compression"] == pytest.approx(1)
    assert 0 <= row["test_top1"] <= row["best_test_top1"] <= 1
    assert row["selected_epoch"] in (1, 2) and row["train_examples"] == 2 * 1295
    assert 0 < row["macs_masked"] < row["macs_dense"]
    assert row["output_depends_on_input"] and row["collapsed_layers"] == []
    assert all(tensor.dtype == torch.bool for tensor in mask.values()) and scores.keys() == mask.keys()

    report = read(directory, "mask.json")
    assert (report["num_kept"], len(report["rounds"])) == (kept, 5)
    assert {layer["name"]: layer["kept"] for layer in report["layers"]} == {n: int(t.sum()) for n, t in mask.items()}

    curve = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
    rounds = [line for line in curve if "prune/round" in line]
    epochs = [line for line in curve if "test_top1" in line]
    assert [line["prune/round"] for line in rounds] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    assert rounds[-1]["layer/fc.weight/density"] == pytest.approx(float(mask["fc.weight"].float().mean()))
    assert epochs[-1]["test_top1"] == row["test_top1"]
    assert epochs[0]["test_top1"] == row["untrained_test_top1"] and row["measured"] == {}
    with (directory / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["epoch"]) for line in table] == [0, 1, 2]
    assert float(table[-1]["test_top1"]) == row["test_top1"]

    status, origin = read(directory, "status.json"), read(directory, "provenance.json")
    assert (status["state"], status["attempt"], status["exit_code"]) == ("finished", 1, 0)
    assert {"commit", "dirty", "versions", "dataset_checksum", "command"} <= origin.keys()
    assert origin["versions"]["torch"] == torch.__version__.split("+")[0]
    for text in (done.stdout, (directory / "run.log").read_text()):
        assert "% test accuracy after the last epoch" in text
        assert "fc.weight" in text and str(directory) in text


def test_a_commit_is_that_of_a_checkout_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed copy inside the checkout of another project has no commit, nor has a copy of ours inside it."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    copy = theirs / "copy"
    copy.mkdir(parents=True)
    ours.mkdir()
    for folder, name in ((theirs, "other"), (copy, "pai_bench"), (ours, "pai_bench")):
        (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\nversion = "1"\n')

    def git(folder: Path, *words: str) -> str:
        command = ["git", "-c", "user.name=me", "-c", "user.email=me@here", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    for folder in (theirs, ours):
        git(folder, "init", "-q")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "All")
    head = git(ours, "rev-parse", "HEAD")
    (ours / "more.py").touch()

    def found(folder: Path) -> tuple[str | None, bool | None]:
        monkeypatch.setattr("pai_bench.system.checkout.ROOT", folder)
        origin = provenance()
        return origin["commit"], origin["dirty"]

    assert found(theirs) == found(copy) == (None, None)
    assert found(ours) == (head, True)
    git(ours, "add", ".")
    git(ours, "commit", "-qm", "More")
    assert found(ours) == (head, True), "a process goes on with the code that it has imported"


def test_a_finished_run_is_not_run_again(run_cli: RunCli, tmp_path: Path) -> None:
    first = run_cli(*SMALL, "tracker=none", "pruner=magnitude", "sparsity=0.5")
    assert first.returncode == 0, first.stderr
    before = {path: path.stat().st_mtime_ns for path in only_run(tmp_path).iterdir()}
    again = run_cli(*SMALL, "tracker=none", "pruner=magnitude", "density=0.5", "num_workers=1")
    assert again.returncode == 0 and "is finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in only_run(tmp_path).iterdir()} == before


def test_two_runs_of_one_config_are_equal(run_cli: RunCli, tmp_path: Path) -> None:
    rows = []
    for _ in range(2):
        assert run_cli(*SMALL, "tracker=none", "pruner=snip", "sparsity=0.8").returncode == 0
        directory = only_run(tmp_path)
        timed = ("seconds", "images_per_second", "peak_memory")
        row = {key: value for key, value in read(directory, "result.json").items() if not any(t in key for t in timed)}
        rows.append((row, load_file(directory / "mask.safetensors")))
        for path in sorted(directory.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        directory.rmdir()
    assert rows[0][0] == rows[1][0]
    assert all(torch.equal(rows[0][1][name], rows[1][1][name]) for name in rows[0][1])


def test_an_unfinished_run_starts_over(run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli(*SMALL, "tracker=none", "pruner=random", "sparsity=0.5").returncode == 0
    directory = only_run(tmp_path)
    (directory / "result.json").unlink()
    assert run_cli(*SMALL, "tracker=none", "pruner=random", "sparsity=0.5").returncode == 0
    epochs = [line for line in (directory / "curve.jsonl").read_text().splitlines() if "test_top1" in line]
    assert len(epochs) == 3
    assert read(directory, "status.json")["attempt"] == 2


def test_a_sweep_goes_on_past_failures_and_ends_with_the_worst_code(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("-m", *SMALL, "tracker=none", "pruner=random,snip", "sparsity=0.5,0.9999999")
    assert done.returncode == 2
    assert len(re.findall(r"config error: sparsity 0.9999999 leaves none of \d+ weights", done.stderr)) == 2
    assert "2 done, 0 skipped, 2 failed" in done.stdout
    rows = status.read(tmp_path / "results")
    assert [row["pruner"] for row in rows] == ["random", "snip"]
    assert len(list((tmp_path / "results").glob("digits-*"))) == 2
    again = run_cli("-m", *SMALL, "tracker=none", "pruner=random,snip", "sparsity=0.5,0.9999999")
    assert again.returncode == 2 and "0 done, 2 skipped, 2 failed" in again.stdout


def test_a_failure_keeps_its_traceback(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(*SMALL, "tracker=none", "pruner=snip", "sparsity=0.5", "training.lr=1e30")
    assert done.returncode == 1
    assert re.fullmatch(r"error: training diverged in epoch 1: .*lower training.lr.*\n", done.stderr)
    status = read(only_run(tmp_path), "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1) and "diverged" in status["error"]
    assert "Traceback" in (only_run(tmp_path) / "run.log").read_text()
    assert not (only_run(tmp_path) / "result.json").exists()


def test_other_images_of_the_same_name_are_not_taken_for_a_finished_run(run_cli: RunCli, tmp_path: Path) -> None:
    arguments = ["dataset=image_folder", "training.epochs=1", "training.batch_size=4", *SMALL[:3], "tracker=none"]
    image_folder(tmp_path / "a" / "insects")
    image_folder(tmp_path / "b" / "insects")
    save_image(tmp_path / "b" / "insects" / "train" / "ant" / "0.png", 999, (16, 16))
    first = run_cli(*arguments, f"dataset.root={tmp_path / 'a' / 'insects'}")
    assert first.returncode == 0, first.stderr
    again = run_cli(*arguments, f"dataset.root={tmp_path / 'a' / 'insects'}")
    assert again.returncode == 0 and "is finished already" in again.stdout
    other = run_cli(*arguments, f"dataset.root={tmp_path / 'b' / 'insects'}")
    assert other.returncode == 2
    assert re.fullmatch(r"config error: dataset.name=insects: .* was run on other images.*\n", other.stderr)


def test_a_half_finished_run_goes_on_with_its_own_images_alone(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "insects")
    arguments = ["dataset=image_folder", f"dataset.root={root}", "training.batch_size=4", *SMALL[:3], "tracker=none"]
    arguments += ["training.epochs=2", f"results_dir={tmp_path / 'results'}"]
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "offer", _ends_after_an_epoch)
        with pytest.raises(PreemptedError):
            experiment.run(composed(*arguments))
    directory = only_run(tmp_path)
    kept = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix not in (".log", ".json")}
    own = (root / "train" / "ant" / "0.png").read_bytes()
    save_image(root / "train" / "ant" / "0.png", 999, (16, 16))
    other = run_cli(*arguments)
    assert other.returncode == 2
    assert re.fullmatch(r"config error: dataset.name=insects: .* was run on other images.*\n", other.stderr)
    assert (read(directory, "status.json")["state"], "checkpoint.pt" in kept) == ("failed", True)
    assert kept.items() <= {path.name: path.read_bytes() for path in directory.iterdir()}.items()
    (root / "train" / "ant" / "0.png").write_bytes(own)
    again = run_cli(*arguments)
    assert again.returncode == 0 and "going on from a checkpoint" in again.stdout, again.stderr


def _ends_after_an_epoch(self: Checkpoints, epoch_ended: bool = False) -> None:
    if epoch_ended:
        self.save()
        raise PreemptedError("preempted")


def test_a_score_without_its_images_names_the_remedy(run_cli: RunCli) -> None:
    done = run_cli(*SMALL, "tracker=none", "pruner=snip", "sparsity=0.5", "pruner.scoring_data=null")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*pruner.scoring_data=null: this score looks at images.*\n", done.stderr)


def test_missing_data_ends_with_its_own_code(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("dataset=cifar10", f"data_dir={tmp_path / 'nowhere'}", "tracker=none")
    assert done.returncode == 4
    assert re.fullmatch(r"data error: dataset=cifar10: .*pai-bench data cifar10 .*\n", done.stderr)
    assert read(only_run(tmp_path), "status.json")["exit_code"] == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("size=1m,ro", 2, r"config error: results_dir=.*cannot be written to \(Read-only file system\).*"),
        ("size=128k", 1, r"error: .*No space left on device.*"),
    ],
    ids=["read-only", "full"],
)
def test_a_file_system_that_takes_nothing(
    options: str, code: int, message: str, run_cli: RunCli, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", results], check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        done = run_cli("tracker=none", "pruner=magnitude", "sparsity=0.5", "training.epochs=1")
        assert done.returncode == code
        assert re.fullmatch(message, done.stderr.strip()), done.stderr
        assert status.read(results) == []
    finally:
        subprocess.run(["umount", results], check=True)


def test_wandb_is_offline_and_has_curves_sparsity_and_the_mask(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(*SMALL, "pruner=magnitude", "sparsity=0.75", "tracker.tags=[first]")
    assert done.returncode == 0, done.stderr
    (folder,) = (only_run(tmp_path) / "wandb").glob("offline-run-*")
    inspected = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert folder.name.endswith(only_run(tmp_path).name)
    for text in (
        "train_loss",
        "test_top1",
        "prune/sparsity",
        "layer/fc.weight/density",
        "num_kept",
        "first",
        "mask-digits",
    ):
        assert text in inspected, text


def test_a_broken_tracker_ends_no_run(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(
        *SMALL,
        "pruner=magnitude",
        "sparsity=0.75",
        "tracker.mode=online",
        "training.epochs=1",
        "tracker.timeout_seconds=3",
        env={"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stderr
    assert "W&B" in done.stdout and "offline" in done.stdout
    assert list((only_run(tmp_path) / "wandb").glob("offline-run-*"))


def test_prepare_data_takes_a_folder_and_says_what_is_ready(tmp_path: Path) -> None:
    from image_data import tiny_files

    source, target = tmp_path / "elsewhere", tmp_path / "data"
    tiny_files(source)
    command = ["scripts/data.py", "tiny_imagenet", "--data-dir", str(target)]
    incomplete = run_script(*command, "--from", str(source / "tiny-imagenet-200"), cwd=tmp_path)
    assert incomplete.returncode == 4 and "complete it, or say dataset.subset=true" in incomplete.stderr
    done = run_script(*command, "dataset.subset=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny_imagenet is ready: 400 train, 3 test images of 3x64x64 in 200 classes" in done.stdout
    assert len(list((target / "cache").glob("tiny_imagenet-*"))) == 1


# The store ------------------------------------------------------------------------------------------------------------


def test_json_has_no_nan(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(target, {"a": object()})
    with pytest.raises(TypeError):
        files.write_atomically(target, "text")  # type: ignore[arg-type]
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_finished_run_says_what_it_did_not_record(run_cli: RunCli) -> None:
    words = [
        "model=resnet8_thin",
        "training=smoke",
        "training.epochs=0",
        "tracker=none",
        "pruner=magnitude",
        "sparsity=0.5",
    ]
    assert run_cli(*words).returncode == 0
    plain, more = run_cli(*words), run_cli(*words, "diagnostics=gradient_flow")
    assert "is finished already" in plain.stdout and "diagnostics" not in plain.stdout
    assert "diagnostics=gradient_flow was not recorded; to have it, run it again: remove " in more.stdout
