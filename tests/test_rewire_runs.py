"""Runs whose mask moves: what they are called, what is refused, what they leave, and that two processes do as one."""

import json
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from processes import in_child
from safetensors.torch import load_file
from whole_runs import TINY, directory_of

from pai_bench import experiment
from pai_bench.config import identity
from pai_bench.config.schema import plain
from pai_bench.core import TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.masks import allocation, masks
from pai_bench.report import configurations, names, reading
from pai_bench.report.configurations import is_dense
from pai_bench.system import seeding
from pai_bench.system.cache import Cache
from pai_bench.training.rewires import rewire_steps

RIGL = ["pruner=random", "sparsity=0.8", "rewire=rigl"]
GRADUAL = ["pruner=dense", "sparsity=0.8", "rewire=gradual"]

# Names ----------------------------------------------------------------------------------------------------------------


def test_a_run_without_a_rewire_has_the_settings_that_it_had() -> None:
    cfg = composed("pruner=snip", "sparsity=0.9")
    assert "rewire" not in identity._counted(plain(cfg), identity.NOT_IDENTITY)
    assert not cfg.rewires and "none" not in cfg.tags and cfg.start_sparsity == 0.9


def test_a_rewire_is_in_the_names_of_a_run() -> None:
    cfg, without = composed(*RIGL), composed("pruner=random", "sparsity=0.8")
    assert "-s0.8-rigl-seed0-" in cfg.id and "-rigl-" in cfg.group and "rigl" in cfg.tags
    assert cfg.task == without.task and cfg.method != without.method
    assert cfg.chain == without.chain  # both train the same networks on the way to their mask
    assert composed(*RIGL, "rewire.end=0.5").id != cfg.id
    itop = ["rewire.rule.drop_fraction=0.5", "rewire.rule.last_drop_fraction=0.005", "rewire.end=1"]
    by_hand = composed(*RIGL, *itop, "rewire.every_steps=4000", "rewire.begin=null", "rewire.skip_step=false")
    assert composed("pruner=random", "sparsity=0.8", "rewire=rigl_itop").method == by_hand.method
    granet = identity._counted(plain(composed("pruner=random", "sparsity=0.8", "rewire=granet")), set())["rewire"]
    assert granet["start_sparsity"] == 0.5 and "reaches_target" not in granet


def test_a_network_that_is_pruned_while_it_trains_is_not_the_dense_one() -> None:
    cfg, dense = composed(*GRADUAL), composed()
    assert cfg.sparsity == 0.8 and cfg.start_sparsity == 0 and cfg.prunes and not dense.prunes
    assert cfg.id != composed(*GRADUAL[::2], "sparsity=0.9").id
    row = {"num_rounds": 0, "mask": None, "target_sparsity": 0}
    assert is_dense(row | {"rewire": "none"}) and not is_dense(row | {"rewire": "gradual"})


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "dense": (["rewire=rigl"], "pruner=dense: rewire=rigl needs a mask to start from; choose another pruner"),
    "a learned mask": (
        ["search=edge_popup", "sparsity=0.9", "rewire=rigl"],
        "search=edge_popup: rewire=rigl does not start from a search; run the search alone, then give its mask with",
    ),
    "a learned mask and a start of its own": (
        ["search=edge_popup", "sparsity=0.9", "rewire=acdc"],
        "search=edge_popup: rewire=acdc does not start from a search; leave search= or rewire= out",
    ),
    "a mask to break that is not there": (
        ["pruner=dense", "sparsity=0.9", "rewire=acdc", "ablation=shuffle_mask"],
        "ablation=shuffle_mask: rewire=acdc starts from the dense network, without a mask to break; choose an ablation",
    ),
    "scores to break that are not there": (
        ["pruner=dense", "sparsity=0.9", "rewire=gradual", "ablation=invert_scores"],
        "ablation=invert_scores: rewire=gradual starts from the dense network, without a mask to break",
    ),
    "nothing to prune to": (["pruner=dense", "rewire=gradual"], "rewire=gradual needs a target: add sparsity=0.9"),
    "scores for nothing": (
        ["pruner=snip", "sparsity=0.9", "rewire=gradual"],
        "pruner=snip: rewire=gradual starts from the dense network, where nothing is scored; use pruner=dense",
    ),
    "sparsity 0": (["pruner=snip", "sparsity=0", "rewire=rigl"], "sparsity=0: rewire=rigl has no mask to move"),
    "denser than the start": (
        ["pruner=random", "sparsity=0.3", "rewire=granet"],
        "rewire.start_sparsity=0.5: the sparsity rises to sparsity=0.3; give at most that",
    ),
    "no training": ([*RIGL, "training.epochs=0"], "rewire=rigl: training.epochs=0 has no step to move a mask at"),
    "filters": (
        ["pruner=filter_magnitude", "sparsity=0.5", "rewire=set"],
        "rewire=set: filters do not return; choose a pruner of weights",
    ),
    "float16": (
        [*RIGL, "training.precision=float16"],
        "training.precision=float16: rewire=rigl ranks gradients, which may overflow there; give bfloat16",
    ),
    "fraction": ([*RIGL, "rewire.rule.drop_fraction=1.5"], r"rewire.rule.drop_fraction=1.5: give one in \[0, 1\]"),
    "begin": ([*RIGL, "rewire.begin=1"], r"rewire.begin=1: give one in \[0, 1\)"),
    "end": ([*RIGL, "rewire.end=1.2"], r"rewire.end=1.2: give one in \[0, 1\]"),
    "begin after end": ([*RIGL, "rewire.begin=0.8"], "rewire.begin=0.8: give less than rewire.end=0.75"),
    "two ways to say when": (
        [*RIGL, "rewire.every_epochs=1"],
        r"rewire.every_steps=100, rewire.every_epochs=1, rewire.at=null: give one of the three and null the others",
    ),
    "never": ([*RIGL, "rewire.every_steps=null"], "give one of the three and null the others"),
    "times": (["pruner=dense", "sparsity=0.5", "rewire=acdc", "rewire.at=[0.5,0.2]"], r"rewire.at=\[0.5,0.2\]: give"),
    "times and an end": (["pruner=dense", "sparsity=0.5", "rewire=acdc", "rewire.end=0.5"], "rewire.at=.*it says when"),
    "a setting of none": (
        ["rewire.every_steps=5"],
        "rewire.every_steps=5: rewire=none moves no mask; choose a rule such as rewire=rigl",
    ),
    "before the mask": (
        [*RIGL, "schedule=early", "schedule.epoch=2"],
        r"rewire.begin=0: with schedule=early the mask is there from epoch 2 of training.epochs=10 on; give 0.2 or",
    ),
    "an interval before the mask": (
        [*RIGL, "rewire.begin=null", "schedule=early", "schedule.epoch=2"],
        r"rewire.begin=null: with schedule=early the mask is there from epoch 2 .* give 0.2 or more",
    ),
    "a time before the mask": (
        [*RIGL, "rewire.every_steps=null", "rewire.end=1", "rewire.at=[0.2,0.5]", "schedule=early", "schedule.epoch=2"],
        r"rewire.at=\[0.2,0.5\]: with schedule=early the mask is there from epoch 2 .* give times above 0.2",
    ),
    "a structure": (
        [*RIGL, "allocation=n_m"],
        "allocation=n_m: rewire=rigl would move weights out of the structure; give another allocation, or rewire=none",
    ),
    "unknown rule": ([*RIGL, "rewire.rule._target_=pai_bench.rewiring.rigl.rules"], "there is no function 'rules'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(name: str) -> None:
    overrides, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said) as raised:
        composed(*overrides)
    assert "\n" not in str(raised.value)


def test_a_given_mask_starts_a_rewire_that_keeps_its_number(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "mask.safetensors"
    save_file({"w": torch.arange(10).view(2, 5) < 3}, path)
    assert composed(f"mask={path}", "rewire=rigl").rewires
    with pytest.raises(ConfigError, match=r"rewire\.start_sparsity=0\.5: mask=.* has a sparsity of its own"):
        composed(f"mask={path}", "rewire=granet")


def test_schedules_that_rewind_leave_the_last_training_to_the_rewire() -> None:
    rewound = ["pruner=magnitude", "sparsity=0.8", "rewire=rigl", "schedule=rewind", "schedule.levels=2"]
    assert composed(*rewound, "schedule.rewind_epoch=0").rewires
    late = composed(*rewound, "schedule.rewind_epoch=2", "rewire.begin=0.2")
    assert rewire_steps(late.rewire, TrainingLength(10, 100))[0] == 200
    with pytest.raises(ConfigError, match=r"rewire\.begin=0: with schedule=rewind the mask is there from epoch 2"):
        composed(*rewound, "schedule.rewind_epoch=2")


# Runs -----------------------------------------------------------------------------------------------------------------


def run(results: Path, *words: str) -> tuple[dict[str, Any], Path]:
    row = experiment.run(composed(*TINY, *words, f"results_dir={results}"))
    return row, results / row["id"]


@pytest.mark.parametrize("rewire", ["rigl", "granet", "gradual"])
def test_what_a_run_leaves(rewire: str, tmp_path: Path) -> None:
    dense = rewire in ("gradual", "acdc")
    rare = [] if rewire == "acdc" else ["rewire.every_steps=3", "rewire.every_epochs=null", "rewire.end=1"]
    start = ["pruner=dense"] if dense else ["pruner=random", "allocation=erk"]
    row, directory = run(tmp_path, *start, "sparsity=0.7", f"rewire={rewire}", *rare)
    mask, weights = (load_file(directory / f"{name}.safetensors") for name in ("mask", "model"))
    kept = sum(int(layer.sum()) for layer in mask.values())
    assert row["num_kept"] == kept == round(0.3 * row["num_prunable"])
    assert not any(weights[name][~layer].any() for name, layer in mask.items())
    report = json.loads((directory / "mask.json").read_text())
    assert report["num_kept"] == kept and sum(layer["kept"] for layer in report["layers"]) == kept
    assert (row["rewire"], row["sparsity"], row["target_sparsity"]) == (rewire, pytest.approx(0.7, abs=1e-3), 0.7)
    assert row["num_rewires"] >= 3 and 0 < row["mean_churn"] < 1 and row["density"] < row["explored"] <= 1
    assert (row["explored"] == 1) == dense
    assert 3 * row["macs_masked"] <= row["train_macs_per_image"] < 3 * row["macs_dense"]
    lines = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
    assert lines[-1]["rewire/density"] == pytest.approx(row["density"])
    assert lines[-1]["rewire/explored"] == pytest.approx(row["explored"])


@pytest.mark.parametrize("every", ["null", "2"])
def test_an_epoch_with_more_weights_than_the_last_is_never_chosen(every: str, tmp_path: Path) -> None:
    words = [*GRADUAL, "sparsity=0.97", "rewire.every_steps=2", "training.epochs=5", "training.warmup_epochs=0"]
    words += ["training.batch_size=64", "training.lr=0.3", "dataset.validation=0.2", f"validate_every_steps={every}"]
    row, directory = run(tmp_path, *words)
    lines = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()][1:]
    wide, small = lines[:3], lines[3:]  # the last rewire lies in the fourth epoch
    assert min(line["rewire/density"] for line in wide) > small[0]["rewire/density"] == small[1]["rewire/density"]
    best, selected = (max(small, key=lambda line: line[key]) for key in ("test_top1", "validation_top1"))
    assert max(line["test_top1"] for line in wide) > best["test_top1"]
    assert max(line["validation_top1"] for line in wide) > selected["validation_top1"]
    assert (row["best_test_top1"], row["best_test_epoch"]) == (best["test_top1"], best["recipe_epoch"])
    assert row["test_top1_at_best_validation"] == selected["test_top1"]
    assert row["selected_epoch"] == selected["recipe_epoch"]
    lowest = min(small, key=lambda line: line["validation_loss"])
    assert min(line["validation_loss"] for line in wide) < lowest["validation_loss"]
    if every == "null":
        assert row["early_stop_epoch"] == lowest["recipe_epoch"]
        assert row["test_top1_at_early_stop"] == lowest["test_top1"]
    else:
        assert [("early_stop_epoch" in line) for line in lines] == [False] * 3 + [True] * 2
        assert 3 < row["early_stop_epoch"] <= 5
        assert small[-1]["lowest_validation_loss"] <= lowest["validation_loss"]


def test_a_run_without_a_rewire_says_so_and_trains_at_the_cost_of_its_mask(tmp_path: Path) -> None:
    row, directory = run(tmp_path, "pruner=magnitude", "sparsity=0.5")
    assert row["rewire"] == "none" and row["train_macs_per_image"] == 3 * row["macs_masked"]
    assert [row[key] for key in ("num_rewires", "explored", "mean_churn")] == [None] * 3
    assert "rewire/density" not in (directory / "curve.jsonl").read_text()


def test_set_that_drops_nothing_ends_with_the_numbers_of_the_static_run(tmp_path: Path) -> None:
    static, one = run(tmp_path, "pruner=snip", "sparsity=0.7")
    still = ["rewire=set", "rewire.rule.drop_fraction=0", "rewire.every_steps=2"]
    moving, other = run(tmp_path, "pruner=snip", "sparsity=0.7", *still)
    for key in ("test_top1", "test_loss", "train_loss", "train_macs_per_image"):
        assert moving[key] == static[key]
    for name in ("mask", "model", "scores"):
        found, expected = (load_file(path / f"{name}.safetensors") for path in (other, one))
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert moving["num_rewires"] > 2 and moving["mean_churn"] == 0
    # Both are methods of a report, with names of their own.
    results = reading.read(tmp_path)
    looks = names.looks(configurations.configurations(results.rows), results.directories)
    assert {"SNIP", "SNIP, set"} <= {look.label for look in looks.values()}


def test_tickets_share_their_search_and_not_the_training_whose_mask_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "worth_keeping", lambda self, seconds: True)
    way = ["pruner=magnitude", "sparsity=0.6", "schedule=rewind", "schedule.levels=1", "schedule.rewind_epoch=0"]
    moving, _ = run(tmp_path, *way, "rewire=rigl", "rewire.every_steps=3")
    static, _ = run(tmp_path, *way)
    assert moving["num_rewires"] > 1 and moving["reused_examples"] == 0
    assert static["reused_examples"] == static["search_train_examples"] == static["train_examples"] > 0


def test_a_network_that_stops_at_a_collapse_moves_nothing(tmp_path: Path) -> None:
    row, directory = run(tmp_path, "pruner=magnitude", "sparsity=0.999", "rewire=rigl", "on_collapse=stop")
    assert row["stopped"] == "collapse" and (directory / "mask.safetensors").is_file()
    assert row["num_rewires"] == 0 and row["mean_churn"] is None and row["train_macs_per_image"] == 0


@pytest.mark.parametrize(
    "rule",
    [
        ["rewire=rigl", "rewire.every_steps=4", "pruner=random"],
        ["rewire=set", "rewire.every_steps=4", "pruner=random"],
        ["rewire=snfs", "rewire.every_steps=4", "pruner=random"],
        ["rewire=granet", "rewire.every_steps=3", "pruner=random"],
        ["rewire=gradual", "rewire.every_steps=4", "pruner=dense"],
        ["rewire=acdc", "rewire.at=[0.2,0.4,0.6]", "pruner=dense"],
    ],
    ids=lambda rule: rule[0],
)
def test_two_processes_move_the_mask_as_one(rule: list[str], tmp_path: Path) -> None:
    """In forks, which spare the time of importing torch. A small step, or training amplifies what rounding changes."""
    words = [*TINY, "sparsity=0.6", "training.lr=0.001", *rule]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def work(rank: int, size: int) -> None:
        if size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        experiment.run(composed(*words, f"results_dir={tmp_path / str(size)}"))

    started = [in_child(partial(work, *one)) for one in ((0, 1), (0, 2), (1, 2))]
    assert [os.waitpid(pid, 0)[1] for pid in started] == [0, 0, 0]
    directories = [directory_of(tmp_path / size) for size in ("1", "2")]
    rows = [json.loads((directory / "result.json").read_text()) for directory in directories]
    assert [row["num_processes"] for row in rows] == [1, 2]
    for key in ("num_kept", "num_rewires", "train_macs_per_image"):
        assert rows[0][key] == rows[1][key]
    one, two = (load_file(directory / "mask.safetensors") for directory in directories)
    assert rows[0]["mean_churn"] > 0
    assert sum(int((one[name] != kept).sum()) for name, kept in two.items()) == 0


@pytest.mark.parametrize(
    "more",
    [
        ["pruner=random", "rewire.start_sparsity=0.6"],
        ["pruner=random", "rewire.start_sparsity=null"],
        ["pruner=random", "schedule=rewind", "schedule.levels=2", "rewire.start_sparsity=0.6"],
        ["pruner=random", "ablation=reinit", "rewire.start_sparsity=0.6"],
    ],
    ids=" ".join,
)
def test_gradual_pruning_ends_at_the_largest_weights_whatever_the_start_mask_was(
    more: list[str], tmp_path: Path
) -> None:
    """With a rate that moves no weight: those that the start mask prunes have the values that they were drawn with."""
    words = ["sparsity=0.7", "rewire=gradual", "rewire.every_steps=2", *more]
    still = ["training.lr=1e-30", "training.weight_decay=0"]
    _, directory = run(tmp_path, *words, *still)
    mask = load_file(directory / "mask.safetensors")
    config = composed(*TINY, *words, *still)
    with seeding.seeded(config.seed, "reinit" if "ablation=reinit" in more else "init"):
        model = config.model((1, 8, 8), 10)
    weights = {name: weight.detach().abs() for name, weight in masks.prunable(model).items()}
    keep = masks.num_kept(0.7, masks.total(weights))
    largest = allocation.uniform(weights, masks.full(model), keep, torch.Generator()).mask
    assert all(torch.equal(mask[name], kept) for name, kept in largest.items())
