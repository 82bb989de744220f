"""prunable=: layers that are left out stay whole everywhere, and count nowhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain, composed, options, pruned_as, residual
from safetensors.torch import load_file, save_file
from torch import Generator, nn
from torch.nn import functional as F

import pai_bench as pb
from pai_bench import experiment
from pai_bench.analysis import paths
from pai_bench.analysis.channels import Channels
from pai_bench.analysis.mode import mode
from pai_bench.config import identity
from pai_bench.config.schema import plain
from pai_bench.core import Batches, Subnetwork
from pai_bench.errors import ConfigError
from pai_bench.masks import mask_files, masks
from pai_bench.runs.export import export, export_mask

SHAPE = (3, 8, 8)
ENDS = "prunable=[no_first,no_last]"
OF_WEIGHTS = [name for name in options("pruner") if name != "dense" and not name.startswith("filter_")]
SMALL = [
    "model=resnet8_thin", "model.widths=[4,8]", "model.blocks=[1,1]", "training.epochs=1", "tracker=none", "device=cpu",
    "seed=3",
]  # fmt: skip


def random_mask(model: nn.Module, which: masks.Which, density: float) -> masks.Mask:
    generator = Generator().manual_seed(1)
    return {
        name: torch.rand(w.shape, generator=generator) < density for name, w in masks.prunable(model, which).items()
    }


# Which layers ---------------------------------------------------------------------------------------------------------


def test_words_leave_out_their_layers() -> None:
    names = ["conv.weight", "stages.0.0.conv1.weight", "stages.1.0.shortcut.0.weight", "fc.weight"]
    model = residual()
    every = list(masks.prunable(model))
    assert [name for name in every if name in names] == names and (every[0], every[-1]) == (names[0], names[-1])
    left_out = {
        "all": set(),
        "no_first": {"conv.weight"},
        "no_last": {"fc.weight"},
        "no_shortcut": {name for name in every if "shortcut" in name},
        "conv": {"fc.weight"},
        ("no_first", "no_last"): {"conv.weight", "fc.weight"},
    }
    for which, names in left_out.items():
        found = masks.prunable(model, which)
        assert list(found) == [name for name in every if name not in names], which
        assert list(masks.full(model, which)) == list(found)
    assert len(left_out["no_shortcut"]) == 1


class Stages(nn.Module):
    """A layer that is called downsample and is no shortcut, as between the stages of ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.downsample, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 2, 2), nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("model", "which", "message"),
    [
        (Chain(), "no_shortcut", "prunable=no_shortcut: Chain has no 1x1 convolution in a module that is called"),
        (Stages(), "no_shortcut", "prunable=no_shortcut: Stages has no 1x1 convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "conv", "prunable=conv: Sequential has no layers other than convolutions"),
        (nn.Linear(3, 2), "no_first", "prunable=no_first: no layer of Linear is left to prune; give prunable=all"),
        (nn.Linear(3, 2), "conv", "prunable=conv: no layer of Linear is left"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)),
            ["no_first", "no_last"],
            r"prunable=\[no_first,no_last\]: no layer of Sequential is left",
        ),
        (Chain(), "none", "prunable=none: give one of all, no_first, no_last, no_shortcut, conv"),
    ],
)
def test_what_makes_no_sense_is_refused(model: nn.Module, which: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        masks.prunable(model, which)


# In a search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_every_pruner_leaves_them_whole_and_keeps_exactly_k_of_the_rest(name: str, batches: Batches) -> None:
    torch.manual_seed(0)
    model = residual()
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    more = ["schedule.rounds=2", "pruner.transfer.steps=1"] if name.startswith("ntt") else []
    found = pruned_as(
        model, SHAPE, f"pruner={name}", "sparsity=0.5", *more, draw=lambda *_: [(x.double(), y) for x, y in batches],
        prunable=["no_first", "no_last"], build=residual,
    )  # fmt: skip
    assert list(found.mask) == [key for key in masks.prunable(model) if key not in ("conv.weight", "fc.weight")]
    assert list(found.scores or {}) == list(found.mask)
    assert masks.kept(found.mask) == masks.num_kept(0.5, masks.total(found.mask))
    assert found.sparsities[-1] == masks.sparsity(found.mask)
    after = dict(model.named_parameters())
    for key in ("conv.weight", "fc.weight"):
        moves = name == "ntt_official"  # which gives norms and biases new values, too
        assert bool((after[key] != 0).all()) if moves else torch.equal(before[key], after[key])


@pytest.mark.parametrize("name", ["magnitude", "snip", "synflow", "fisher"])
def test_scores_of_the_others_are_as_they_were(name: str, batches: Batches) -> None:
    torch.manual_seed(0)
    model, pruner = residual(), composed(f"pruner={name}", "sparsity=0.5").pruner
    initial = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    scores = []
    for which in ("all", ["no_first", "no_last"]):
        net = Subnetwork(model, masks.full(model, which), initial, SHAPE)  # type: ignore[arg-type]
        with mode(model, pruner.mode == "train"):
            assert pruner.score is not None
            scores.append(pruner.score(net, batches, F.cross_entropy, Generator().manual_seed(0)))
    assert len(scores[1]) == len(scores[0]) - 2
    assert all(torch.equal(values, scores[0][key]) for key, values in scores[1].items())


def test_paths_run_through_them() -> None:
    torch.manual_seed(0)
    model = residual()
    mask = random_mask(model, ["no_first", "no_shortcut"], 0.1)
    whole = masks.full(model) | mask
    found, expected = paths.effective(model, mask, SHAPE), paths.effective(model, whole, SHAPE)
    assert found is not None and expected is not None and list(found) == list(mask)
    assert 0 < masks.kept(found) < masks.kept(mask)
    assert all(torch.equal(reached, expected[name]) for name, reached in found.items())


def test_channels_are_alive_in_them() -> None:
    model = Chain(norm=False)
    mask = random_mask(model, ["no_first", "no_last"], 0.0)
    mask["conv2.weight"][:4, 2:] = True
    found = Channels(model, SHAPE).left(mask)
    assert repr(found) == repr(Channels(model, SHAPE).left(masks.full(model) | mask))
    assert found["conv1.weight"].rows is not None and found["fc.weight"].columns is not None


# In a run -------------------------------------------------------------------------------------------------------------


def test_a_run_and_the_library_leave_them_whole(tmp_path: Path) -> None:
    cfg = composed(*SMALL, "pruner=magnitude", "sparsity=0.75", ENDS, "training.epochs=0", f"results_dir={tmp_path}")
    row = experiment.run(cfg)
    mask, model = load_file(cfg.directory / "mask.safetensors"), load_file(cfg.directory / "model.safetensors")
    sizes = {name: weight.numel() for name, weight in model.items() if weight.ndim > 1}
    assert row["prunable"] == "no_first,no_last" and set(sizes) - set(mask) == {"conv.weight", "fc.weight"}
    assert row["num_prunable"] == sum(sizes[name] for name in mask)
    assert row["num_kept"] == masks.num_kept(0.75, row["num_prunable"])
    assert row["num_unprunable"] == sizes["conv.weight"] + sizes["fc.weight"]
    assert row["macs_masked"] > 0.25 * row["macs_dense"]
    layers = [layer["name"] for layer in json.loads((cfg.directory / "mask.json").read_text())["layers"]]
    assert layers == [name for name in layers if name in mask] and len(layers) == len(mask)
    assert all(bool((model[name] != 0).all()) for name in ("conv.weight", "fc.weight"))

    exported = export_mask(cfg.directory, tmp_path / "mask.npz", "final")
    assert set(exported) == set(mask) and len(mask_files.read("mask", str(tmp_path / "mask.npz"), zeros=False)) == len(
        mask
    )
    shown = export(cfg.directory, tmp_path / "small.pt2", batch_size=2, repeats=1)
    assert shown[0]["prunable"] == row["num_prunable"] and shown[0]["nonzero"] == row["num_kept"]

    again = composed(
        *SMALL, f"mask={cfg.directory / 'mask.safetensors'}", ENDS, "training.epochs=0", f"results_dir={tmp_path}"
    )
    given = experiment.run(again)
    assert (given["num_kept"], given["num_prunable"]) == (row["num_kept"], row["num_prunable"])

    network = cfg.model((1, 8, 8), 10)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(load_initial(cfg)[name])
    found = pb.prune(network, "magnitude", sparsity=0.75, prunable=["no_last", "no_first"], seed=3)
    assert set(found) == set(mask) and all(torch.equal(found[name], kept) for name, kept in mask.items())
    assert pb.summary(network, found, prunable=["no_first", "no_last"]).total["size"] == row["num_prunable"]


def load_initial(cfg: Any) -> dict[str, torch.Tensor]:
    from pai_bench.runs.export import initial

    return dict(initial(cfg.directory)[0].named_parameters())


def test_without_pruning_it_trains_as_ever(tmp_path: Path) -> None:
    """Weight decay too is on all layers: nothing but the mask knows of what is left out."""
    curves = []
    for which in ("all", "no_first"):
        words = [*SMALL, "pruner=magnitude", "sparsity=0", f"prunable={which}", f"results_dir={tmp_path}"]
        cfg = composed(*words)
        experiment.run(cfg)
        curves.append(load_file(cfg.directory / "model.safetensors"))
    assert all(torch.equal(value, curves[1][name]) for name, value in curves[0].items())


def test_a_cached_score_is_of_its_layers(tmp_path: Path) -> None:
    """A second run reads the cache of the first, and not that of another choice of layers."""
    base = [*SMALL, "training.epochs=0", "pruner=synflow", "schedule=one_shot", f"results_dir={tmp_path}"]
    kept = []
    for words in (["sparsity=0.5"], ["sparsity=0.5", "prunable=no_last"], ["sparsity=0.8", "prunable=no_last"]):
        row = experiment.run(composed(*base, *words))
        kept.append((row["num_kept"], row["num_prunable"]))
    assert kept[0][1] > kept[1][1] == kept[2][1]


def test_a_mask_of_a_layer_that_is_left_out_is_refused(tmp_path: Path) -> None:
    model = residual()
    path = tmp_path / "mask.safetensors"
    save_file(masks.full(model), path)
    read = mask_files.read("mask", str(path), zeros=False)
    with pytest.raises(ConfigError, match=r"it has a mask of conv.weight, which prunable=no_first leaves whole"):
        mask_files.fitted("mask=x", read, model, names="exact", missing="refuse", prunable="no_first")
    del read["conv.weight"]
    mask, others = mask_files.fitted("mask=x", read, model, names="exact", missing="refuse", prunable="no_first")
    assert list(mask) == list(masks.prunable(model, "no_first")) and not others


# Names ----------------------------------------------------------------------------------------------------------------

BASE = ["pruner=snip", "sparsity=0.9"]


def test_all_renames_nothing_and_other_words_are_a_method_of_their_own() -> None:
    one, other = composed(*BASE), composed(*BASE, "prunable=no_first")
    assert composed(*BASE, "prunable=all").id == one.id == composed(*BASE, "prunable=[all]").id
    assert other.id != one.id and other.task == one.task and other.method != one.method
    assert composed(*BASE, "prunable=[no_first]").id == other.id
    assert composed(*BASE, "prunable=[no_last,no_first]").id == composed(*BASE, ENDS).id
    assert composed("prunable=no_first").id == composed().id, "a dense network is one run"
    assert identity.differences(plain(other), plain(one)) == {"prunable": ("no_first", None)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prunable=first"], "prunable=first: give one of all, no_first, no_last, no_shortcut, conv"),
        (["prunable=[]"], r"prunable=\[\]: give .* at least 1 value"),
        (["prunable=[all,conv]"], r"prunable=\[all,conv\]: all leaves nothing out"),
        (["pruner=filter_magnitude", "prunable=conv"], "prunable=conv: pruned filters take the weights that read them"),
        (
            ["allocation=uniform_plus", "prunable=no_first"],
            "prunable=no_first: allocation=uniform_plus would take another layer for the first or the last; give all",
        ),
        (["allocation=uniform_plus", ENDS], r"prunable=\[no_first,no_last\]: allocation=uniform_plus would"),
        (["allocation=erk_plus", "prunable=no_last"], "prunable=no_last: allocation=erk_plus would"),
        (["allocation=layer_rates", "prunable=[conv,no_first]"], r"prunable=\[conv,no_first\]: allocation=layer_rates"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(*BASE, *words)


def test_an_allocation_with_a_density_for_an_end_goes_with_words_that_leave_it() -> None:
    composed(*BASE, "allocation=erk_plus", "prunable=no_first")
    composed(*BASE, "allocation=uniform_plus", "prunable=no_shortcut")
    composed("pruner=dense", "allocation=uniform_plus", ENDS)
    with pytest.raises(ConfigError, match="prunable=no_last: allocation=layer_rates would"):
        pb.prune(Chain(), "magnitude", sparsity=0.5, allocation="layer_rates", prunable="no_last")
