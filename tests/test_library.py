"""pai_bench.prune: the mask of a run, for any model and any batches, and no trace of the search."""

import copy
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Chain, composed, drawn, options, pruned_as
from safetensors.torch import load_file, save_file
from torch import Generator, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import pai_bench as pb
from pai_bench import assembly, experiment
from pai_bench.api import version
from pai_bench.core import Batches, Loss, Mask, Round, Scores, Selection, Subnetwork, TrainingLength
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import masks, selection
from pai_bench.pruning import rounds
from pai_bench.system import seeding

SHAPE = (3, 8, 8)


def same(one: Mask, other: Mask) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def random_batches(number: int = 10, size: int = 16, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = Generator().manual_seed(1)
    return [
        (torch.randn(size, *SHAPE, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(number)
    ]


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
            model, cfg.pruner, parts.allocate, parts.rounds, initial=drawn(model),
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
        assert same(pb.prune(model, "snip", sparsity=0.9, data=data), plain)


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


@pytest.mark.parametrize("pruner", ["magnitude", "random"])
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


# Which examples -------------------------------------------------------------------------------------------------------


class Seen:
    """A score that notes what it is given."""

    def __init__(self) -> None:
        self.rounds: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def __call__(self, net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
        self.rounds.append(list(batches))
        return {name: weight.abs() for name, weight in net.weights.items()}


def numbered(size: int, number: int, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose images hold their own number."""
    images = torch.arange(float(size * number)).view(-1, 1, 1, 1).expand(-1, *SHAPE)
    labels = torch.arange(size * number) // 3 % classes
    return list(zip(images.split(size), labels.split(size), strict=True))


def examples_of(data: Any, rounds: int = 1, **settings: Any) -> list[list[int]]:
    """The numbers of the examples that each round sees."""
    seen = Seen()
    given = {f"pruner.scoring_data.{key}": value for key, value in settings.items()}
    schedule = {"schedule": "linear"} if rounds > 1 else {}
    if rounds > 1:
        given["schedule.rounds"] = rounds
    torch.manual_seed(0)
    pb.prune(Chain(), seen, sparsity=0.5, data=data, settings=given, **schedule)
    for batches in seen.rounds:
        for images, labels in batches:
            assert images.dtype == torch.float64 and torch.equal(labels, images[:, 0, 0, 0].long() // 3 % 4)
    return [[int(n) for images, _ in batches for n in images[:, 0, 0, 0]] for batches in seen.rounds]


def test_the_examples_are_the_first_ones_and_each_round_takes_the_next() -> None:
    assert examples_of(numbered(8, 4), total=10) == [list(range(10))]
    assert examples_of(numbered(8, 4), 3, total=10) == [list(range(10)), list(range(10, 20)), list(range(20, 30))]
    # Too few are left for the third round, so it starts over.
    assert examples_of(numbered(8, 3), 3, total=10) == [list(range(10)), list(range(10, 20)), list(range(10))]


def test_examples_are_balanced_where_the_settings_say_so() -> None:
    first = [0, 1, 3, 4, 6, 7, 9, 10]  # two of each class, of which three come in a row
    assert examples_of(numbered(8, 4), total=None, per_class=2) == [first]
    assert examples_of(numbered(8, 4), total=9, balanced=True) == [first]
    assert examples_of(numbered(8, 4), total=None, per_class=2, balanced=False) == [list(range(8))]
    assert examples_of(numbered(8, 4), 2, total=None, per_class=2) == [first, [11, 12, 13, 15, 16, 18, 19, 21]]


def test_batches_are_as_large_as_the_settings_say_and_none_is_of_one_image() -> None:
    seen = Seen()
    sizes = {"pruner.scoring_data.total": 21, "pruner.scoring_data.batch_size": 5}
    pb.prune(Chain(), seen, sparsity=0.5, data=numbered(8, 4), settings=sizes)
    assert [len(labels) for _, labels in seen.rounds[0]] == [5, 5, 5, 6]


def test_what_can_be_walked_once_is_enough_for_one_walk() -> None:
    once: Iterator[Any] = iter(numbered(8, 4))
    assert examples_of(once, total=10) == [list(range(10))]
    with pytest.raises(ConfigError, match=r"data: it ends and cannot be walked again before a round has .*total=10"):
        examples_of(iter(numbered(8, 2)), 2, total=10)


def test_only_as_much_of_a_loader_is_read_as_is_used() -> None:
    read = []

    def endless() -> Iterator[Any]:
        for number in range(1000):
            read.append(number)
            yield numbered(8, 1)[0]

    pb.prune(Chain(), Seen(), sparsity=0.5, data=endless(), settings={"pruner.scoring_data.total": 20})
    assert read == [0, 1, 2]


# Functions in place of names ------------------------------------------------------------------------------------------


def by_size(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, power: float = 1.0) -> Scores:
    return {name: weight.abs() ** power for name, weight in net.weights.items()}


def test_functions_stand_in_for_names(chain: nn.Module) -> None:
    def halves(sparsity: float, length: TrainingLength) -> list[Round]:
        return [Round(sparsity / 2), Round(sparsity)]

    def globally(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        return selection.keep_largest(scores, candidates, keep)

    plain = pb.prune(copy.deepcopy(chain), "magnitude", sparsity=0.8)
    score = partial(by_size, power=2.0)
    assert same(pb.prune(copy.deepcopy(chain), score, sparsity=0.8, schedule=halves, allocation=globally), plain)
    assert same(pb.prune(copy.deepcopy(chain), score, sparsity=0.8, data=random_batches()), plain)
    uniform = pb.prune(copy.deepcopy(chain), score, sparsity=0.8, allocation="uniform")
    assert max(masks.densities(uniform).values()) < 0.22 < max(masks.densities(plain).values())

    def too_many(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        return selection.keep_largest(scores, candidates, keep + 1)

    with pytest.raises(ConfigError, match=r"^allocation: it keeps 126 weights; keep exactly 125$"):
        pb.prune(copy.deepcopy(chain), score, sparsity=0.8, allocation=too_many)


def test_a_setting_can_be_a_path_with_any_letters(chain: nn.Module, tmp_path: Path) -> None:
    other = pb.prune(copy.deepcopy(chain), "synflow", sparsity=0.8, input_shape=SHAPE)
    path = tmp_path / "o'brien's {mask} = 1, 2.safetensors"
    save_file(other, path)
    allocation = {"allocation": "densities_of_mask", "settings": {"allocation.mask": str(path)}}
    mask = pb.prune(chain, "random", sparsity=0.8, **allocation)  # type: ignore[arg-type]
    assert masks.densities(mask) == masks.densities(other) and not same(mask, other)


def test_a_loss_of_ones_own_is_used(chain: nn.Module) -> None:
    data = random_batches()

    def squared(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs - F.one_hot(labels, 4)).square().mean()

    ours = pb.prune(copy.deepcopy(chain), "gradient_norm", sparsity=0.9, data=data, loss=squared)
    net = copy.deepcopy(chain).eval()
    images, labels = (torch.cat(part)[:100] for part in zip(*data, strict=True))
    squared(net(images.double()), labels).backward()
    scores = {name: weight.grad.abs() for name, weight in masks.prunable(net).items()}  # type: ignore[union-attr]
    assert same(ours, selection.keep_largest(scores, masks.full(net), masks.kept(ours)).mask)


def test_a_search_goes_on_from_a_mask_as_iterative_magnitude_pruning_does(chain: nn.Module) -> None:
    mask = None
    for sparsity in (0.3, 0.6, 0.8):
        before = mask
        with torch.no_grad():  # as training would
            chain.fc.weight += 0.01
        mask = pb.prune(chain, "magnitude", sparsity=sparsity, mask=mask)
        assert masks.kept(mask) == masks.num_kept(sparsity, masks.total(mask))
        assert before is None or not any((mask[name] & ~before[name]).any() for name in mask)
    assert mask is not None
    with pytest.raises(ConfigError, match=r"mask: it has sparsity 0\.8.* already, and a round has 0\.5"):
        pb.prune(chain, "magnitude", sparsity=0.5, mask=mask)
    with pytest.raises(ConfigError, match=r"pruner=force cannot go on from one, as weights may return"):
        pb.prune(chain, "force", sparsity=0.9, mask=mask, data=random_batches())


# What is refused ------------------------------------------------------------------------------------------------------

IMAGES = (torch.zeros(100, *SHAPE), torch.zeros(100, dtype=torch.int64))
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("snp", {}, r"^pruner=snp: there is no such option \(did you mean snip\?\)"),
    ("snip,grasp", {}, r"^pruner=snip,grasp: give the name of one option"),
    ("dense", {}, "^pruner=dense: it prunes nothing"),
    ("snip", {}, r"^pruner=snip: its score looks at images; give data="),
    ("synflow", {}, r"^pruner=synflow: it passes an image .* input_shape=\(C, H, W\)"),
    ("synflow", {"input_shape": (1, 8, 8)}, r"^model: Chain does not take inputs of shape \(1, 1, 8, 8\)"),
    ("filter_magnitude", {"input_shape": SHAPE}, "^pruner=filter_magnitude: schedule=front_loaded trains between"),
    ("magnitude", {"schedule": "rewind"}, "^pruner=magnitude: schedule=rewind trains .* or do the whole run with"),
    ("magnitude", {"schedule": "none"}, "^schedule=none: it never prunes"),
    ("magnitude", {"sparsity": None}, "^sparsity: how much is to be pruned"),
    ("magnitude", {"density": 0.5}, r"^sparsity=0\.9 and density=0\.5: they say the same thing"),
    ("magnitude", {"sparsity": 98}, r"^sparsity=98: give a fraction in \[0, 1\)"),
    ("magnitude", {"seed": -1}, "^seed=-1: give 0 or more"),
    ("magnitude", {"settings": {"training.lr": 1}}, r"^settings: 'training\.lr' plays no part here"),
    ("magnitude", {"settings": {"allocation.min_density": 2}}, r"^allocation\.min_density=2: give one in \[0, 1\]"),
    ("snip", {"settings": {"pruner.scoring_data.augment": True}}, "augment' plays no part here"),
    (by_size, {"settings": {"pruner.score.power": 2}}, r"pruner\.score is a function of yours"),  # type: ignore[list-item]
    ("magnitude", {"mask": {"fc.bias": torch.ones(4).bool()}}, "^mask: Chain has no parameter 'fc.bias'"),
    ("magnitude", {"mask": {"norm1.bias": torch.ones(6).bool()}}, "^mask: norm1.bias is no weight that is pruned"),
    ("ntk_sap", {"input_shape": SHAPE}, "^pruner=ntk_sap: it draws new weights .*; give build="),
    ("ntk_sap", {"input_shape": SHAPE, "build": lambda: nn.Linear(2, 2)}, "^build: it makes no Chain with"),
    ("snip", {"data": [IMAGES], "build": Chain}, "^build: pruner=snip draws no weights; leave it out"),
    ("snip", {"data": 5}, "^data: int is no iterable of batches"),
    ("snip", {"data": []}, "^data: it holds no batch"),
    ("snip", {"data": IMAGES}, "^data: a batch is Tensor; .* a single batch goes into a list"),
    ("snip", {"data": [(IMAGES[0][:5], IMAGES[1])]}, r"^data: a batch has images \(5, 3, 8, 8\) and labels \(100,\)"),
    ("snip", {"data": [(IMAGES[0].byte(), IMAGES[1])]}, "^data: images are uint8; give floats"),
    ("snip", {"data": [(IMAGES[0][:50], IMAGES[1][:50])]}, "^data: it ends before .*total=100"),
    ("grasp", {"data": [IMAGES]}, "^data: it ends before .*per_class=10"),
    ("snip", {"data": [(IMAGES[0], IMAGES[1] + 4)]}, "^data: there is a label 4, and the model has 4 outputs"),
    ("snip", {"data": [IMAGES], "input_shape": (1, 8, 8)}, r"^input_shape=\(1, 8, 8\): images of data= have"),
]  # fmt: skip


@pytest.mark.parametrize(("pruner", "more", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_is_wrong_is_one_line_and_changes_nothing(pruner: str, more: dict[str, Any], message: str) -> None:
    model = Chain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message) as raised:
        pb.prune(model, pruner, **{"sparsity": 0.9} | more)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None or not type(raised.value.__cause__).__module__.startswith("hydra")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight - self.layer.weight.mean())


class Two(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.BatchNorm2d(3), "BatchNorm2d has no weight that can be pruned"),
        (nn.LazyLinear(3), "LazyLinear has lazy layers"),
        (Computed(), r"Computed: 1 layers such as layer\.weight \(Linear\) compute what they apply"),
        (Two(8, 4), "Two returns tuple, and a score needs one tensor"),
        (torch_prune.identity(nn.Linear(8, 4), "weight"), "Linear has no weight that can be pruned"),
        ("resnet18", "str is no torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model: {message}"):
        pb.prune(model, "synflow", sparsity=0.5, input_shape=(8,))


def test_a_collapse_is_said(chain: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        chain.conv2.weight.mul_(1e-6)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logging.getLogger("pai_bench"), "propagate", True)
        pb.prune(chain, "magnitude", sparsity=0.8)
    assert "pruner=magnitude: layer collapse: nothing is kept in conv2.weight" in caplog.text


def test_scores_that_cannot_rank_are_an_error(chain: nn.Module) -> None:
    with torch.no_grad():
        chain.fc.weight.zero_()
    with pytest.raises(UserError, match="every score is zero"):
        pb.prune(chain, "synflow", sparsity=0.5, input_shape=SHAPE)


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
    foreign = tmp_path / "pyproject.toml"
    foreign.write_text('[project]\nname = "other"\nversion = "9"\n')
    monkeypatch.setattr(version, "version", lambda name: f"installed {name}")
    assert version._found(foreign) == version._found(tmp_path / "none") == "installed pai_bench"

    def absent(name: str) -> str:
        raise version.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", absent)
    assert version._found(foreign) == "0+unknown"
