"""pai_bench.run, sweep and load: runs from Python are the runs of the command line."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import pai_bench as pb
from pai_bench import errors, experiment
from pai_bench.config.schema import RunConfig
from pai_bench.errors import ConfigError, DataError, PreemptedError
from pai_bench.launch import compose

SMALL = ["model=lenet300", "training.epochs=1", "tracker=none", "device=cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the present one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def log() -> Iterator[logging.Logger]:
    """The log of the package, as in a process in which nothing has been run yet."""
    log = logging.getLogger("pai_bench")
    before = log.handlers, log.propagate, log.level, logging.raiseExceptions
    log.handlers = []
    yield log
    log.handlers, log.propagate, log.level, logging.raiseExceptions = before


def test_a_run_gives_its_row_and_is_not_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    states = torch.get_rng_state(), torch.backends.cudnn.benchmark
    row = pb.run("pruner=snip", "sparsity=0.9", *SMALL)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.backends.cudnn.benchmark == states[1]
    assert (row["pruner"], row["epochs"]) == ("snip", 1) and 0.2 < row["test_top1"] <= 1
    directory = folder / "results" / row["id"]
    assert int(sum(int(kept.sum()) for kept in load_file(directory / "mask.safetensors").values())) == row["num_kept"]
    said = capsys.readouterr()
    assert said.out.count(f"everything is in results/{row['id']}\n") == 1 == said.out.count(row["id"])
    assert said.out.count("epoch   1 of 1") == 1
    assert said.err == "" and "\r" not in said.out
    finished = (directory / "result.json").stat().st_mtime_ns
    again = pb.run(["pruner=snip", *SMALL], "sparsity=0.90")
    assert {key: again[key] for key in row if key != "input_shape"} == {
        key: row[key] for key in row if key != "input_shape"
    }
    assert (directory / "result.json").stat().st_mtime_ns == finished
    said = capsys.readouterr()
    assert said.out.count("is finished already") == 1 == len(said.out.splitlines())
    assert compose.compose(["pruner=snip", "sparsity=0.9", *SMALL]).id == row["id"]


def test_a_sweep_goes_on_past_failures_and_says_what_failed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # At this sparsity SNIP would keep no weight.
    words = ["pruner=random,magnitude", "sparsity=0.5,0.9999999", *SMALL]
    rows = pb.sweep(words)
    assert [(row["pruner"], row["target_sparsity"]) for row in rows] == [("random", 0.5), ("magnitude", 0.5)]
    said = capsys.readouterr().out
    assert "run 1 of 4" in said and "run 4 of 4" in said
    end = said[said.index("2 done, 0 finished before, 2 failed") :].splitlines()
    assert len(end) == 3
    for line, pruner in zip(end[1:], ("random", "magnitude"), strict=True):
        assert line.startswith(f"failed: digits-lenet300-{pruner}-s") and "leaves none of" in line
    assert [row["id"] for row in pb.sweep(*words)] == [row["id"] for row in rows]
    assert "0 done, 2 finished before, 2 failed" in capsys.readouterr().out
    # A dense network is one run at every sparsity.
    rows = pb.sweep("pruner=dense", "sparsity=0.5,0.9", *SMALL)
    assert len(rows) == 1


def test_ctrl_c_ends_a_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def interrupted(config: RunConfig, *_: object) -> None:
        begun.append(config.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "assembled", interrupted)
    with pytest.raises(PreemptedError, match="interrupted"):
        pb.sweep("pruner=magnitude", "sparsity=0.5", "seed=range(3)", *SMALL)
    assert begun == [0]


def test_an_experiment_is_a_sweep(folder: Path) -> None:
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "two.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      pruner: magnitude\n"
        "      sparsity: 0.5,0.9\n      seed: 0\n"
    )
    path = f"hydra.searchpath=[file://{folder / 'conf'}]"
    small = [*SMALL[:1], "training.epochs=0", *SMALL[2:]]
    with pytest.raises(ConfigError, match="experiment=: these are several runs"):
        pb.run(path, "experiment=two", *small)
    assert [row["target_sparsity"] for row in pb.sweep(path, "experiment=two", *small)] == [0.5, 0.9]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prunr=snip"], r"^prunr: there is no such setting; .*\(did you mean pruner\?\)"),
        (["pruner=snip"], "^pruner=snip needs a target"),
        (["pruner=snip", "sparsity=0.5,0.9"], r"^sparsity=0\.5,0\.9: these are several runs; use pai_bench\.sweep"),
        (["foo bar"], "^foo bar: it cannot be read; give key=value"),
        (["-m"], "^-m: flags are for the command line"),
        (["hydra/launcher=parallel"], "^hydra/launcher=parallel: runs go one after another"),
        ([5], "^5: give settings as on the command line"),
        (["pruner=snip", "sparsity=0.9", "device=tpu"], "^device=tpu: give auto"),
    ],
)
def test_a_wrong_word_is_one_line_without_a_page_of_hydra(folder: Path, words: list[Any], message: str) -> None:
    for function in (pb.run, pb.sweep):
        if function is pb.sweep and "sparsity=0.5,0.9" in words:
            continue
        with pytest.raises(ConfigError, match=message) as raised:
            function(*words)
        assert "\n" not in str(raised.value)
        error = raised.value
        assert error.__cause__ is None and (error.__suppress_context__ or error.__context__ is None)
    assert list(folder.iterdir()) == []


def test_messages_are_shown_once_however_often_it_is_called(
    folder: Path, log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pruner=random", "sparsity=0.5", "model=lenet300", "training.epochs=0", "tracker=none"]
    for _ in range(3):
        pb.run(*words)
    assert [type(handler).__name__ for handler in log.handlers].count("Console") == 1
    assert capsys.readouterr().out.count("is finished already") == 2


@pytest.mark.parametrize("own", [None, "mine"])
def test_settings_of_the_process_come_back(own: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_ERROR_REPORTING", "WANDB__SERVICE_WAIT")
    for name in variables:
        monkeypatch.setenv(name, own or "")
        if own is None:
            monkeypatch.delenv(name)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    launcher = logging.getLogger("hydra._internal.core_plugins.basic_launcher")
    monkeypatch.setattr(launcher, "level", logging.INFO)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    seen = []

    def tracked(config: RunConfig) -> dict[str, Any]:
        for name in variables:
            os.environ[name] = str(config.directory)
        seen.append(logging.raiseExceptions)
        return {}

    monkeypatch.setattr(experiment, "run", tracked)
    for function in (pb.run, pb.sweep):
        function("pruner=random", "sparsity=0.5", *SMALL)
    assert seen == [False, False] and logging.raiseExceptions
    assert [os.environ.get(name) for name in variables] == [own] * len(variables)
    assert "GOMP_SPINCOUNT" not in os.environ and launcher.level == logging.INFO


def test_it_works_from_any_folder_in_a_plain_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import pai_bench as pb\n"
        "row = pb.run('pruner=random', 'sparsity=0.5', 'model=lenet300', 'training.epochs=0', 'tracker=none')\n"
        "print(row['num_kept'])\npb.run('pruner=snp')\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1].isdigit() and (tmp_path / "results").is_dir()
    *trace, last = done.stderr.strip().splitlines()
    assert last.startswith("pai_bench.errors.ConfigError: pruner=snp: there is no such option (did you mean snip?)")
    assert not any("hydra/" in line for line in trace) and "direct cause" not in done.stderr


def test_finished_runs_are_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    words = ["model=lenet300", "training.epochs=0", "tracker=none", "pruner=random", "sparsity=0.5", "seed=0,1"]
    rows = pb.sweep(*words)
    (folder / "results" / "unfinished").mkdir()
    table = pb.load("results")
    assert sorted(table.id) == sorted(row["id"] for row in rows) and len(table) == 2
    assert list(table.columns) == list(rows[0]) and set(table.seed) == {0, 1}
    assert pb.load(folder / "results").equals(table)
    (folder / "empty").mkdir()
    assert len(pb.load("empty")) == 0
    with pytest.raises(DataError, match=r"^nowhere: there is no such folder; give the results_dir"):
        pb.load("nowhere")
    own = f"results/{rows[0]['id']}"
    with pytest.raises(
        DataError, match=f"^{re.escape(own)}: it is a run's own directory; give the folder that it lies in"
    ):
        pb.load(own)
    with pytest.raises(DataError, match=r"result\.json: it is no folder and no \.tar\.gz; give the results_dir"):
        pb.load(f"{own}/result.json")


def test_without_pandas_there_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "pandas" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pandas, which is not installed: .*pai_bench\[notebook\]"):
        pb.load("results")
