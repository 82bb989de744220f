"""Steps on images that are read while the network trains: captured as CUDA graphs, and copied beside the steps."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Chain
from emulated_graphs import emulated
from few_images import CPU, RECIPE, half
from few_images import trainer as training_of
from test_captured import Dropped, Streaming, assert_same, graphs_on, resident
from torch import nn

from pai_bench.system import devices, streams
from pai_bench.training.step import Execution
from pai_bench.training.steps import Steps

__all__ = ["graphs_on"]  # a fixture


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Chain, Dropped])
def test_captured_steps_on_batches_train_as_single_ones(
    kind: type[nn.Module], precision: str, graphs_on: torch.device
) -> None:
    torch.manual_seed(0)
    net = kind().to(graphs_on)
    recipe = replace(RECIPE, precision=precision, lr_schedule="cosine", warmup_epochs=1)
    trainers = []
    with devices.reproducible(graphs_on):
        for capture in (True, False):
            data = Streaming(resident(graphs_on))
            trainer = training_of(copy.deepcopy(net), recipe, data, device=graphs_on, capture=capture)
            mask = {name: kept.to(graphs_on) for name, kept in half(net.cpu()).items()}
            net.to(graphs_on)
            trainer.until(mask, 1.5)
            third = {name: (torch.arange(kept.numel()).view(kept.shape) % 3 > 0) for name, kept in mask.items()}
            trainer.until({name: kept & third[name].to(graphs_on) for name, kept in mask.items()}, 3)
            trainers.append(trainer)
    captured, plain = trainers
    assert captured._steps._on_batch is not None and plain._steps._on_batch is None
    assert captured._steps._captured is None
    assert_same(captured, plain)


def test_a_batch_of_another_size_is_captured_anew() -> None:
    torch.manual_seed(0)
    step = training_of(Chain(), RECIPE, resident(CPU)).network.step
    with emulated() as made:
        steps = Steps(Streaming(resident(CPU)), RECIPE, Execution(CPU, False, False), step)  # type: ignore[arg-type]
        sizes = [12, 12, 8, 8, 12]
        for size in sizes:
            images, labels = torch.randn(8, 3, size, size), torch.arange(8) % 4
            assert steps._captured_on_batch(step, images, labels) is not None
        assert len(made) == 3
        assert steps._captured_on_batch(step, torch.randn(3, 3, 12, 12), torch.arange(3)) is None


class FakeGpu:
    """Streams and events of torch.cuda that write down what they are asked."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.where = "main"

    def stream_of(self, name: str) -> Any:
        number = itertools.count(1)

        def record_event() -> Any:
            event = f"{name} event {next(number)}"
            return SimpleNamespace(synchronize=lambda: self.done.append(f"wait for {event}"))

        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.done.append(f"{name} waits for {other.name}"),
            record_event=record_event,
        )

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.where = self.where, stream.name
        yield
        self.where = before

    def batches(self, number: int) -> Iterator[Any]:
        for at in range(1, number + 1):
            self.done.append(f"batch {at} on {self.where}")
            yield (
                SimpleNamespace(record_stream=lambda stream, at=at: self.done.append(f"{at} used on {stream.name}")),
            )


def test_batches_are_copied_beside_the_steps_two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_there = FakeGpu()
    main, side = gpu_there.stream_of("main"), gpu_there.stream_of("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", gpu_there.on)
    monkeypatch.setattr(streams, "_side", cache(streams._side.__wrapped__))
    for at, _ in enumerate(streams.beside(gpu_there.batches(4), torch.device("cuda", 0)), 1):
        gpu_there.done.append(f"step {at} on {gpu_there.where}")
    expected = ["side waits for main"]
    for at in range(1, 5):
        expected += [f"wait for main event {at - 2}"] if at > 2 else []
        expected += [f"batch {at} on side", "main waits for side", f"{at} used on main", f"step {at} on main"]
    assert gpu_there.done == [*expected, "wait for main event 3"]
    assert list(streams.beside(iter([1, 2]), CPU)) == [1, 2]  # type: ignore[list-item,comparison-overlap]


def test_every_epoch_copies_on_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps the memory that a stream has used for that stream alone."""
    gpu_there, made = FakeGpu(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu_there.stream_of("main"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or gpu_there.stream_of("side"))
    monkeypatch.setattr(torch.cuda, "stream", gpu_there.on)
    monkeypatch.setattr(streams, "_side", cache(streams._side.__wrapped__))
    for epoch in range(4):
        list(streams.beside(gpu_there.batches(2), torch.device("cuda", epoch % 2)))
    assert made == [torch.device("cuda", 0), torch.device("cuda", 1)]
