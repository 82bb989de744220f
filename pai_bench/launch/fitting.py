"""As many runs of an experiment as fit into a given time on this machine, the most informative first."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from pai_bench.config import checks
from pai_bench.config.schema import RunConfig
from pai_bench.errors import PreemptedError, UserError
from pai_bench.runs import status
from pai_bench.system import cores, mps, preemption

Say = Callable[[str], None]
_SPAWN = multiprocessing.get_context("spawn")
# Ctrl-C and the notices of a cluster reach workers, too. A SIGTERM after these would be the second, which ends a worker
# without a checkpoint.
_END = signal.SIGUSR1
_LOOK = 0.5  # seconds between two looks whether a signal has come
_PATIENCE = 60.0  # seconds that a worker has for its last checkpoint
_EVALUATION = 1 / 3  # of the time of a training step, for an image


def by_information(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs in the order in which they tell most: of the first network all methods at one density with one seed.

    Then follow more seeds, then other densities, from the middle outwards, then other networks. Dense networks come
    with every density, so first.
    """
    tasks = list(dict.fromkeys(run.task for run in runs))
    sparsities = sorted({run.sparsity for run in runs if run.prunes})
    middle = (len(sparsities) - 1) / 2
    outwards = sorted(sparsities, key=lambda sparsity: abs(sparsities.index(sparsity) - middle))

    def rank(run: RunConfig) -> tuple[int, int, int]:
        return tasks.index(run.task), outwards.index(run.sparsity) if run.prunes else 0, run.seed

    return sorted(runs, key=rank)


def epochs_to_train(run: RunConfig) -> float:
    """All training that a run takes, that of its search included, in epochs."""
    clock, total = 0.0, 0.0
    for one in checks.rounds_of(run, run.sparsity):
        total += max(0.0, one.until_epoch - clock)
        clock = max(clock, one.until_epoch) if one.rewind_epoch is None else one.rewind_epoch
    return total + run.training.epochs - clock


@dataclass(frozen=True)
class Pace:
    """How fast a network trains while other workers do the same."""

    images_per_second: float
    num_train: int
    num_evaluated: int  # test and validation images

    def seconds(self, run: RunConfig) -> float:
        """What a run takes, without its scores."""
        each = self.num_train + _EVALUATION * self.num_evaluated
        return epochs_to_train(run) * each / self.images_per_second


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run: RunConfig
    code: int
    seconds: float


class Worker:
    """A process that does one thing after another."""

    def __init__(self) -> None:
        self._ours, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs,), name="Worker")
        self._process.start()
        theirs.close()
        self.run: RunConfig | None = None
        self._since = 0.0

    @property
    def connection(self) -> Connection:
        """Where its answers come from."""
        return self._ours

    def ask(self, what: str, run: RunConfig) -> None:
        """Starts something: "attempt" or "pace"."""
        self.run, self._since = run, time.perf_counter()
        with suppress(ConnectionError):  # the process has died: `answer` says so
            self._ours.send((what, run))

    def answer(self) -> tuple[Any, float]:
        """What came out and how long it took. None: the process has died."""
        try:
            answer = self._ours.recv()
        except (EOFError, ConnectionError):
            answer = None
        self.run = None
        return answer, time.perf_counter() - self._since

    def end(self) -> None:
        """Asks the process to write a checkpoint and to end: one that waits for work finds its pipe closed."""
        self._ours.close()
        if self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, _END)

    def join(self) -> None:
        """Waits until the process has ended, with patience."""
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection) -> None:
    """What a worker does: it answers until the pipe closes."""
    from pai_bench.launch import attempt, terminal

    terminal.start_process()
    preemption.watch()
    while True:
        try:
            what, run = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        answer = attempt.attempt(run) if what == "attempt" else _pace(run)
        with suppress(ConnectionError):  # nobody waits for the answer any more
            connection.send(answer)
        if preemption.requested():
            return


def _pace(run: RunConfig) -> Pace | UserError:
    """The pace of a run, or what hinders it."""
    from pai_bench.assembly import load_data
    from pai_bench.launch import throughput
    from pai_bench.system import devices
    from pai_bench.system.world import world

    try:
        number = load_data(run, devices.pick(run.device, world())).num_examples
        rate = throughput.measure(run, 1.0)["both"]
    except UserError as error:
        return error
    return Pace(rate, number["train"], number["test"] + number["validation"])


class Crew:
    """Workers that run side by side, each with its share of the processor's threads."""

    def __init__(self, number: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores.num_allowed() // number)))
        self.workers = [Worker() for _ in range(number)]

    def pace(self, run: RunConfig) -> Pace:
        """How fast all workers train a run at the same time.

        Raises:
            UserError: and its kinds, for what hinders the run, such as a dataset that is missing.
            PreemptedError: a signal came.
        """
        for worker in self.workers:
            worker.ask("pace", run)
        for worker in self.workers:
            preemption.check()
            while not worker.connection.poll(_LOOK):
                preemption.check()
        found = [worker.answer()[0] for worker in self.workers]
        for answer in found:
            if not isinstance(answer, Pace):
                raise answer or UserError("a worker has died, perhaps for want of memory; give fewer with --at-once")
        rate = sum(pace.images_per_second for pace in found) / len(found)
        return Pace(rate, found[0].num_train, found[0].num_evaluated)

    def do(self, runs: Sequence[RunConfig], deadline: float) -> Iterator[Outcome]:
        """Does runs in their order until a time on the monotonic clock, or until a signal comes to this process.

        What is then running keeps a checkpoint.
        """
        left = list(runs)
        for worker in self.workers:
            if left:
                worker.ask("attempt", left.pop(0))
        while busy := {worker.connection: worker for worker in self.workers if worker.run is not None}:
            ready = _ready(list(busy), deadline)
            if not ready:
                break
            for connection in ready:
                worker = busy[connection]  # type: ignore[index]
                run = worker.run
                assert run is not None
                code, seconds = worker.answer()
                if code is None:
                    worker.end()
                    worker.join()
                    self.workers[self.workers.index(worker)] = worker = Worker()
                yield Outcome(run, 1 if code is None else code, seconds)
                over = preemption.requested() or time.monotonic() >= deadline
                if left and code != PreemptedError.exit_code and not over:
                    worker.ask("attempt", left.pop(0))

    def stop(self) -> None:
        """Ends all workers. Runs that are not done keep their checkpoints."""
        for worker in self.workers:
            worker.end()
        for worker in self.workers:
            worker.join()


def _ready(connections: Sequence[Connection], deadline: float) -> list[Any]:
    """The connections that have an answer, as soon as there is one. None: it is the deadline, or a signal came."""
    while True:
        left = deadline - time.monotonic()
        ready = wait(connections, max(0.0, min(_LOOK, left)))
        if ready or left <= 0 or preemption.requested():
            return ready


def open_runs(runs: Sequence[RunConfig]) -> tuple[list[RunConfig], int]:
    """The different runs that are not finished and that nobody is doing, and how many are."""
    different = list({run.id: run for run in runs}.values())
    states = {run.id: status.state(run.directory).name for run in different}
    left = [run for run in different if states[run.id] not in ("finished", "running")]
    return left, len(different) - len(left)


def fit(runs: Sequence[RunConfig], minutes: float, at_once: int, say: Say) -> list[Outcome]:
    """Does as many runs as fit, and says what it expects before and what came out.

    Args:
        minutes: the whole time, its own start and the last checkpoints included.
        at_once: how many runs go side by side.

    Raises:
        PreemptedError: a signal came before all was done.
    """
    started = time.monotonic()
    todo, num_done = open_runs(by_information(runs))
    say(f"{len(todo) + num_done} runs, {num_done} done or under way, {len(todo)} to do; {at_once} at once")
    if not todo:
        return []
    num_workers = min(at_once, len(todo))
    with mps.shared(num_workers, num_gpus()):
        return _fitted(todo, Crew(num_workers), started, minutes, say)


def _fitted(todo: Sequence[RunConfig], crew: Crew, started: float, minutes: float, say: Say) -> list[Outcome]:
    """Does as many runs as fit, the first ones first. Ends the workers.

    Raises:
        PreemptedError: a signal came before all was done.
    """
    try:
        deadline = started + 60 * minutes - min(_PATIENCE, 6 * minutes)
        _expect(crew, todo, deadline, say)
        outcomes = []
        for outcome in crew.do(todo, deadline):
            outcomes.append(outcome)
            row = status.finished(outcome.run.directory)
            told = f"{100 * row['test_top1']:.2f} %" if row else f"exit code {outcome.code}"
            say(f"{time.monotonic() - started:6.0f} s  {outcome.run.id}  {told}  in {outcome.seconds:.0f} s")
    finally:
        crew.stop()
    done = sum(outcome.code == 0 for outcome in outcomes)
    say(f"{done} of {len(todo)} done in {(time.monotonic() - started) / 60:.1f} min; the same command goes on")
    ended = sum(outcome.code != PreemptedError.exit_code for outcome in outcomes)
    if ended < len(todo) and (name := preemption.requested()):
        raise PreemptedError(f"{name} came when {done} of {len(todo)} runs were done; the same command goes on")
    return outcomes


def _expect(crew: Crew, todo: Sequence[RunConfig], deadline: float, say: Say) -> None:
    """Says how many runs of each network will fit, by a pace that is measured with all workers."""
    paces: dict[str, Pace] = {}
    room = (deadline - time.monotonic()) * len(crew.workers)
    fitting: dict[str, int] = {}
    for run in todo:
        if run.task not in paces:
            paces[run.task] = pace = crew.pace(run)
            room = min(room, (deadline - time.monotonic()) * len(crew.workers))
            say(
                f"{run.task}: {pace.images_per_second:,.0f} images/s each, "
                f"{pace.seconds(run):,.0f} s for {run.pruner.name} without its scores"
            )
        room -= paces[run.task].seconds(run)
        if room < 0:
            break
        fitting[run.task] = fitting.get(run.task, 0) + 1
    for task, number in fitting.items():
        say(f"expected: {number} runs of {task}")
    if not fitting:
        say("expected: no run will end in this time; those that are begun keep their checkpoints")


def num_gpus() -> int:
    """The GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def runs_at_once() -> int:
    """One run on each core, or four on each GPU."""
    return 4 * num_gpus() or cores.num_allowed()
