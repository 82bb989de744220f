"""What a report reads beside the rows, and what it calls methods and tasks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_rows import directory, only, row, rows

from pai_bench.config.composition import CONF
from pai_bench.errors import DataError
from pai_bench.report import evidence, names, palette, reading
from pai_bench.report.configurations import Configuration, Grid, configurations, grids


def masked(tmp_path: Path, **masks: list[int]) -> tuple[Grid, dict[str, Path]]:
    runs = {method: row(method) for method in masks}
    paths = {r["id"]: directory(tmp_path, r, {"w": np.array(masks[method])}) for method, r in runs.items()}
    return only(list(runs.values())), paths


def test_overlap_by_hand(tmp_path: Path) -> None:
    grid, paths = masked(tmp_path, a=[1, 1, 1, 0, 0, 0, 0, 0], b=[0, 1, 1, 1, 1, 0, 0, 0])
    unreadable = evidence.Unreadable()
    seed, (pair,) = evidence.overlaps(grid, 0.9, paths, unreadable)
    assert seed == 0 and not unreadable.paths
    assert (pair.kept_first, pair.kept_second, pair.common) == (3, 4, 2)
    assert pair.jaccard == pytest.approx(2 / 5) and pair.of_smaller == pytest.approx(2 / 3)


def test_chance_is_what_random_masks_of_the_same_layers_have_in_common(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes, kept = (40, 200), {"a": (30, 20), "b": (10, 60)}

    def drawn(method: str) -> dict[str, Any]:
        return {str(i): rng.permutation(np.arange(size) < kept[method][i]) for i, size in enumerate(sizes)}

    runs = [row("a"), row("b")]
    paths = {r["id"]: directory(tmp_path, r, drawn(r["pruner"])) for r in runs}
    _, (pair,) = evidence.overlaps(only(runs), 0.9, paths, evidence.Unreadable())
    trials = [(drawn("a"), drawn("b")) for _ in range(2000)]
    counts = [sum(int((a[name] & b[name]).sum()) for name in a) for a, b in trials]
    assert pair.common_by_chance == pytest.approx(np.mean(counts), abs=4.5 * np.std(counts) / 2000**0.5)


def test_overlaps_take_the_seed_that_most_methods_have(tmp_path: Path) -> None:
    runs = [row("a", 0), row("a", 1), row("b", 1), row("c", 2)]
    paths = {r["id"]: directory(tmp_path, r) for r in runs}
    seed, found = evidence.overlaps(only(runs), 0.9, paths, evidence.Unreadable())
    assert seed == 1 and [(pair.first[0], pair.second[0]) for pair in found] == [("a", "b")]
    assert evidence.overlaps(only([row("a", 0), row("b", 1)]), 0.9, paths, evidence.Unreadable()) == (None, [])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    grid, paths = masked(tmp_path, a=[1, 0], b=[1, 0], c=[0, 1])
    first, second, _ = paths.values()
    (first / "mask.safetensors").unlink()
    (second / "mask.json").write_text("{")
    unreadable = evidence.Unreadable()
    _, found = evidence.overlaps(grid, 0.9, paths, unreadable)
    assert found == [] and set(unreadable.paths) == {first / "mask.safetensors", second / "mask.json"}


def test_layers_are_means_over_seeds(tmp_path: Path) -> None:
    densities = {0: [1, 1, 0, 0], 1: [1, 0, 0, 0], 2: [1, 1, 1, 1]}
    runs = [row(seed=seed) for seed in densities]
    paths = {r["id"]: directory(tmp_path, r, {"w": np.array(densities[r["seed"]])}) for r in runs}
    (layer,) = evidence.layers(configurations(runs)[0], paths, evidence.Unreadable())
    assert (layer.name, layer.size, layer.density.seeds) == ("w", 4, (0, 1, 2))
    assert layer.density.mean == pytest.approx(np.mean([0.5, 0.25, 1]))
    assert layer.density.sd == pytest.approx(np.std([0.5, 0.25, 1], ddof=1))


def test_curves_are_means_over_the_seeds_that_reached_an_epoch(tmp_path: Path) -> None:
    curves = {0: [(0.0, 0.1), (1.0, 0.5), (2.0, 0.9)], 1: [(0.0, 0.2), (1.0, 0.7)]}
    runs = [row(seed=seed) for seed in curves]
    paths = {r["id"]: directory(tmp_path, r, curve=curves[r["seed"]]) for r in runs}
    found = evidence.curve(configurations(runs)[0], paths, evidence.Unreadable())
    assert {epoch: value.mean for epoch, value in found.items()} == pytest.approx({0.0: 0.15, 1.0: 0.6, 2.0: 0.9})
    assert found[2.0].sd is None and found[2.0].seeds == (0,)


def test_long_curves_keep_their_ends(tmp_path: Path) -> None:
    run = row()
    path = directory(tmp_path, run, curve=[(float(epoch), 0.5) for epoch in range(1001)])
    found = list(evidence.curve(configurations([run])[0], {run["id"]: path}, evidence.Unreadable()))
    assert len(found) == evidence.EPOCHS_SHOWN and (found[0], found[-1]) == (0.0, 1000.0)


# Names ----------------------------------------------------------------------------------------------------------------


def labels(tmp_path: Path, *runs: dict[str, Any]) -> list[str]:
    paths = {r["id"]: tmp_path / r["id"] for r in runs}
    looks = names.looks(configurations(runs), paths)
    return [looks[r["method"]].label for r in runs]


def test_methods_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    alone = row("snip")
    assert labels(tmp_path, alone, row("synflow")) == ["snip", "synflow"]
    shuffled = row("snip@2", ablation="shuffle_mask")
    assert labels(tmp_path, alone, shuffled) == ["snip", "snip, shuffle_mask"]
    rounds = row("snip@3", schedule="exponential")
    assert labels(tmp_path, alone, rounds) == ["snip, one_shot", "snip, exponential"]


def test_what_makes_another_method_of_a_pruner_is_named_beside_any_other(tmp_path: Path) -> None:
    synflow = row("synflow")
    for settings, name in (
        ({"ablation": "shuffle_mask"}, "snip, shuffle_mask"),
        ({"rewire": "rigl"}, "snip, rigl"),
        ({"target": "effective", "prunable": "all", "repair": None}, "snip, target=effective"),
        ({"target": "sparsity", "prunable": "no_first,no_last"}, "snip, prunable=no_first,no_last"),
        ({"repair": "flow", "ablation": "reinit"}, "snip, reinit, repair=flow"),
        ({"target": "sparsity", "prunable": "all", "repair": None}, "snip"),
    ):
        assert labels(tmp_path, row("snip", **settings), synflow) == [name, "synflow"]
    assert labels(tmp_path, row("dense", prunable="no_first"), synflow) == ["dense", "synflow"]
    plain, other = row("snip"), row("snip@2", prunable="no_first") | {"method": "snip-0000bbbb"}
    assert labels(tmp_path, plain, other) == ["snip", "snip, prunable=no_first"]
    found = look(tmp_path, plain, other)
    assert found[plain["method"]] == look(tmp_path, plain)[plain["method"]]


def test_methods_are_called_by_the_label_of_their_pruner(tmp_path: Path) -> None:
    runs = [row("snip"), row("synflow"), row("mine")]
    for label, run in zip(("SNIP", "SynFlow", "null"), runs, strict=True):
        (tmp_path / run["id"]).mkdir()
        (tmp_path / run["id"] / "config.yaml").write_text(f"pruner: {{name: {run['pruner']}, label: {label}}}\n")
    assert labels(tmp_path, *runs) == ["SNIP", "SynFlow", "mine"]


def test_methods_that_differ_in_a_setting_are_called_by_it(tmp_path: Path) -> None:
    runs = [row("snip@1"), row("snip@2")]
    for total, run in zip((100, 256), runs, strict=True):
        (tmp_path / run["id"]).mkdir()
        text = f"pruner:\n  name: snip\n  mode: eval\n  scoring_data: {{total: {total}}}\nseed: {total}\n"
        (tmp_path / run["id"] / "config.yaml").write_text(text)
    assert labels(tmp_path, *runs) == ["snip, pruner.scoring_data.total=100", "snip, pruner.scoring_data.total=256"]


def test_methods_without_a_config_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    runs = [row("snip@1") | {"method": "snip-aaaa0000"}, row("snip@2") | {"method": "snip-bbbb0000"}]
    assert labels(tmp_path, *runs) == ["snip, aaaa0000", "snip, bbbb0000"]


def test_tasks_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [row(), row(task="digits-resnet20-ffff0000"), row(model="vgg16", task="digits-vgg16-00001111")]
    runs += [row(task="digits-resnet20-ffff0000", dataset_checksum="beef" * 16)]
    paths = {}
    for epochs, run in zip((20, 40, 20, 40), runs, strict=True):
        paths[run["id"]] = tmp_path / run["id"]
        paths[run["id"]].mkdir()
        (paths[run["id"]] / "config.yaml").write_text(f"training: {{epochs: {epochs}}}\n")
    found = names.tasks(grids(configurations(runs)), paths)
    assert set(found.values()) == {
        "digits, resnet20, training.epochs=20",
        "digits, resnet20, training.epochs=40, images cafecafe",
        "digits, resnet20, training.epochs=40, images beefbeef",
        "digits, vgg16",
    }


def test_no_two_methods_look_alike(tmp_path: Path) -> None:
    runs = [row(f"method{i}") for i in range(42)]
    looks = names.looks(
        configurations([*runs, row("dense")]), {r["id"]: tmp_path for r in runs} | {row("dense")["id"]: tmp_path}
    )
    assert len({(look.colour, look.marker) for look in looks.values()}) == 43


def look(tmp_path: Path, *runs: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    found = names.looks(configurations(list(runs)), {run["id"]: tmp_path for run in runs})
    return {run["method"]: (one.colour, one.marker, one.dash) for run in runs for one in [found[run["method"]]]}


def test_a_method_looks_the_same_whatever_stands_beside_it(tmp_path: Path) -> None:
    pruners = ["random", "magnitude", "snip", "grasp", "synflow", "force", "iter_snip"]
    together = look(tmp_path, *(row(pruner) for pruner in pruners))
    for pruner in pruners:
        assert (
            look(tmp_path, row(pruner), row("a"), row("mine"))[f"{pruner}-1111bbbb"] == together[f"{pruner}-1111bbbb"]
        )
    assert len({colour for colour, _, _ in together.values()}) == len(pruners)
    shuffled = row("snip@2", ablation="shuffle_mask")
    assert look(tmp_path, row("snip"), shuffled)["snip-1111bbbb"] == together["snip-1111bbbb"]


def test_an_unknown_method_has_a_stable_look_that_nothing_shown_has(tmp_path: Path) -> None:
    alone = look(tmp_path, row("mine"))["mine-1111bbbb"]
    assert alone == look(tmp_path, row("mine"))["mine-1111bbbb"] and alone[2] == "solid"
    known = ["random", "magnitude", "snip", "grasp", "synflow"]  # one colour is free
    found = look(tmp_path, row("mine"), *(row(pruner) for pruner in known))
    assert len({colour for colour, _, _ in found.values()}) == 6


def test_pruners_of_the_table_have_looks_of_their_own() -> None:
    assert set(palette.OF_PRUNER) <= {path.stem for path in (CONF / "pruner").glob("*.yaml")} - {"dense"}
    assert len({style[:2] for style in palette.OF_PRUNER.values()}) == len(palette.OF_PRUNER)


def test_sparsities_are_written_with_the_digits_they_need() -> None:
    assert [names.compression(s) for s in (0.9, 0.98, 0.966666666667, 0.9999, 1 - 1 / 12345)] == [
        "10×",
        "50×",
        "30×",
        "10,000×",
        "12,345×",
    ]
    assert [names.sparsity(s) for s in (0.875, 0.625, 0.82, 0.825, 0.892626, 1 - 0.8**18)] == [
        "87.5 %", "62.5 %", "82 %", "82.5 %", "89.3 %", "98.2 %",
    ]  # fmt: skip
    assert [names.sparsity(s) for s in (0.5, 0.98, 0.966666666667, 0.996666666667, 0.9999)] == [
        "50 %",
        "98 %",
        "96.7 %",
        "99.67 %",
        "99.99 %",
    ]


# Reading --------------------------------------------------------------------------------------------------------------


def test_broken_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    directory(tmp_path, row(seed=0))
    for seed, text in enumerate(
        [
            "{",
            "[]",
            json.dumps(row(seed=9) | {"test_top1": "high"}),
            json.dumps({"id": "x"}),
            json.dumps(row(seed=9)).replace("0.5", "NaN"),
            json.dumps(row(seed=9, task="../../evil")),
            json.dumps(row(seed=9, dataset="\ud800")),
        ],
        1,
    ):
        path = directory(tmp_path, row(seed=seed))
        (path / "result.json").write_text(text)
    results = reading.read(tmp_path)
    assert [r["seed"] for r in results.rows] == [0]
    reasons = " ".join(results.refused.values())
    assert len(results.refused) == 7 and "its test_top1 is 'high'" in reasons and "it holds no row" in reasons


def test_a_copy_of_a_run_counts_once(tmp_path: Path) -> None:
    directory(tmp_path, row())
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "result.json").write_text(json.dumps(row()))
    results = reading.read(tmp_path)
    assert len(results.rows) == 1
    ((name, reason),) = results.refused.items()
    assert {name, *reason.split()} >= {"copy"} and "the same run" in reason


def test_unfinished_runs_are_named_with_their_state(tmp_path: Path) -> None:
    directory(tmp_path, row())
    for name, state in (("one", {"state": "failed", "error": "no luck"}), ("two", {"state": "preempted"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps(state))
    (tmp_path / ".cache").mkdir()
    found = reading.read(tmp_path).unfinished
    assert {name: state.name for name, state in found.items()} == {"one": "failed", "two": "preempted"}


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no runs"):
        reading.read(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        reading.read(tmp_path / "nowhere")
    path = directory(tmp_path, row())
    with pytest.raises(DataError, match="a run's own directory"):
        reading.read(path)
    with pytest.raises(DataError, match="no run has the task"):
        reading.read(tmp_path, lambda row: False)


def test_configurations_are_usable_without_a_report() -> None:
    found = {
        (configuration.rows[0]["pruner"], configuration.sparsity): configuration.mean
        for configuration in configurations(rows((0.9, 0.99)))
    }
    assert isinstance(found["snip", 0.99], float) and len(found) == 6
    assert all(isinstance(configuration, Configuration) for configuration in configurations(rows()))
