"""Every model of conf/model: its published size, its initialization, its output."""

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import composed, options, pruned_as
from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench import assembly, experiment
from pai_bench.analysis import cost, operations, paths, signal
from pai_bench.analysis.cost import CountFlops
from pai_bench.analysis.mode import mode
from pai_bench.core import Mask, Scores, Shape, Subnetwork
from pai_bench.errors import ConfigError
from pai_bench.masks import masks, selection
from pai_bench.system import seeding

MNIST, CIFAR, TINY, IMAGENET = (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 224, 224)


def build(*overrides: str, shape: Shape = CIFAR, num_classes: int = 10, seed: int = 0) -> nn.Module:
    with seeding.seeded(seed, "init"):
        return composed(*overrides).model(shape, num_classes)


def shape_of(name: str) -> Shape:
    if name.startswith("lenet"):
        return MNIST
    return TINY if name.endswith("_tiny") else IMAGENET if name in ("resnet50", "vgg16_bn", "timm") else CIFAR


# Prunable weights: conv and linear weights. Sources: the arrays and code released with SynFlow, GraSP and open_lth, and
# torchvision's ResNet-50.
@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "num_prunable"),
    [
        ("resnet20", CIFAR, 10, 270_896),
        ("resnet32", CIFAR, 10, 464_432),
        ("resnet32_double", CIFAR, 10, 1_855_584),
        ("resnet32_double", CIFAR, 100, 1_867_104),
        ("resnet32_double", TINY, 200, 1_879_904),
        ("resnet18", CIFAR, 10, 11_164_352),
        ("resnet18", CIFAR, 100, 11_210_432),
        ("resnet18", TINY, 200, 11_261_632),
        ("vgg16", CIFAR, 100, 14_761_664),
        ("vgg19", CIFAR, 10, 20_024_000),
        ("vgg19", CIFAR, 100, 20_070_080),
        ("vgg19", TINY, 200, 20_121_280),
        ("resnet50", IMAGENET, 1000, 25_502_912),
        # The one for ImageNet less its 7x7 stem and its classifier, plus those for CIFAR.
        ("resnet50_cifar", CIFAR, 10, 25_502_912 - 64 * 3 * 49 - 2048 * 1000 + 64 * 3 * 9 + 2048 * 10),
        ("lenet300", MNIST, 10, 266_200),
        ("lenet5", MNIST, 10, 430_500),
        ("conv2", CIFAR, 10, 4_300_992),
        ("conv4", CIFAR, 10, 2_425_024),
        ("conv6", CIFAR, 10, 2_261_184),
    ],
)
def test_prunable_counts_are_the_published_ones(name: str, shape: Shape, num_classes: int, num_prunable: int) -> None:
    model = build(f"model={name}", shape=shape, num_classes=num_classes)
    assert masks.total(masks.prunable(model)) == num_prunable


# All parameters. WRN: Zagoruyko and Komodakis 2016, table 5 (36.5M, 11.0M, 8.9M); others from their reference code.
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("wrn28_10", 36_479_194), ("wrn16_8", 10_961_370), ("wrn40_4", 8_949_210), ("mobilenet", 3_217_226)],
)
def test_parameter_counts_are_the_published_ones(name: str, num_parameters: int) -> None:
    assert sum(parameter.numel() for parameter in build(f"model={name}").parameters()) == num_parameters


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_has_its_depth(depth: int) -> None:
    # one linear layer stands for the three of the original
    assert len(masks.prunable(build(f"model=vgg{depth}"))) == depth - 2


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_resnet_has_its_depth(depth: int) -> None:
    model = build(f"model=resnet{depth}")
    projections = [name for name in masks.prunable(model) if "shortcut" in name]
    assert len(masks.prunable(model)) == depth + len(projections)
    assert len(projections) == 2


def test_every_stage_projects_if_it_is_asked_to() -> None:
    usual, more = build("model=resnet20"), build("model=resnet20_projected")
    added = set(masks.prunable(more)) - set(masks.prunable(usual))
    assert added == {"stages.0.0.shortcut.0.weight"} and set(masks.prunable(usual)) < set(masks.prunable(more))
    assert more.get_parameter(*added).shape == (16, 16, 1, 1)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(more(x), usual(x))
    bottlenecks = [build("model=resnet50_cifar", *words) for words in ([], ["model.projections=every_stage"])]
    assert bottlenecks[0].state_dict().keys() == bottlenecks[1].state_dict().keys()  # they always project


# The network with a planted ticket takes points: see test_planted.py.
@pytest.mark.parametrize("name", sorted(set(options("model")) - {"timm", "vgg16_bn", "wrn28_10", "planted"}))
def test_model_gives_finite_logits_and_gradients_everywhere(name: str) -> None:
    shape = (3, 64, 64) if name == "resnet50" else shape_of(name)
    model = build(f"model={name}", shape=shape, num_classes=7)
    logits = model(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_greyscale_images_are_taken_as_they_are() -> None:
    assert build("model=resnet20", shape=(1, 32, 32))(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["mobilenet", "resnet20", "vgg16_tiny", "wrn22_2"])
def test_the_seed_alone_decides_the_initial_weights(name: str) -> None:
    first, second, other = (build(f"model={name}", shape=shape_of(name), seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_building_a_model_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build("model=resnet20")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("scheme", "std"),
    [
        ("kaiming_normal_fan_in", math.sqrt(2 / (256 * 9))),
        ("kaiming_normal_fan_out", math.sqrt(2 / (512 * 9))),
        ("xavier_normal", math.sqrt(2 / (768 * 9))),
        ("lecun_normal", math.sqrt(1 / (256 * 9))),
        ("normal_0.01", 0.01),
        ("framework", 1 / math.sqrt(3 * 256 * 9)),
    ],
)
def test_init_schemes_have_their_standard_deviation(scheme: str, std: float) -> None:
    model = build("model=vgg16", f"model.init.conv={scheme}")
    conv = next(
        m for m in model.modules() if isinstance(m, nn.Conv2d) and (m.in_channels, m.out_channels) == (256, 512)
    )
    assert conv.weight.std().item() == pytest.approx(std, rel=0.01)
    assert (conv.bias.abs().sum() == 0) == (scheme != "framework")


def test_lecun_normal_is_cut_off_at_two_deviations() -> None:
    weight = dict(build("model=lenet300", "model.init.linear=lecun_normal").named_parameters())["layers.1.weight"]
    std = weight.shape[1] ** -0.5
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert 2.2 * std < weight.abs().max().item() < 2.28 * std  # the normal distribution before the cut is wider


def test_norm_weights_can_be_drawn_uniformly() -> None:
    model = build("model=resnet20", "model.init.norm=uniform")
    weights = torch.cat([module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)])
    assert 0 <= weights.min() < 0.05 and 0.95 < weights.max() <= 1


def test_resnet50_lets_signal_through_every_block() -> None:
    model = build("model=resnet50", shape=IMAGENET, num_classes=10)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=timm", "model.name=resnet5O"], "model.name=resnet5O: timm has no such model"),
        (["model=timm", "model.name=resnet18", "+model.options.foo=1"], "model.options=.*refuses them"),
        (["model=wrn16_8", "model.depth=17"], "model.depth=17: give 6n"),
        (["model=resnet20", "model.widths=[16,32]"], "model.widths=.*give one for each stage"),
        (["model=wrn16_8", "model.dropout=2"], "model.dropout=2: give one in"),
        (["model=resnet20", "model.init.conv=he"], "model.init.conv=he: give one of kaiming_normal_fan_in"),
    ],
    ids=["name", "option", "depth", "widths", "dropout", "init"],
)
def test_a_model_that_does_not_exist_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*overrides)


def test_multiply_adds_of_known_networks() -> None:
    # VGG-16 at 32 pixels: 313.2 M in convolutions, 512 * 100 in the classifier. ResNet-50 at 224: 4.089 G (RigL).
    vgg = cost.multiply_adds(build("model=vgg16", num_classes=100), CIFAR)
    assert sum(vgg.values()) == 313_196_544 + 51_200
    resnet50 = cost.multiply_adds(build("model=resnet50", shape=IMAGENET, num_classes=1000), IMAGENET)
    assert sum(resnet50.values()) == pytest.approx(4.089e9, rel=1e-3)


def test_multiply_adds_of_grouped_convolutions_and_masks() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(8 * 36, 2))
    counts = cost.multiply_adds(model, (4, 6, 6))
    assert counts == {"0.weight": 36 * 8 * 9, "2.weight": 8 * 36 * 2}
    mask = {"0.weight": torch.zeros(8, 1, 3, 3, dtype=torch.bool), "2.weight": torch.ones(2, 288, dtype=torch.bool)}
    assert cost.masked_multiply_adds(counts, mask) == 576


def test_vgg13_of_the_gradient_flow_paper_has_its_size_and_order() -> None:
    """9,459,236 parameters and 2,944 filters: Lubana and Dick, arXiv:2009.11839."""
    model = build("model=vgg13_gradient_flow", num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_459_236
    assert [type(layer).__name__ for layer in model.features[:4]] == ["Conv2d", "ReLU", "BatchNorm2d", "Conv2d"]


# Any architecture -----------------------------------------------------------------------------------------------------

# Of every kind: attention with fused projections, layer norms, grouped and depthwise convolutions, gates.
ANY = {
    "vit_tiny_patch16_224": ["+model.options.patch_size=8"],
    "convnext_atto": [],
    "efficientnet_b0": [],
    "mobilenetv3_small_050": [],
    "resnet50": ["+model.options.zero_init_last=false"],
    "resnext50_32x4d": ["+model.options.zero_init_last=false"],
}


def anything(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return build("model=timm", f"model.name={architecture}", *ANY[architecture], shape=(3, 64, 64))


@pytest.mark.parametrize("architecture", ANY)
def test_the_weights_of_convolutions_and_linear_layers_are_prunable_and_no_others(architecture: str) -> None:
    model = anything(architecture)
    mask = masks.full(model)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        assert (name in mask) == (isinstance(owner, (nn.Conv2d, nn.Linear)) and name.endswith(".weight")), name
        assert name not in mask or parameter.ndim > 1
    if architecture.startswith("vit"):
        assert mask["blocks.0.attn.qkv.weight"].shape == (3 * 192, 192)
    counts = cost.multiply_adds(model, (3, 64, 64))
    assert [name for name in counts if name != operations.ACTIVATIONS] == list(mask) and all(counts.values())


@pytest.mark.parametrize("architecture", ANY)
@pytest.mark.parametrize("pruner", ["magnitude", "snip", "grasp", "synflow", "prospr"])
def test_scores_exist_for_every_architecture(architecture: str, pruner: str) -> None:
    model = anything(architecture).double()  # as scores are by default
    settings = composed(f"pruner={pruner}", "sparsity=0.5").pruner
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    net = Subnetwork(model, masks.full(model), initial, (3, 64, 64))
    batch = (torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4))
    assert settings.score is not None
    with mode(model, settings.mode == "train"), seeding.seeded(0, "score"):
        scores = settings.score(net, [batch], F.cross_entropy, torch.Generator())
    assert list(scores) == list(net.mask)
    assert all(values.isfinite().all() for values in scores.values())
    mask = selection.keep_largest(scores, net.mask, masks.total(net.mask) // 2).mask
    masks.apply_(model, mask)
    if pruner != "magnitude":  # ranks layers by their initialization, and so may empty a classifier
        assert masks.kept(paths.effective(model, mask, (3, 64, 64))) > 0
        assert signal.output_depends_on_input(model, batch[0])


def test_synflow_says_once_where_its_theory_does_not_hold(caplog: pytest.LogCaptureFixture) -> None:
    from pai_bench.pruners import synflow

    def warned(architecture: str) -> list[str]:
        caplog.clear()
        model = anything(architecture).double()
        mask = masks.full(model)
        for _ in range(2):
            net = Subnetwork(model, mask, {}, (3, 64, 64))
            with mode(model, False):
                scores = synflow.score(net, [], F.cross_entropy, torch.Generator())
            mask = selection.keep_largest(scores, mask, masks.kept(mask) // 2).mask
        return [record.getMessage() for record in caplog.records]

    assert warned("vit_tiny_patch16_224") == [
        "SynFlow's conservation laws do not hold through attention, layer norm; its scores are taken as they come"
    ]
    assert "sigmoid gates" in warned("mobilenetv3_small_050")[0]
    assert warned("resnet50") == []


@pytest.mark.parametrize(
    ("overrides", "shape", "is_cut"),
    [
        (["model=vgg11"], CIFAR, True),
        (["model=resnet20"], CIFAR, True),
        (["model=lenet5"], MNIST, True),
        (["model=wrn22_2"], CIFAR, True),
        (["model=timm", "model.name=resnet26", "+model.options.zero_init_last=false"], TINY, True),
        (["model=timm", "model.name=vit_tiny_patch16_224", "+model.options.patch_size=8"], TINY, None),
        (["model=timm", "model.name=mobilenetv3_small_050"], TINY, False),  # depthwise layers are left whole
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_synflow_without_dead_channels_finds_the_same_masks(
    overrides: list[str], shape: Shape, is_cut: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pai_bench.pruners import synflow

    cuts = []
    cut = synflow.Flow._cut
    monkeypatch.setattr(synflow.Flow, "_cut", lambda flow, left: (cuts.append(len(left)), cut(flow, left)))
    settings = ("pruner=synflow", "compression=1000", "schedule.rounds=12")
    monkeypatch.setattr(synflow, "_LARGE", 1 << 60)
    plain = pruned_as(build(*overrides, shape=shape), shape, *settings)
    assert not cuts
    monkeypatch.setattr(synflow, "_LARGE", 0)
    faster = pruned_as(build(*overrides, shape=shape), shape, *settings)
    if is_cut is not None:
        assert any(cuts) == is_cut
    assert plain.scores is not None and faster.scores is not None
    for name, mask in plain.mask.items():
        assert torch.equal(faster.mask[name], mask), name
        torch.testing.assert_close(faster.scores[name], plain.scores[name], rtol=1e-9, atol=0.0)


def test_synflow_needs_no_memory_of_earlier_rounds() -> None:
    from pai_bench.pruners import synflow

    model = build("model=wrn22_2").double().eval()
    cache: dict[str, object] = {}
    mask = masks.full(model)
    for _ in range(8):
        mask = selection.keep_largest(_flow(model, mask, cache), mask, masks.kept(mask) // 2).mask
        masks.apply_(model, mask)
        for buffer in model.buffers():  # as training would move running statistics
            buffer.add_(1)
    assert isinstance(cache["synflow"], synflow.Flow) and cache["synflow"].left
    for name, fresh in _flow(model, mask, {}).items():
        assert torch.equal(_flow(model, mask, cache)[name], fresh), name  # a search that was interrupted has none


def _flow(model: nn.Module, mask: Mask, cache: dict[str, object]) -> Scores:
    from pai_bench.pruners import synflow

    net = Subnetwork(model, mask, {}, CIFAR, cache=cache)
    return synflow.score(net, [], F.cross_entropy, torch.Generator())


# Networks that are asked before they are trained ---------------------------------------------------------------------


def examined(model: nn.Module, *overrides: str, shape: Shape = CIFAR) -> operations.Operations:
    cfg = composed("model=lenet300", "sparsity=0.5", "pruner=magnitude", *overrides)
    parts = SimpleNamespace(run=cfg, pruner=cfg.pruner, data=SimpleNamespace(input_shape=shape, num_classes=10))
    return assembly.examined(parts, model)  # type: ignore[arg-type]


def test_images_that_a_network_does_not_take_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^model.name=lenet300: VGG does not take images of 3x20x20 \(RuntimeError"):
        examined(build("model=vgg16_tiny", shape=(3, 20, 20)), shape=(3, 20, 20))
    with pytest.raises(ConfigError, match=r"outputs of shape \(1, 7\), and 10 classes"):
        examined(build("model=lenet300", num_classes=7))


class Computing(nn.Conv2d):
    """Applies something else than its weight."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__(3, 10, 3)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute(self.weight)).mean((2, 3))


def test_a_layer_that_fills_in_what_is_pruned_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 layers such as weight \(Computing\).*zeros would not stay zeros"):
        examined(Computing(lambda weight: weight - weight.mean((1, 2, 3), keepdim=True)))
    examined(Computing(lambda weight: 3 * weight / weight.norm()))  # here they stay
    examined(Computing(lambda weight: weight.clone(memory_format=torch.channels_last)))


def test_what_no_mask_covers_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.fc = nn.Parameter(torch.zeros(1, 32, 32)), nn.Linear(3072, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((x + self.places).flatten(1))

    examined(Embedded())
    assert [record.getMessage() for record in caplog.records] == [
        "1,024 parameters in places are of no layer that is pruned, and stay dense"
    ]


def test_a_classifier_that_starts_at_zero_is_not_taken_for_a_network_without_signal() -> None:
    model = build("model=resnet20")
    nn.init.zeros_(model.fc.weight)
    data = SimpleNamespace(
        num_examples={"train": 4}, draw=lambda examples, generator, dtype: [(torch.randn(4, *CIFAR), torch.arange(4))]
    )
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mask = masks.full(model)

    def found() -> bool:
        masks.apply_(model, mask)
        return experiment._has_signal(model, data, 0, initial, paths.effective(model, mask, CIFAR))  # type: ignore[arg-type]

    assert found()
    mask["conv.weight"] = torch.zeros_like(mask["conv.weight"])
    assert not found()


@pytest.mark.parametrize("pruner", ["snip", "synflow", "magnitude"])
def test_packed_attention_is_scored_and_masked(pruner: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 12), layer, nn.Flatten(), nn.Linear(36, 4)).double()
    shape, batch = (3, 8, 8), (torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4))
    settings = composed(f"pruner={pruner}", "sparsity=0.5").pruner
    assert settings.score is not None
    net = Subnetwork(model, masks.full(model), masks.prunable(model), shape)
    with mode(model, settings.mode == "train"):
        scores = settings.score(net, [batch], F.cross_entropy, torch.Generator())
    packed = "2.self_attn.in_proj_weight"
    assert scores[packed].shape == (36, 12) and scores[packed].count_nonzero() > 300
    found = examined_operations(model, shape)
    assert found.multiply_adds[packed] == 3 * 36 * 12 and not found.computed
    whole = paths.effective(model, net.mask, shape)
    assert whole is not None and masks.sparsity(whole) == 0
    # Values that no token has leave its way through attention without a path.
    mask = {name: kept.clone() for name, kept in net.mask.items()}
    mask[packed][24:] = False
    reached = paths.effective(model, mask, shape)
    assert reached is not None and not reached[packed].any() and not reached["2.self_attn.out_proj.weight"].any()


def examined_operations(model: nn.Module, shape: Shape) -> operations.Operations:
    with mode(model, False):
        return operations.watch(model, shape)


def test_where_paths_cannot_be_followed_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Sorting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3072, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1).sort().values)

    model = Sorting()
    assert paths.effective(model, masks.full(model), CIFAR) is None
    assert caplog.messages == ["effective sparsity is left out: what sort does to paths is not known"]


def test_paths_through_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.scale, self.fc = nn.Parameter(1e-6 * torch.ones(4, 1, 1)), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((self.scale * x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3)))

    model = Gated()
    mask = masks.full(model)
    mask["conv.weight"][1] = False  # nothing feeds this channel, and its gate feeds nothing
    mask["gate.weight"][2] = False  # this one stays open
    reached = paths.effective(model, mask, CIFAR)
    assert reached is not None
    assert reached["conv.weight"].flatten(1).any(1).tolist() == [True, False, True, True]
    assert reached["gate.weight"].flatten(1).any(1).tolist() == [True, False, False, True]
    assert reached["fc.weight"].any(0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("pruner", ["filter_magnitude", "phew", "magnitude"])
def test_without_torch_pruning_single_weights_can_be_pruned(pruner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model = build("model=lenet5", shape=MNIST)
    settings = (f"pruner={pruner}", "sparsity=0.5", "schedule=linear", "schedule.rounds=1")
    if pruner == "magnitude":
        assert masks.sparsity(pruned_as(model, MNIST, *settings).mask) == 0.5
    else:
        with pytest.raises(ConfigError, match="torch-pruning, which is not installed: pip install torch-pruning"):
            pruned_as(model, MNIST, *settings)


def test_without_timm_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"model=timm model\.name=resnet18: timm is not installed: pip install timm"):
        build("model=timm", "model.name=resnet18")


def test_flops_are_counted_as_torch_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = composed("model=resnet20").model((3, 32, 32), 10)

    def work() -> None:
        F.cross_entropy(model(torch.ones(2, 3, 32, 32)), torch.zeros(2, dtype=torch.long)).backward()
        query = torch.ones(1, 2, 4, 8)
        F.scaled_dot_product_attention(query, query, query)
        torch.einsum("bij,bjk->bik", torch.ones(2, 3, 4), torch.ones(2, 4, 5))

    ours, theirs = CountFlops(), FlopCounterMode(display=False)
    with ours:
        work()
    with theirs:
        work()
    assert ours.flops == theirs.get_total_flops() > 1e8
