"""The examples of docs/adding.md, as they stand: each is written to disk, composed and run."""

import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench import assembly, experiment
from pai_bench.core import Batches, Mask, Round, Subnetwork, TrainingLength
from pai_bench.launch import compose
from pai_bench.masks import masks
from pai_bench.published import numbers
from pai_bench.published.matching import compare
from pai_bench.published.verdicts import DEVIATES, REPRODUCED, UNDERPOWERED, Rule
from pai_bench.rewiring.rewire import RewireProgress
from pai_bench.runs import row as rows
from pai_bench.training.optimizer import Optimizer

PAGE = (ROOT / "docs" / "adding.md").read_text()
SECTIONS = {title: text for title, _, text in (part.partition("\n") for part in PAGE.split("\n## ")[1:])}
BLOCKS = re.findall(r"^`([\w./]+)`\n\n```(python|yaml|diff)\n(.*?)^```", PAGE, re.M | re.S)
FILES = {path: text for path, kind, text in BLOCKS if kind != "diff"}
DIFFS = {path: text for path, kind, text in BLOCKS if kind == "diff"}
COMMANDS = re.findall(r"^    pai-bench (?!report|verify)(.*)$", PAGE, re.M)
SMALL = ["model=resnet8_thin", "training=smoke", "training.epochs=0", "tracker=none", "device=cpu"]


def elsewhere(text: str) -> str:
    """A text in which the new modules lie in a package `added`, beside pai_bench."""
    for path in FILES:
        if path.endswith(".py"):
            module = path.removesuffix(".py").replace("/", ".")
            text = text.replace(module, module.replace("pai_bench", "added", 1))
    return text


@dataclass(frozen=True)
class Added:
    """A folder with every file of the page, and where runs go."""

    folder: Path
    results: Path

    def words(self, command: str, *more: str) -> list[str]:
        """The words of a command of the page, and more of them. What stands first counts."""
        assert command in COMMANDS, command
        words = {word.partition("=")[0]: word for word in reversed([*shlex.split(command), *more])}
        return [f"hydra.searchpath=[file://{self.folder / 'conf'}]", *words.values()]

    def run(self, command: str, *more: str) -> tuple[dict[str, Any], Path]:
        """What a command of the page comes to, on a small network: the row, and the run directory."""
        cfg = compose.compose(self.words(command, *more, *SMALL, f"results_dir={self.results}"))
        return experiment.run(cfg), cfg.directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every new file of the page, its modules importable."""
    folder = tmp_path_factory.mktemp("adding")
    for path, text in FILES.items():
        file = folder / re.sub("^pai_bench/", "added/", path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(elsewhere(text))
    for directory in (folder / "added", *(path for path in (folder / "added").rglob("*") if path.is_dir())):
        (directory / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "added"]:
        del sys.modules[name]


@pytest.fixture
def added(folder: Path, tmp_path: Path) -> Added:
    return Added(folder, tmp_path / "results")


def patched(module: ModuleType, path: str) -> ModuleType:
    """A module with the changes that the page makes to it. The lines that it shows unchanged or removes are there."""
    source = (ROOT / path).read_text()
    for hunk in DIFFS[path].split("@@\n"):
        before, after = (
            "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in kept) for kept in (" -", " +")
        )
        found = re.search("^" + re.sub(r"(?m)^ +", r" *", re.escape(before).replace(r"\ ", " ")), source, re.M)
        assert found, f"{path} has no such lines:\n{before}"
        indent = re.match(" *", found[0])[0].removeprefix(re.match(" *", before)[0])  # type: ignore[index]
        source = source.replace(found[0], "".join(indent + line for line in after.splitlines(keepends=True)))
    changed = ModuleType(module.__name__)
    sys.modules[changed.__name__], before_it = changed, module  # dataclasses look their module up
    try:
        exec(compile(elsewhere(source), path, "exec"), vars(changed))
    finally:
        sys.modules[changed.__name__] = before_it
    return changed


def kept_of(directory: Path) -> Mask:
    return load_file(directory / "mask.safetensors")


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]


def test_the_page_names_files_that_exist_or_are_on_it() -> None:
    named = set(re.findall(r"`((?:pai_bench|conf|tests|docs|scripts)/[\w./]*)`", PAGE))
    assert len(named) > 40
    assert not [path for path in named if path not in FILES and not (ROOT / path).exists()]
    assert not [path for path in FILES if (ROOT / path).exists()], "an example is not yet there"


def test_every_kind_of_addition_has_an_example_and_says_what_tests_it() -> None:
    kinds = {title for title in SECTIONS if title.startswith("Adding ")}
    assert len(kinds) == 14
    for kind in kinds:
        assert "**Tests that apply at once:**" in SECTIONS[kind], kind
        assert re.findall(r"`tests/test_\w+\.py`", SECTIONS[kind]), kind
        assert any(f"`{path}`\n\n```" in SECTIONS[kind] for path in (*FILES, *DIFFS)), kind
        anchor = kind.lower().replace(" ", "-")
        assert f"](#{anchor})" in PAGE, anchor


def test_a_pruner(added: Added, batches: Batches) -> None:
    command = "pruner=gradient_power sparsity=0.9"
    score = compose.compose(added.words(command, "pruner.score.power=2")).pruner.score
    assert score is not None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    net = Subnetwork(model, masks.full(model), {}, (3, 8, 8))
    scores = score(net, batches, F.cross_entropy, Generator())
    F.cross_entropy(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])).backward()
    torch.testing.assert_close(scores["0.weight"], model[0].weight.grad.square())

    row, directory = added.run(command)
    assert (row["pruner"], row["score_examples"]) == ("gradient_power", 100)
    assert masks.kept(kept_of(directory)) == row["num_kept"] == round(0.1 * row["num_prunable"])


def test_a_setting_out_of_its_range_is_refused(added: Added) -> None:
    from pai_bench.errors import ConfigError

    with pytest.raises(ConfigError, match=r"pruner\.score\.power=-1: give 0 or more"):
        compose.compose(added.words("pruner=gradient_power sparsity=0.9", "pruner.score.power=-1"))


def test_an_allocation(added: Added) -> None:
    command = "pruner=magnitude sparsity=0.9 allocation=by_size"
    allocate = compose.compose(added.words(command)).allocation
    sizes = {"small": 100, "medium": 400, "large": 900}
    scores = {name: torch.arange(size, dtype=torch.float64) for name, size in sizes.items()}
    candidates = {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
    mask = allocate(scores, candidates, 60, Generator()).mask
    assert {name: int(kept.sum()) for name, kept in mask.items()} == {"small": 10, "medium": 20, "large": 30}
    assert mask["medium"][-20:].all()

    row, directory = added.run(command)
    mask = kept_of(directory)
    shares = {name: int(kept.sum()) / math.sqrt(kept.numel()) for name, kept in mask.items()}
    open_layers = [name for name, kept in mask.items() if not kept.all()]
    assert masks.kept(mask) == row["num_kept"] == round(0.1 * row["num_prunable"])
    for name in open_layers:
        assert abs(shares[name] - shares[open_layers[0]]) < 2 / math.sqrt(min(mask[one].numel() for one in open_layers))


def test_a_schedule(added: Added) -> None:
    command = "pruner=magnitude sparsity=0.9 schedule=fixed_rate schedule.rate=0.5"
    schedule = compose.compose(added.words(command)).schedule
    assert schedule(0.9, TrainingLength(1, 1)) == [Round(0.5), Round(0.75), Round(0.875), Round(0.9)]
    assert schedule(0.3, TrainingLength(1, 1)) == [Round(0.3)]

    row, directory = added.run(command)
    total = row["num_prunable"]
    reached = [line["prune/sparsity"] for line in lines_of(directory) if "prune/sparsity" in line]
    assert [total - round(sparsity * total) for sparsity in reached] == [
        round(density * total) for density in (0.5, 0.25, 0.125, 0.1)
    ]


def test_an_ablation(added: Added) -> None:
    command = "pruner=magnitude sparsity=0.9 ablation=random_signs"
    hook = compose.compose(added.words(command)).ablation.weights
    assert hook is not None
    state = {"weight": torch.randn(1000), "bias": torch.randn(10)}
    mask = {"weight": torch.ones(1000, dtype=torch.bool)}
    changed = hook(state, {}, mask, Generator().manual_seed(0))
    assert torch.equal(changed["weight"].abs(), state["weight"].abs()) and changed["bias"] is state["bias"]
    assert 0.4 < float((changed["weight"] == state["weight"]).double().mean()) < 0.6

    row, directory = added.run(command)
    plain, without = added.run("pruner=magnitude sparsity=0.9 diagnostics=layer_norms")
    assert (row["ablation"], plain["ablation"]) == ("random_signs", "none")
    ours, theirs, mask = weights_of(directory), weights_of(without), kept_of(directory)
    assert all(torch.equal(kept, mask[name]) for name, kept in kept_of(without).items())
    assert all(torch.equal(ours[name].abs(), theirs[name].abs()) for name in mask)
    same = sum(int((ours[name] == theirs[name])[kept].sum()) for name, kept in mask.items())
    assert row["ablation_overlap"] == same / row["num_kept"] and 0.4 < row["ablation_overlap"] < 0.6


def test_a_learned_search(added: Added) -> None:
    command = "search=magnitude_popup sparsity=0.5"
    settings = compose.compose(added.words(command)).search
    assert settings is not None and settings.epochs == 100
    weight = torch.tensor([[0.5, -2.0]])
    assert settings.method().draw(weight, Generator()).tolist() == [[0.5, 2.0]]

    row, directory = added.run(command, "search.epochs=1")
    untouched, _ = added.run(command, "search.epochs=1", "search.lr=1e-30")
    assert row["pruner"] == "magnitude_popup" and row["test_top1"] == row["strong_test_top1"]
    assert row["num_kept"] == untouched["num_kept"] == masks.kept(kept_of(directory))
    cfg = compose.compose(added.words(command, *SMALL))
    weights = masks.prunable(assembly.assembled(cfg, torch.device("cpu")).build("init"))
    sizes = {name: weight.detach().abs() for name, weight in weights.items()}
    full = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    largest = cfg.allocation(sizes, full, row["num_kept"], Generator()).mask
    of_start = kept_of(added.results / untouched["id"])
    assert all(torch.equal(kept, of_start[name]) for name, kept in largest.items())
    assert any(not torch.equal(kept, of_start[name]) for name, kept in kept_of(directory).items())


def test_a_rewiring_rule(added: Added) -> None:
    command = "pruner=random allocation=erk rewire=against_the_sign sparsity=0.9"
    rule = compose.compose(added.words(command, "rewire.rule.drop_fraction=0.5")).rewire.rule
    assert rule is not None
    weights, mask = {"w": torch.tensor([2.0, -1.0, 0.0, 0.0])}, {"w": torch.tensor([True, True, False, False])}
    gradients = {"w": torch.tensor([15.0, 5.0, 4.0, -20.0])}  # 2 becomes 0.5, and -1 becomes -1.5
    progress = RewireProgress(1, False, 0.0, 0.0, {"w": 2}, 2)
    assert rule(weights, gradients, {}, mask, progress, Generator())["w"].tolist() == [False, True, False, True]

    row, directory = added.run(command, "training.epochs=1", "rewire.every_steps=3")
    assert row["rewire"] == "against_the_sign" and row["num_rewires"] > 1 and row["mean_churn"] > 0
    assert masks.kept(kept_of(directory)) == row["num_kept"] == round(0.1 * row["num_prunable"])


def test_a_transfer(added: Added) -> None:
    command = "pruner=magnitude sparsity=0.9 transfer=signed_constant"
    rule = compose.compose(added.words(command, "transfer.scale=2")).transfer
    assert rule is not None
    weight = torch.tensor([[1.0, -2.0], [4.0, 0.5]])
    found = rule({"w": weight}, {}, {}, Generator())["w"]
    torch.testing.assert_close(found, 2 * weight.std() * torch.tensor([[1.0, -1.0], [1.0, 1.0]]))

    row, directory = added.run(command)
    weights, mask = weights_of(directory), kept_of(directory)
    assert (row["transfer"], row["transfer_overlap"], row["sign_agreement"]) == ("signed_constant", 1.0, 1.0)
    for name, kept in mask.items():
        assert not weights[name][~kept].any()
        assert len(weights[name].abs().unique()) <= 2 and weights[name].any() == kept.any()


def test_a_model(added: Added) -> None:
    row, directory = added.run("model=pooled pruner=magnitude sparsity=0.5", "training.epochs=1")
    assert (row["model"], row["num_prunable"], row["num_kept"]) == ("pooled", 72 + 1152 + 160, 692)
    assert {name: tuple(kept.shape) for name, kept in kept_of(directory).items()} == {
        "0.weight": (8, 1, 3, 3),
        "3.weight": (16, 8, 3, 3),
        "8.weight": (10, 16),
    }


def test_a_dataset(added: Added, tmp_path: Path) -> None:
    from pai_bench.errors import DataError

    drawn = np.random.default_rng(0)
    parts: dict[str, Any] = {}
    for split, number in (("train", 60), ("test", 20)):
        parts[f"{split}_labels"] = np.arange(number) % 3
        parts[f"{split}_images"] = drawn.integers(0, 256, (number, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", **parts)
    root = f"dataset.root={tmp_path / 'mine.npz'}"
    command = "dataset=arrays dataset.root=PATH"
    words = [*added.words(command, *SMALL, f"results_dir={added.results}"), root, "training.epochs=1"]
    cfg = compose.compose(words)
    row = experiment.run(cfg)
    assert (row["dataset"], row["input_shape"], row["num_classes"]) == ("arrays", (3, 12, 12), 3)
    assert row["train_examples"] == 60
    data = assembly.load_data(cfg, torch.device("cpu"))
    assert data.num_examples == {"train": 60, "validation": 0, "test": 20}
    with pytest.raises(DataError, match=r"dataset\.root=PATH: it cannot be read"):
        assembly.load_data(compose.compose(words[:-2]), torch.device("cpu"))


def test_an_optimizer_and_a_recipe(added: Added) -> None:
    recipe = compose.compose(added.words("training=digits_lion")).training
    by_hand = compose.compose(
        added.words("training/optimizer=lion training.lr=1e-3 training.weight_decay=1e-2")
    ).training
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == (by_hand.optimizer, 1e-3, 1e-2)
    assert (recipe.name, by_hand.name, recipe.epochs) == ("digits_lion", "digits", 10)

    weight = nn.Parameter(torch.tensor([1.0, -1.0, 2.0, 3.0]))
    optimizer = Optimizer(recipe.optimizer(), [({"weight": weight}, 0.1)], lr=0.5)
    optimizer.apply_mask({"weight": torch.tensor([True, True, True, False])})
    weight.grad = torch.tensor([4.0, -2.0, 0.0, 5.0])
    optimizer.step()  # w - lr (sign(g) + decay w)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.45, -0.45, 1.9, 0.0]))
    torch.testing.assert_close(optimizer.state["mean"]["weight"], torch.tensor([0.04, -0.02, 0.0, 0.0]))
    weight.grad = torch.tensor([-0.1, -2.0, 0.0, 5.0])
    optimizer.step()  # 0.9 * 0.04 - 0.1 * 0.1 > 0: the mean decides
    assert float(weight.detach()[0]) == pytest.approx(0.45 - 0.5 * (1 + 0.045)) and weight[3] == 0

    row, directory = added.run("training=digits_lion", "pruner=magnitude", "sparsity=0.5", "training.epochs=1")
    weights, mask = weights_of(directory), kept_of(directory)
    assert (row["training"], row["train_examples"]) == ("digits_lion", 1438)
    assert all(not weights[name][~kept].any() for name, kept in mask.items())


def test_a_curve(added: Added) -> None:
    _, directory = added.run("pruner=magnitude sparsity=0.9 diagnostics=layer_norms", "training.epochs=1")
    weights, lines = weights_of(directory), lines_of(directory)
    evaluated = [line for line in lines if "test_top1" in line]
    assert len(evaluated) == 2
    for name in kept_of(directory):
        assert evaluated[-1][f"norm/{name}"] == pytest.approx(float(weights[name].norm()))
        assert evaluated[0][f"norm/{name}"] != evaluated[-1][f"norm/{name}"]
    (around,) = (line for line in lines if "prune/round" in line)
    assert around["after/norm/fc.weight"] < around["before/norm/fc.weight"]


def test_a_tracker(added: Added, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = "pruner=magnitude sparsity=0.9 tracker=one_file tracker.path=all.jsonl"
    rows_of = [added.run(command, f"seed={seed}")[0] for seed in (0, 1)]
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows_of]
    assert json.loads(json.dumps(rows_of)) == lines
    added.run(command, "seed=1")  # is finished already
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2


def test_a_column(added: Added, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "rows", patched(rows, "pai_bench/runs/row.py"))
    row, directory = added.run("pruner=gradient_power sparsity=0.9")
    densities = [layer["density"] for layer in json.loads((directory / "mask.json").read_text())["layers"]]
    assert row["smallest_density"] == min(densities) < 0.1
    assert json.loads((directory / "result.json").read_text())["smallest_density"] == min(densities)
    columns = list(row)
    assert columns[columns.index("smallest_density") - 1] == "num_tied"


def test_an_experiment_with_a_published_number(added: Added, tmp_path: Path) -> None:
    cfgs, _ = compose.expand(added.words("experiment=digits_table", *SMALL[2:], f"results_dir={added.results}"))
    assert len({cfg.id for cfg in cfgs}) == int(re.search(r"# Runs +(\d+):", PAGE)[1]) == 4  # type: ignore[index]
    found = [experiment.run(cfg) for cfg in cfgs if cfg.sparsity == 0.5]
    # The recipe finds the experiment where this test has put it, and does not train either.
    searched = f'"hydra.searchpath=[file://{added.folder / "conf"}]", training.epochs=0'
    paper = FILES["pai_bench/published/papers/somebody.yaml"]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "somebody.yaml").write_text(
        paper.replace("[experiment=digits_table]", f"[{searched}, experiment=digits_table]")
    )
    published = numbers.read(tmp_path / "papers")
    assert [(number.value, number.sd, number.target) for number in published] == [
        (0.95, pytest.approx(0.01), "sparsity=0.5"),
        (0.6, pytest.approx(0.05), "sparsity=0.9"),
    ]
    of_half, of_tenth = compare(published, found, added.results, Rule())
    assert of_half.name in (REPRODUCED, DEVIATES, UNDERPOWERED) and of_tenth.name == "MISSING"
    assert of_half.ours is not None
    assert of_half.ours.mean == pytest.approx(sum(row["test_top1"] for row in found) / 2)


def test_commands_of_the_page_are_run_here() -> None:
    source = Path(__file__).read_text()
    assert len(COMMANDS) == len(set(COMMANDS)) == 14
    assert not [command for command in COMMANDS if f'"{command}"' not in source]
