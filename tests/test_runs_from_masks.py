"""Masks from elsewhere are trained as if they had been found here, and decide the name of the run."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, composed
from given_masks import Tensors, found, mask, parametrized, row_of, run
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from whole_runs import TINY, directory_of, outcome

from pai_bench import experiment
from pai_bench.config import composition
from pai_bench.errors import ConfigError, PreemptedError
from pai_bench.launch import compose
from pai_bench.masks import masks, weight_files
from pai_bench.masks.parametrization import parametrize_
from pai_bench.runs.directory import RunDirectory
from pai_bench.runs.export import export_mask, initial, trained
from pai_bench.system import preemption

__all__ = ["found", "mask"]  # fixtures

# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["npz", "pt"])
def test_the_mask_of_a_run_trains_as_in_the_run(ending: str, found: Path, tmp_path: Path) -> None:
    export_mask(found, tmp_path / f"m.{ending}", "initial")
    again = run(tmp_path / "again", f"mask={tmp_path}/m.{ending}", "seed=3")
    theirs, ours = outcome_of(found), outcome_of(again)
    for kind in ("mask", "model"):
        assert theirs[kind].keys() == ours[kind].keys()
        assert all(torch.equal(ours[kind][name], tensor) for name, tensor in theirs[kind].items()), kind
    assert evaluated(theirs) == evaluated(ours) and len(evaluated(ours)) == 3
    same = (
        "test_top1",
        "best_test_top1",
        "test_loss",
        "train_loss",
        "num_kept",
        "sparsity",
        "target_sparsity",
        "task",
    )
    row, other = ours["row"], theirs["row"]
    assert {key: row[key] for key in same} == {key: other[key] for key in same}
    assert (row["pruner"], row["score_examples"], row["score_flops"], row["num_rounds"]) == ("mask", 0, 0, 0)
    assert row_of(again)["prune_seconds"] == 0
    assert row["mask"] == compose.stored(again).checksums.mask != other["mask"]
    assert re.fullmatch(r"digits-resnet20(-w4.6-b1.1)?-mask-s0\.8-seed3-[0-9a-f]{8}", again.name)


def outcome_of(directory: Path) -> dict[str, Any]:
    """What test_resume compares, of a run that saved no scores."""
    save = directory / "scores.safetensors"
    if not save.is_file():
        save_file({"none": torch.zeros(1)}, save)
    return outcome(directory.parent)


def evaluated(outcome: dict[str, Any]) -> list[dict[str, float]]:
    return [line for line in outcome["curve"] if "test_top1" in line]


def test_a_mask_of_filters_holds_their_norms_too(tmp_path: Path) -> None:
    settings = ["pruner=filter_magnitude", "sparsity=0.5", "schedule=one_shot"]
    theirs = run(tmp_path / "theirs", *settings)
    held = load_file(theirs / "mask.safetensors")
    assert any(tensor.ndim == 1 and not tensor.all() for tensor in held.values())
    ours = run(tmp_path / "ours", f"mask={theirs}/mask.safetensors")
    weights = [load_file(directory / "model.safetensors") for directory in (theirs, ours)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert load_file(ours / "mask.safetensors").keys() == held.keys()
    with pytest.raises(ConfigError, match="is held at zero too"):
        run(tmp_path / "shuffled", f"mask={theirs}/mask.safetensors", "ablation=shuffle_mask")


@pytest.mark.parametrize("ablation", ["shuffle_mask", "shuffle_weights"])
def test_a_sanity_check_of_a_given_mask_is_that_of_the_method(ablation: str, found: Path, tmp_path: Path) -> None:
    settings = ["seed=3", f"ablation={ablation}", "training.epochs=1"]
    theirs = run(tmp_path / "theirs", "pruner=snip", "sparsity=0.8", *settings)
    ours = run(tmp_path / "ours", f"mask={found}/mask.safetensors", *settings)
    assert row_of(ours)["ablation_overlap"] == row_of(theirs)["ablation_overlap"] < 1
    weights = [load_file(directory / "model.safetensors") for directory in (theirs, ours)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert f"-{ablation}-" in ours.name


@pytest.mark.parametrize("weights", ["initial", "final"])
def test_an_exported_state_dict_is_one_of_torch_prune(weights: Any, found: Path, tmp_path: Path) -> None:
    export_mask(found, tmp_path / "m.pt", weights)
    model, shape = initial(found)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            torch_prune.identity(module, "weight")
    model.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    expected, _ = initial(found) if weights == "initial" else trained(found)
    masks.apply_(expected, load_file(found / "mask.safetensors"))
    images = torch.randn(4, *shape)
    assert torch.equal(model(images), expected(images))
    assert any(not buffer.all() for name, buffer in model.named_buffers() if name.endswith("weight_mask"))


def test_a_mask_holds_as_a_parametrization(found: Path, mask: Tensors) -> None:
    model, shape = initial(found)
    expected, _ = initial(found)
    masks.apply_(expected, mask)
    parametrize_(model, mask)
    images = torch.randn(4, *shape)
    assert torch.equal(model(images), expected(images))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model(images).square().sum().backward()
        optimizer.step()
    weights = {name: model.get_submodule(name.rpartition(".")[0]).weight for name in mask}
    assert all(not weights[name][~kept].any() for name, kept in mask.items())
    assert not torch.equal(model(images), expected(images))
    for name in mask:
        parametrize.remove_parametrizations(model.get_submodule(name.rpartition(".")[0]), "weight")
    assert all(not model.get_parameter(name)[~kept].any() for name, kept in mask.items())
    for wrong in ({"nosuch": torch.ones(2, dtype=torch.bool)}, {"fc.weight": torch.ones(2, dtype=torch.bool)}):
        with pytest.raises(ConfigError, match="give its own mask"):
            parametrize_(model, wrong)


def test_weights_under_a_parametrization_can_be_started_from(found: Path, mask: Tensors, tmp_path: Path) -> None:
    torch.save(parametrized(mask, found), tmp_path / "m.pt")
    model, _ = initial(found)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    weight_files.load_(model, str(tmp_path / "m.pt"))
    assert all(torch.equal(value, initial(found)[0].state_dict()[name]) for name, value in model.state_dict().items())


def test_export_says_what_it_wrote(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")

    export(str(found), "-o", str(tmp_path / "m.npz"))
    row = row_of(found)
    assert f"keeps {row['num_kept']:,} of {row['num_prunable']:,}; written to" in capsys.readouterr().out
    for code, wrong in ((2, ["-o", "m.h5"]), (2, ["-o", "m.npz", "--weights", "final"]), (4, ["-o", "m.npz"])):
        with pytest.raises(SystemExit) as stopped:
            export(str(found if code == 2 else tmp_path), *wrong)
        assert stopped.value.code == code
    assert "it is not the directory of a finished run" in capsys.readouterr().err


def test_training_starts_from_weights_in_a_file(found: Path, tmp_path: Path) -> None:
    """Of a network that is not trained further the accuracy is that of the run that trained it."""
    export_mask(found, tmp_path / "m.pt", "final")
    again = run(tmp_path / "again", f"mask={tmp_path}/m.pt", f"weights={tmp_path}/m.pt", "training.epochs=0", "seed=7")
    assert row_of(again)["test_top1"] == row_of(found)["test_top1"]
    assert row_of(again)["test_loss"] == row_of(found)["test_loss"]
    assert row_of(again)["weights"] is not None and row_of(found)["weights"] is None
    assert torch.equal(initial(again)[0].fc.bias, trained(found)[0].fc.bias)
    export_mask(found, tmp_path / "m.pt", "initial")
    with pytest.raises(ConfigError, match=r"m\.pt: it has changed"):
        initial(again)
    trained(again)
    other = composed(*TINY, "pruner=snip", "sparsity=0.8", "seed=3", f"weights={found}/model.safetensors")
    assert other.id != found.name
    assert other.task != row_of(found)["task"]
    assert other.method == row_of(found)["method"]


# Identity -------------------------------------------------------------------------------------------------------------


def test_another_mask_is_another_run_and_a_name_makes_masks_one_method(
    mask: Tensors, found: Path, tmp_path: Path
) -> None:
    other = {name: tensor.flip(0) for name, tensor in mask.items()}
    save_file(other, tmp_path / "m.safetensors")
    paths = [f"mask={found}/mask.safetensors", f"mask={tmp_path}/m.safetensors"]
    for label, equal in ((None, False), ("prospr", True)):
        named = [f"mask_name={label}"] if label else []
        one, two = (composed(*TINY, path, *named) for path in paths)
        assert one.id != two.id
        assert one.task == two.task
        assert (one.group == two.group) == equal
        assert (one.method == two.method) == equal
        assert one.method.startswith(f"{label or 'mask'}-") and f"-{label or 'mask'}-s0.8-" in one.id


def test_weights_of_each_seed_are_what_the_name_names(mask: Tensors, found: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.pt" for seed in range(2)]
    for path in paths:
        torch.save({"w": torch.rand(2, 2)}, path)

    def of(*settings: str) -> dict[str, Any]:
        return composed(*TINY, f"mask={found}/mask.safetensors", *settings)

    one, two = (of("mask_name=ticket", f"weights={path}") for path in paths)
    assert one.id != two.id
    control = of("mask_name=ticket")
    for identity in ("group", "method", "task"):
        assert getattr(one, identity) == getattr(two, identity)
        same = getattr(one, identity) == getattr(control, identity)
        assert same == (identity == "task"), "a ticket and its control"
    one, two = (of(f"weights={path}") for path in paths)
    assert one.group != two.group and one.task != two.task


def test_masks_of_a_name_with_a_few_weights_more_or_less_are_one_group(tmp_path: Path) -> None:
    settings = ["model.widths=[16,32]", "mask_name=threshold", "training.epochs=0"]
    dense = run(tmp_path / "dense", settings[0], settings[2])
    shapes = {name: tensor.shape for name, tensor in load_file(dense / "mask.safetensors").items()}
    total = sum(shape.numel() for shape in shapes.values())
    paths = [tmp_path / f"{number}.pt" for number in range(2)]
    kept = [round(0.2 * total) - 1, round(0.2 * total) + 1]
    for path, number in zip(paths, kept, strict=True):
        bits = (torch.randperm(total, generator=torch.Generator().manual_seed(0)) < number).split(
            [shape.numel() for shape in shapes.values()]
        )
        torch.save({name: part.view(shapes[name]) for name, part in zip(shapes, bits, strict=True)}, path)
    plain = [composed(*TINY, *settings, f"mask={path}") for path in paths]
    assert plain[0].group != plain[1].group, "without a target they are two"
    one, two = (composed(*TINY, *settings, f"mask={path}", "compression=5") for path in paths)
    assert one.sparsity == two.sparsity == 0.8 and one.group == two.group
    directory = run(tmp_path / "one", *settings, f"mask={paths[0]}", "sparsity=0.8")
    row = row_of(directory)
    assert (row["target_sparsity"], row["num_kept"]) == (0.8, kept[0]) and row["sparsity"] != 0.8
    assert compose.stored(directory).id == directory.name
    with pytest.raises(ConfigError, match=r"^sparsity=0.801: mask=.* has sparsity 0.8.* more than 0.1 % away"):
        composed(*TINY, *settings, f"mask={paths[0]}", "sparsity=0.801")


def test_a_stored_run_notices_that_its_mask_has_changed(found: Path, mask: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    shutil.copy(found / "mask.safetensors", path)
    cfg = composed(*TINY, f"mask={path}", f"results_dir={tmp_path}/results")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(composition.rerunnable(cfg))
    assert compose.stored(tmp_path / "run").id == cfg.id
    path.rename(tmp_path / "gone")
    assert compose.stored(tmp_path / "run").id == cfg.id, "its name needs no file"
    with pytest.raises(ConfigError, match="there is no such file"):
        experiment.run(compose.stored(tmp_path / "run"))
    save_file({name: ~tensor for name, tensor in mask.items()}, path)
    for attempt in (lambda: compose.stored(tmp_path / "run"), lambda: experiment.run(cfg)):
        with pytest.raises(ConfigError, match=r"m.safetensors: it has changed since the run was composed \(checksum"):
            attempt()
    assert not list((tmp_path / "results").iterdir())


def test_a_preempted_run_goes_on_with_its_mask(
    found: Path, mask: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    shutil.copy(found / "mask.safetensors", path)
    whole = run(tmp_path / "whole", f"mask={path}", f"weights={found}/model.safetensors")
    cfg = composed(
        *TINY,
        f"mask={path}",
        f"weights={found}/model.safetensors",
        f"results_dir={tmp_path}/results",
        "checkpoint_minutes=0",
    )
    record = RunDirectory.record

    def interrupted(self: RunDirectory, metrics: dict[str, float], epoch: float) -> None:
        record(self, metrics, epoch)
        if epoch == 1:
            monkeypatch.setattr(preemption, "_received", ["SIGTERM"])

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "record", interrupted)
        with pytest.raises(PreemptedError):
            experiment.run(cfg)
    monkeypatch.setattr(preemption, "_received", [])
    save_file({name: ~tensor for name, tensor in mask.items()}, path)
    with pytest.raises(ConfigError, match="it has changed"):
        experiment.run(cfg)
    directory = directory_of(tmp_path / "results")
    assert (directory / "checkpoint.pt").is_file(), "nothing is lost"
    shutil.copy(found / "mask.safetensors", path)
    experiment.run(cfg)
    assert json.loads((directory / "status.json").read_text())["attempt"] > 1
    one, other = outcome_of(whole), outcome_of(directory)
    assert one["row"] == other["row"] and one["curve"] == other["curve"]
    assert all(torch.equal(other["model"][name], tensor) for name, tensor in one["model"].items())


def test_two_processes_train_a_given_mask_as_one_does(found: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"mask={found}/mask.safetensors", "training.batch_size=101", "training.lr=0.001"]
    one = run(tmp_path / "one", *settings[len(TINY) :])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            str(ROOT / "run.py"),
            *settings,
            f"results_dir={tmp_path / 'two'}",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = directory_of(tmp_path / "two")
    assert one.name == two.name and row_of(two)["num_processes"] == 2
    a, b = load_file(one / "mask.safetensors"), load_file(two / "mask.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert row_of(two)["test_loss"] == pytest.approx(row_of(one)["test_loss"], abs=1e-3)
