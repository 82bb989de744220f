"""Whole runs of methods with something of their own, each by its command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RunCli, composed
from safetensors.torch import load_file
from whole_runs import SMALL, only_run, read

from pai_bench import experiment
from pai_bench.errors import ConfigError
from pai_bench.launch.compose import stored
from pai_bench.runs import status
from pai_bench.runs.export import trained

# Every method ---------------------------------------------------------------------------------------------------------


def test_a_ticket_is_found_by_training_and_its_cost_stands_in_the_row(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(
        *SMALL,
        "tracker=none",
        "pruner=magnitude",
        "sparsity=0.5",
        "schedule=rewind",
        "schedule.levels=2",
        "schedule.rewind_epoch=null",
        "schedule.rewind_step=3",
        "diagnostics=gradient_flow",
    )
    assert done.returncode == 0, done.stderr
    row = read(only_run(tmp_path), "result.json")
    # 12 steps an epoch: two epochs, back to step 3, again to the end, back, and to the end.
    assert row["num_rounds"] == 2 and row["search_train_examples"] > row["train_examples"] > 1438
    assert row["search_train_examples"] + row["train_examples"] == 3 * 2 * 1438 - 2 * 3 * 128
    curve = [json.loads(line) for line in (only_run(tmp_path) / "curve.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in curve] == sorted(line["epoch"] for line in curve)
    assert [line["recipe_epoch"] for line in curve if "recipe_epoch" in line] == [1, 2] * 3
    assert row["test_top1"] == curve[-1]["test_top1"] and row["best_test_epoch"] in (1, 2)
    assert row["best_test_top1"] == max(line["test_top1"] for line in curve[-2:])
    flow = ("loss", "parameter_norm", "gradient_norm", "weight_gradient", "weight_hessian_gradient")
    for line in curve:
        prefixes = ("before/", "after/") if "prune/round" in line else ("",)
        assert all(f"{prefix}flow/{key}" in line for prefix in prefixes for key in flow)
    assert row["measured"] == {f"flow/{key}": curve[-1][f"flow/{key}"] for key in (*flow, "gradient_hessian_gradient")}
    assert row["untrained_test_top1"] is None  # training came before the mask
    assert "finding the mask took" in done.stdout


def test_the_row_has_the_epoch_that_a_condition_chose_and_whether_it_held(run_cli: RunCli, tmp_path: Path) -> None:
    words = ["tracker=none", "training.epochs=4", "pruner=magnitude", "sparsity=0.6", "schedule=early_crop"]
    done = run_cli("-m", *SMALL, *words, "schedule.latest=0.75", "schedule.threshold=0,10")
    assert done.returncode == 0, done.stderr
    rows = {row["condition_met"]: row for row in status.read(tmp_path / "results")}
    assert {met: row["pruned_epoch"] for met, row in rows.items()} == {True: 2, False: 3}
    for met, row in rows.items():
        assert row["search_train_examples"] == row["pruned_epoch"] * 1438
        assert row["search_train_examples"] + row["train_examples"] == 4 * 1438
        directory = tmp_path / "results" / row["id"]
        assert ("its condition has not held by epoch 3" in (directory / "run.log").read_text()) != met
        curve = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
        looked = {line["epoch"]: line["condition/distance"] for line in curve if "condition/distance" in line}
        assert list(looked) == list(range(1, int(row["pruned_epoch"]) + 1)) and looked[1] == 0 < looked[2]


def test_sanity_checks_store_what_they_left_of_the_mask(run_cli: RunCli, tmp_path: Path) -> None:
    ablations = "shuffle_mask,reinit,invert_scores,random_labels,random_pixels,shuffle_weights"
    done = run_cli(
        "-m", *SMALL, "tracker=none", "training.epochs=0", "pruner=snip", "sparsity=0.8", f"ablation={ablations}"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["ablation"]: row for row in status.read(tmp_path / "results")}
    assert set(rows) == set(ablations.split(","))
    overlaps = {name: row["ablation_overlap"] for name, row in rows.items()}
    assert all(0 <= overlap < 1 for overlap in overlaps.values())
    assert overlaps["invert_scores"] < overlaps["shuffle_mask"] < overlaps["random_labels"]
    assert overlaps["reinit"] == overlaps["shuffle_weights"] == 0 or overlaps["shuffle_weights"] < 0.1
    assert len({row["num_kept"] for row in rows.values()}) == 1
    assert all(name in row["id"] for name, row in rows.items())


def test_an_ablation_that_changes_nothing_is_an_error(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(*SMALL, "tracker=none", "pruner=snip", "sparsity=0", "ablation=shuffle_mask")
    assert done.returncode == 1
    assert re.fullmatch(r"error: ablation=shuffle_mask: it changed nothing for pruner=snip.*\n", done.stderr)


def test_a_collapsed_network_is_not_trained_when_told_so(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(*SMALL, "tracker=none", "pruner=random", "sparsity=0.999", "on_collapse=stop")
    assert done.returncode == 0, done.stderr
    row = read(only_run(tmp_path), "result.json")
    assert row["collapsed_layers"] and row["stopped"] == "collapse" and row["train_examples"] == 0
    assert 0 <= row["test_top1"] <= 1 and "NOT TRAINED" in done.stdout
    assert row["num_effective"] <= row["num_kept"] and row["effective_sparsity"] >= row["sparsity"]


def test_the_densities_of_one_run_with_the_positions_of_another(run_cli: RunCli, tmp_path: Path) -> None:
    settings = [*SMALL, "tracker=none", "training.epochs=0", "sparsity=0.9"]
    assert run_cli(*settings, "pruner=synflow", "schedule.rounds=5").returncode == 0
    theirs = only_run(tmp_path)
    done = run_cli(
        *settings, "pruner=random", "allocation=densities_of_mask", f"allocation.mask={theirs}/mask.safetensors"
    )
    assert done.returncode == 0, done.stderr
    (ours,) = (path for path in (tmp_path / "results").iterdir() if "random" in path.name)
    kept = [[layer["kept"] for layer in read(directory, "mask.json")["layers"]] for directory in (ours, theirs)]
    assert kept[0] == kept[1]
    a, b = load_file(ours / "mask.safetensors"), load_file(theirs / "mask.safetensors")
    assert any((a[name] != b[name]).any() for name in a)


def test_a_file_of_densities_that_has_changed_is_refused_and_one_that_is_gone_keeps_the_name(tmp_path: Path) -> None:
    file = tmp_path / "densities.csv"

    def write(last: float) -> None:
        file.write_text(f"name,density\nlayers.1.weight,0.1\nlayers.3.weight,0.2\nlayers.5.weight,{last}\n")

    write(0.5)
    words = ["model=lenet300", "pruner=random", "sparsity=0.9", "allocation=densities_of_file", "tracker=none"]
    config = composed(*words, f"allocation.file={file}", f"results_dir={tmp_path / 'results'}", "training.epochs=0")
    write(0.6)
    with pytest.raises(ConfigError, match=r"allocation\.file=.*: it has changed since the run was composed"):
        experiment.run(config)
    other = composed(*words, f"allocation.file={file}", f"results_dir={tmp_path / 'others'}", "training.epochs=0")
    assert other.id != config.id and other.method != config.method
    row = experiment.run(other)
    file.unlink()
    again = stored(other.directory)
    assert (again.id, again.group, again.method, again.task) == (row["id"], row["group"], row["method"], row["task"])


def test_a_filter_pruned_run_is_exported_as_a_smaller_network(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(
        *SMALL,
        "tracker=none",
        "pruner=filter_biased_loss",
        "sparsity=0.5",
        "schedule.rounds=2",
        "save_model=true",
        "pruner.scoring_data.total=128",
    )
    assert done.returncode == 0, done.stderr
    directory = only_run(tmp_path)
    row = read(directory, "result.json")
    assert row["num_filters_kept"] == round(0.5 * row["num_filters"]) and row["filter_sparsity"] == pytest.approx(
        0.5, abs=0.02
    )
    assert f"{row['num_filters_kept']} of {row['num_filters']} filters kept" in done.stdout
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(directory), "-o", str(tmp_path / "small.pt2")]
    exported = subprocess.run([*command, "--repeats", "2"], capture_output=True, text=True, timeout=300, check=False)
    assert exported.returncode == 0, exported.stderr
    sizes = {line.split()[0]: line.split()[1:3] for line in exported.stdout.splitlines() if line[:1].isalpha()}
    masked, small = (int(number.replace(",", "")) for number in sizes["parameters"])
    assert small < masked == row["num_parameters"]
    model, shape = trained(directory)
    images = torch.randn(5, *shape)
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)
    (directory / "model.safetensors").unlink()
    missing = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert missing.returncode == 4 and "save_model=true" in missing.stderr and len(missing.stderr.splitlines()) == 1
