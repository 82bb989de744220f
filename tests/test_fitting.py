"""As many runs as fit into a given time: their order, what they take, and how they stop and go on."""

import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, composed
from whole_runs import TINY

from pai_bench.config.schema import RunConfig
from pai_bench.errors import DataError, PreemptedError
from pai_bench.launch import chains, fitting
from pai_bench.runs import status
from pai_bench.system import cache, preemption


def test_the_most_informative_runs_come_first() -> None:
    """All methods at the middle density with one seed, then more seeds, then other densities, then other networks."""
    grid = [
        composed(f"model={model}", f"pruner={pruner}", f"sparsity={sparsity}", f"seed={seed}")
        for model in ("resnet20", "lenet300")
        for seed in (1, 0)
        for sparsity in (0.5, 0.9, 0.99)
        for pruner in ("snip", "synflow")
    ]
    order = [(run.model.name, run.sparsity, run.seed, run.pruner.name) for run in fitting.by_information(grid)]
    assert order[:6] == [
        ("resnet20", 0.9, 0, "snip"), ("resnet20", 0.9, 0, "synflow"),
        ("resnet20", 0.9, 1, "snip"), ("resnet20", 0.9, 1, "synflow"),
        ("resnet20", 0.5, 0, "snip"), ("resnet20", 0.5, 0, "synflow"),
    ]  # fmt: skip
    assert [model for model, *_ in order] == ["resnet20"] * 12 + ["lenet300"] * 12
    dense = composed("model=resnet20", "seed=0")
    assert dense in fitting.by_information([*grid, dense])[:3]


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        ([], 20),
        (["pruner=snip", "sparsity=0.5"], 20),
        (["pruner=magnitude", "sparsity=0.5", "schedule=rewind", "schedule.levels=3"], 80),
        (["pruner=magnitude", "sparsity=0.5", "schedule=rewind", "schedule.levels=3", "schedule.rewind_epoch=5"], 65),
        (["pruner=magnitude", "sparsity=0.5", "schedule=gradual", "schedule.end_epoch=10"], 20),
    ],
)
def test_all_training_of_a_run_is_counted(words: list[str], epochs: float) -> None:
    assert fitting.epochs_to_train(chains.trainings(composed("training.epochs=20", *words))) == pytest.approx(epochs)


def ticket(density: float, *more: str) -> RunConfig:
    words = ["model=lenet300", "training.epochs=20", "pruner=magnitude", "schedule=rewind", "schedule.levels=null"]
    return composed(*words, "schedule.keep_per_level=0.5", f"density={density}", *more)


def test_of_runs_that_tell_as_much_the_cheapest_comes_first() -> None:
    """Dense, one round, many rounds: a short time is not spent on the many rounds alone."""
    rounds = ["schedule.keep_per_level=null", "schedule.levels"]
    many, few, one = (ticket(0.125, rounds[0], f"{rounds[1]}={n}") for n in (6, 3, 1))
    dense = composed("model=lenet300", "training.epochs=20")
    cut = composed("model=lenet300", "training.epochs=20", "pruner=snip", "density=0.125")
    assert fitting.by_information([many, few, dense, one, cut]) == [dense, cut, one, few, many]


def test_before_a_ticket_come_those_on_the_way_to_it() -> None:
    """The middle density first; what it needs anyway comes on the way, and each training costs once."""
    tickets = {(level, seed): ticket(0.5**level, f"seed={seed}") for seed in (1, 0) for level in (5, 1, 3, 4, 2)}
    control = ticket(0.5**3, "seed=0", "ablation=reinit")
    names = {run.id: key for key, run in tickets.items()} | {control.id: "control"}
    order = fitting.by_information([*tickets.values(), control])
    assert [names[run.id] for run in order] == [
        (1, 0), (2, 0), (3, 0), "control", (1, 1), (2, 1), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1),
    ]  # fmt: skip
    trained: set[chains.Training] = set()
    epochs = []
    for run in order[:5]:
        epochs.append(fitting.epochs_to_train(chains.trainings(run), trained))
        trained |= chains.trainings(run).keys()
    assert epochs == [40, 20, 20, 20, 40]
    alone = ticket(0.5**3, "cache_gb=0")
    assert fitting.epochs_to_train(chains.trainings(alone), trained) == 80


class Still:
    """A worker without a process, which does at once what it is asked, and notes it."""

    def __init__(self, log: list[tuple[str, RunConfig]]) -> None:
        self.connection, self.run, self.log = object(), None, log

    def ask(self, _: str, run: RunConfig) -> None:
        self.run = run  # type: ignore[assignment]
        self.log.append(("begins", run))

    def answer(self) -> tuple[int, float]:
        assert self.run is not None
        self.log.append(("ends", self.run))
        self.run = None
        return 0, 1.0


def still(number: int, log: list[tuple[str, RunConfig]] | None = None) -> fitting.Crew:
    crew = object.__new__(fitting.Crew)
    crew.workers = [Still([] if log is None else log) for _ in range(number)]  # type: ignore[misc]
    return crew


def test_the_expectation_counts_a_shared_training_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = [ticket(0.5**level) for level in (1, 2, 3, 4)]
    pace = fitting.Pace(images_per_second=10.0, num_train=10, num_evaluated=0)  # an epoch a second
    monkeypatch.setattr(fitting.Crew, "pace", lambda *_: pace)
    monkeypatch.setattr(fitting.time, "monotonic", lambda: 0.0)
    for workers, seconds, done, expected in ((1, 80, 0, 3), (1, 79, 0, 2), (2, 79, 0, 2), (1, 40, 2, 2)):
        said: list[str] = []  # alone they take 40, 60, 80 and 100
        fitting._expect(still(workers), tickets[done:], tickets[:done], seconds, said.append)
        assert said[-1] == f"expected: {expected} runs of {tickets[0].task}", (seconds, said)
    assert said[0].endswith(" 20 s for magnitude without its scores")


def test_runs_of_a_chain_go_one_after_another_and_others_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = [ticket(0.5**level, f"seed={seed}") for seed in (0, 1) for level in (1, 2, 3)]
    others = [composed("pruner=snip", f"sparsity=0.{n}") for n in (5, 8)]
    monkeypatch.setattr(fitting, "_ready", lambda busy, _: busy[-1:])
    log: list[tuple[str, RunConfig]] = []
    outcomes = list(still(3, log).do([*tickets, *others], time.monotonic() + 600))
    assert {outcome.run.id for outcome in outcomes} == {run.id for run in [*tickets, *others]}
    assert [run for _, run in log[:3]] == [tickets[0], tickets[3], others[0]]
    under_way: list[str] = []
    for what, run in log:
        (under_way.append if what == "begins" else under_way.remove)(chains.chain_of(run))
        assert len(set(under_way)) == len(under_way)


def test_after_the_deadline_nothing_begins_and_no_pace_is_waited_for() -> None:
    crew, said = still(2), list[str]()
    pipes = [multiprocessing.Pipe() for _ in crew.workers]
    for worker, (ours, _) in zip(crew.workers, pipes, strict=True):
        worker.connection = ours  # type: ignore[misc]
    run = composed("pruner=snip", "sparsity=0.5")
    fitting._expect(crew, [run], [], time.monotonic() - 1, said.append)
    assert said == [
        f"{run.task}: the time is up before its pace is known",
        "expected: no run will end in this time; those that are begun keep their checkpoints",
    ]
    assert list(crew.do([run], time.monotonic() - 1)) == []


def test_all_workers_together_have_one_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many hang: the second has what the first has left."""
    now, waited = 1000.0, list[float]()

    class Hanging:
        pid, killed = 1, False

        def is_alive(self) -> bool:
            return not self.killed

        def kill(self) -> None:
            self.killed = True

        def join(self, seconds: float | None = None) -> None:
            nonlocal now
            waited.append(seconds or 0.0)
            now += seconds or 0.0

    monkeypatch.setattr(fitting.os, "kill", lambda *_: None)
    monkeypatch.setattr(fitting.time, "monotonic", lambda: now)
    crew = object.__new__(fitting.Crew)
    crew.workers = [object.__new__(fitting.Worker) for _ in range(3)]
    for worker in crew.workers:
        worker._ours, _ = multiprocessing.Pipe()
        worker._process = Hanging()  # type: ignore[assignment]
    crew.stop()
    assert waited == [60, 0, 0, 0, 0, 0] and all(worker._process.killed for worker in crew.workers)  # type: ignore[attr-defined]


def runs(results: Path, *more: str) -> list[RunConfig]:
    words = [*TINY, "device=cpu", f"results_dir={results}", "pruner=magnitude", "sparsity=0.5", *more]
    return [composed(*words, f"seed={seed}") for seed in range(3)]


def test_runs_are_done_side_by_side_and_only_once(tmp_path: Path) -> None:
    said: list[str] = []
    outcomes = fitting.fit(runs(tmp_path), 10, 2, said.append)
    assert sorted(outcome.run.seed for outcome in outcomes) == [0, 1, 2]
    assert all(outcome.code == 0 and status.finished(outcome.run.directory) for outcome in outcomes)
    assert said[0] == "3 runs, 0 done or under way, 3 to do; 2 at once" and said[-1].startswith("3 of 3 done in ")
    assert any(line.startswith("expected: 3 runs of digits-resnet20") for line in said), said
    again: list[str] = []
    assert fitting.fit(runs(tmp_path), 10, 2, again.append) == []
    assert again == ["3 runs, 3 done or under way, 0 to do; 2 at once"]


def serve_keeping_all(connection: Any) -> None:
    """A worker that keeps trainings however short they are."""
    cache._SECONDS = 0.0
    fitting._serve(connection)


def test_side_by_side_a_chain_costs_a_training_each_and_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_serve", serve_keeping_all)
    words = [*TINY, "device=cpu", f"results_dir={tmp_path}"]
    rewind = ["pruner=magnitude", "schedule=rewind", "schedule.levels=null", "schedule.keep_per_level=0.5"]
    tickets = [composed(*words, *rewind, f"density={0.5**level}") for level in (1, 2, 3)]
    outcomes = fitting.fit([*tickets, composed(*words)], 10, 2, lambda _: None)
    assert [outcome.code for outcome in outcomes] == [0] * 4
    rows = [status.finished(run.directory) for run in tickets]
    trained = [row["search_train_examples"] + row["train_examples"] - row["reused_examples"] for row in rows]  # type: ignore[index]
    assert sum(trained) == 4 * rows[0]["train_examples"]  # type: ignore[index]


def test_what_does_not_fit_goes_on_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = runs(tmp_path, "training.epochs=300")

    def until_two_have_begun(connections: Any, deadline: float) -> Any:
        until_begun(long, 2)
        return []

    monkeypatch.setattr(fitting, "_ready", until_two_have_begun)
    said: list[str] = []
    assert fitting.fit(long, 10, 2, said.append) == []
    assert said[-1].startswith("0 of 3 done in ")
    states = [status.state(run.directory).name for run in long]
    assert states == ["preempted", "preempted", "missing"]
    assert all((run.directory / "checkpoint.pt").is_file() for run in long[:2])
    left, others = fitting.open_runs(long)
    assert ([run.seed for run in left], others) == ([0, 1, 2], [])


def until_begun(found: Sequence[RunConfig], number: int) -> None:
    while sum((run.directory / "curve.jsonl").is_file() for run in found) < number:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_at_a_signal_the_command_keeps_checkpoints_and_ends_with_75(number: signal.Signals, tmp_path: Path) -> None:
    words = [*TINY, "device=cpu", f"results_dir={tmp_path}", "pruner=magnitude", "sparsity=0.5", "training.epochs=3000"]
    command = [sys.executable, "-m", "pai_bench", "fit", "--minutes=60", "--at-once=1", *words, "seed=0,1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    (run, other) = (composed(*words, f"seed={seed}") for seed in range(2))
    until_begun([run], 1)
    process.send_signal(number)
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 75, said + complained
    name = number.name
    last = f"preempted: {name} came when 0 of 2 runs were done; the same command goes on"
    assert complained.splitlines()[-1] == last and "Traceback" not in complained
    assert (run.directory / "checkpoint.pt").is_file() and not other.directory.exists()
    assert status.state(run.directory).name == "preempted"


def test_a_signal_ends_the_measurement_of_the_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_received", ["SIGUSR1"])
    said: list[str] = []
    with pytest.raises(PreemptedError, match=r"^SIGUSR1 came before the run began; the same command starts it"):
        fitting.fit(runs(tmp_path), 10, 1, said.append)
    assert len(said) == 1 and list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_and_a_run_that_fails_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = runs(tmp_path, "training.lr=1e30")
    said: list[str] = []
    outcomes = fitting.fit(wrong[:1], 10, 1, said.append)
    assert [outcome.code for outcome in outcomes] == [1] and "exit code 1" in said[-2]
    assert "training diverged" in capfd.readouterr().err
    crew = fitting.Crew(1)
    (worker,) = crew.workers
    first, second = runs(tmp_path)[:2]
    found = crew.do([first, second], time.monotonic() + 600)
    worker._process.kill()
    assert [(outcome.run.seed, outcome.code) for outcome in found] == [(0, 1), (1, 0)]
    crew.stop()


def test_data_that_is_missing_ends_it_before_the_first_run(tmp_path: Path) -> None:
    words = ["dataset=cifar10", "download=false", f"data_dir={tmp_path}", f"results_dir={tmp_path / 'results'}"]
    said: list[str] = []
    with pytest.raises(DataError, match="cifar-10-batches-py is missing"):
        fitting.fit([composed(*words, "device=cpu", "tracker=none")], 10, 1, said.append)
    assert len(said) == 1 and not (tmp_path / "results").exists()


def test_a_worker_is_asked_once_to_end_by_a_signal_that_cannot_be_its_second(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(fitting.os, "kill", lambda pid, number: sent.append((pid, number)))
    crew = object.__new__(fitting.Crew)
    crew.workers = [stub(pid, sent) for pid in (11, 12)]
    crew.stop()
    assert sent == [(11, signal.SIGUSR1), (12, signal.SIGUSR1)]
    assert signal.SIGUSR1 not in preemption._ENDING


def stub(pid: int, sent: list[tuple[int, int]]) -> fitting.Worker:
    """A worker whose process ends when somebody waits for it."""

    class Process:
        alive = True

        def is_alive(self) -> bool:
            return self.alive

        def join(self, _: float | None = None) -> None:
            assert (pid, signal.SIGUSR1) in sent, "nobody has asked it to end"
            self.alive = False

        def terminate(self) -> None:
            sent.append((pid, signal.SIGTERM))

    worker = object.__new__(fitting.Worker)
    worker._ours, _ = multiprocessing.Pipe()
    worker._process = Process()  # type: ignore[assignment]
    worker._process.pid = pid  # type: ignore[misc]
    return worker
