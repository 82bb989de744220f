"""Every model of conf/model: its published size, its initialization, its output."""

import math

import pytest
import torch
from conftest import options
from network_builds import CIFAR, IMAGENET, MNIST, TINY, build
from torch import nn

from pai_bench.analysis import cost
from pai_bench.core import Shape
from pai_bench.errors import ConfigError
from pai_bench.masks import masks


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
        ("lenet5_caffe", MNIST, 10, 430_500),
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


def test_fan_out_of_a_grouped_convolution_is_that_of_one_group() -> None:
    """As timm and TensorFlow count it. A depthwise kernel of nine weights has nine outputs for each input."""
    model = build("model=mobilenet", "model.init.conv=kaiming_normal_fan_out")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            assert module.weight.detach().std() == pytest.approx((2 / 9) ** 0.5, rel=0.15)


def test_magnitude_at_initialization_leaves_no_depthwise_layer_of_mobilenet_empty() -> None:
    weights = masks.prunable(build("model=mobilenet"))
    every = torch.cat([weight.abs().flatten() for weight in weights.values()])
    threshold = every.kthvalue(round(0.9 * len(every))).values
    depthwise = [weight for weight in weights.values() if weight.dim() == 4 and weight.shape[1] == 1]
    assert len(depthwise) == 13 and all((weight.abs() > threshold).any() for weight in depthwise)


def test_vgg16_of_imagenet_has_the_dropout_of_the_paper() -> None:
    model = build("model=vgg16_bn", shape=IMAGENET, num_classes=10)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]


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
        (["model=timm", "model.name=resnet18", "+model.options.act_layer=gelu_x"], "refuses them .KeyError: 'gelu_x'"),
        (["model=timm", "model.name=resnet18", "+model.options.output_stride=7"], "refuses them .AssertionError"),
        (["model=wrn16_8", "model.depth=17"], "model.depth=17: give 6n"),
        (["model=resnet20", "model.widths=[16,32]"], "model.widths=.*give one for each stage"),
        (["model=wrn16_8", "model.dropout=2"], "model.dropout=2: give one in"),
        (["model=resnet20", "model.init.conv=he"], "model.init.conv=he: give one of kaiming_normal_fan_in"),
    ],
    ids=["name", "option", "option of another kind", "option without a reason", "depth", "widths", "dropout", "init"],
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
