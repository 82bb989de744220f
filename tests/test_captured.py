"""Steps as one CUDA graph: they train as steps of single kernels do. What they are made of is tested on a CPU too."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain
from emulated_graphs import emulated
from few_images import CPU, RECIPE, FewImages, half
from few_images import trainer as training_of
from test_optimizers import METHODS, RATES, optimizer_of
from torch import Generator, nn

from pai_bench.core import DataSettings, OnDevice
from pai_bench.data.resident import Resident
from pai_bench.masks import masks
from pai_bench.system import devices
from pai_bench.training.captured import obstacle
from pai_bench.training.evaluation import evaluate
from pai_bench.training.trainer import Trainer

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def resident(device: torch.device, num_train: int = 43, num_test: int = 8, validation: float = 0.0) -> Resident:
    """Images of 12x12 in four classes, whose last batch is smaller."""

    def images(number: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.random.default_rng(number).integers(0, 256, (number, 12, 12, 3), dtype=np.uint8)
        return pixels, np.arange(number) % 4

    return Resident(
        images(num_train),
        images(num_test),
        4,
        DataSettings(Path(), False, device, 0),
        validation=validation,
        mean=None,
        std=None,
        padding=2,
        flip=True,
    )


def test_a_batch_by_a_tensor_of_positions_is_the_batch_of_the_epoch() -> None:
    data = resident(CPU)
    assert isinstance(data, OnDevice) and not isinstance(FewImages(), OnDevice)
    tables = data.tables(Generator().manual_seed(1), Generator().manual_seed(2))
    batches = list(data.train(8, Generator().manual_seed(1), Generator().manual_seed(2)))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 8, 3]
    for number, (images, labels) in enumerate(batches[:5]):
        again, of_these = data.gather(tables, torch.arange(8) + 8 * number)
        assert torch.equal(images, again) and torch.equal(labels, of_these)
        assert images.stride() == again.stride()


@pytest.mark.parametrize("name", METHODS)
def test_a_learning_rate_in_a_tensor_is_that_of_the_step(name: str) -> None:
    torch.manual_seed(0)
    nets = [Chain()]
    nets.append(copy.deepcopy(nets[0]))
    optimizers = [
        optimizer_of(net, name, capturable=capturable) for net, capturable in zip(nets, (False, True), strict=True)
    ]
    for step in range(5):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.lr = RATES[name] * step  # a warm-up begins with 0
            generator = Generator().manual_seed(step)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # one multiplication is rounded more


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_an_optimizer_moves_in_memory(name: str) -> None:
    torch.manual_seed(0)
    net = Chain()
    optimizer = optimizer_of(net, name, capturable=True)
    optimizer.apply_mask(half(net))
    before = [tensor.data_ptr() for tensor in optimizer.tensors]
    optimizer.lr = 0.5
    optimizer.apply_mask({name: kept & (torch.rand(kept.shape) < 0.5) for name, kept in half(net).items()})
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    given = {
        key: {"conv1.weight": torch.ones_like(tensors["conv1.weight"])} for key, tensors in optimizer.state.items()
    }
    optimizer.load_state(given)
    assert [tensor.data_ptr() for tensor in optimizer.tensors] == before
    for tensors in optimizer.state.values():
        assert tensors["conv1.weight"].all() and not tensors["conv2.weight"].any()


def test_what_cannot_be_captured_says_why() -> None:
    training = trained(Chain(), CPU, epochs=0)
    assert obstacle(training.network.step, 1) is None
    assert obstacle(training.network.step, 2) == "several processes train it"
    training.network.step.recipe = replace(RECIPE, precision="float16")
    assert obstacle(training.network.step, 1) == "float16 looks at the gradients before it takes a step"


def trained(net: nn.Module, device: torch.device, *, epochs: float = 2, **settings: Any) -> Trainer:
    """A trainer that has trained a copy of a network, whose mask narrows after an epoch and a half."""
    recipe = replace(RECIPE, lr_schedule="cosine", warmup_epochs=1, **settings.pop("recipe", {}))
    net = copy.deepcopy(net).to(device)
    trainer = training_of(net, recipe, resident(device), device=device, keep_epochs=[0.5], **settings)
    mask = {name: kept.to(device) for name, kept in half(net.cpu()).items()}
    net.to(device)
    trainer.until(mask, min(1.5, epochs))
    narrower = {
        name: kept & (torch.rand(kept.shape, generator=Generator().manual_seed(5)) < 0.7).to(device)
        for name, kept in mask.items()
    }
    trainer.until(narrower, epochs)
    return trainer


class Dropped(Chain):
    """A network that drops units at random."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = nn.functional.dropout(super().forward(x), 0.3, self.training)
        return logits


def assert_same(one: Trainer, other: Trainer) -> None:
    for (name, tensor), value in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, value), name
    assert torch.equal(one.state()["sums"], other.state()["sums"])
    states = [trainer.state()["optimizer"] for trainer in (one, other)]
    for key, tensors in states[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, states[1][key][name]), (key, name)


# Captured: on a GPU, and emulated on a CPU ----------------------------------------------------------------------------


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=gpu)])
def graphs_on(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device with CUDA graphs, or a CPU with emulated ones."""
    if request.param == "cuda":
        yield torch.device("cuda", 0)
    else:
        with emulated():
            yield CPU


@pytest.mark.parametrize("precision", ["float32", "tfloat32", "bfloat16"])
@pytest.mark.parametrize("kind", [Chain, Dropped])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("method", ["sgd_nesterov", "adamw"])
def test_captured_steps_train_as_single_ones(
    kind: type[nn.Module], precision: str, channels_last: bool, method: str, graphs_on: torch.device
) -> None:
    device = graphs_on
    devices.prepare(device, precision)
    torch.manual_seed(0)
    net = kind()
    settings: dict[str, Any] = {
        "channels_last": channels_last,
        "recipe": {"precision": precision, "optimizer": lambda: METHODS[method][0], "lr": RATES[method]},
    }
    with devices.reproducible(device):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tfloat32"
        captured, plain = (trained(net, device, capture=capture, **settings) for capture in (True, False))
    assert captured._steps._captured is not None and plain._steps._captured is None
    assert_same(captured, plain)


def test_rewinding_and_a_checkpoint_in_mid_epoch_need_no_other_capture(graphs_on: torch.device) -> None:
    device = graphs_on
    devices.prepare(device, "float32")
    torch.manual_seed(0)
    net = Chain()
    with devices.reproducible(device):
        whole, broken = (trained(net, device, epochs=2.5) for _ in range(2))
        graph = whole._steps._captured
        for trainer in (whole, broken):
            trainer.rewind(trainer.network.mask, 0.5, True)
        whole.until(whole.network.mask, 2)
        assert whole._steps._captured is graph
        broken.until(broken.network.mask, 1.5)
        state = copy.deepcopy(broken.state())
        later = trained(Chain(), device, epochs=0)
        later.load_state(state, broken.network.mask)
        later.until(broken.network.mask, 2)
    assert_same(whole, later)
    assert masks.sparsity({name: whole.model.get_parameter(name) != 0 for name in whole.network.mask}) > 0.5


def test_compact_networks_are_captured_too(monkeypatch: pytest.MonkeyPatch, graphs_on: torch.device) -> None:
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})
    monkeypatch.setattr("pai_bench.training.compact.FASTER", 0.0)
    device = graphs_on
    devices.prepare(device, "float32")
    torch.manual_seed(0)
    net = nn.Sequential(  # wide enough for channels by eights
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 12 * 12, 4),
    )
    mask = masks.full(net.to(device))
    mask["2.weight"][:, 8:] = False
    with devices.reproducible(device):
        trainers = []
        for compact in (True, False):
            trainer = training_of(copy.deepcopy(net), RECIPE, resident(device), device=device, compact_training=compact)
            trainer.until(mask, 2)
            trainers.append(trainer)
    assert trainers[0].trained is not trainers[0].model
    assert all(trainer._steps._captured is not None for trainer in trainers)
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Streaming:
    """A core.Data that has its images batch by batch only."""

    def __init__(self, data: Resident) -> None:
        self.input_shape, self.num_classes, self.checksum = data.input_shape, data.num_classes, data.checksum
        self.num_examples, self.train, self.evaluation, self.draw = (
            data.num_examples,
            data.train,
            data.evaluation,
            data.draw,
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("streamed", [False, True])
def test_captured_evaluations_equal_single_ones(
    precision: str, streamed: bool, graphs_on: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pai_bench.training.recording._EVALUATION_BATCH", 12)
    torch.manual_seed(0)
    net = Dropped()
    lines: list[list[dict[str, float]]] = []
    for capture in (True, False):
        device, measured = graphs_on, []
        recipe = replace(RECIPE, precision=precision)
        data = resident(device, num_test=29, validation=0.3)
        trainer = training_of(
            copy.deepcopy(net).to(device),
            recipe,
            Streaming(data) if streamed else data,
            device=device,
            capture=capture,
            record=lambda metrics, epoch, measured=measured: measured.append(metrics),
        )
        with devices.reproducible(device):
            trainer.until({name: kept.to(device) for name, kept in half(net).items()}, 2)
        lines.append([{key: value for key, value in line.items() if "second" not in key} for line in measured])
        assert (trainer._recording._evaluator._recorded is not None) == capture
    assert len(lines[0]) == 3 and lines[0] == lines[1]


def test_an_evaluation_is_captured_once_and_again_for_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pai_bench.training.recording._EVALUATION_BATCH", 4)
    with emulated() as made:
        training = trained(Chain(), CPU, epochs=0)
        evaluator, step = training._recording._evaluator, training.network.step
        images = torch.randn(4, 3, 12, 12, generator=Generator().manual_seed(0))
        batches = [
            (images, torch.tensor([0, 1, 2, 3])),
            (-images, torch.tensor([0, 1, 2, 3])),
            (images[:3], torch.arange(3)),
        ]
        step.net.eval()
        before = len(made)
        results = []
        for _ in range(2):
            results.append(evaluator(step, batches, 4))
            assert results[-1] == evaluate(step.net, batches, CPU)
            with torch.no_grad():
                for parameter in step.net.parameters():
                    parameter.mul_(1.5)  # in place: the same memory
        assert results[0] != results[1] and len(made) == before  # recorded by the first evaluation of training
        step.net.fc.weight.data = step.net.fc.weight.data.flip(0).clone()
        assert evaluator(step, batches, 4) == evaluate(step.net, batches, CPU)
        assert len(made) == before + 1


def test_an_evaluation_that_cannot_be_captured_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    class Peeks(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2 if float(x[0, 0, 0, 0]) > 0 else 1)

    caplog.set_level("INFO")
    with emulated() as made:
        trainer = training_of(Peeks(), RECIPE, resident(CPU, num_test=32))
        trainer.until(masks.full(trainer.model), 2)
    assert not made
    lines = sorted(line for line in caplog.messages if "one by one" in line)
    assert len(lines) == 2, lines
    for line, work in zip(lines, ("a step", "an evaluation"), strict=True):
        why = "the network cannot be captured (operation not permitted when stream is capturing"
        assert line.startswith(f"the kernels of {work} are launched one by one: {why}")
