"""Scores and masks that serve later runs: the same results as computed anew, and never those of something else."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from safetensors.torch import load_file
from test_resume import TINY, config_of, directory_of, outcome

from pai_bench import experiment, reuse
from pai_bench.reuse import Shelf

RUN = [word for word in TINY if "save_scores" not in word and "epochs=" not in word] + ["training.epochs=1"]


@pytest.fixture(autouse=True)
def however_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_SECONDS", 0.0)


def run(results: Path, *settings: str) -> dict[str, Any]:
    return experiment.run(composed(*RUN, f"results_dir={results}", *settings))


def assert_same_as_anew(row: dict[str, Any], results: Path, anew: Path, *settings: str) -> None:
    fresh = run(anew, "reuse_gb=0", *settings)
    assert fresh["reused"] is None and not (anew / ".reuse").exists()
    differs = {key for key in row if row[key] != fresh[key]}
    assert differs <= {"reused"} | {key for key in row if "seconds" in key or "per_second" in key or "memory" in key}
    masks = [load_file(folder / row["id"] / "mask.safetensors") for folder in (results, anew)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])
    curves = [(folder / row["id"] / "curve.jsonl").read_text().splitlines() for folder in (results, anew)]
    rounds = [[line for line in curve if "prune/round" in line] for curve in curves]
    assert rounds[0] == rounds[1] and rounds[0]


def test_scores_of_one_shot_pruning_serve_every_sparsity(tmp_path: Path) -> None:
    first = run(tmp_path / "a", "pruner=snip", "sparsity=0.5")
    assert first["reused"] is None and len(list((tmp_path / "a" / ".reuse").iterdir())) == 1
    second = run(tmp_path / "a", "pruner=snip", "sparsity=0.8", "allocation=uniform")
    assert second["reused"] == "scores" and second["score_flops"] == first["score_flops"] > 0
    assert second["prune_seconds"] > 0 and second["score_examples"] == first["score_examples"]
    assert_same_as_anew(second, tmp_path / "a", tmp_path / "b", "pruner=snip", "sparsity=0.8", "allocation=uniform")


@pytest.mark.parametrize("pruner", ["synflow", "filter_magnitude"])
def test_the_mask_of_a_search_without_images_serves_other_recipes_and_images(pruner: str, tmp_path: Path) -> None:
    settings = [f"pruner={pruner}", "sparsity=0.6", "schedule=exponential", "schedule.rounds=4"]
    assert run(tmp_path / "a", *settings)["reused"] is None
    more = [*settings, "training.lr=0.05", "dataset.validation=0.1"]
    row = run(tmp_path / "a", *more)
    assert row["reused"] == "mask"
    assert_same_as_anew(row, tmp_path / "a", tmp_path / "b", *more)


SNIP = ["pruner=snip", "sparsity=0.5"]
SYNFLOW = ["pruner=synflow", "sparsity=0.5", "schedule.rounds=3"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SNIP, [*SNIP, "seed=1"]),
        (SNIP, [*SNIP, "pruner.examples.total=64", "pruner.examples.per_class=null"]),
        (SNIP, [*SNIP, "dataset.validation=0.1"]),
        (SNIP, [*SNIP, "model.init.conv=xavier_normal"]),
        (SNIP, [*SNIP, "ablation=random_labels"]),
        (["pruner=grasp", "sparsity=0.5"], ["pruner=grasp", "sparsity=0.5", "pruner.score.temperature=1"]),
        (["pruner=phew", "sparsity=0.5"], ["pruner=phew", "sparsity=0.8"]),  # it walks until it has found enough
        (SYNFLOW, ["pruner=synflow", "sparsity=0.6", "schedule.rounds=3"]),
        (SYNFLOW, ["pruner=synflow", "sparsity=0.5", "schedule.rounds=4"]),
        (SYNFLOW, [*SYNFLOW, "allocation=uniform"]),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_differs_in_anything_that_counts_is_computed_anew(
    one: list[str], other: list[str], tmp_path: Path
) -> None:
    assert run(tmp_path, *one)["reused"] is None
    assert run(tmp_path, *other)["reused"] is None


def test_a_search_that_rescales_weights_is_not_kept_as_a_mask(tmp_path: Path) -> None:
    settings = ["pruner=magnitude", "sparsity=0.5", "schedule=exponential", "schedule.rounds=2", "allocation=sampled"]
    run(tmp_path, *settings, "allocation.rescale=true")
    assert not (tmp_path / ".reuse").exists()


def test_an_ablation_takes_the_mask_beside_it_from_the_shelf(tmp_path: Path) -> None:
    run(tmp_path / "a", *SYNFLOW)
    broken = [*SYNFLOW, "ablation=invert_scores"]
    row = run(tmp_path / "a", *broken)
    assert row["reused"] is None and 0 < row["ablation_overlap"] < 1
    assert_same_as_anew(row, tmp_path / "a", tmp_path / "b", *broken)


def test_a_damaged_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, *SNIP)
    (path,) = (tmp_path / ".reuse").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert run(tmp_path, "pruner=snip", "sparsity=0.8")["reused"] is None
    assert "cannot be read and is computed again" in caplog.text
    assert path.read_bytes() == content or len(path.read_bytes()) == len(content)


def test_the_code_of_a_score_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_method.py").write_text("def score(): ...")
    __import__("my_method")
    before = reuse.code(["my_method.score"])
    assert reuse.code(["my_method.score"]) == before != reuse.code([])
    (tmp_path / "my_method.py").write_text("def score(): return 1")
    assert reuse.code(["my_method.score"]) != before


def test_the_shelf_drops_what_was_used_least_recently(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 3000, {})
    tensor = {"a": torch.zeros(1000, dtype=torch.uint8)}
    for number in range(2):
        shelf.put("scores", {"number": number}, tensor, {})
        os.utime(shelf._path("scores", {"number": number}), (number, number))
    assert shelf.take("scores", {"number": 0}) is not None  # so the other is older now
    shelf.put("scores", {"number": 2}, tensor, {})
    found = [shelf.take("scores", {"number": number}) is not None for number in range(3)]
    assert found == [True, False, True]
    Shelf(tmp_path, 10, {}).put("scores", {"number": 3}, tensor, {})
    assert shelf.take("scores", {"number": 3}) is None


def test_runs_with_images_that_were_kept_are_taken_up_and_end_the_same(tmp_path: Path) -> None:
    """A kept mask changes nothing about what a run leaves."""
    for results in ("a", "b"):
        experiment.run(config_of("synflow", tmp_path / results, "save_scores=false"))
    kept = outcome_without_scores(tmp_path / "a"), outcome_without_scores(tmp_path / "b")
    assert kept[0] == kept[1]


def outcome_without_scores(results: Path) -> dict[str, Any]:
    for hidden in results.glob(".reuse"):
        hidden.rename(results.parent / f"{results.name}-reuse")
    (directory_of(results) / "scores.safetensors").write_bytes(
        (directory_of(results) / "mask.safetensors").read_bytes()
    )
    found = outcome(results)
    return {key: found[key] for key in ("row", "curve", "mask report", "files")}
