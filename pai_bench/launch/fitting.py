"""As many runs of an experiment as fit into a given time on this machine, the most informative first."""

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from pai_bench.config.schema import RunConfig
from pai_bench.errors import PreemptedError, UserError
from pai_bench.launch import chains
from pai_bench.launch.chains import Training
from pai_bench.runs import status
from pai_bench.system import cores, mps, preemption

Say = Callable[[str], None]
_SPAWN = multiprocessing.get_context("spawn")
# Ctrl-C and the notices of a cluster reach workers, too. A SIGTERM after these would be the second, which ends a worker
# without a checkpoint.
_END = signal.SIGUSR1
_LOOK = 0.5  # seconds between two looks whether a signal has come
_PATIENCE = 60.0  # seconds that all workers together have for their last checkpoints
_EVALUATION = 1 / 3  # of the time of a training step, for an image


def by_information(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The different runs in the order in which they tell most: of the first network all methods at one density.

    That is with one seed. Then follow more seeds, then other densities, from the middle outwards, then other networks.
    Dense networks come with every density, so first. Of runs that tell as much, the one that takes the least training
    is next. Trainings that an earlier run shares with it cost nothing. So before a ticket come the tickets on the way
    to it.
    """
    chain: dict[str, list[RunConfig]] = {}
    for run in {run.id: run for run in runs}.values():
        chain.setdefault(chains.chain_of(run), []).append(run)
    takes = {run.id: chains.trainings(run) for run in runs}
    rank, order, trained = _rank(runs), dict[str, RunConfig](), set[Training]()
    for _, equal in itertools.groupby(sorted(runs, key=rank), rank):
        left = {run.id: run for run in equal}
        while left := {name: run for name, run in left.items() if name not in order}:
            name = min(left, key=lambda name: epochs_to_train(takes[name], trained))
            on_the_way = [
                run for run in chain[chains.chain_of(left[name])] if takes[run.id].keys() <= takes[name].keys()
            ]
            for run in sorted(on_the_way, key=lambda run: len(takes[run.id])):
                order.setdefault(run.id, run)
            trained |= takes[name].keys()
    return list(order.values())


def _rank(runs: Sequence[RunConfig]) -> Callable[[RunConfig], tuple[int, int, int]]:
    """How early a run tells something: by its network, its density and its seed."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    sparsities = sorted({run.sparsity for run in runs if run.prunes})
    middle = (len(sparsities) - 1) / 2
    outwards = sorted(sparsities, key=lambda sparsity: abs(sparsities.index(sparsity) - middle))

    def rank(run: RunConfig) -> tuple[int, int, int]:
        return tasks.index(run.task), outwards.index(run.sparsity) if run.prunes else 0, run.seed

    return rank


def epochs_to_train(trainings: Mapping[Training, float], trained: Collection[Training] = ()) -> float:
    """The epochs of those trainings of a run that no run has done yet."""
    return sum(epochs for training, epochs in trainings.items() if training not in trained)


@dataclass(frozen=True)
class Pace:
    """How fast a network trains while other workers do the same."""

    images_per_second: float
    num_train: int
    num_evaluated: int  # test and validation images

    def seconds(self, epochs: float) -> float:
        """What so much training takes."""
        return epochs * (self.num_train + _EVALUATION * self.num_evaluated) / self.images_per_second


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

    def join(self, until: float) -> None:
        """Waits until the process has ended; kills it if it has not at a time on the monotonic clock."""
        self._process.join(max(0.0, until - time.monotonic()))
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

    def pace(self, run: RunConfig, deadline: float) -> Pace | None:
        """How fast all workers train a run at the same time. None: that is not known by the deadline.

        Raises:
            UserError: and its kinds, for what hinders the run, such as a dataset that is missing.
            PreemptedError: a signal came.
        """
        for worker in self.workers:
            worker.ask("pace", run)
        for worker in self.workers:
            preemption.check()
            while not worker.connection.poll(max(0.0, min(_LOOK, deadline - time.monotonic()))):
                preemption.check()
                if time.monotonic() >= deadline:
                    return None
        found = [worker.answer()[0] for worker in self.workers]
        for answer in found:
            if not isinstance(answer, Pace):
                raise answer or UserError("a worker has died, perhaps for want of memory; give fewer with --at-once")
        rate = sum(pace.images_per_second for pace in found) / len(found)
        return Pace(rate, found[0].num_train, found[0].num_evaluated)

    def do(self, runs: Sequence[RunConfig], deadline: float) -> Iterator[Outcome]:
        """Does runs in their order until a time on the monotonic clock, or until a signal comes to this process.

        Runs of one chain go one after another: each takes over what the one before has trained. What is running at the
        end keeps a checkpoint.
        """
        left, idle = list(runs), list(self.workers)
        while time.monotonic() < deadline:
            self._hand_out(left, idle)
            busy: dict[Any, Worker] = {worker.connection: worker for worker in self.workers if worker.run is not None}
            ready = _ready(list(busy), deadline) if busy else []
            if not ready:
                return
            for connection in ready:
                worker = busy[connection]
                run = worker.run
                assert run is not None
                code, seconds = worker.answer()
                if code is None:
                    worker = self._replaced(worker)
                if code != PreemptedError.exit_code:
                    idle.append(worker)
                yield Outcome(run, 1 if code is None else code, seconds)

    def _hand_out(self, left: list[RunConfig], idle: list[Worker]) -> None:
        """Gives each idle worker the next run that shares nothing with one that is under way."""
        under_way = {chains.chain_of(worker.run) for worker in self.workers if worker.run is not None}
        for run in list(left):
            if not idle or preemption.requested():
                return
            if (chain := chains.chain_of(run)) not in under_way:
                under_way.add(chain)
                left.remove(run)
                idle.pop(0).ask("attempt", run)

    def _replaced(self, dead: Worker) -> Worker:
        """A worker in the place of one that has died."""
        dead.end()
        dead.join(time.monotonic() + _PATIENCE)
        self.workers[self.workers.index(dead)] = worker = Worker()
        return worker

    def stop(self) -> None:
        """Ends all workers within `_PATIENCE`. Runs that are not done keep their checkpoints."""
        until = time.monotonic() + _PATIENCE
        for worker in self.workers:
            worker.end()
        for worker in self.workers:
            worker.join(until)


def _ready(connections: Sequence[Connection], deadline: float) -> list[Any]:
    """The connections that have an answer, as soon as there is one. None: it is the deadline, or a signal came."""
    while True:
        left = deadline - time.monotonic()
        ready = wait(connections, max(0.0, min(_LOOK, left)))
        if ready or left <= 0 or preemption.requested():
            return ready


def open_runs(runs: Sequence[RunConfig]) -> tuple[list[RunConfig], list[RunConfig]]:
    """The runs that are not finished and that nobody is doing, and the others."""
    todo: list[RunConfig] = []
    others: list[RunConfig] = []
    for run in runs:
        (others if status.state(run.directory).name in ("finished", "running") else todo).append(run)
    return todo, others


def fit(runs: Sequence[RunConfig], minutes: float, at_once: int, say: Say) -> list[Outcome]:
    """Does as many runs as fit, and says what it expects before and what came out.

    Args:
        minutes: the whole time, its own start included. The last minute of it, or the last tenth of less than ten
            minutes, is for the last checkpoints. A worker within a long step or evaluation has a minute in all.
        at_once: how many runs go side by side.

    Raises:
        PreemptedError: a signal came before all was done.
    """
    started = time.monotonic()
    todo, others = open_runs(by_information(runs))
    say(f"{len(todo) + len(others)} runs, {len(others)} done or under way, {len(todo)} to do; {at_once} at once")
    if not todo:
        return []
    deadline = started + 60 * minutes - min(_PATIENCE, 6 * minutes)
    num_workers = min(at_once, len(todo))
    with mps.shared(num_workers, num_gpus()):
        crew = Crew(num_workers)
        try:
            _expect(crew, todo, others, deadline, say)
            outcomes = _done(crew, todo, started, deadline, say)
        finally:
            crew.stop()
    done = sum(outcome.code == 0 for outcome in outcomes)
    say(f"{done} of {len(todo)} done in {(time.monotonic() - started) / 60:.1f} min; the same command goes on")
    ended = sum(outcome.code != PreemptedError.exit_code for outcome in outcomes)
    if ended < len(todo) and (name := preemption.requested()):
        raise PreemptedError(f"{name} came when {done} of {len(todo)} runs were done; the same command goes on")
    return outcomes


def _expect(crew: Crew, todo: Sequence[RunConfig], others: Sequence[RunConfig], deadline: float, say: Say) -> None:
    """Says how many runs of each network will fit, by a pace that is measured with all workers.

    Args:
        others: runs that are done or under way; the cache holds their trainings.
    """
    paces: dict[str, Pace | None] = {}
    fitting: dict[str, int] = {}
    all_seconds, of_chain = 0.0, dict[str, float]()
    trained = {training for run in others for training in chains.trainings(run)}
    for run in todo:
        takes = chains.trainings(run)
        epochs, chain = epochs_to_train(takes, trained), chains.chain_of(run)
        trained |= takes.keys()
        if run.task not in paces:
            paces[run.task] = _told_pace(crew, run, epochs, deadline, say)
        if (pace := paces[run.task]) is None:
            break
        room = deadline - time.monotonic()
        of_chain[chain] = of_chain.get(chain, 0.0) + pace.seconds(epochs)
        if of_chain[chain] > room:  # other workers do other runs meanwhile
            continue
        all_seconds += pace.seconds(epochs)
        if all_seconds > room * len(crew.workers):
            break
        fitting[run.task] = fitting.get(run.task, 0) + 1
    for task, number in fitting.items():
        say(f"expected: {number} runs of {task}")
    if not fitting:
        say("expected: no run will end in this time; those that are begun keep their checkpoints")


def _told_pace(crew: Crew, run: RunConfig, epochs: float, deadline: float, say: Say) -> Pace | None:
    """The pace of a run, which is said, and how long it takes for so many epochs. None: the time is up before."""
    pace = crew.pace(run, deadline)
    if pace is None:
        say(f"{run.task}: the time is up before its pace is known")
    else:
        say(
            f"{run.task}: {pace.images_per_second:,.0f} images/s each, "
            f"{pace.seconds(epochs):,.0f} s for {run.pruner.name} without its scores"
        )
    return pace


def _done(crew: Crew, todo: Sequence[RunConfig], started: float, deadline: float, say: Say) -> list[Outcome]:
    """Does as many runs as fit, the first ones first, and says how each ends."""
    outcomes = []
    for outcome in crew.do(todo, deadline):
        outcomes.append(outcome)
        row = status.finished(outcome.run.directory)
        told = f"{100 * row['test_top1']:.2f} %" if row else f"exit code {outcome.code}"
        say(f"{time.monotonic() - started:6.0f} s  {outcome.run.id}  {told}  in {outcome.seconds:.0f} s")
    return outcomes


def num_gpus() -> int:
    """The GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def runs_at_once() -> int:
    """One run on each core, or four on each GPU."""
    return 4 * num_gpus() or cores.num_allowed()
