"""The benchmarks: that they run, that what they claim to be equal is, and how they judge. Nothing here is timed."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from emulated_graphs import emulated

from benchmarks import __main__ as command
from benchmarks import gpu, score_rounds, table, textbook
from benchmarks.measure import Rates, Times, in_turn
from benchmarks.subjects import Setting, parts, pruned, trainer
from benchmarks.table import Row
from pai_bench.errors import ConfigError
from pai_bench.masks import masks

CPU = torch.device("cpu")
RATES = Rates(*(dict.fromkeys(("float32", "float64", "bfloat16"), 100000000000.0) for _ in range(2)), 1e10)
FILES = sorted((ROOT / "benchmarks").glob("*.py"))


def bench(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_every_benchmark_runs_and_finds_equal_what_has_to_be(tmp_path: Path) -> None:
    done = bench("--quick", "--json", "found.json", "--markdown", "table.md", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert all(f"{name} took " in done.stdout for name in command.CPU)
    assert len(rows) == len(found["rows"]) >= 20
    assert sum(row["exact"] is True for row in rows.values()) >= 10
    assert [row for row in rows.values() if not row["passed"]] == []  # figures of so little work may be anything
    # A smaller network was trained, or there would be nothing to compare.
    assert any("compact" in name and "outputs differ" in row["note"] for name, row in rows.items())
    assert {"processor", "software", "memory, GB/s"} <= found["machine"].keys()
    page = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in page for name in rows)
    assert "`python -m benchmarks --quick --markdown table.md`" in page


def test_a_benchmark_that_cannot_run_ends_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(setting: Setting) -> Iterator[Row]:
        yield Row("first", 2.0, target=1)
        raise ConfigError("model=timm: timm is not installed")

    benchmarks = {"broken": broken, "whole": lambda setting: iter([Row("last", 3.0)])}
    found = list(command._rows(list(benchmarks), benchmarks, Setting(CPU, RATES), float("inf")))
    assert [(row.name, row.passed(speed=False)) for row in found] == [
        ("first", True), ("broken ended with an error", False), ("last", True)
    ]  # fmt: skip
    assert "broken ended: model=timm: timm is not installed" in capsys.readouterr().out


def test_the_benchmarks_of_a_gpu_run_where_there_is_none() -> None:
    setting = Setting(CPU, RATES, quick=True)
    images, rows = list(gpu.images(setting)), [*gpu.synflow(setting), *gpu.evaluation(setting), *gpu.compact(setting)]
    assert [row.name.rpartition(", ")[2] for row in images[1:]] == ["captured", "kernel by kernel"] * 3
    assert "published" in images[0].name and all(row.lower_bound is not None for row in images[1:])
    assert len(rows) == 5 and all(row.passed(speed=False) for row in [*images, *rows])


def test_rounds_of_scores_run_where_there_is_no_gpu_and_as_graphs() -> None:
    setting = Setting(CPU, RATES, quick=True)
    with emulated() as made:
        rows = list(score_rounds.rounds(setting))
    assert len(made) >= len(score_rounds.METHODS)  # one at least in the rounds of each method
    assert len(rows) == 2 * len(score_rounds.METHODS) and all(row.exact and row.lower_bound for row in rows)


def test_rows_are_kept_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def first(setting: Setting) -> Iterator[Row]:
        assert setting.quick
        yield Row("one", 1.0)
        yield Row("two", 2.0)

    monkeypatch.setattr(command, "GPU", dict.fromkeys(("first", "second", "third"), first))
    monkeypatch.setattr(command.measure, "rates", lambda device, quick: RATES)
    for minutes, number in ((None, 6), ("0", 1)):
        more = [] if minutes is None else ["--minutes", minutes]
        file = tmp_path / "found.json"
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--gpu", "--quick", "--json", str(file), *more])
        with pytest.raises(SystemExit) as ended:
            command.main()
        said = capsys.readouterr().out
        assert ended.value.code == 0 and len(json.loads(file.read_text())["rows"]) == number
        assert ("the time is up; what is left of first is left out, second, third\n" in said) == (number == 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_set_says_so_in_a_line(tmp_path: Path) -> None:
    done = bench("--gpu", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"--gpu: torch {torch.__version__} finds no GPU here; leave it out\n"


@pytest.mark.parametrize(
    ("row", "passes", "passes_without_speed"),
    [
        (Row("", 2.0, target=1.5), True, True),
        (Row("", 1.0, target=1.5), False, True),
        (Row("", 1.0, target=1.5, at_most=True), True, True),
        (Row("", 3, target=2, at_most=True, timed=False), False, False),
        (Row("", 9.0, target=1.5, exact=False), False, False),
        (Row("", 9.0), True, True),
    ],
)
def test_bars_are_judged(row: Row, passes: bool, passes_without_speed: bool) -> None:
    assert (row.passed(), row.passed(speed=False)) == (passes, passes_without_speed)
    assert ("missed" in row.cells()) is not passes


def test_a_missed_bar_is_named_and_ends_in_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(setting: Setting) -> Iterator[Row]:
        yield Row("a claim", 1.0, target=2.0)
        yield Row("another", 3.0, target=2.0)

    monkeypatch.setattr(command, "CPU", {"slow": slow})
    monkeypatch.setattr(command.measure, "rates", lambda device, quick: RATES)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert capsys.readouterr().out.endswith("1 of 2 rows pass\nmissed: a claim\n")


def test_variants_take_turns_and_ratios_are_taken_pair_by_pair() -> None:
    order = []

    def variant(name: str) -> float:
        order.append(name)
        return 1.0

    times = in_turn({"a": lambda: variant("a"), "b": lambda: variant("b")}, 2, warm_up=1)
    assert order == ["a", "b"] * 3 and times.taken == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    # The machine was three times slower in the second round; the ratio does not see it.
    assert Times({"a": [2.0, 6.0, 2.0], "b": [1.0, 3.0, 1.0]}).ratio("a", "b") == 2.0


def test_a_floor_is_what_takes_longer_of_operations_and_bytes() -> None:
    assert RATES.lower_bound(flops=1e11) == 1.0
    assert RATES.lower_bound(flops=1e11, moved=2e10) == 2.0


def test_the_published_loop_keeps_the_numbers_that_it_is_given() -> None:
    of = parts(CPU, "pruner=synflow", "sparsity=0.9", "schedule.rounds=3", "model.widths=[4,6]", "model.blocks=[1,1]")
    model = of.build("init")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = textbook.Masked(model)
    total = masks.total(masks.full(model))
    for k in (total, total // 2, 7):
        assert masks.kept(textbook.synflow(net, of.data.input_shape, [k])) == k
    assert all(torch.equal(value, before[name]) for name, value in net.model.state_dict().items())
    assert masks.kept(pruned(of, trainer(of)).mask) == masks.num_kept(0.9, total)


def test_columns_of_a_table_line_up() -> None:
    lines = table.text([Row("short", 1.0), Row("a longer name", 2.5, target=2.0, time=0.002)]).splitlines()
    assert [line[lines[0].index("figure") :].split()[0] for line in lines] == ["figure", "1x", "2.5x"]
    assert "2 ms" in lines[2] and lines[2].endswith("ok")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_benchmarks_use_what_the_package_makes_public(path: Path) -> None:
    """So that they go on to hold when its inner parts are made faster."""
    tree = ast.parse(path.read_text())
    ours = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pai_bench"):
            ours |= {alias.name for alias in node.names}
    assert not [name for name in ours if name.startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            assert not node.attr.startswith("_"), f"{path.name}: {node.value.id}.{node.attr}"
