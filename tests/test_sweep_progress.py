"""What a terminal shows of a run and of a sweep: one line a run, the time that is left, the closing table, colours."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain, RunCli
from few_images import half, trainer
from report_rows import row

from pai_bench.errors import ConfigError
from pai_bench.launch import colours, sweep_progress, terminal
from pai_bench.runs import summary
from pai_bench.training import trainer as loop


def sweep_rows() -> list[dict[str, Any]]:
    """A dense network and two methods at two compressions, two seeds."""
    runs = [row("dense", seed, 0.95 + 0.01 * seed) for seed in (0, 1)]
    for method, at in {"snip": (0.9, 0.5), "synflow": (0.8, 0.7)}.items():
        runs += [row(method, s, a + 0.02 * s, sp) for s in (0, 1) for a, sp in zip(at, (0.9, 0.99), strict=True)]
    return runs


def stored(folder: Path, runs: list[dict[str, Any]]) -> list[Path]:
    for run in runs:
        (folder / run["id"]).mkdir(parents=True, exist_ok=True)
        (folder / run["id"] / "result.json").write_text(json.dumps(run))
    return [folder / run["id"] for run in runs]


# The closing table ----------------------------------------------------------------------------------------------------


def test_the_table_has_the_means_by_method_and_compression_the_best_first() -> None:
    lines = [line.split() for line in summary.accuracies(sweep_rows())]
    assert lines[0] == ["digits,", "resnet20:", "test", "accuracy", "in", "percent"]
    assert lines[1] == ["10x", "100x"]
    assert lines[2] == ["dense", "95.50", "±", "0.71"]
    assert lines[3] == ["synflow", "81.00", "±", "1.41", "71.00", "±", "1.41"]
    assert lines[4] == ["snip", "91.00", "±", "1.41", "51.00", "±", "1.41"]
    assert " ".join(lines[5]) == "mean ± standard deviation of 2 runs"


def test_untrained_runs_count_in_no_mean() -> None:
    runs = sweep_rows()
    for run in runs:
        if run["sparsity"] == 0.99 and (run["pruner"] == "snip" or run["seed"] == 1):
            run["stopped"] = "collapse"
    lines = summary.accuracies(runs)
    assert lines[3].split() == ["synflow", "81.00", "±", "1.41", "70.00"]
    assert lines[4].split() == ["snip", "91.00", "±", "1.41", "not", "trained"]
    assert "of 1 to 2 runs" in lines[5]


def test_methods_of_one_pruner_and_tasks_are_told_apart() -> None:
    runs = [*sweep_rows(), row("snip@2", ablation="shuffle_mask"), row(task="digits-resnet20-ffff0000")]
    text = "\n".join(summary.accuracies(runs))
    assert "  snip, shuffle_mask " in text and "  synflow  " in text
    assert "digits, resnet20 (0000aaaa): " in text and "digits, resnet20 (ffff0000): " in text
    assert "of 1 to 2 runs" in text


def test_settings_of_a_pruner_make_methods_of_their_own() -> None:
    """Six runs that differ in a setting that no row has are two methods of three seeds."""
    runs = [
        row("snip", seed, accuracy + 0.01 * seed) | {"method": f"snip-{digest}"}
        for digest, accuracy in (("0000000a", 0.5), ("0000000b", 0.8))
        for seed in range(3)
    ]
    lines = [line.split() for line in summary.accuracies(runs)]
    assert lines[2] == ["snip,", "0000000b", "81.00", "±", "1.00"]
    assert lines[3] == ["snip,", "0000000a", "51.00", "±", "1.00"]
    assert " ".join(lines[4]) == "mean ± standard deviation of 3 runs"
    for run in runs:
        run["prunable"] = "no_first" if run["method"] == "snip-0000000b" else "all"
    lines = [line.split() for line in summary.accuracies(runs)]
    assert [line[:3] for line in lines[2:4]] == [
        ["snip,", "prunable=no_first", "81.00"], ["snip,", "prunable=all", "51.00"],
    ]  # fmt: skip


def test_seeds_with_a_mask_each_are_one_method() -> None:
    runs = [row("ticket", seed, 0.8 + 0.02 * seed, mask=f"{seed}abc" * 16) for seed in (0, 1)]
    lines = [line.split() for line in summary.accuracies(runs)]
    assert lines[2] == ["ticket", "81.00", "±", "1.41"] and len(lines) == 4


def test_a_long_table_shows_its_highest_compressions() -> None:
    runs = [row("snip", 0, 0.9, 1 - 2.0**-i) for i in range(1, 10)]
    lines = summary.accuracies(runs)
    assert lines[1].split() == ["16x", "32x", "64x", "128x", "256x", "512x"]
    assert "the 6 highest of 9 compressions" in lines[-1]


# The lines of runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the terminal shows."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.INFO)
    log = logging.getLogger("pai_bench")
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.DEBUG)
    monkeypatch.setattr(log, "propagate", False)
    yield stream
    sweep_progress.forget()


def test_a_sweep_has_one_line_a_run_and_ends_with_a_table_and_the_command(
    console: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    runs = sweep_rows()[:4]
    runs[2] |= {"collapsed_layers": ["fc.weight"], "output_depends_on_input": False}
    runs[3] |= {"collapsed_layers": ["fc.weight"], "stopped": "collapse"}
    directories = stored(tmp_path / "results", runs)
    with sweep_progress.counting() as count:
        sweep_progress.expect(6)
        logging.getLogger("pai_bench.training").info("epoch 1 of 2")
        logging.getLogger("pai_bench.experiment").warning("layer collapse")
        logging.getLogger("pai_bench.runs").warning("the disk is full")
        sweep_progress.count(0, skipped=True, directory=directories[0])
        for number, directory in enumerate(directories[1:], 1):
            now = 1000.0 + 60 * number
            sweep_progress.count(0, directory=directory)
        sweep_progress.count(2)
        sweep_progress.count(75, directory=tmp_path / "results" / "later")
    lines = console.getvalue().splitlines()
    assert lines[:2] == ["6 runs", "the disk is full"]
    assert lines[2] == f"run 1 of 6   95.00 % test accuracy   is finished already   {runs[0]['id']}"
    assert lines[3] == f"run 2 of 6   96.00 % test accuracy   10.0 s   about 4 min left   {runs[1]['id']}"
    assert "   layer collapse   no signal   10.0 s   about 3 min left   " in lines[4]
    assert lines[5].startswith("run 4 of 6   layer collapse   not trained   10.0 s   ")
    assert lines[6].startswith("run 5 of 6   failed with exit code 2   about 60 s left")
    assert lines[7] == "run 6 of 6   preempted   later"
    text = console.getvalue()
    assert "digits, resnet20: test accuracy in percent" in text
    assert f"  pai-bench report {tmp_path / 'results'} -o report" in text
    assert lines[-1] == "3 done, 1 skipped, 1 failed, 1 preempted"
    assert count.worst == 75


def test_the_time_that_is_left_is_told_by_runs_that_succeeded(
    console: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    first, second = stored(tmp_path, sweep_rows()[:2])
    with sweep_progress.counting():
        sweep_progress.expect(22)
        sweep_progress.count(0, skipped=True, directory=first)
        now = 1002.0
        sweep_progress.count(1, directory=tmp_path / "failed")
        now = 1122.0
        sweep_progress.count(0, directory=second)
    _, skipped, failed, succeeded, *_ = console.getvalue().splitlines()
    assert " left" not in skipped + failed
    assert "   about 39 min left   " in succeeded  # 19 runs


def test_a_line_is_said_without_a_look_into_earlier_outcomes(
    console: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    first, second, third = stored(tmp_path / 'of "skipped": false', sweep_rows()[:3])
    with sweep_progress.counting() as count, monkeypatch.context() as sweep:
        sweep_progress.expect(9)
        sweep.setattr(sweep_progress, "_read", None)
        sweep_progress.count(0, skipped=True, directory=first)
        now = 1010.0
        sweep_progress.count(0, directory=second)
        now = 1020.0
        sweep_progress.count(0, directory=third)
    said = [line.split("   ") for line in console.getvalue().splitlines()[1:4]]
    assert [words[0] for words in said] == ["run 1 of 9", "run 2 of 9", "run 3 of 9"]
    assert said[0][2] == "is finished already"
    assert (said[1][3], said[2][3]) == ("about 70 s left", "about 60 s left")
    assert len(count.outcomes) == 3


def test_a_search_shows_validation_accuracies_and_ends_with_its_conclusion(
    console: io.StringIO, tmp_path: Path
) -> None:
    runs = [row("snip", seed, 0.9) | {"validation_top1": 0.5 + seed / 10} for seed in (0, 1)]
    with sweep_progress.counting():
        sweep_progress.expect(2, searches=True)
        for directory in stored(tmp_path, runs):
            logging.getLogger("pai_bench.training").info("epoch 1 of 2")
            sweep_progress.count(0, directory=directory)
        sweep_progress.conclude("seed=1 was best")
    lines = console.getvalue().splitlines()
    assert [line.split("   ")[1] for line in lines[1:3]] == [
        "50.00 % validation accuracy",
        "60.00 % validation accuracy",
    ]
    assert lines[3:] == ["", "2 done, 0 skipped, 0 failed", "seed=1 was best"]
    with sweep_progress.counting():
        sweep_progress.expect(0, searches=True)  # all its trials were done before
        sweep_progress.conclude("seed=1 was best")
    assert console.getvalue().splitlines()[-1] == "seed=1 was best"


def test_a_single_run_says_everything(console: io.StringIO, tmp_path: Path) -> None:
    (directory,) = stored(tmp_path, [row()])
    with sweep_progress.counting() as count:
        sweep_progress.expect(1)
        logging.getLogger("pai_bench.training").info("epoch 1 of 2")
        sweep_progress.count(0, directory=directory)
    assert console.getvalue() == "epoch 1 of 2\n" and count.worst == 0


@pytest.mark.slow
def test_a_parallel_sweep_prints_a_line_a_run_and_nothing_of_its_launcher(run_cli: RunCli) -> None:
    words = ["model=lenet300", "training.epochs=1", "tracker=none", "pruner=magnitude", "compression=10", "seed=0,1"]
    done = run_cli("-m", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "2 runs" and "HYDRA" not in done.stdout + done.stderr
    shown = [re.match(r"run \d of 2   \d+\.\d\d % test accuracy   ", line) for line in lines[1:3]]
    assert all(shown) and "step/s" not in done.stdout + done.stderr
    assert lines[3] == "" and "test accuracy in percent" in lines[4] and lines[-1] == "2 done, 0 skipped, 0 failed"


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("worker", "disable"), [(True, True), (False, None)])
def test_workers_have_no_progress_bar(worker: bool, disable: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool | None] = []

    def bar(steps: range, *_: str, disable: bool | None, **__: Any) -> range:
        asked.append(disable)
        return steps

    monkeypatch.setattr(loop, "tqdm", bar)
    monkeypatch.setattr(loop, "in_worker", lambda: worker)
    torch.manual_seed(0)
    model = Chain()
    trainer(model).until(half(model), 1)
    assert asked == [disable]


def test_bars_of_layers_are_linear_and_labelled() -> None:
    layers = [
        {"name": name, "size": 1000, "kept": kept, "density": kept / 1000}
        for name, kept in (("first", 400), ("half", 200), ("quarter", 100), ("none", 0))
    ]
    head, *lines = summary._layers(layers)
    assert "full bar: 40 %, linear" in head
    assert [line.count("#") for line in lines] == [24, 12, 6, 0] and "collapsed" in lines[3]
    assert all("#" not in line for line in summary._layers([layers[3]]))


# Colours --------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colours.painted("error:", colours.RED, Terminal()) == "\x1b[31merror:\x1b[0m"
    assert colours.painted("error:", colours.RED, io.StringIO()) == "error:"
    record = logging.LogRecord("pai_bench", logging.INFO, "", 0, "  91.20 %% test accuracy of %s", ("it",), None)
    assert colours.Formatter(Terminal()).format(record) == "  \x1b[32m91.20 %\x1b[0m test accuracy of it"
    assert colours.Formatter(io.StringIO()).format(record) == "  91.20 % test accuracy of it"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as inner:
            inner.setenv(name, value)
            assert colours.painted("error:", colours.RED, Terminal()) == "error:"


def test_lines_are_cut_between_columns_and_words_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    columns = "  12 of 60   train 1.5000 loss, 38.11 %   test 0.7861 loss, 68.52 %"
    cut = colours.wrapped(columns, Terminal())
    assert cut == "  12 of 60   train 1.5000 loss, 38.11 %\n    test 0.7861 loss, 68.52 %"
    assert colours.wrapped(columns, io.StringIO()) == columns
    words = "config error: there is no such setting as the one that you gave; see --help\n\n  short"
    assert colours.wrapped(words, Terminal()).split("\n") == [
        "config error: there is no such setting",
        "  as the one that you gave; see --help",
        "",
        "  short",
    ]
    path = "everything is in " + 50 * "x"
    assert colours.wrapped(path, Terminal()).split() == path.split()
    monkeypatch.setenv("COLUMNS", "200")
    assert colours.wrapped(columns, Terminal()) == columns


def test_the_line_of_a_failure_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.report(ConfigError("give one of " + ", ".join(f"option_{i}" for i in range(30)))) == 2
    lines = stream.getvalue().splitlines()
    assert len(lines) > 5 and all(len(line) <= 60 for line in lines) and lines[0].startswith("config error: give one")
