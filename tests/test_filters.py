"""Filters: which can be pruned, and what is pruned with them."""

from collections.abc import Callable

import pytest
import torch
from conftest import composed, pruned_as
from scored import subnetwork
from torch import nn
from torch.nn import functional as F

from pai_bench.analysis import graph
from pai_bench.analysis.filters import Filters, Layer, find_filters
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import masks
from pai_bench.pruning.pruned import Pruned

SHAPE = (3, 32, 32)


def model_of(name: str, *more: str) -> nn.Module:
    torch.manual_seed(0)
    return composed(f"model={name}", *more).model(SHAPE, 10)


def conv_relu_norm() -> nn.Module:
    """The order of the VGG of Lubana and Dick, arXiv:2009.11839: the norm comes after the activation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=True),
        nn.ReLU(),
        nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg11": lambda: model_of("vgg11"),
    "vgg11 with hidden linear layers": lambda: model_of("vgg11_tiny"),
    "mobilenet": lambda: model_of("mobilenet"),
    "resnet20": lambda: model_of("resnet20"),
    "conv-relu-norm, flattened": conv_relu_norm,
    "timm densenet121": lambda: model_of("timm", "model.name=densenet121"),
    "timm efficientnet_b0": lambda: model_of("timm", "model.name=efficientnet_b0"),
    "timm resnet18": lambda: model_of("timm", "model.name=resnet18", "+model.options.zero_init_last=false"),
}


def pruned_of(model: nn.Module, sparsity: float, rounds: int = 1) -> Pruned:
    schedule = ["schedule=linear", f"schedule.rounds={rounds}"]
    return pruned_as(model, SHAPE, "pruner=filter_magnitude", f"sparsity={sparsity}", *schedule)


def unsettled(model: nn.Module) -> nn.Module:
    """Norms as after some training: a shift that leaks would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def test_masking_the_filter_alone_would_leak_the_shift_of_its_norm() -> None:
    model = unsettled(NETWORKS["vgg11"]()).double().eval()
    pruned = pruned_of(model, 0.6)
    assert pruned.coupled
    without = unsettled(NETWORKS["vgg11"]()).double().eval()
    masks.apply_(without, pruned.mask)
    parameters, other = dict(model.named_parameters()), dict(without.named_parameters())
    name = next(key for key in pruned.coupled if key.endswith("bias"))
    assert not parameters[name][~pruned.coupled[name]].any()
    assert other[name][~pruned.coupled[name]].all()


def test_a_norm_behind_a_flattened_map_loses_every_position_of_a_pruned_filter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 36), nn.Linear(4 * 36, 4))
    filters = find_filters(model, (3, 8, 8))
    mask = filters.expand(model, {"0.weight": torch.tensor([True, False, True, True])})
    assert mask["0.bias"].tolist() == [True, False, True, True]
    for name in ("2.weight", "2.bias"):
        assert mask[name].view(4, 36).all(1).tolist() == [True, False, True, True]
        assert not mask[name].view(4, 36)[1].any()
    score = composed("pruner=filter_batch_norm", "sparsity=0.5").pruner.score
    with pytest.raises(UserError, match=r"0\.weight runs into no batch norm"):
        score(subnetwork(model), [], F.cross_entropy, torch.Generator())


def test_the_residual_stream_keeps_its_channels_and_its_stem() -> None:
    model = model_of("resnet56")
    filters = find_filters(model, SHAPE)
    assert "conv.weight" not in filters.layers and "fc.weight" not in filters.layers
    first, second = filters.layers["stages.0.0.conv1.weight"], filters.layers["stages.0.0.conv2.weight"]
    assert list(first.readers) == ["stages.0.0.conv2.weight"] and not second.readers
    assert list(second.slices) == ["stages.0.0.bn2.weight", "stages.0.0.bn2.bias"]
    # The stem's sixteen are all that the 2,128 filters of the paper's ResNet-56 have more.
    assert sum(layer.num_filters for layer in filters.layers.values()) == 2128 - 16
    mask = filters.full(masks.full(model))
    mask["stages.0.1.conv2.weight"][:] = False
    masks.apply_(model, filters.expand(model, mask))
    model.eval()
    x = torch.rand(2, 16, 8, 8)
    block = model.stages[0][1]
    assert torch.equal(block(x), F.relu(block.shortcut(x)))


def test_filters_that_grouped_convolutions_read_are_followed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )
    filters = find_filters(model, SHAPE)
    assert list(filters.layers) == ["0.weight", "6.weight"]  # a grouped convolution is not cut itself
    units = filters.full(masks.full(model))
    units["0.weight"][[1, 4]] = False
    mask = filters.expand(unsettled(model.eval()), units)
    # Filters 1 and 4 are the second of the first pair of channels and the first of the third pair.
    expected = torch.ones(12, 2, 3, 3, dtype=torch.bool)
    expected[0:3, 1] = expected[6:9, 0] = False
    assert torch.equal(mask["3.weight"], expected)
    masks.apply_(model, mask)
    images = torch.randn(2, *SHAPE)
    before = model(images)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 1.0
        model[1].bias[[1, 4]] = 1.0
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "regnetx_002", "dla46x_c"])
def test_networks_with_grouped_convolutions_have_filters(name: str) -> None:
    model = model_of("timm", f"model.name={name}")
    filters = find_filters(model, SHAPE)
    units = filters.full(masks.full(model))
    for kept in units.values():
        kept[::2] = False
    assert 0.4 < masks.sparsity(filters.expand(model, units)) < 0.8


def test_channels_that_cannot_be_followed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1 of ResNet shares its channels out among layers"):
        find_filters(model_of("timm", "model.name=res2net50_26w_4s"), SHAPE)
    monkeypatch.setattr(graph, "_LOOKS", 0)
    with pytest.raises(ConfigError, match=r"cannot be traced \(the search .* does not come to an end\); prune weights"):
        find_filters(model_of("vgg11"), SHAPE)


def test_all_filters_of_vgg13_and_mobilenet_count_once() -> None:
    vgg = find_filters(model_of("vgg13"), SHAPE)
    assert (len(vgg.layers), sum(layer.num_filters for layer in vgg.layers.values())) == (10, 2944)
    mobile = find_filters(model_of("mobilenet"), SHAPE)
    assert sum(layer.num_filters for layer in mobile.layers.values()) == 5984
    assert all("depthwise" not in name for name in mobile.layers)
    stem = mobile.layers["features.0.0.weight"]
    assert list(stem.slices)[2:] == ["features.1.0.weight", "features.1.1.weight", "features.1.1.bias"]


def test_reductions() -> None:
    filters = Filters({"a": Layer(2, {}, {})})
    scores = {"a": torch.tensor([[3.0, -4.0], [1.0, 1.0]]).view(2, 2, 1, 1)}
    assert filters.reduce(scores, "sum")["a"].tolist() == [-1.0, 2.0]
    assert filters.reduce(scores, "abs_sum")["a"].tolist() == [1.0, 2.0]
    assert filters.reduce(scores, "l2")["a"].tolist() == [5.0, pytest.approx(2**0.5)]
    assert filters.reduce(scores, "max")["a"].tolist() == [3.0, 1.0]


def test_a_network_without_filters_is_refused() -> None:
    with pytest.raises(ConfigError, match="Sequential has no filters that can be pruned"):
        find_filters(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), SHAPE)


def test_frozen_layers_are_followed_as_others() -> None:
    """Channels are traced by gradients: layers before the first one that is trained had none."""
    model = model_of("vgg11")
    plain = find_filters(model, SHAPE)
    for parameter in model.features.parameters():
        parameter.requires_grad_(False)
    frozen = find_filters(model, SHAPE)
    assert list(frozen.layers) == list(plain.layers)
    for name, layer in plain.layers.items():
        other = frozen.layers[name]
        for one, two in ((layer.slices, other.slices), (layer.readers, other.readers)):
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not any(parameter.requires_grad for parameter in model.features.parameters())


class Flattened(nn.Module):
    """Two convolutions, a gate for each channel if asked for, and a linear layer on the whole map."""

    def __init__(self, order: tuple[int, ...], gated: bool) -> None:
        super().__init__()
        self.order, self.gated = order, gated
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.gate, self.fc = nn.Linear(6, 6), nn.Linear(6 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 8)
        if self.gated:
            x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[..., None, None]
        return self.fc(x.permute(self.order).flatten(1))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_flattened_map_with_its_channels_apart_is_refused(gated: bool) -> None:
    torch.manual_seed(0)
    layers = find_filters(Flattened((0, 1, 2, 3), gated), SHAPE).layers
    if not gated:
        assert layers["conv2.weight"].readers["fc.weight"].tolist() == torch.arange(96).view(6, 16).tolist()
        said = "flattens a map so that the channels of conv2 do not lie next to each other in fc"
        with pytest.raises(ConfigError, match=said):
            find_filters(Flattened((0, 2, 3, 1), gated), SHAPE)
