"""pai_bench.prune: the mask of a run, for any model and any batches, and no trace of the search."""

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Chain, composed, drawn, options, pruned_as
from few_images import SHAPE, random_batches, same
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pai_bench as pb
from pai_bench import assembly, experiment
from pai_bench.api import version
from pai_bench.core import Mask
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.pruning import rounds
from pai_bench.system import seeding

# The mask of a run ----------------------------------------------------------------------------------------------------

OF_RUNS: dict[str, dict[str, Any]] = {
    "snip": {"pruner.scoring_data.total": 40},
    "grasp": {"pruner.scoring_data.per_class": 3},
    "synflow": {"schedule.rounds": 5},
    "iter_snip": {"schedule.rounds": 3, "pruner.scoring_data.total": 20},
    "filter_loss": {"schedule.rounds": 2, "pruner.scoring_data.total": 20},
}


@pytest.mark.parametrize("name", OF_RUNS)
def test_it_is_the_mask_of_a_run_for_the_same_weights_batches_and_seed(name: str, tmp_path: Path) -> None:
    settings = OF_RUNS[name]
    schedule = "linear" if name == "filter_loss" else None
    words = [f"pruner={name}", *([f"schedule={schedule}"] if schedule else [])]
    words += [f"{key}={value}" for key, value in settings.items()]
    words += ["sparsity=0.6", "seed=3", "model=resnet8_thin", "model.widths=[8,16]", "model.blocks=[1,1]"]
    cfg = composed(*words, "training.epochs=0", "tracker=none", "device=cpu", "cache_gb=0", f"results_dir={tmp_path}")
    parts = assembly.assembled(cfg, torch.device("cpu"))
    model = parts.build("init")
    if name == "snip":  # the whole run; the others without what comes after the mask
        row = experiment.run(cfg)
        expected = load_file(cfg.directory / "mask.safetensors")
        assert 0 < row["num_kept"] < row["num_prunable"]
    else:
        expected = rounds.prune(
            model, cfg.pruner, parts.allocate(model), parts.rounds, initial=drawn(model),
            input_shape=parts.data.input_shape, draw=parts.data.draw, loss=F.cross_entropy, seed=3,
        ).mask_with_coupled  # fmt: skip

    wanted, batches = cfg.pruner.scoring_data, []
    if wanted is not None:
        for number in range(1, len(parts.rounds) + 1):
            batches += parts.data.draw(wanted, seeding.generator(3, "examples", number), torch.float64)
    other = parts.build("init")
    data = {"data": batches} if batches else {"input_shape": parts.data.input_shape}
    mask = pb.prune(other, name, sparsity=0.6, schedule=schedule, settings=settings, seed=3, **data)
    assert set(expected) == set(mask) and all(torch.equal(mask[key], kept) for key, kept in expected.items())


def test_a_search_that_moves_weights_leaves_the_weights_of_a_run(chain: nn.Module) -> None:
    model, other = chain.float(), copy.deepcopy(chain).float()
    ((images, labels), *_) = random_batches(size=4)
    few = {"schedule.rounds": 2, "pruner.scoring_data.total": 4, "pruner.scoring_data.batch_size": 4}
    words = [f"{key}={value}" for key, value in few.items()]
    found = pruned_as(
        model, SHAPE, "pruner=ntt_official", "sparsity=0.6", *words, draw=lambda *_: [(images.double(), labels)]
    )
    mask = pb.prune(other, "ntt_official", sparsity=0.6, data=[(images, labels)], settings=few)
    assert same(mask, found.mask)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", [name for name in options("pruner") if name != "dense"])
def test_every_pruner_prunes_a_model_of_ones_own(name: str) -> None:
    torch.manual_seed(0)
    model = Chain()
    before = copy.deepcopy(model.state_dict())
    few = (
        {}
        if composed(f"pruner={name}", "sparsity=0.5").pruner.scoring_data is None
        else {
            "pruner.scoring_data.per_class": None,
            "pruner.scoring_data.total": 32,
            "pruner.scoring_data.batch_size": 16,
        }
    )
    more: dict[str, Any] = {"settings": few}
    if name.startswith("filter_"):
        more = {"schedule": "linear", "settings": few | {"schedule.rounds": 2}}
    elif name.startswith("ntt"):
        more = {"settings": few | {"schedule.rounds": 2}}
    elif composed(f"pruner={name}", "sparsity=0.5").pruner.redraws:
        more = {"build": Chain, "settings": {"schedule.rounds": 3}}
    mask = pb.prune(model, name, sparsity=0.5, data=random_batches(), **more)
    prunable = masks.prunable(model)
    assert set(prunable) <= set(mask)
    if not name.startswith("filter_"):
        total = sum(weight.numel() for weight in prunable.values())
        assert set(prunable) == set(mask) and masks.kept(mask) == round(0.5 * total)
    for key, value in model.state_dict().items():
        kept = mask.get(key, torch.ones_like(value, dtype=torch.bool))
        assert not value[~kept].any()
        if not name.startswith("ntt"):
            assert torch.equal(value[kept], before[key][kept])


# No trace -------------------------------------------------------------------------------------------------------------


def state_of_the_world() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_modes_gradients_buffers_and_random_states_stay(chain: nn.Module) -> None:
    model = chain.float()
    model.norm1.eval()
    model.conv2.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    memory = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    images = torch.cat([images for images, _ in random_batches()])
    labels = torch.cat([labels for _, labels in random_batches()])
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
    world = state_of_the_world()
    with torch.no_grad():  # as callers may have it
        pb.prune(model, "iter_snip", sparsity=0.9, data=loader, settings={"pruner.scoring_data.total": 64})
        assert not torch.is_grad_enabled()
    assert state_of_the_world() == world
    assert [module.training for module in model.modules()] == modes
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == memory
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not model.conv2.weight.requires_grad and model.conv1.weight.requires_grad
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == ["fc.weight"]


def test_a_shuffling_loader_gives_the_same_mask_again_and_another_seed_another_one(chain: nn.Module) -> None:
    images = torch.cat([images for images, _ in random_batches()])
    labels = torch.cat([labels for _, labels in random_batches()])
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)

    def mask(seed: int) -> Mask:
        torch.manual_seed(seed + 100)  # does not matter
        small = {"pruner.scoring_data.total": 40}
        return pb.prune(copy.deepcopy(chain), "snip", sparsity=0.9, data=loader, seed=seed, settings=small)

    assert same(mask(0), mask(0))
    assert not same(mask(0), mask(1))


def test_autocast_and_inference_around_it_change_nothing(chain: nn.Module) -> None:
    model, data = chain.float(), random_batches()
    plain = pb.prune(copy.deepcopy(model), "snip", sparsity=0.9, data=data)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        mask = pb.prune(model, "snip", sparsity=0.9, data=data)
        shown = pb.summary(model, mask, input_shape=tuple(data[0][0].shape[1:]))
    assert same(mask, plain) and not any(kept.is_inference() for kept in mask.values())
    outside = pb.summary(model, mask, input_shape=tuple(data[0][0].shape[1:]))
    assert (shown.records, shown.total) == (outside.records, outside.total) and shown.total["macs"] > 0


def test_a_gradient_that_is_there_when_attach_is_called_in_inference_mode_can_still_change(chain: nn.Module) -> None:
    model = chain.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = pb.prune(model, "magnitude", sparsity=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.inference_mode():
        pb.attach(optimizer, model, mask)
    optimizer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


class Noisy(nn.Module):
    """It counts its passes and draws numbers, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.layer(x + torch.rand_like(x))


def test_a_summary_leaves_the_model_and_random_states_alone() -> None:
    model = Noisy()
    mask = pb.prune(model, "magnitude", sparsity=0.5)
    before = torch.get_rng_state()
    assert pb.summary(model, mask, input_shape=(4,)).total["macs"] == 8
    assert not model.passes and torch.equal(torch.get_rng_state(), before)


def test_a_program_of_hydra_can_call_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("sparsity: 0.5\n")
    (tmp_path / "app.py").write_text(
        "import hydra\nimport pai_bench as pb\nfrom hydra.core.hydra_config import HydraConfig\nfrom torch import nn\n"
        f"@hydra.main(config_path={str(tmp_path)!r}, config_name='config', version_base='1.3')\n"
        "def main(cfg):\n"
        "    mask = pb.prune(nn.Linear(4, 5), 'magnitude', sparsity=cfg.sparsity)\n"
        "    print(int(mask['weight'].sum()), HydraConfig.get().job.name, hydra.compose('config'))\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "app.py", "-m", "sparsity=0.5,0.9"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "10 app {'sparsity': 0.5}" in done.stdout and "2 app {'sparsity': 0.5}" in done.stdout, done.stderr
    assert (tmp_path / "multirun").is_dir(), "the program's own folders are as Hydra makes them"


# Models ---------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight, and a weight that an embedding shares."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x).relu()).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x, x, x[..., :2]], -1)
        return self.out(self.attention(x, x, x)[0].mean(1))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip


@pytest.mark.parametrize("pruner", ["snip", "grasp_abs", "synflow"])
@pytest.mark.parametrize("build", [Tied, Attention, grouped])
def test_tied_weights_attention_and_grouped_convolutions(build: Callable[[], nn.Module], pruner: str) -> None:
    torch.manual_seed(0)
    model = build()
    images = torch.randn(100, 8) if build is Tied else torch.randn(100, *SHAPE)
    mask = pb.prune(model, pruner, sparsity=0.5, data=[(images, torch.arange(100) % 4)])
    assert list(mask) == list(masks.prunable(model))
    assert masks.kept(mask) == round(0.5 * masks.total(mask))
    if isinstance(model, Tied):
        assert model.second.weight is model.first.weight and not model.second.weight[~mask["first.weight"]].any()
    if isinstance(model, Attention):
        assert mask["attention.in_proj_weight"].shape == (24, 8)


@pytest.mark.parametrize("pruner", ["phew", "filter_magnitude"])
def test_channels_of_tied_weights_are_not_followed(pruner: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.out = *(nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4)), nn.Linear(4, 4)
            self.c.weight = self.b.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.c(self.b(self.a(x).relu()).relu()).mean((2, 3)))

    settings = {} if pruner == "phew" else {"schedule": "one_shot"}
    with pytest.raises(ConfigError, match=r"the channels of Twice cannot be traced \(b and c share a weight\)"):
        pb.prune(Twice(), pruner, sparsity=0.5, input_shape=SHAPE, **settings)


def test_synflow_of_a_large_network_with_tied_weights_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    masks_of = []
    for least in (0, 10**9):  # with and without looking for dead channels
        monkeypatch.setattr("pai_bench.pruners.synflow._LARGE", least)
        torch.manual_seed(0)
        masks_of.append(pb.prune(Tied(), "synflow", sparsity=0.9, input_shape=(8,), settings={"schedule.rounds": 8}))
    assert same(*masks_of)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(4, 4, 3), nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 3))], ids=["transposed", "1d"]
)
def test_phew_refuses_layers_that_no_walk_goes_through(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), layer, nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, *SHAPE))
    with pytest.raises(ConfigError, match=r"^pruner=phew: no walk goes through 2\..*weight \(Conv"):
        pb.prune(model, "phew", sparsity=0.5, input_shape=SHAPE)


@pytest.mark.parametrize("pruner", ["magnitude", "random", "lamp"])
def test_scores_of_weights_alone_need_no_images_and_take_any_model(pruner: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(10, 6), nn.Linear(6, 4)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.out(self.embedding(words).mean(1))

    model = Words()
    assert masks.kept(pb.prune(model, pruner, sparsity=0.5)) == 12
    words = [(torch.randint(10, (50, 3)), torch.arange(50) % 4) for _ in range(2)]
    assert masks.kept(pb.prune(model, "snip", density=0.25, data=words)) == 6  # whole numbers stay whole numbers


def test_wrappers_are_looked_through(chain: nn.Module) -> None:
    model = chain.float()
    plain = pb.prune(copy.deepcopy(model), "synflow", compression=10, input_shape=SHAPE)
    for wrap in (nn.DataParallel, partial(torch.compile, backend="eager")):
        inner = copy.deepcopy(model)
        assert same(pb.prune(wrap(inner), "synflow", compression=10, input_shape=SHAPE), plain)
        assert not inner.fc.weight[~plain["fc.weight"]].any()


def test_half_precision_is_scored_in_double(chain: nn.Module) -> None:
    model = chain.bfloat16()
    before = copy.deepcopy(model)
    data = [(images.bfloat16(), labels) for images, labels in random_batches()]
    mask = pb.prune(model, "snip", sparsity=0.9, data=data)
    as_double = pb.prune(before.double(), "snip", sparsity=0.9, data=[(i.double(), y) for i, y in data])
    assert same(mask, as_double) and model.fc.weight.dtype == torch.bfloat16


# The summary ----------------------------------------------------------------------------------------------------------


def test_the_summary_counts_weights_and_multiply_adds(chain: nn.Module) -> None:
    mask = pb.prune(chain, "random", sparsity=0.5)
    found = pb.summary(chain, mask, input_shape=SHAPE)
    conv1, conv2, fc = found.records
    assert (conv1["name"], conv1["shape"], conv1["size"]) == ("conv1.weight", (6, 3, 3, 3), 162)
    assert (conv1["macs"], conv2["macs"], fc["macs"]) == (162 * 64, 432 * 16, 32)
    for record in found.records:
        kept = int(mask[record["name"]].sum())
        assert (record["kept"], record["density"]) == (kept, kept / record["size"])
        assert record["macs_kept"] == record["macs"] // record["size"] * kept
    assert found.total == {
        "name": "all", "shape": (), "size": 626, "kept": 313, "density": 0.5,
        "macs": sum(r["macs"] for r in found.records), "macs_kept": sum(r["macs_kept"] for r in found.records),
    }  # fmt: skip
    lines = str(found).splitlines()
    assert repr(found) == str(found) and len(lines) == 7 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["name", "shape", "size", "kept", "density", "macs", "macs_kept"]
    assert lines[2].split()[:3] == ["conv1.weight", "6x3x3x3", "162"] and lines[-1].split()[0] == "all"

    of_one = pb.summary(chain, {"fc.weight": mask["fc.weight"]})
    assert "macs" not in of_one.total and [record["density"] for record in of_one.records[:2]] == [1.0, 1.0]
    with pytest.raises(ConfigError, match="mask: Chain has no parameter"):
        pb.summary(chain, {"conv9.weight": mask["fc.weight"]})


# The package ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_torch_and_shows_its_names() -> None:
    code = (
        "import sys, pai_bench as pb; "
        "print('torch' in sys.modules, 'hydra' in sys.modules, set(pb.__all__) <= set(dir(pb)), pb.__version__, "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", pb.__version__, "False"]


def test_every_public_name_is_there_and_says_how_it_is_used() -> None:
    for name in set(pb.__all__) - {"__version__"}:
        text = getattr(pb, name).__doc__
        assert "Args:" in text and "Raises:" in text and ">>> " in text and f"pai_bench.{name}(" in text, name
    with pytest.raises(AttributeError, match=r"has no attribute 'snip'; it has .*prune"):
        _ = pb.snip  # type: ignore[attr-defined]


def test_the_version_is_that_of_pyproject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    assert pb.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9"\n')
    monkeypatch.setattr(version, "version", lambda name: f"installed {name}")
    assert version._found(tmp_path) == version._found(tmp_path / "none") == "installed pai_bench"

    def absent(name: str) -> str:
        raise version.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", absent)
    assert version._found(tmp_path) == "0+unknown"
