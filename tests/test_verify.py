"""Numbers of papers: typed without slips and in reach of experiments; verdicts whose statistics hold."""

import csv
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import published_runs
import pytest
from conftest import ROOT
from published_runs import FIGURE_6, NUMBERS, find, written

from pai_bench.errors import DataError
from pai_bench.launch import terminal
from pai_bench.published import matching, pages
from pai_bench.published.matching import MISSING, NO_EXPERIMENT, NOT_COMPARABLE
from pai_bench.published.numbers import Number
from pai_bench.published.verdicts import (
    DEVIATES,
    REPRODUCED,
    UNDERPOWERED,
    Rule,
    sample,
)

# Runs and numbers -----------------------------------------------------------------------------------------------------

Write = Callable[..., list[dict[str, Any]]]
LAST_EPOCH = [n for n in NUMBERS if n.table.name == "Figure 6, last epoch"]
DENSITIES = [n for n in NUMBERS if n.table.name == "Layer densities of VGG-16"]
SYNFLOW = find("Figure 6", "cifar100", "vgg16", "synflow", "log10_compression=1")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes finished runs of a number's recipe."""
    return partial(written, tmp_path)


def compared(rows: list[dict[str, Any]], root: Path, chosen: list[Number] = NUMBERS) -> dict[str, matching.Comparison]:
    return published_runs.compared(rows, root, chosen)


def test_runs_of_the_recipe_are_judged_by_the_papers_statistic(write: Write, tmp_path: Path) -> None:
    rows = write(SYNFLOW, [0.7200, 0.7225, 0.7210, 0.7205, 0.7215])
    found = compared(rows, tmp_path, FIGURE_6 + LAST_EPOCH)
    best, last = found[f"Figure 6: {SYNFLOW.label}"], found[f"Figure 6, last epoch: {SYNFLOW.label}"]
    assert best.name == REPRODUCED and best.ours == sample([row["best_test_top1"] for row in rows])
    assert last.ours == sample([row["test_top1"] for row in rows])
    assert len(found) == 2


def test_a_smoke_run_is_no_reproduction(write: Write, tmp_path: Path) -> None:
    rows = write(SYNFLOW, [0.72, 0.721, 0.7205], {"training.epochs": 2, "training.lr": 0.2})
    comparison = compared(rows, tmp_path, [SYNFLOW])[f"Figure 6: {SYNFLOW.label}"]
    assert comparison.name == NOT_COMPARABLE and comparison.verdict is None
    assert comparison.reason == "training.epochs=2, published 160; training.lr=0.2, published 0.1"


def test_a_copy_of_the_images_is_no_reproduction(write: Write, tmp_path: Path) -> None:
    rows = write(SYNFLOW, [0.72, 0.721, 0.7205], {"dataset.verify": False, "training.epochs": 2})
    comparison = compared(rows, tmp_path, [SYNFLOW])[f"Figure 6: {SYNFLOW.label}"]
    assert comparison.name == NOT_COMPARABLE and comparison.verdict is None
    assert comparison.reason == (
        "dataset.verify=false: the images are not the published files, but a copy of them; "
        "training.epochs=2, published 160"
    )


def test_runs_on_images_of_two_kinds_are_no_sample(write: Write, tmp_path: Path) -> None:
    rows = write(SYNFLOW, [0.72, 0.721, 0.7205, 0.7212])
    for row in rows[2:]:
        row["dataset_checksum"] = "deadbeef"
    comparison = compared(rows, tmp_path, [SYNFLOW])[f"Figure 6: {SYNFLOW.label}"]
    assert comparison.name == NOT_COMPARABLE
    assert comparison.reason == (
        "the runs have images of different checksums (0123abcd, deadbeef); compare those of one alone"
    )


def test_a_published_spread_of_zero_is_one_at_chance_alone(write: Write, tmp_path: Path) -> None:
    rows = write(SYNFLOW, [SYNFLOW.value - 0.001])
    found = compared(rows, tmp_path, [replace(SYNFLOW, sd=0.0)])[f"Figure 6: {SYNFLOW.label}"]
    assert found.name == UNDERPOWERED and found.verdict and found.verdict.interval is None
    chance = replace(SYNFLOW, sd=0.0, value=0.01)
    rows = write(chance, [0.01])
    assert compared(rows, tmp_path, [chance])[f"Figure 6: {SYNFLOW.label}"].name == REPRODUCED


def test_what_cannot_change_a_result_makes_no_difference(write: Write, tmp_path: Path) -> None:
    changes = {"device": "cpu", "results_dir": "elsewhere", "training.compact": "off", "training.name": "mine"}
    rows = write(SYNFLOW, [0.72, 0.721, 0.7205], changes)
    assert compared(rows, tmp_path, [SYNFLOW])[f"Figure 6: {SYNFLOW.label}"].name != NOT_COMPARABLE


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.95},
        {"dataset.name": "cifar10"},
        {"pruner.name": "snip"},
        {"ablation.name": "shuffle_mask", "ablation.mask": {"_target_": "pai_bench.pruning.ablations.shuffle_mask"}},
    ],
)
def test_what_is_another_experiment_is_not_listed_beside_a_number(
    changes: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    rows = write(SYNFLOW, [0.72], changes)
    assert matching.compare([SYNFLOW], rows, tmp_path / "results", Rule())[0].name == MISSING


def test_at_compression_1_every_method_is_the_dense_network(write: Write, tmp_path: Path) -> None:
    dense = find("Figure 6", "cifar10", "vgg16", "magnitude", "log10_compression=0")
    rows = write(dense, [0.935, 0.936, 0.934])
    assert rows[0]["pruner"] == "dense"
    found = compared(rows, tmp_path)
    assert len(found) == 5 and all(comparison.name in (REPRODUCED, UNDERPOWERED) for comparison in found.values())


def test_one_resnet18_stands_beside_both_panels(write: Write, tmp_path: Path) -> None:
    number = find("Figure 6", "cifar10", "resnet18", "synflow", "log10_compression=2")
    found = compared(write(number, [0.904, 0.903, 0.905]), tmp_path)
    assert [name.split(":")[0] for name in found] == ["Figure 6", "Figure 6, panels called WideResNet-18"]


def test_the_reversed_grasp_is_not_grasp(write: Write, tmp_path: Path) -> None:
    number = find("Figure 6, GraSP of reversed sign", "cifar10", "vgg16", "log10_compression=1")
    rows = write(number, [0.92], {"pruner.score.temperature": 200.0, "ablation.scores": None, "ablation.name": "none"})
    (comparison,) = compared(rows, tmp_path).values()
    assert comparison.name == NOT_COMPARABLE and "pruner.score.temperature=200, published 1" in comparison.reason
    assert compared(write(number, [0.92]), tmp_path).popitem()[1].name != NOT_COMPARABLE


def mask_json(rows: list[dict[str, Any]], root: Path, layers: list[tuple[int, float]]) -> None:
    for row in rows:
        content = {"layers": [{"size": size, "density": density} for size, density in layers]}
        (root / "results" / row["id"] / "mask.json").write_text(json.dumps(content))


def test_densities_of_layers_are_verified_whatever_the_training(write: Write, tmp_path: Path) -> None:
    layers = DENSITIES[56:70]
    assert {n.label.partition(" layer")[0] for n in layers} == {
        "dataset=cifar100 model=vgg16 pruner=synflow log10_compression=2"
    }
    rows = write(layers[0], [0.1], {"training.epochs": 1, "on_collapse": "stop"})
    mask_json(rows, tmp_path, [(10**6, n.value) for n in layers[:-1]] + [(10**6, 1.1 * layers[-1].value)])
    found = list(compared(rows, tmp_path, layers).values())
    assert [c.name for c in found] == [REPRODUCED] * 13 + [DEVIATES]
    assert found[-1].ours and found[-1].ours.mean == pytest.approx(1.1 * layers[-1].value)
    rows = write(layers[0], [0.1], {"pruner.dtype": "float32"})
    assert compared(rows, tmp_path, layers[:1]).popitem()[1].name == NOT_COMPARABLE


def test_a_mask_that_was_trained_twice_counts_once(write: Write, tmp_path: Path) -> None:
    rows = write(DENSITIES[0], [0.1, 0.2]) + write(DENSITIES[0], [0.1], {"training.epochs": 1})
    mask_json(rows, tmp_path, [(1728, DENSITIES[0].value)])
    comparison = compared(rows, tmp_path, DENSITIES[:1]).popitem()[1]
    assert comparison.ours and comparison.ours.num == 2 and len(comparison.groups) == 2


def test_a_run_whose_mask_file_is_gone_is_no_reason_to_stop(write: Write, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    mask.write_bytes(b"a mask")
    rows = write(SYNFLOW, [0.72], {"allocation.mask": str(mask)})
    mask.unlink()
    comparison = compared(rows, tmp_path, [SYNFLOW]).popitem()[1]
    assert comparison.name == NOT_COMPARABLE and f"allocation.mask={mask}, published unset" in comparison.reason


def test_chance_moves_small_layers(write: Write, tmp_path: Path) -> None:
    layer = DENSITIES[-1]
    rows = write(layer, [0.1])
    for size, expected in ((100, REPRODUCED), (10**7, DEVIATES)):
        mask_json(rows, tmp_path, [(size, 2 * layer.value)] * 14)
        assert compared(rows, tmp_path, [layer]).popitem()[1].name == expected
    mask_json(rows, tmp_path, [(100, 0.1)] * 3)
    with pytest.raises(DataError, match="it has 3 layers"):
        compared(rows, tmp_path, [layer])


def test_multiply_adds_are_a_share_of_the_dense_network(write: Write, tmp_path: Path) -> None:
    number = find("Inference FLOPs of ERK", "sparsity=0.8")
    found = compared(write(number, [0.7], {"training.epochs": 0}, macs_masked=41.4), tmp_path, [number])
    assert found.popitem()[1].name == REPRODUCED
    found = compared(write(number, [0.7], {"allocation.kernel": False}), tmp_path, [number])
    assert found.popitem()[1].reason == "allocation.kernel=False, published True"


def curve(
    write: Write, tmp_path: Path, number: Number, last_whole: list[float], grid: list[float]
) -> list[dict[str, Any]]:
    """Runs of seeds whose layers are whole up to some log10 compression each."""
    rows = []
    for step in grid:
        cells = write(replace(number, density=10**-step), [0.1] * len(last_whole))
        for row, last in zip(cells, last_whole, strict=True):
            row["collapsed_layers"] = [] if step <= last else ["fc.weight"]
        mask_json(cells, tmp_path, [(1000, 0.1)] * 14)
        rows += cells
    return rows


def test_critical_compression_is_the_last_without_an_empty_layer(write: Write, tmp_path: Path) -> None:
    number = find("Figure 1, critical compression", "magnitude")
    grid = [2.25, 2.5, 2.75, 3.0]
    comparison = compared(curve(write, tmp_path, number, [2.75, 2.75, 2.5], grid), tmp_path, [number]).popitem()[1]
    assert comparison.name == REPRODUCED and comparison.ours
    assert comparison.ours.mean == pytest.approx(fmean([2.75, 2.75, 2.5])) and comparison.ours.num == 3


@pytest.mark.parametrize("grid", [[2.0, 2.25], [3.0], [2.0, 3.0]])
def test_a_collapse_that_no_run_brackets_is_missing(grid: list[float], write: Write, tmp_path: Path) -> None:
    number = find("Figure 1, critical compression", "magnitude")
    comparison = compared(curve(write, tmp_path, number, [2.5], grid), tmp_path, [number]).popitem()[1]
    assert comparison.name == MISSING and "known too roughly; seed 0" in comparison.reason


def test_fewer_weights_than_layers_leave_one_empty(write: Write, tmp_path: Path) -> None:
    """14,000,000 weights in 14 layers: beyond 10^6 no run is needed to know."""
    number = find("Figure 1, critical compression", "synflow")
    rows = curve(write, tmp_path, number, [6.0, 6.0, 5.75], [5.5, 5.75, 6.0])
    comparison = compared(rows, tmp_path, [number]).popitem()[1]
    assert comparison.ours and comparison.ours.mean == pytest.approx(17.75 / 3) and comparison.name == REPRODUCED


@pytest.mark.parametrize(("last_whole", "expected"), [(1.0, REPRODUCED), (1.25, DEVIATES)])
def test_a_threshold_lies_between_the_last_whole_and_the_first_empty_layer(
    last_whole: float, expected: str, write: Write, tmp_path: Path
) -> None:
    number = find("Where magnitude pruning empties the classifier of ResNet-18", "cifar10")
    rows = curve(write, tmp_path, number, [last_whole], [0.75, 1.0, 1.25, 1.5])
    comparison = compared(rows, tmp_path, [number]).popitem()[1]
    assert comparison.name == expected and comparison.ours is None  # only between which values it lies is known
    assert comparison.reason == f"here it lies between {last_whole:g} and {last_whole + 0.25:g}"
    record = pages.records([comparison])[0]
    assert (record["ours"], record["difference"], record["verdict"]) == (None, None, expected)


def test_numbers_of_methods_that_are_not_here_say_why() -> None:
    found = [c for c in matching.compare(NUMBERS, [], Path(), Rule()) if c.name == NO_EXPERIMENT]
    assert found and all(c.reason for c in found)
    assert {c.number.table.paper for c in found} >= {"rigl", "jaxpruner", "rigl_reproducibility", "grasp"}


def test_what_is_asked_for_is_counted_missing_and_recalled_numbers_are_not() -> None:
    found = matching.compare(NUMBERS, [], Path(), Rule())
    assert {c.name for c in found} == {MISSING, NO_EXPERIMENT}
    failing = matching.not_reproduced(found)
    assert failing and all(c.name == MISSING and c.number.table.evidence != "R" for c in failing)


# The command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Verify = Callable[..., Ended]


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Runs the script on the results folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        terminal, "start_process", lambda: None
    )  # it is done once for a process, and other tests share it

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["verify.py", "results", *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
        except SystemExit as error:
            code = int(error.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


def test_the_command_prints_and_writes_verdicts(write: Write, tmp_path: Path, verify: Verify) -> None:
    write(SYNFLOW, [0.7200, 0.7225, 0.7210, 0.7205, 0.7215])
    other = find("Figure 6", "cifar100", "vgg16", "snip", "log10_compression=1")
    write(other, [0.60, 0.61], {"training.epochs": 1})
    done = verify("--only", "Figure 6", "vgg16", "-o", "verdicts.csv")
    assert done.code == 0 and done.err == ""
    assert "cifar100 vgg16 synflow log10_compression=1  72.11 ±0.10 (5)  72.08 ±0.35 (3)" in done.out
    assert "training.epochs=1, published 160" in done.out
    assert "margin 0.5 points" in done.out and "1 NOT COMPARABLE" in done.out
    with (tmp_path / "verdicts.csv").open() as file:
        records = list(csv.DictReader(file))
    assert {r["verdict"] for r in records} >= {REPRODUCED, NOT_COMPARABLE}
    (record,) = [r for r in records if r["pruner"] == "synflow" and r["quantity"] == "best_test_top1"]
    assert float(record["ours"]) == pytest.approx(0.7211) and float(record["published"]) == pytest.approx(0.7208)
    assert float(record["low"]) < float(record["difference"]) < float(record["high"])
    for name in ("verdicts.json", "verdicts.md"):
        assert verify("--only", "Figure 6", "-o", name).code == 0
    assert json.loads((tmp_path / "verdicts.json").read_text())["rule"]["margin"] == 0.005
    assert "| cifar100 vgg16 synflow log10_compression=1 | 72.11" in (tmp_path / "verdicts.md").read_text()


def test_exit_codes(write: Write, tmp_path: Path, verify: Verify) -> None:
    nothing = verify()
    assert nothing.code == 4 and "there are no finished runs" in nothing.err
    write(SYNFLOW, [0.7200, 0.7225, 0.7210, 0.7205, 0.7215])
    chosen = ["--only", "Figure 6, last epoch", "log10_compression=1"]
    loose = verify(*chosen, "--margin", "3", "--strict")
    assert loose.code == 0, loose.err
    strict = verify("--only", "Figure 6, last epoch", "--margin", "3", "--strict")
    assert strict.code == 5 and "3 of 4 numbers were not reproduced" in strict.err
    for wrong, says in (
        (["--only", "nonsense"], "--only nonsense"),
        (["-o", "verdicts.txt"], "ends in .csv"),
        (["-o", "nowhere/verdicts.csv"], "cannot be written"),
        (["--margin", "-1"], "--margin -1"),
        (["--papers", "results"], "no papers"),
    ):
        done = verify(*(chosen if "--only" not in wrong else []), *wrong)
        assert done.code == 2 and says in done.err and "Traceback" not in done.err, done.err


def test_without_scipy_a_line_says_so(
    write: Write, tmp_path: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(SYNFLOW, [0.7200, 0.7225])
    monkeypatch.setitem(sys.modules, "scipy", None)
    done = verify("-o", "verdicts.csv")
    assert done.code == 2 and not (tmp_path / "verdicts.csv").exists()
    assert done.err == (
        "config error: intervals of verdicts need scipy, which is not installed: pip install scipy "
        "(it belongs to 'pai_bench[report]')\n"
    )


def test_nothing_heavy_is_imported(write: Write, tmp_path: Path) -> None:
    write(SYNFLOW, [0.72, 0.721])
    code = (
        "import sys, runpy; sys.argv = ['verify.py', 'results', '--only', 'Figure 6, last epoch'];"
        f"runpy.run_path({str(ROOT / 'scripts' / 'verify.py')!r}, run_name='__main__'); print(sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "UNDERPOWERED" in done.stdout or "DEVIATES" in done.stdout
    loaded = done.stdout.rsplit("[", 1)[1]
    assert "'torch'" not in loaded and "'wandb'" not in loaded


def test_damaged_files_are_named(write: Write, tmp_path: Path, verify: Verify) -> None:
    (row,) = write(SYNFLOW, [0.72])
    (tmp_path / "results" / row["id"] / "config.yaml").write_text("{")
    done = verify()
    assert done.code == 4 and f"{row['id']}/config.yaml: it is damaged" in done.err
    (tmp_path / "results" / row["id"] / "result.json").write_text("{")
    done = verify()
    assert done.code == 4 and f"{row['id']}/result.json: it is damaged" in done.err


@pytest.mark.parametrize(
    ("change", "lacks"), [({"group": None}, "no group in it"), ({"seed": "0"}, "no seed in it"), (None, "no group and")]
)
def test_rows_without_what_is_compared_are_named(
    change: dict[str, Any] | None, lacks: str, write: Write, tmp_path: Path, verify: Verify
) -> None:
    (row,) = write(SYNFLOW, [0.72])
    broken = tmp_path / "results" / "elsewhere"
    broken.mkdir()
    (broken / "result.json").write_text(json.dumps({"id": "x"} if change is None else row | change))
    done = verify()
    assert done.code == 4 and done.err.startswith("data error: results/elsewhere/result.json: it is damaged (" + lacks)
    assert done.err.endswith("; run it again, or take it away\n")
