"""Masks from elsewhere: read from any format, fitted to the network, trained as if they had been found here."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, composed
from safetensors.torch import load_file, save_file
from test_config import HEAVY, imported
from test_resume import TINY, directory_of, outcome
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from pai_bench import assembly, experiment
from pai_bench.config import composition
from pai_bench.errors import ConfigError, PreemptedError
from pai_bench.launch import cli, compose
from pai_bench.masks import mask_files, masks
from pai_bench.masks.parametrization import parametrize_
from pai_bench.runs.directory import RunDirectory
from pai_bench.runs.export import export_mask, initial, trained
from pai_bench.system import preemption

Tensors = dict[str, Tensor]


def run(results: Path, *overrides: str) -> Path:
    experiment.run(composed(*TINY, *overrides, f"results_dir={results}"))
    return directory_of(results)


def row_of(directory: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return row


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose mask is trained again; its directory."""
    torch.set_num_threads(1)  # as every test has it
    return run(tmp_path_factory.mktemp("found"), "pruner=snip", "sparsity=0.8", "seed=3", "cache_gb=0")


@pytest.fixture
def mask(found: Path) -> Tensors:
    return load_file(found / "mask.safetensors")


def in_model_order(mask: Tensors, directory: Path) -> Tensors:
    return {name: mask[name] for name in masks.prunable(initial(directory)[0])}


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
    mask_files.load_weights_(model, str(tmp_path / "m.pt"))
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


# Formats --------------------------------------------------------------------------------------------------------------


def pruned_by_torch(mask: Tensors, directory: Path) -> Tensors:
    model, _ = initial(directory)
    for name, module in model.named_modules():
        if f"{name}.weight" in mask:
            torch_prune.custom_from_mask(module, "weight", mask[f"{name}.weight"])
    return model.state_dict()


def parametrized(mask: Tensors, directory: Path) -> Tensors:
    model, _ = initial(directory)
    parametrize_(model, mask)
    return model.state_dict()


def like_synaptic_flow(mask: Tensors, directory: Path) -> Tensors:
    """Every parameter with a mask in a buffer beside it, those of biases and norms all ones."""
    state = initial(directory)[0].state_dict()
    beside = {f"{name}_mask": mask.get(name, torch.ones_like(value)).float() for name, value in state.items()}
    return state | {name: value for name, value in beside.items() if "running" not in name and "num" not in name}


def save_npz(tensors: Tensors, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


FORMATS: dict[str, Callable[[Tensors, Path, Path], Path]] = {
    "bool.safetensors": lambda mask, run, path: save_file(mask, path),
    "half.safetensors": lambda mask, run, path: save_file({n: t.half() for n, t in mask.items()}, path),
    "bfloat16.safetensors": lambda mask, run, path: save_file({n: t.bfloat16() for n, t in mask.items()}, path),
    "uint8.npz": lambda mask, run, path: save_npz({n: t.byte() for n, t in mask.items()}, path),
    "ints.pth": lambda mask, run, path: torch.save({n: t.int() for n, t in mask.items()}, path),
    "sparse.pt": lambda mask, run, path: torch.save({n: t.float().to_sparse() for n, t in mask.items()}, path),
    "prune.pt": lambda mask, run, path: torch.save(pruned_by_torch(mask, run), path),
    "parametrized.pt": lambda mask, run, path: torch.save(parametrized(mask, run), path),
    "synflow.pt": lambda mask, run, path: torch.save(like_synaptic_flow(mask, run), path),
    "parallel.pt": lambda mask, run, path: torch.save({f"module.{n}": t for n, t in mask.items()}, path),
    "compiled.pt": lambda mask, run, path: torch.save({f"_orig_mod.module.{n}": t for n, t in mask.items()}, path),
    "checkpoint.tar": lambda mask, run, path: torch.save({"epoch": 3, "opt": {}, "state_dict": mask}, path),
    "old.pth": lambda mask, run, path: torch.save(mask, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_mask_is_one_run_in_whatever_format_and_place(
    name: str, mask: Tensors, found: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    FORMATS[name](mask, found, tmp_path / "elsewhere" / name)
    one, other = (
        composed(*TINY, f"mask={path}", "seed=3")
        for path in (tmp_path / "elsewhere" / name, found / "mask.safetensors")
    )
    assert one.sparsity == 0.8 and one.pruner.name == "mask"
    for identity in ("id", "group", "method", "task"):
        assert getattr(one, identity) == getattr(other, identity)
    given, others = assembly.given_mask(one, initial(found)[0])
    assert others == {} and list(given) == list(in_model_order(mask, found))
    assert all(torch.equal(given[key], tensor) for key, tensor in mask.items())


def test_zeros_of_weights_are_a_mask_when_told_so(mask: Tensors, found: Path, tmp_path: Path) -> None:
    model, _ = initial(found)
    masks.apply_(model, mask)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    given, others = assembly.given_mask(
        composed(*TINY, f"mask={tmp_path}/w.pt", "mask_file.zeros=true"), initial(found)[0]
    )
    assert others == {}, "zeros of biases are no mask"
    assert all(torch.equal(given[key], tensor) for key, tensor in mask.items())


@pytest.mark.parametrize("save", [save_npz, torch.save], ids=["npz", "pt"])
def test_masks_under_other_names_are_matched_by_order(
    save: Any, mask: Tensors, found: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = {f"net.{99 - i}.w": tensor for i, tensor in enumerate(in_model_order(mask, found).values())}
    path = tmp_path / f"m.{'npz' if save is save_npz else 'pt'}"
    save(renamed | {"norm": torch.ones(3)}, path)
    with pytest.raises(
        ConfigError, match=r"the model has no net.99.w, net.98.w, net.97.w and \d+ more, and there is no"
    ):
        assembly.given_mask(composed(*TINY, f"mask={path}"), initial(found)[0])
    cfg = composed(*TINY, f"mask={path}", "mask_file.names=order")
    with caplog.at_level("DEBUG", "pai_bench"):
        given, _ = assembly.given_mask(cfg, initial(found)[0])
    assert all(torch.equal(given[key], tensor) for key, tensor in mask.items())
    assert f"the mask of {next(iter(given))} is that of net.99.w" in caplog.text
    assert cfg.id != composed(*TINY, f"mask={found}/mask.safetensors").id
    path = path.with_stem("reversed")
    save(dict(reversed(renamed.items())), path)
    with pytest.raises(ConfigError, match=r"by order net.\d+.w \(10, 6\) would be the mask of"):
        assembly.given_mask(composed(*TINY, f"mask={path}", "mask_file.names=order"), initial(found)[0])


def test_layers_without_a_mask_stay_whole_when_told_so(mask: Tensors, found: Path, tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in mask.items() if name != "fc.weight"}
    save_file(rest, tmp_path / "m.safetensors")
    settings = [f"mask={tmp_path}/m.safetensors", "training.epochs=0"]
    with pytest.raises(ConfigError, match=r"there is no mask of fc.weight; mask_file.missing=keep"):
        run(tmp_path / "refused", *settings)
    assert not list((tmp_path / "refused").iterdir())
    kept = run(tmp_path / "kept", *settings, "mask_file.missing=keep")
    assert load_file(kept / "mask.safetensors")["fc.weight"].all()
    row = row_of(kept)
    assert row["num_kept"] == sum(int(t.sum()) for t in rest.values()) + mask["fc.weight"].numel()
    assert row["sparsity"] == pytest.approx(1 - row["num_kept"] / row["num_prunable"])
    assert masks.num_kept(row["target_sparsity"], row["num_prunable"]) == row["num_kept"]
    assert "-s0.8" in kept.name and row["target_sparsity"] < mask_files.sparsity(arrays(rest)), "fc counts in the row"
    with pytest.raises(ConfigError, match=r"sparsity=0.8: how sparse mask_file.missing=keep leaves"):
        composed(*TINY, *settings, "mask_file.missing=keep", "mask_name=a", "sparsity=0.8")


def arrays(tensors: Tensors) -> mask_files.Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_what_is_no_weight_does_not_count_as_one(mask: Tensors, tmp_path: Path) -> None:
    one = mask_files.sparsity(arrays(mask))
    more = {"pos_embed": torch.ones(1, 500, 600), "cls.table": torch.tensor([[0, 1]])}
    assert mask_files.sparsity(arrays(mask | more)) == one == 0.8
    assert mask_files.sparsity({"a": np.ones((4, 1), bool), "b": np.zeros((4, 1), bool)}) == 0.5, "any names"


BUFFERS = {
    "blocks.1.attn_mask": torch.tensor([[[0.0, -100.0]]]),
    "blocks.0.causal_mask": torch.ones(4, 4).tril().bool(),
    "blocks.1.relative_position_index": torch.arange(4).reshape(2, 2),
}


def test_buffers_that_end_as_masks_do_are_none(mask: Tensors, found: Path, tmp_path: Path) -> None:
    model, _ = initial(found)
    masks.apply_(model, mask)
    path = tmp_path / "w.pt"
    torch.save(model.state_dict() | BUFFERS, path)
    given, _ = assembly.given_mask(composed(*TINY, f"mask={path}", "mask_file.zeros=true"), initial(found)[0])
    assert all(torch.equal(given[key], tensor) for key, tensor in mask.items())
    for weight in ("_orig", ""):  # torch.nn.utils.prune, and Synaptic-Flow
        path = tmp_path / f"m{weight}.pt"
        state = {f"{n}{weight if n in mask else ''}": t for n, t in model.state_dict().items()}
        torch.save(state | BUFFERS | {f"{name}_mask": tensor for name, tensor in mask.items()}, path)
        given, _ = assembly.given_mask(composed(*TINY, f"mask={path}"), initial(found)[0])
        assert all(torch.equal(given[key], tensor) for key, tensor in mask.items())
        with pytest.raises(ConfigError, match="it holds masks"):
            composed(*TINY, f"mask={path}", "mask_file.zeros=true")


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.98, 0.966666666667, 0.9999])
def test_the_sparsity_of_a_mask_is_the_shortest_that_keeps_as_many(sparsity: float) -> None:
    total = 270_896
    kept = masks.num_kept(sparsity, total)
    mask = np.zeros((total, 1), dtype=bool)
    mask[:kept] = True
    found = mask_files.sparsity({"a": mask, "norm": np.zeros(5, dtype=bool)})
    assert masks.num_kept(found, total) == kept
    assert len(str(found)) <= len(str(sparsity))


# Refusals -------------------------------------------------------------------------------------------------------------


class _Module(nn.Linear):
    """Something that only a pickle can hold."""


def write(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)


def trillion() -> bytes:
    """An .npz file of two lines that says that it holds a million by a million entries."""
    header, file = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|b1", "fortran_order": False, "shape": (10**6, 10**6)})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w.npy", header.getvalue())
    return file.getvalue()


ONE = torch.ones(2, 2)
TRILLION = trillion()
WRONG: dict[str, tuple[str, Any, list[str], str]] = {
    "absent": ("x.pt", None, [], "mask=x.pt: there is no such file"),
    "not torch": ("x.pt", b"no mask", [], "mask=x.pt: it .*cannot be read"),
    "not safetensors": ("x.safetensors", b"no mask", [], "cannot be read as a safetensors file"),
    "torn safetensors": ("x.safetensors", b"\x10\0\0\0\0\0\0\0{", [], "cannot be read as a safetensors file"),
    "not npz": ("x.npz", b"no mask", [], "cannot be read as a npz file"),
    "pickled modules": ("x.pt", {_Module(2, 2): ONE}, [], "pickled modules, .*GraSP"),
    "pickled arrays": ("x.npz", {"a": np.array([{}], dtype=object)}, [], "cannot be read as a npz file"),
    "a tensor": ("x.pt", ONE, [], "holds a Tensor and not tensors by name"),
    "no tensors": ("x.pt", {"epoch": 3}, [], r"no single state dict can be told in it \(there is epoch\)"),
    "two state dicts": ("x.pt", {"a": {"w": ONE}, "b": {"w": ONE}}, [], r"no single .*\(there is a, b\)"),
    "nothing": ("x.npz", {}, [], "it holds no tensors"),
    "weights": ("x.pt", {"w": ONE / 3}, [], "w holds 0.333333, and a mask only 0 and 1; .*mask_file.zeros=true"),
    "not a number": ("x.npz", {"w": np.full((2, 2), np.nan)}, [], "w holds nan, and a mask only 0 and 1"),
    "not a number among weights": ("x.pt", {"w": ONE * torch.nan}, ["mask_file.zeros=true"], "w holds nan; give"),
    "a trillion entries": ("x.pt", {"w": torch.ones(1).expand(10**6, 10**6)}, [], "its tensors have 1,000,000,000,000"),
    "a trillion in a file of text": ("x.npz", TRILLION, [], "its tensors have 1,000,000,000,000 entries, and at most"),
    "words": ("x.npz", {"w": np.array([["a"]])}, [], "w holds <U1, and a mask 0 and 1"),
    "keeps nothing": ("x.pt", {"w": 0 * ONE}, [], "it keeps nothing"),
    "only a norm": ("x.pt", {"norm": torch.tensor([1, 0])}, [], "it holds no mask of a kernel or a matrix"),
    "twice": ("x.pt", {"w": ONE, "module.w": ONE}, [], "it holds w twice"),
    "masks and zeros": ("x.pt", {"w_mask": ONE}, ["mask_file.zeros=true"], r"holds masks \(w_mask\); take"),
    "shape": ("x.pt", "fc", [], r"the mask of fc.weight is \(2, 2\), the weight \(10, 6\)"),
    "number": ("x.pt", {"w": ONE}, ["mask_file.names=order"], r"holds masks of 1 kernels and matrices,"),
    "order of sorted names": ("x.safetensors", {"w": ONE}, ["mask_file.names=order"], "it is sorted by name"),
    "order of some": ("x.pt", {"w": ONE}, ["mask_file.names=order", "mask_file.missing=keep"], "every layer needs"),
    "biases by order": ("x.pt", {"w": ONE, "b": torch.tensor([1, 0])}, ["mask_file.names=order"], "b is pruned too"),
    "sparsity": ("x.pt", {"w": ONE}, ["sparsity=0.5"], "sparsity=0.5: mask=x.pt has a sparsity of its own; leave"),
    "compression": ("x.pt", {"w": ONE}, ["compression=10"], "compression=10: mask=x.pt has a sparsity of its own"),
    "two targets": ("x.pt", {"w": ONE}, ["mask_name=a", "sparsity=0", "density=1"], "they say the same thing"),
    "far target": ("x.pt", {"w": ONE}, ["mask_name=a", "density=0.99"], "density=0.99: mask=x.pt has sparsity 0, "),
    "no target": ("x.pt", {"w": ONE}, ["mask_name=a", "sparsity=1"], "sparsity=1: give a fraction in"),
    "pruner": ("x.pt", {"w": ONE}, ["pruner=snip"], "mask=x.pt: a pruner would compute another mask"),
    "schedule": ("x.pt", {"w": ONE}, ["schedule=rewind"], "mask=x.pt: schedule=rewind would compute another mask"),
    "scores": ("x.pt", {"w": ONE}, ["ablation=invert_scores"], "ablation=invert_scores: mask=x.pt comes without"),
    "labels": ("x.pt", {"w": ONE}, ["ablation=random_labels"], "ablation=random_labels: mask=x.pt comes without"),
    "choice": ("x.pt", {"w": ONE}, ["mask_file.names=regex"], "mask_file.names=regex: give one of exact, order"),
    "no such setting": ("x.pt", {"w": ONE}, ["mask_file.order=1"], "mask_file.order"),
    "name without": ("x.pt", None, ["mask=null", "mask_name=a"], "mask_name=a: there is no mask for it; add mask=PATH"),
    "a taken name": ("x.pt", {"w": ONE}, ["mask_name=dense"], "mask_name=dense: that is the unpruned network"),
    "zeros without": ("x.pt", None, ["mask=null", "mask_file.zeros=true"], "mask_file.zeros=true: there is no mask"),
    "no weights": ("x.pt", "all", ["weights=y.pt"], "weights=y.pt: it cannot be read"),
    "other weights": ("x.pt", "all", ["weights=x.pt"], "weights=x.pt: there is no .*; give a state dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_what_is_wrong_is_refused_in_one_line(
    case: str, mask: Tensors, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    name, content, overrides, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    content = {"all": mask, "fc": mask | {"fc.weight": ONE}}[content] if isinstance(content, str) else content
    if content is not None:
        write(Path(name), content)
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["run.py", *TINY, f"mask={name}", *overrides])
    if "mask=null" in overrides:
        sys.argv.remove(f"mask={name}")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2, said
    assert re.fullmatch(f"config error: .*{message}.*\n", said.err), said.err
    assert not list(tmp_path.glob("results/*"))


def test_a_mask_is_checked_without_torch(found: Path, tmp_path: Path) -> None:
    shutil.copy(found / "mask.safetensors", tmp_path / "m.safetensors")
    arguments = ["-m", "mask=m.safetensors", "sparsity=0.5,0.6"]
    assert imported("run.py", arguments, HEAVY, tmp_path) <= {"numpy", "safetensors"}


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
