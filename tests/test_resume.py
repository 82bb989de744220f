"""A run that is killed, preempted or met by a second process: the same result as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, composed
from processes import in_child
from whole_runs import RUNS, TINY, assert_equal, config_of, directory_of, outcome, whole

from pai_bench import experiment
from pai_bench.errors import ConfigError
from pai_bench.runs import checkpoint_file
from pai_bench.runs.directory import RunDirectory
from pai_bench.system import files

__all__ = ["whole"]  # a fixture

KILLS = int(os.environ.get("PAI_KILLS", "3"))  # of every kind of run; more of them is a soak test


@pytest.fixture(autouse=True, scope="module")
def however_short() -> Iterator[None]:
    """Idle channels are looked for in these short runs, too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pai_bench.training.compact.LONG", {})
        yield


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    name: str, whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL at random moments; with a checkpoint after every step many fall into the writing of one."""
    expected = whole(name)
    chance = random.Random(name)
    pace, kills, begun = expected["seconds"], 0, False
    while True:
        pid = in_child(lambda: experiment.run(config_of(name, tmp_path, "checkpoint_minutes=0")))
        if kills < KILLS:
            time.sleep(chance.uniform(0, 0.5 * pace))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            begun |= any(tmp_path.glob("*/status.json"))
            continue
        assert status == 0, f"exit code {os.WEXITSTATUS(status)}"
        if begun:
            break
        # It was over before a kill came, or every kill came before it had begun: the machine is more or less busy now.
        pace, kills = pace * (2 if kills else 0.5), 0
        shutil.rmtree(directory_of(tmp_path))
    assert_equal(outcome(tmp_path), expected)
    assert 1 < json.loads((directory_of(tmp_path) / "status.json").read_text())["attempt"] <= kills + 1


@pytest.mark.parametrize("name", ["synflow", "rewinding to a step"])
def test_a_run_that_dies_in_the_middle_of_a_write_ends_as_if_it_had_not(
    name: str, whole: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt gets a few writes further, and dies with half a file written."""
    expected = whole(name)
    real = files.write_atomically

    def dying(after: int) -> Callable[[Path, bytes], None]:
        left = [after]

        def write(path: Path, content: bytes) -> None:
            left[0] -= 1
            if left[0] == 0:
                path.with_name(f"{path.name}.tmp-dying").write_bytes(content[: len(content) // 2])
                os._exit(99)
            real(path, content)

        return write

    def work(after: int) -> None:
        files.write_atomically = dying(after)
        experiment.run(config_of(name, tmp_path, "checkpoint_minutes=0"))

    for attempt in range(100):
        pid = in_child(lambda after=7 + 4 * attempt: work(after))  # type: ignore[misc]
        status = os.WEXITSTATUS(os.waitpid(pid, 0)[1])
        if status == 0:
            break
        assert status == 99
    assert attempt > 1
    for left in directory_of(tmp_path).glob("*.tmp-dying"):
        left.unlink()
    assert_equal(outcome(tmp_path), expected)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_dies_between_its_last_step_and_its_result(
    name: str, whole: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunDirectory.write_tensors

    def dying(self: RunDirectory, file: str, tensors: Any) -> None:
        if file == "model.safetensors":
            os._exit(99)
        real(self, file, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "write_tensors", dying)
        pid = in_child(lambda: experiment.run(config_of(name, tmp_path, "checkpoint_minutes=0")))
        assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 99
    pid = in_child(lambda: experiment.run(config_of(name, tmp_path)))
    assert os.waitpid(pid, 0)[1] == 0
    assert_equal(outcome(tmp_path), whole(name))


def test_a_run_that_dies_after_its_result_is_tidied_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config_of("synflow", tmp_path, "checkpoint_minutes=0")
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "_tidy", lambda self: os._exit(99))
        assert os.WEXITSTATUS(os.waitpid(in_child(lambda: experiment.run(cfg)), 0)[1]) == 99
    directory = directory_of(tmp_path)
    row = json.loads((directory / "result.json").read_text())
    assert (directory / "checkpoint.pt").is_file()
    assert experiment.run(cfg) == row
    assert not list(directory.glob("checkpoint*")) and not (directory / "owner.json").exists()
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 0)


def test_who_claims_a_run_just_after_its_end_leaves_it_as_it_is(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    first.record({"test_top1": 0.5}, 1.0)
    row = {"id": "run", "test_top1": 0.5, "sparsity": 0.0}
    first.finish(row)
    first.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "status.json"}
    second = RunDirectory(tmp_path / "run")
    assert second.row == row
    second.close()
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "status.json"}
    assert after == before


def test_an_attempt_that_ends_before_its_first_status_loses_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDirectory(tmp_path / "run").close()
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "status", lambda self, state: os._exit(99))
        pid = in_child(lambda: RunDirectory(tmp_path / "run"))
        assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 99
    RunDirectory(tmp_path / "run").close()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["attempt"] == 2


def test_a_round_that_is_refused_late_loses_nothing(tmp_path: Path) -> None:
    words = ["pruner=magnitude", "sparsity=0.8", "schedule=rewind", "schedule.levels=2", "schedule.rewind_epoch=0"]
    more = ["allocation=global_min_density", "allocation.min_density=0.3", "checkpoint_minutes=0"]
    cfg = composed(*TINY, *words, *more, f"results_dir={tmp_path}")
    for attempt in (1, 2):  # the first level keeps 45 % and is possible, the second is not
        with pytest.raises(ConfigError, match=r"allocation\.min_density=0\.3"):
            experiment.run(cfg)
        directory = directory_of(tmp_path)
        status = json.loads((directory / "status.json").read_text())
        assert (status["state"], status["exit_code"], status["attempt"]) == ("failed", 2, attempt)
        assert "allocation.min_density" in status["error"] and (directory / "checkpoint.pt").is_file()
        assert "prune/round" in (directory / "curve.jsonl").read_text()


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_file.save_checkpoint(tmp_path, {"a": torch.ones(3)})
    checkpoint_file.save_checkpoint(tmp_path, {"a": torch.zeros(3)})
    loaded = checkpoint_file.load_checkpoint(tmp_path)
    assert loaded is not None and not loaded["a"].any()
    content = (tmp_path / "checkpoint.pt").read_bytes()
    for damaged in (content[:-10], content[:50], b"", content[:-1] + b"x"):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        loaded = checkpoint_file.load_checkpoint(tmp_path)
        assert loaded is not None and loaded["a"].all()
        assert not (tmp_path / "checkpoint.pt").exists()  # or the next one would take the place of the whole one
    assert "checkpoint.pt: it is damaged" in caplog.text
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"pai_bench")
    assert checkpoint_file.load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_preempted_run_ends_with_75_and_goes_on(
    number: signal.Signals, whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # another number of threads gives other roundings
    command = [sys.executable, str(ROOT / "run.py"), *TINY, *RUNS["gradual"], f"results_dir={tmp_path / 'results'}"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "results").glob("*/status.json")):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert said.startswith("preempted: ") and number.name in said and len(said.splitlines()) == 1
    directory = directory_of(tmp_path / "results")
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (directory / "checkpoint.pt").is_file() and not (directory / "owner.json").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "going on from a checkpoint" in again.stdout
    assert_equal(outcome(tmp_path / "results"), whole("gradual"))
