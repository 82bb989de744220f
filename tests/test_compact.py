"""Training without dead channels: the same trajectory as that of the whole network, in its names."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Chain, composed, options
from few_images import CPU, RECIPE, FewImages
from few_images import trainer as training_of
from test_optimizers import METHODS, RATES
from torch import Generator, nn

from pai_bench.analysis import cost
from pai_bench.core import Batch, Mask, Shape
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.system import seeding
from pai_bench.training.compact import CompactNetwork, pass_seconds
from pai_bench.training.trainer import Trainer

# Of some the channels cannot be cut down exactly; then the whole network is trained, and a line says so.
WHOLE = {"vgg11_tiny": "drops units at random"}
SHAPE: Shape = (3, 32, 32)
SHAPES: dict[str, Shape] = {"planted": (2, 1, 1)}  # of models that take no images


class Doubles(FewImages):
    """A few images in float64, so that two orders of summation agree."""

    def __init__(self, shape: Shape = SHAPE) -> None:
        self.input_shape = shape
        self.images = torch.randn(16, *shape, generator=Generator().manual_seed(3), dtype=torch.float64)
        self.labels = torch.arange(16) % 4
        self.num_examples = {"train": 16, "validation": 0, "test": 4}

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        for part in torch.randperm(16, generator=order).split(batch_size)[start:]:
            yield self.images[part], self.labels[part]


def trained(model: nn.Module, mask: Mask, compact: bool, epochs: float = 1, **settings: Any) -> Trainer:
    model = copy.deepcopy(model)
    recipe = replace(RECIPE, decay_norm_and_bias=True, weight_decay=0.1, **settings.pop("recipe", {}))
    data = Doubles(settings.pop("shape", SHAPE))
    trainer = training_of(model, recipe, data, compact_training=compact, **{"channels_last": True} | settings)
    trainer.until(mask, epochs)
    return trainer


def assert_same(one: Trainer, other: Trainer, mask: Mask) -> None:
    theirs = one.model.state_dict()
    for name, value in other.model.state_dict().items():
        if "running" not in name:  # of a channel that nothing reads they stand still
            torch.testing.assert_close(value, theirs[name], rtol=1e-7, atol=1e-9)
    states = [trainer.state()["optimizer"] for trainer in (one, other)]
    assert states[0].keys() == states[1].keys() != set()
    for key, tensors in states[1].items():
        assert states[0][key].keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(value, states[0][key][name], rtol=1e-7, atol=1e-9)
    for name, kept in mask.items():
        assert not theirs[name][~kept].any()


def of(method: str) -> dict[str, Any]:
    """The settings of a recipe with an optimizer."""
    return {"optimizer": lambda: METHODS[method][0], "lr": RATES[method]}


def built(name: str) -> nn.Module:
    more = ["model.name=efficientnet_b0"] if name == "timm" else []
    with seeding.seeded(0, "init"):
        model: nn.Module = composed(f"model={name}", *more).model(SHAPES.get(name, SHAPE), 4)
    return model


@pytest.fixture(autouse=True)
def long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})


def scattered(model: nn.Module) -> Mask:
    """A mask that leaves every layer some of its input channels, and an eighth of the weights that read them."""
    generator = Generator().manual_seed(1)
    mask = {}
    for index, (name, weight) in enumerate(masks.prunable(model).items()):
        kept = torch.rand(weight.shape, generator=generator) < 0.125
        if index and weight.shape[1] > 1:
            kept &= (torch.rand(weight.shape[1], generator=generator) < 0.6).view(1, -1, *[1] * (weight.ndim - 2))
        mask[name] = kept
    masks.apply_(model, mask)
    return mask


# Deeper and wider ones of the same code. resnet50_cifar has the blocks of resnet50 and the beginning of resnet18.
LARGER = {
    "resnet32", "resnet44", "resnet50_cifar", "resnet56", "resnet56_projected", "resnet110", "resnet110_projected",
    "vgg13", "vgg16", "vgg19", "vgg16_bn", "vgg16_tiny", "wrn16_8", "wrn16_10", "wrn22_8", "wrn28_10", "wrn40_4",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(options("model")) - LARGER))
def test_every_model_trains_the_same_without_its_dead_channels(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = built(name).double()
    mask = scattered(model)
    with caplog.at_level(logging.INFO):
        whole, small = (trained(model, mask, compact, shape=SHAPES.get(name, SHAPE)) for compact in (False, True))
    if name in WHOLE:
        assert WHOLE[name] in caplog.text and small.trained is small.model
    else:
        assert sum(p.numel() for p in small.trained.parameters()) < sum(p.numel() for p in small.model.parameters())
    assert_same(whole, small, mask)


def with_dead_channels(density: float = 0.08) -> tuple[nn.Module, Mask]:
    """A network with kept weights in channels that nothing reads, and channels that nothing feeds."""
    torch.manual_seed(0)
    model = Chain(bias=True)
    generator = Generator().manual_seed(1)
    mask = {n: torch.rand(w.shape, generator=generator) < density for n, w in masks.prunable(model).items()}
    mask["conv2.weight"][:, :3] = False
    mask["conv1.weight"][4] = False
    mask["fc.weight"][:, ::2] = False
    masks.apply_(model, mask)
    return model.double(), mask


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("method", ["sgd_nesterov", "adamw"])
def test_weights_of_channels_that_are_gone_move_by_momentum_and_decay(channels_last: bool, method: str) -> None:
    model, mask = with_dead_channels()
    settings: Any = {"channels_last": channels_last, "recipe": of(method)}
    whole, small = (trained(model, mask, compact, 3, **settings) for compact in (False, True))
    assert small.trained is not small.model
    assert_same(whole, small, mask)
    gone = mask["conv1.weight"].clone()
    gone[3:] = False
    start, end = (dict(m.named_parameters())["conv1.weight"][gone] for m in (model, small.model))
    assert gone.any() and not torch.isclose(start, end).any()  # only decay moves them


@pytest.mark.parametrize("method", ["sgd_nesterov", "adamw"])
def test_a_run_of_parts_under_falling_masks_is_the_same(method: str) -> None:
    model, first = with_dead_channels(0.3)
    second = {
        name: kept & (torch.rand(kept.shape, generator=Generator().manual_seed(2)) < 0.5)
        for name, kept in first.items()
    }
    trainers = []
    for compact in (False, True):
        trainer = trained(model, first, compact, 1, recipe=of(method))
        assert (trainer.trained is not trainer.model) == compact
        trainer.until(first, 2)
        trainer.until(second, 3)
        trainers.append(trainer)
    assert_same(*trainers, second)


class Shared(nn.Module):
    """Its first channels are shared out between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
        self.last, self.fc = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.conv(x).relu().split(4, 1)
        return self.fc(self.last((self.one(one) + self.other(other)).relu()).relu().mean((2, 3)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 2048, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(1024, 12), layer, nn.Flatten(), nn.Linear(36, 4))


@pytest.mark.parametrize("build", [Shared, encoder])
def test_channels_that_cannot_be_cut_are_left_whole_and_others_are_not(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().double()
    mask = scattered(model)
    whole, small = (trained(model, mask, compact) for compact in (False, True))
    assert sum(p.numel() for p in small.trained.parameters()) < sum(p.numel() for p in small.model.parameters())
    assert_same(whole, small, mask)


def test_less_than_an_epoch_is_trained_whole() -> None:
    model, mask = with_dead_channels()
    trainer = trained(model, mask, True, 0.5)
    assert trainer.trained is trainer.model
    trainer.until(mask, 1)
    assert trainer.trained is not trainer.model


def test_where_no_channel_is_dead_the_whole_network_is_trained() -> None:
    model = Chain().double()
    mask = masks.full(model)
    trainer = trained(model, mask, True)
    assert trainer.trained is trainer.model


def test_a_network_whose_code_counts_channels_is_trained_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.conv1.weight.shape[0]

    model, mask = with_dead_channels()
    odd = Counting(bias=True).double()
    odd.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="computes something else"):
        CompactNetwork(odd, mask, SHAPE)
    with caplog.at_level(logging.WARNING):
        trainer = trained(odd, mask, True)
    assert "training.compact=auto: the whole network is trained" in caplog.text
    assert trainer.trained is trainer.model


def test_short_training_is_of_the_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, mask = with_dead_channels()
    trainer = trained(model, mask, True)
    assert trainer.compact_speedup is None and trainer.trained is trainer.model
    # Under the same mask for longer it is another matter, whether or not the run was interrupted in between.
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})
    trainer.until(mask, 2)
    assert trainer.trained is not trainer.model


def test_the_gain_is_measured() -> None:
    model, mask = with_dead_channels()
    before = cost.multiply_adds(model, SHAPE)
    trainer = trained(model, mask, True)
    assert trainer.compact_speedup is not None and trainer.compact_speedup > 0
    assert sum(cost.multiply_adds(trainer.trained, SHAPE).values()) < sum(before.values())
    assert_same(trained(model, mask, False), trainer, mask)


def test_networks_are_as_before_when_the_gain_has_been_measured() -> None:
    nets = [with_dead_channels()[0].eval(), with_dead_channels()[0].train()]
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    seconds = pass_seconds(nets, (4, *SHAPE), CPU, "float32")
    assert len(seconds) == 2 and min(seconds) > 0
    for net, state in zip(nets, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert all(parameter.grad is None for parameter in net.parameters())
    assert [net.training for net in nets] == [False, True]
