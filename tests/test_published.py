"""Published numbers that need no training: layer densities and collapse points."""

import math
from statistics import fmean

import pytest
import torch
from conftest import composed, pruned_as
from torch import Generator, nn

from pai_bench.analysis import cost
from pai_bench.masks import allocation, masks
from pai_bench.published import numbers
from pai_bench.system import seeding

NUMBERS = numbers.read(numbers.PAPERS)


def densities(pruner: str, compression: int) -> list[float]:
    """Of VGG-16 on CIFAR-100, conv 1 to 13 and the classifier; between seeds they differ by 0.001 to 0.005."""
    wanted = {"dataset": "cifar100", "model": "vgg16", "pruner": pruner}
    target = f"log10_compression={math.log10(compression):g}"
    of_layers = [n for n in NUMBERS if n.table.quantity == "layer_density" and n.settings == wanted]
    return [n.value for n in of_layers if n.target == target]


def vgg16() -> nn.Module:
    with seeding.seeded(0, "init"):
        return composed("model=vgg16").model((3, 32, 32), 100)


def pruned(model: nn.Module, pruner: str, compression: float, input_shape: tuple[int, int, int]) -> masks.Mask:
    return pruned_as(model, input_shape, f"pruner={pruner}", f"compression={compression}").mask


@pytest.mark.parametrize(("pruner", "compression"), [("magnitude", 10), ("magnitude", 100), ("synflow", 100)])
def test_layer_densities_of_vgg16_on_cifar100(pruner: str, compression: int) -> None:
    mask = pruned(vgg16(), pruner, compression, (3, 32, 32))
    assert masks.kept(mask) == round(14_761_664 / compression)
    ours, theirs = list(masks.densities(mask).values()), densities(pruner, compression)
    sizes = [tensor.numel() for tensor in mask.values()]
    for density, expected, size in zip(ours, theirs, sizes, strict=True):
        chance = 3 * math.sqrt(expected * (1 - expected) / size)
        assert density == pytest.approx(expected, rel=0.05, abs=chance)
    errors = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    assert fmean(errors) < 0.02


def test_magnitude_densities_have_their_closed_form() -> None:
    """Gaussian layers of standard deviation s keep erfc(T / (s sqrt 2)), with one threshold T for the whole network."""
    mask = pruned(vgg16(), "magnitude", 10, (3, 32, 32))
    model = vgg16()
    fan_in = {name: weight[0].numel() for name, weight in masks.prunable(model).items()}
    low, high = 0.0, 1.0
    for _ in range(60):
        threshold = (low + high) / 2
        expected = {name: math.erfc(threshold / (2 / math.sqrt(n))) for name, n in fan_in.items()}
        kept = sum(expected[name] * mask[name].numel() for name in mask)
        low, high = (threshold, high) if kept > masks.kept(mask) else (low, threshold)
    assert threshold == pytest.approx(0.0383, abs=1e-4)
    for name, density in masks.densities(mask).items():
        chance = 4 * math.sqrt(expected[name] * (1 - expected[name]) / mask[name].numel())
        assert density == pytest.approx(expected[name], abs=chance)


@pytest.mark.parametrize(
    ("num_classes", "critical_density"), [(10, 0.0772), (100, 0.0768), (200, 0.0765)], ids=["10", "100", "200"]
)
def test_magnitude_deletes_the_classifier_of_resnet18_at_the_predicted_density(
    num_classes: int, critical_density: float
) -> None:
    """The classifier is uniform in +-1/sqrt(512), so it is gone once the threshold passes that bound."""
    with seeding.seeded(0, "init"):
        model = composed("model=resnet18").model((3, 32, 32), num_classes)
    scores = {name: weight.detach().abs() for name, weight in masks.prunable(model).items()}
    total = masks.total(scores)
    above, below = (
        allocation.global_topk(
            scores, masks.full(model), round(factor * critical_density * total), Generator(), min_density=0.0
        ).mask
        for factor in (1.01, 0.99)
    )
    assert masks.collapsed(above) == [] and above["fc.weight"].any()
    assert masks.collapsed(below) == ["fc.weight"]


def test_synflow_keeps_every_layer_where_one_shot_pruning_collapses() -> None:
    """Tanaka et al. 2020, figure 1, on a small scale: a dozen weights left, and SynFlow has emptied no layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter) if parameter.ndim == 1 else nn.init.kaiming_normal_(parameter)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    compression = masks.total(masks.prunable(model)) / 12
    assert masks.collapsed(pruned(model, "synflow", compression, (3, 8, 8))) == []
    model.load_state_dict(weights)
    assert masks.collapsed(pruned(model, "magnitude", compression, (3, 8, 8))) != []


# The share of ResNet-50's multiply-adds that Erdos-Renyi-kernel densities leave.
ERK = [n for n in NUMBERS if n.table.quantity == "multiply_adds" and n.settings["allocation"] == "erk"]


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return composed("model=resnet50").model((3, 224, 224), 1000)


@pytest.mark.parametrize("number", ERK, ids=lambda number: number.target)
def test_erk_leaves_the_published_share_of_multiply_adds(number: numbers.Number, resnet50: nn.Module) -> None:
    scores = {name: weight.detach().abs() for name, weight in masks.prunable(resnet50).items()}
    assert number.density is not None
    keep = round(number.density * masks.total(scores))
    mask = allocation.erk(scores, masks.full(resnet50), keep, Generator(), kernel=True).mask
    counts = cost.multiply_adds(resnet50, (3, 224, 224))
    assert sum(counts.values()) == pytest.approx(4.089e9, rel=1e-3)
    share = cost.masked_multiply_adds(counts, mask) / sum(counts.values())
    assert share == pytest.approx(number.value, abs=0.0065)


def test_uniform_with_a_dense_first_layer_leaves_the_published_share(resnet50: nn.Module) -> None:
    scores = {name: weight.detach().abs() for name, weight in masks.prunable(resnet50).items()}
    counts = cost.multiply_adds(resnet50, (3, 224, 224))
    for sparsity, published in ((0.8, 0.223), (0.9, 0.126), (0.95, 0.077)):
        shares = dict.fromkeys(scores, 1.0)
        keep = masks.num_kept(sparsity, masks.total(scores))
        mask = allocation.by_density(scores, masks.full(resnet50), keep, shares, fixed={"conv1.weight"}).mask
        share = cost.masked_multiply_adds(counts, mask) / sum(counts.values())
        assert share == pytest.approx(published, abs=0.002)


def test_erk_densities_of_resnet20() -> None:
    with seeding.seeded(0, "init"):
        model = composed("model=resnet20").model((3, 32, 32), 10)
    scores = {name: weight.detach().abs() for name, weight in masks.prunable(model).items()}
    keep = masks.num_kept(0.9, masks.total(scores))
    mask = allocation.erk(scores, masks.full(model), keep, Generator(), kernel=True).mask
    found = masks.densities(mask)
    expected = {
        "conv.weight": 0.983,
        "stages.0.0.conv1.weight": 0.280,
        "stages.1.0.conv1.weight": 0.199,
        "stages.1.1.conv1.weight": 0.129,
        "stages.1.0.shortcut.0.weight": 1.0,
        "stages.2.0.conv1.weight": 0.094,
        "stages.2.1.conv1.weight": 0.0617,
        "stages.2.0.shortcut.0.weight": 0.813,
        "fc.weight": 1.0,
    }
    for name, density in expected.items():
        assert found[name] == pytest.approx(density, abs=0.002), name


def test_smart_ratio_densities_of_vgg19() -> None:
    """Published densities of 98 %, where what a full layer cannot take is spread in proportion: the shape is theirs."""
    with seeding.seeded(0, "init"):
        model = composed("model=vgg19").model((3, 32, 32), 10)
    scores = {name: weight.detach().abs() for name, weight in masks.prunable(model).items()}
    keep = masks.num_kept(0.98, masks.total(scores))
    settings = {"shape": "vgg", "linear_density": 0.3, "surplus": "proportional"}
    mask = allocation.smart_ratio(scores, masks.full(model), keep, Generator(), **settings).mask
    found = list(masks.densities(mask).values())
    expected = [1, 1, 0.838, 0.2635, 0.146, 0.087, 0.054, 0.0345, 0.0223, 0.0145, 0.0093, 0.0059, 0.0036, 0.0020]
    assert found[0] == found[1] == 1 and found[-1] == pytest.approx(0.3, abs=1e-3)
    ratios = [ours / theirs for ours, theirs in zip(found[3:13], expected[3:13], strict=True)]
    assert max(ratios) / min(ratios) < 1.03  # one factor: the shape is theirs
    assert fmean(ratios) == pytest.approx(1, abs=0.1)


PLAN = [64, 64, 128, 128, *[256] * 4, *[512] * 8]  # the convolutions of VGG-19
SMART_RATIO = {  # densities of its layers in the code of Su et al. 2020
    0.9: [*[1] * 6, 0.318, 0.173, 0.112, 0.0725, 0.0466, 0.0294, 0.0179, 0.0103, 0.0054, 0.0024, 0.3],
    0.95: [*[1] * 4, 0.669, 0.218, 0.1355, 0.0865, 0.0559, 0.0362, 0.0233, 0.0147, 0.0089, 0.0051, 0.0027, 0.0012, 0.3],
    0.98: [1, 1, 0.838, 0.2635, 0.146, 0.087, 0.054, 0.0345, 0.0223, 0.0145, 0.0093, 0.0059, 0.0036, 0.0020, 0.0011,
           0.0005, 0.3],
}  # fmt: skip


def smart_ratio_counts(sizes: list[int], sparsity: float) -> list[int]:
    """What the released code keeps of the convolutions of a VGG and of the linear layer after them, in integers."""
    depth = len(sizes)
    raw = [((depth - i) ** 2 + depth - i) / (i + 1) ** 2 for i in range(depth - 1)]
    scaled = sum(int(size * share) for size, share in zip(sizes, raw, strict=False))
    ratios = [share * (int(sum(sizes) * (1 - sparsity)) - int(0.3 * sizes[-1])) / scaled for share in raw]
    extra, counts = 0, []
    for size, ratio in zip(sizes, ratios, strict=False):
        if ratio >= 1:
            extra += int((ratio - 1) * size)
            counts.append(size)
        else:
            taken = min(extra, int((1 - ratio) * size))
            extra -= taken
            counts.append(int(ratio * size + taken))
    return [*counts, int(0.3 * sizes[-1])]


@pytest.mark.parametrize("sparsity", SMART_RATIO)
def test_smart_ratio_gives_the_surplus_to_the_next_layers_as_the_released_code(sparsity: float) -> None:
    shapes = [(out, before, 3, 3) for before, out in zip([3, *PLAN], PLAN, strict=False)] + [(10, 512)]
    scores = {f"layer{i}.weight": torch.rand(shape) for i, shape in enumerate(shapes)}
    candidates = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    keep = masks.num_kept(sparsity, masks.total(scores))
    settings = {"shape": "vgg", "linear_density": 0.3, "surplus": "next"}
    mask = allocation.smart_ratio(scores, candidates, keep, Generator(), **settings).mask
    assert masks.kept(mask) == keep
    found, counts = list(masks.densities(mask).values()), [int(kept.sum()) for kept in mask.values()]
    for ours, theirs in zip(found, SMART_RATIO[sparsity], strict=True):
        assert ours == pytest.approx(theirs, abs=6e-4)
    expected = smart_ratio_counts([values.numel() for values in scores.values()], sparsity)
    assert max(abs(ours - theirs) for ours, theirs in zip(counts, expected, strict=True)) <= 3  # theirs round down
