"""Scores and masks that serve later runs: the same results as computed anew, and never those of something else."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain, composed
from safetensors.torch import load_file
from whole_runs import TINY, config_of, directory_of, outcome

from pai_bench import experiment
from pai_bench.core import Subnetwork
from pai_bench.masks import masks
from pai_bench.pruning import reuse
from pai_bench.system import cache, files
from pai_bench.system.cache import Cache, code, fingerprint

RUN = [word for word in TINY if "save_scores" not in word and "epochs=" not in word] + ["training.epochs=1"]


@pytest.fixture(autouse=True)
def however_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pai_bench.system.cache._SECONDS", 0.0)


def run(results: Path, *settings: str) -> dict[str, Any]:
    return experiment.run(composed(*RUN, f"results_dir={results}", *settings))


def assert_same_as_anew(row: dict[str, Any], results: Path, anew: Path, *settings: str) -> None:
    fresh = run(anew, "cache_gb=0", *settings)
    assert fresh["cache_hit"] is None and not (anew / ".cache").exists()
    differs = {key for key in row if row[key] != fresh[key]}
    assert differs <= {"cache_hit"} | {key for key in row if "seconds" in key or "per_second" in key or "memory" in key}
    masks = [load_file(folder / row["id"] / "mask.safetensors") for folder in (results, anew)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])
    curves = [(folder / row["id"] / "curve.jsonl").read_text().splitlines() for folder in (results, anew)]
    rounds = [[line for line in curve if "prune/round" in line] for curve in curves]
    assert rounds[0] == rounds[1] and rounds[0]


def test_scores_of_one_shot_pruning_serve_every_sparsity(tmp_path: Path) -> None:
    first = run(tmp_path / "a", "pruner=snip", "sparsity=0.5")
    assert first["cache_hit"] is None and len(list((tmp_path / "a" / ".cache").iterdir())) == 1
    second = run(tmp_path / "a", "pruner=snip", "sparsity=0.8", "allocation=uniform")
    assert second["cache_hit"] == "scores" and second["score_flops"] == first["score_flops"] > 0
    assert second["prune_seconds"] > 0 and second["score_examples"] == first["score_examples"]
    assert_same_as_anew(second, tmp_path / "a", tmp_path / "b", "pruner=snip", "sparsity=0.8", "allocation=uniform")


# Without images, with the labels of a batch, in train mode, with second derivatives, at random, with drawn weights, and
# of filters.
@pytest.mark.parametrize(
    "pruner", ["magnitude", "synflow", "grasp", "random", "ntk_sap", "prospr", "filter_magnitude", "snip mode=train"]
)
def test_cached_scores_give_what_computed_ones_give(pruner: str, tmp_path: Path) -> None:
    name, *mode = pruner.split()
    settings = [f"pruner={name}", "schedule=one_shot", "sparsity=0.5", *(f"pruner.{word}" for word in mode)]
    assert run(tmp_path / "a", *settings)["cache_hit"] is None
    more = [*settings, "sparsity=0.7"]
    row = run(tmp_path / "a", *more)
    assert row["cache_hit"] == "scores"
    assert_same_as_anew(row, tmp_path / "a", tmp_path / "b", *more)


def test_the_mask_of_a_search_with_passes_is_kept_with_their_costs(tmp_path: Path) -> None:
    mode = ["pruner=snip", "pruner.mode=eval_after_pass", "+pruner.pass_images=64", "sparsity=0.6"]
    assert run(tmp_path / "a", *mode)["score_examples"] == 100 + 64
    assert not (tmp_path / "a" / ".cache").exists()
    rounds = [*mode, "schedule=exponential", "schedule.rounds=2"]
    first = run(tmp_path / "a", *rounds)
    assert first["cache_hit"] is None and first["score_examples"] == 2 * (100 + 64)
    more = [*rounds, "training.lr=0.05"]
    second = run(tmp_path / "a", *more)
    assert second["cache_hit"] == "mask"
    assert_same_as_anew(second, tmp_path / "a", tmp_path / "b", *more)


def test_how_weights_are_drawn_counts_where_a_score_draws_them(tmp_path: Path) -> None:
    settings = ["pruner=ntk_sap", "sparsity=0.6", "schedule.rounds=2", "pruner.score.repeats=1"]
    drawn = run(tmp_path, *settings, "save_model=true")
    weights = f"weights={tmp_path / drawn['id'] / 'model.safetensors'}"
    assert run(tmp_path, *settings, weights)["cache_hit"] is None
    assert run(tmp_path, *settings, weights, "training.lr=0.05")["cache_hit"] == "mask"
    assert run(tmp_path, *settings, weights, "model.init.conv=xavier_normal")["cache_hit"] is None


@pytest.mark.parametrize("pruner", ["synflow", "filter_magnitude"])
def test_the_mask_of_a_search_without_images_serves_other_recipes_and_images(pruner: str, tmp_path: Path) -> None:
    settings = [f"pruner={pruner}", "sparsity=0.6", "schedule=exponential", "schedule.rounds=4"]
    assert run(tmp_path / "a", *settings)["cache_hit"] is None
    more = [*settings, "training.lr=0.05", "dataset.validation=0.1"]
    row = run(tmp_path / "a", *more)
    assert row["cache_hit"] == "mask"
    assert_same_as_anew(row, tmp_path / "a", tmp_path / "b", *more)


SNIP = ["pruner=snip", "sparsity=0.5"]
SYNFLOW = ["pruner=synflow", "sparsity=0.5", "schedule.rounds=3"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SNIP, [*SNIP, "seed=1"]),
        (SNIP, [*SNIP, "pruner.scoring_data.total=64", "pruner.scoring_data.per_class=null"]),
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
    assert run(tmp_path, *one)["cache_hit"] is None
    assert run(tmp_path, *other)["cache_hit"] is None


def test_a_table_of_densities_that_has_changed_is_another_allocation(tmp_path: Path) -> None:
    table = tmp_path / "densities.csv"
    settings = [*SYNFLOW, "allocation=densities_of_file", f"allocation.file={table}"]
    first = uniform_table(table, {})
    assert run(tmp_path / "a", *settings)["cache_hit"] is None
    assert run(tmp_path / "a", *settings, "training.lr=0.05")["cache_hit"] == "mask"
    uniform_table(table, {first: 0.5})
    more = [*settings, "training.lr=0.025"]
    row = run(tmp_path / "a", *more)
    assert row["cache_hit"] is None
    assert_same_as_anew(row, tmp_path / "a", tmp_path / "b", *more)


def uniform_table(path: Path, other: dict[str, float]) -> str:
    """Writes density 1 for all layers of the small network but some, and returns the name of its first layer."""
    names = masks.prunable(composed(*RUN, *SNIP).model((1, 8, 8), 10))
    path.write_text("name,density\n" + "".join(f"{name},{other.get(name, 1.0)}\n" for name in names))
    return next(iter(names))


def test_what_changes_the_passes_and_no_tensor_counts(tmp_path: Path) -> None:
    wide = ["model=wrn16_8", "model.depth=10", "model.width=2", "pruner=snip", "pruner.mode=train", "sparsity=0.5"]
    words = [word for word in RUN if not word.startswith("model.")]
    for dropout in (0.0, 0.3):
        row = experiment.run(composed(*words, *wide, f"results_dir={tmp_path}", f"model.dropout={dropout}"))
        assert row["cache_hit"] is None
    assert len(list((tmp_path / ".cache").iterdir())) == 2


def test_a_search_that_rescales_weights_is_not_kept_as_a_mask(tmp_path: Path) -> None:
    settings = ["pruner=magnitude", "sparsity=0.5", "schedule=exponential", "schedule.rounds=2", "allocation=sampled"]
    run(tmp_path, *settings, "allocation.rescale=true")
    assert not (tmp_path / ".cache").exists()


def test_an_ablation_takes_the_mask_beside_it_from_the_cache(tmp_path: Path) -> None:
    run(tmp_path / "a", *SYNFLOW)
    broken = [*SYNFLOW, "ablation=invert_scores"]
    row = run(tmp_path / "a", *broken)
    assert row["cache_hit"] is None and 0 < row["ablation_overlap"] < 1
    assert_same_as_anew(row, tmp_path / "a", tmp_path / "b", *broken)


def test_a_damaged_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, *SNIP)
    (path,) = (tmp_path / ".cache").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert run(tmp_path, "pruner=snip", "sparsity=0.8")["cache_hit"] is None
    assert "cannot be read and is computed again" in caplog.text
    assert run(tmp_path, "pruner=snip", "sparsity=0.9")["cache_hit"] == "scores"


@pytest.mark.parametrize("notes", ["", "[]", "{}", "null", "{", '{"seconds": "x", "num_examples": 1, "flops": 1}'])
def test_an_entry_without_its_notes_is_computed_again(
    notes: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, cache = Chain(), Cache(tmp_path, 10**6, {})
    scores = {name: torch.ones_like(weight) for name, weight in masks.prunable(model).items()}
    costs = {"seconds": 2.0, "num_examples": 10, "flops": 7}
    cache.put("scores", {}, scores, costs)
    found = reuse.scores(cache, model)
    assert found is not None and found[1] == costs and found[0].keys() == scores.keys()
    (path,) = tmp_path.iterdir()
    path.write_bytes(files.tensor_bytes(scores, notes))
    assert reuse.scores(cache, model) is None and f"{path} cannot be read and is computed again" in caplog.text
    other = {"other": torch.ones(2)}
    path.write_bytes(files.tensor_bytes(other, json.dumps(costs | {"checksum": fingerprint(other)})))
    assert reuse.scores(cache, model) is None and "not those of this network" in caplog.text


def test_an_entry_with_a_flipped_bit_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, 10**6, {})
    cache.put("scores", {"number": 0}, {"a": torch.ones(100)}, {})
    assert taken(cache, 0)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not taken(cache, 0) and "its checksum is another" in caplog.text


def test_one_entry_of_scores_serves_all_that_comes_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other hooks, allocations and sparsities; and no images are drawn for scores that are there."""
    run(tmp_path / "a", *SNIP)

    def no_images(*_: object) -> None:
        raise AssertionError("scoring images were drawn")

    after = ["ablation=shuffle_mask", "ablation=invert_scores", "ablation=reinit", "allocation=uniform"]
    with monkeypatch.context() as patched:
        patched.setattr("pai_bench.data.resident.Resident.draw", no_images)
        patched.setattr(experiment, "_has_signal", lambda *_: True)
        rows = [run(tmp_path / "a", *SNIP, setting) for setting in after]
    assert [row["cache_hit"] for row in rows] == ["scores"] * len(after)
    assert len(list((tmp_path / "a" / ".cache").iterdir())) == 1
    assert run(tmp_path / "a", *SNIP, "ablation=random_labels")["cache_hit"] is None
    assert len(list((tmp_path / "a" / ".cache").iterdir())) == 2
    assert_same_as_anew(rows[0], tmp_path / "a", tmp_path / "b", *SNIP, after[0])


def test_costs_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = [0.0]
    monkeypatch.setattr("pai_bench.pruning.reuse.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("pai_bench.system.devices.wait", lambda device: clock.append(clock.pop() + 100))
    model, cache = Chain(), Cache(tmp_path, 10**6, {})
    net = Subnetwork(model, masks.full(model), masks.prunable(model), (3, 8, 8))
    ones = {name: torch.ones_like(weight) for name, weight in net.weights.items()}
    reuse.CachedScore(lambda *_: ones, cache)(net, [], torch.nn.functional.cross_entropy, torch.Generator())
    found = reuse.scores(cache, model)
    assert found is not None and found[1]["seconds"] == 100


def test_the_code_of_a_score_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cache, "_as_imported", dict(cache._as_imported))
    (tmp_path / "my_method.py").write_text("def score(): ...")
    __import__("my_method")
    before = code(["my_method.score"])
    assert code(["my_method.score"]) == before != code([])
    (tmp_path / "my_method.py").write_text("def score(): return 1")
    assert code(["my_method.score"]) == before  # this process goes on with what it has imported
    kept = Cache(tmp_path / "cache", 10**6, {})
    kept.put("scores", {"number": 1}, {"a": torch.zeros(3)}, {})
    assert not taken(kept, 1) and "my_method.py has changed since this process began" in caplog.text
    monkeypatch.setattr(cache, "_as_imported", {})  # as in the next process
    assert code(["my_method.score"]) != before
    kept.put("scores", {"number": 1}, {"a": torch.zeros(3)}, {})
    assert taken(kept, 1)


def test_the_cache_drops_what_was_used_least_recently(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3000, {})
    tensor = {"a": torch.zeros(1000, dtype=torch.uint8)}
    for number in range(2):
        cache.put("scores", {"number": number}, tensor, {"seconds": 1})
        os.utime(cache._path("scores", {"number": number}), (number, number))
    assert taken(cache, 0)  # so the other is older now
    for name, age in (("old.tmp-1", 7200), ("now.tmp-2", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.put("scores", {"number": 2}, tensor, {"seconds": 1})
    assert sorted(path.name for path in tmp_path.glob("*.tmp-*")) == ["now.tmp-2"]
    assert [taken(cache, number) for number in range(3)] == [True, False, True]
    Cache(tmp_path, 10, {}).put("scores", {"number": 3}, tensor, {"seconds": 1})
    assert not taken(cache, 3)


def test_what_another_user_has_kept_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Cache(tmp_path, 10**6, {})
    kept.put("scores", {"number": 1}, {"a": torch.zeros(3)}, {})

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    assert taken(kept, 1)


def taken(cache: Cache, number: int) -> bool:
    return cache.take("scores", {"number": number}, lambda tensors, notes: True) is not None


def test_runs_with_images_that_were_kept_are_taken_up_and_end_the_same(tmp_path: Path) -> None:
    """A kept mask changes nothing about what a run leaves."""
    for results in ("a", "b"):
        experiment.run(config_of("synflow", tmp_path / results, "save_scores=false"))
    kept = outcome_without_scores(tmp_path / "a"), outcome_without_scores(tmp_path / "b")
    assert kept[0] == kept[1]


def outcome_without_scores(results: Path) -> dict[str, Any]:
    for hidden in results.glob(".cache"):
        hidden.rename(results.parent / f"{results.name}-reuse")
    (directory_of(results) / "scores.safetensors").write_bytes(
        (directory_of(results) / "mask.safetensors").read_bytes()
    )
    found = outcome(results)
    return {key: found[key] for key in ("row", "curve", "mask report", "files")}
