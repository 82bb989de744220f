"""Signals: the first is noted, the second ends the process, whatever it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, composed
from processes import in_child
from whole_runs import directory_of

from pai_bench import experiment
from pai_bench.errors import PreemptedError
from pai_bench.runs import status
from pai_bench.system import preemption, second_signal

SMALL = ["model=lenet300", "tracker=none", "pruner=magnitude", "sparsity=0.5"]
HANGS = {
    "in C, with Python's lock": "import itertools; sum(itertools.repeat(1))",
    "in C, without it": "import select; select.select([], [], [])",
    "in Python": "while True: pass",
}


def started(work: str) -> subprocess.Popen[str]:
    """A process that watches, says so, and then does some work."""
    code = f"from pai_bench.system import preemption\npreemption.watch()\nprint('watching', flush=True)\n{work}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "watching\n"
    return process


@pytest.mark.parametrize("where", HANGS)
def test_a_second_signal_ends_a_process_that_hangs(where: str) -> None:
    process = started(HANGS[where])
    for _ in range(2):  # a launcher that tells the process and its group
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    time.sleep(second_signal.SAME_NOTICE_SECONDS)
    assert process.poll() is None, "one notice is no second signal"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) in (-signal.SIGINT, -signal.SIGKILL)


def test_notices_of_a_scheduler_end_nothing() -> None:
    process = started("import time; time.sleep(2.5)")
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    time.sleep(second_signal.SAME_NOTICE_SECONDS + 0.2)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(10) == 0


def test_the_process_that_waits_for_a_second_signal_ends_with_its_parent() -> None:
    process = started("input()")
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    until(lambda: not alive(int(child)))


def test_a_worker_ends_with_its_parent() -> None:
    def parent() -> None:
        def worker() -> None:
            preemption.end_with_parent()
            time.sleep(60)

        os.write(writing, f"{in_child(worker)}\n".encode())
        time.sleep(60)

    reading, writing = os.pipe()
    pid = in_child(parent)
    os.close(writing)
    with os.fdopen(reading) as said:
        worker = int(said.readline())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until(lambda: not alive(worker))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: object) -> None:
    end = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def run(results: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "run.py"), *more, *SMALL, f"results_dir={results}"]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("more", [["training.epochs=2"], ["-m", "seed=range(50)"]])
def test_a_signal_before_the_run_begins_is_answered(more: list[str], tmp_path: Path) -> None:
    process = run(tmp_path, *more)
    until(lambda: "second_signal" in "".join(children(process.pid)))
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 75
    assert complained == "preempted: SIGTERM came before the run began; the same command starts it\n", said
    assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[str]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [Path(f"/proc/{child}/cmdline").read_text() for child in found]
    except FileNotFoundError:
        return []


def test_ctrl_c_is_a_preemption_and_a_second_one_leaves_no_run_that_seems_to_run(tmp_path: Path) -> None:
    process = run(tmp_path, "training.epochs=2000")
    until(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 75 and "was preempted by SIGINT" in complained
    assert status.state(directory_of(tmp_path)).name == "preempted"


def test_the_last_words_of_a_run_say_that_it_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        monkeypatch.setattr(preemption, "_asked", [0.0])
        preemption.watch()
        os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        monkeypatch.setattr(experiment, "assembled", ended)
        experiment.run(composed(*SMALL, f"results_dir={tmp_path}"))

    assert os.WTERMSIG(os.waitpid(in_child(work), 0)[1]) == signal.SIGTERM
    found = status.state(directory_of(tmp_path))
    assert (found.name, found.exit_code) == ("preempted", 75)


def test_ctrl_c_in_a_process_that_notes_no_signals_is_a_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "assembled", interrupted)
    with pytest.raises(PreemptedError, match="interrupted"):
        experiment.run(composed(*SMALL, f"results_dir={tmp_path}"))
    assert status.state(directory_of(tmp_path)).name == "preempted"
