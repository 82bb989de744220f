"""Masks from elsewhere: read from any format, fitted to the network, trained as if they had been found here."""

import io
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from given_masks import Tensors, found, in_model_order, mask, parametrized, row_of, run
from processes import HEAVY, imported
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune
from whole_runs import TINY

from pai_bench import assembly
from pai_bench.errors import ConfigError
from pai_bench.launch import cli
from pai_bench.masks import mask_files, masks
from pai_bench.runs.export import initial

__all__ = ["found", "mask"]  # fixtures

# Formats --------------------------------------------------------------------------------------------------------------


def pruned_by_torch(mask: Tensors, directory: Path) -> Tensors:
    model, _ = initial(directory)
    for name, module in model.named_modules():
        if f"{name}.weight" in mask:
            torch_prune.custom_from_mask(module, "weight", mask[f"{name}.weight"])
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


def test_a_target_fits_a_mask_that_keeps_as_many_weights_as_it_asks_for() -> None:
    mask = {"w": np.zeros((1000, 1000), bool)}
    mask["w"].flat[:198] = True
    assert mask_files.sparsity(mask) == 0.999802
    assert mask_files.agree(1 - 0.00019802, mask)  # 198.02 weights, as a density of a ticket has many digits
    assert mask_files.agree(0.999802, mask) and not mask_files.agree(0.9998, mask)
    small = {"w": np.zeros((100, 100), bool)}
    small["w"].flat[:2] = True
    assert mask_files.sparsity(small) == 0.9998
    assert mask_files.agree(1 - 0.00019802, small) and not mask_files.agree(0.9999, small)


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
    "far target": ("x.pt", {"w": ONE}, ["mask_name=a", "density=0.4"], "density=0.4: mask=x.pt has sparsity 0, "),
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
