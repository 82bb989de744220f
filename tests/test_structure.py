"""Filters and their dependencies: what goes with a filter, and the smaller network that is left."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import Chain, composed, pruned_as, residual
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench import experiment
from pai_bench.analysis import cost, graph, paths, signal
from pai_bench.analysis.filters import Filters, Layer, find_filters
from pai_bench.analysis.mode import mode
from pai_bench.core import Batches
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.pruning.rounds import Pruned
from pai_bench.training import compact_model

SHAPE = (3, 32, 32)


def model_of(name: str, *more: str) -> nn.Module:
    torch.manual_seed(0)
    return experiment._function(composed(f"model={name}", *more)["model"])(SHAPE, 10)


def conv_relu_norm() -> nn.Module:
    """The order of the VGG of Lubana and Dick, arXiv:2009.11839: the norm comes after the activation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=True), nn.ReLU(), nn.BatchNorm2d(12), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 10),
    )  # fmt: skip


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


# Chains, where nothing is summed: all that is masked can go.
EXACT = ["vgg11", "vgg11 with hidden linear layers", "mobilenet", "conv-relu-norm, flattened"]


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


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_smaller_network_gives_the_same_outputs(name: str, rounds: int) -> None:
    model = unsettled(NETWORKS[name]()).double()
    pruned = pruned_of(model, 0.6, rounds)
    assert masks.kept(pruned.units) == round(0.4 * masks.total(pruned.units))
    before = copy.deepcopy(model.state_dict())
    small = compact_model.compact(model, pruned.mask_with_coupled, SHAPE).model
    images = torch.randn(3, *SHAPE, dtype=torch.float64)
    with mode(model, False), mode(small, False), torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert sizes[0] < (0.5 if name in EXACT else 0.95) * sizes[1]
    # Where nothing is summed, what is left is dense: the mask said all there was to remove.
    if name in EXACT:
        assert sum((p != 0).sum() for p in masks.prunable(small).values()) == masks.kept(pruned.mask)
        assert masks.total(masks.prunable(small)) == masks.kept(pruned.mask)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_its_idle_channels_a_network_computes_and_learns_the_same(name: str) -> None:
    model = unsettled(NETWORKS[name]()).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it would draw other numbers for fewer units
    mask = pruned_as(model, SHAPE, "pruner=synflow", "schedule.rounds=8", "sparsity=0.99").mask
    state = copy.deepcopy(model.state_dict())
    compact = compact_model.compact(model, mask, SHAPE)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    full, small = (sum(cost.multiply_adds(m, SHAPE).values()) for m in (model, compact.model))
    assert small < (0.95 if "densenet" in name or "efficientnet" in name else 0.7) * full
    images, labels = torch.randn(6, *SHAPE, dtype=torch.float64), torch.arange(6)
    # With batch statistics of constant channels a DenseNet turns a change of 1e-15 in the image into one of 1e-6.
    for training in (False,) if "densenet" in name else (True, False):
        for network in (model, compact.model):
            network.train(training)
            network.zero_grad()
            F.cross_entropy(network(images), labels).backward()
        theirs, ours = dict(model.named_parameters()), dict(compact.model.named_parameters())
        assert theirs.keys() == ours.keys()
        scale = 1e-10 * max(float(parameter.grad.abs().max()) for parameter in theirs.values())
        for key, parameter in ours.items():
            expected = compact.gather(key, theirs[key].grad)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=scale)
        # What is gone has no gradient: only weight decay moves it.
        for key, places in compact.gone(mask).items():
            assert not theirs[key].grad.flatten()[places].any()
        for key, buffer in compact.model.named_buffers():
            torch.testing.assert_close(buffer, compact.gather(key, dict(model.named_buffers())[key]))


def test_channels_can_be_left_in_eights() -> None:
    model = model_of("vgg11").double()
    mask = pruned_as(model, SHAPE, "pruner=synflow", "schedule.rounds=8", "sparsity=0.99").mask
    compact, exact = compact_model.compact(model, mask, SHAPE, multiple=8), compact_model.compact(model, mask, SHAPE)
    images = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(compact.model(images), model(images), rtol=1e-9, atol=1e-9)
    widths = [[w.shape[0] for w in masks.prunable(c.model).values()][:-1] for c in (compact, exact)]
    assert all(eights % 8 == 0 and 0 <= eights - least < 8 for eights, least in zip(*widths, strict=True))


def test_entries_of_the_smaller_network_go_back_to_their_places() -> None:
    model = model_of("vgg11").to(memory_format=torch.channels_last)
    mask = pruned_as(model, SHAPE, "pruner=synflow", "schedule.rounds=8", "sparsity=0.99").mask
    compact = compact_model.compact(model, mask, SHAPE)
    assert compact.places
    before = copy.deepcopy(model.state_dict())
    for name, tensor in compact.model.state_dict().items():
        compact.scatter_(name, tensor, model.state_dict()[name])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, tensor in compact.model.state_dict().items():
        compact.scatter_(name, torch.full_like(tensor, 7), model.state_dict()[name])
    for name, value in model.state_dict().items():
        kept = compact.gather(name, value)
        assert (kept == 7).all() and (value == 7).sum() == kept.numel()


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
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip
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


# Effective sparsity ---------------------------------------------------------------------------------------------------


def on_a_path(model: Chain, mask: masks.Mask) -> masks.Mask:
    """By hand, for a chain: a weight counts if kept paths lead to its input channel and on from its output channel."""
    between = {name: m.flatten(2).any(2) if m.ndim == 4 else m for name, m in mask.items()}
    forward, names = [torch.ones(3, dtype=torch.bool)], list(mask)
    for name in names:
        forward.append((between[name] & forward[-1]).any(1))
    backward = torch.ones(4, dtype=torch.bool)
    reached = {}
    for name, into in zip(reversed(names), reversed(forward[:-1]), strict=True):
        both = backward[:, None] & into[None]
        reached[name] = mask[name] & (both[:, :, None, None] if mask[name].ndim == 4 else both)
        backward = (between[name] & backward[:, None]).any(0)
    return {name: reached[name] for name in names}


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.5, 1.0])
def test_effective_weights_of_a_chain_are_those_on_a_path(density: float) -> None:
    torch.manual_seed(0)
    model = Chain(bias=True)
    for seed in range(5):
        generator = Generator().manual_seed(seed)
        mask = {n: torch.rand(w.shape, generator=generator) < density for n, w in masks.prunable(model).items()}
        found, expected = paths.effective(model, mask, (3, 8, 8)), on_a_path(model, mask)
        assert all(torch.equal(found[name], expected[name]) for name in mask)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("density", [0.03, 0.1, 0.3])
def test_effective_weights_of_a_residual_net_are_those_whose_removal_can_matter(density: float) -> None:
    """A weight lies on a path exactly if, with positive weights and no norms, the output depends on it."""
    torch.manual_seed(0)
    model = residual().double()
    generator = Generator().manual_seed(1)
    mask = {n: torch.rand(w.shape, generator=generator) < density for n, w in masks.prunable(model).items()}
    found = paths.effective(model, mask, (3, 8, 8))
    positive = {name: m.double().requires_grad_() for name, m in mask.items()}
    model.eval()
    others = {
        name: torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
        for name, p in model.named_parameters()
        if name not in mask
    }
    outputs = torch.func.functional_call(model, positive | others, (torch.ones(1, 3, 8, 8, dtype=torch.float64),))
    gradients = torch.autograd.grad(outputs.sum(), list(positive.values()))
    for (name, m), gradient in zip(mask.items(), gradients, strict=True):
        assert torch.equal(found[name], m & (gradient > 0)), name


def test_effective_sparsity_of_a_deep_network_neither_overflows_nor_vanishes() -> None:
    model = model_of("resnet110")
    generator = Generator().manual_seed(0)
    full = masks.full(model)
    assert masks.kept(paths.effective(model, full, SHAPE)) == masks.total(full)
    mask = {n: torch.rand(w.shape, generator=generator) < 0.05 for n, w in masks.prunable(model).items()}
    reached = paths.effective(model, mask, SHAPE)
    assert 0.5 * masks.kept(mask) < masks.kept(reached) < masks.kept(mask)


def test_dead_units_are_those_that_no_path_runs_through() -> None:
    model = Chain()
    mask = masks.full(model)
    mask["conv2.weight"][:, 2] = False  # nobody reads unit 2 of the first layer
    mask["conv1.weight"][4] = False  # nothing feeds unit 4
    reached = paths.effective(model, mask, (3, 8, 8))
    assert paths.dead_units(reached) == {"conv1.weight": 2, "conv2.weight": 0, "fc.weight": 0}
    assert not reached["conv2.weight"][:, 4].any() and not reached["conv1.weight"][2].any()


def test_signal_and_paths_agree(batches: Batches) -> None:
    model = Chain()
    mask = masks.full(model)
    mask["conv2.weight"][:] = False
    assert masks.kept(paths.effective(model, mask, (3, 8, 8))) == 0
    masks.apply_(model, mask)
    assert not signal.output_depends_on_input(model, batches[0][0])
