"""What searches do on a GPU, on a CPU: rounds as emulated CUDA graphs, convolutions as matrix products."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import Chain, composed, pruned_as, residual
from emulated_graphs import emulated
from torch import Generator, nn

from pai_bench.analysis import patches
from pai_bench.core import Mask
from pai_bench.masks import masks, selection
from pai_bench.pruning.pruned import Pruned

SHAPE = (3, 16, 16)
WORDS = ("pruner=synflow", "sparsity=0.97", "schedule.rounds=12")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products for convolutions, and the selection of a GPU."""
    monkeypatch.setattr(patches, "pay", lambda device, dtype: dtype == torch.float64)
    monkeypatch.setattr("pai_bench.masks.allocation.keep_largest", selection.keep_largest_on_device)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": (5, 3), "padding": (2, 0), "stride": (1, 3)},
        {"kernel_size": 3, "dilation": 2},
    ],
    ids=str,
)
def test_a_product_of_patches_is_the_convolution(settings: dict[str, int], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, bias=bias, **settings).double()  # type: ignore[arg-type]
    image = torch.randn(1, 5, 12, 9, dtype=torch.float64, requires_grad=True)
    outputs = [layer(image), patches.convolved(layer, image)]
    assert outputs[0].shape == outputs[1].shape
    direction = torch.randn(outputs[0].shape, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad(out, [image, *layer.parameters()], direction) for out in outputs), strict=True)
    for one, other in [(outputs[0], outputs[1]), *pairs]:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_what_is_no_plain_convolution_stays() -> None:
    layers = [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Linear(4, 4),
    ]
    changed = nn.Sequential(*layers, nn.Conv2d(4, 4, 3))
    patches.use_(changed)
    assert ["forward" in vars(layer) for layer in changed] == [False] * 4 + [True]


def test_where_matrix_products_pay() -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert patches.pay(cuda, torch.float64)
    assert not patches.pay(cuda, torch.float32) and not patches.pay(cpu, torch.float64)


def same(one: Pruned, other: Pruned) -> None:
    masks_of: list[Mask] = [one.mask, other.mask]
    for name, kept in masks_of[0].items():
        assert torch.equal(kept, masks_of[1][name]), name
    assert (one.sparsities, one.num_tied, one.flops) == (other.sparsities, other.num_tied, other.flops)


def resnet20() -> nn.Module:
    return composed("model=resnet20").model((3, 16, 16), 10)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("make", [Chain, residual, resnet20], ids=["chain", "residual", "resnet20"])
def test_synflow_finds_the_same_mask(make: Callable[[], nn.Module], dtype: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    model = make()
    words = (*WORDS, f"pruner.dtype={dtype}")
    plain = pruned_as(copy.deepcopy(model), SHAPE, *words)
    request.getfixturevalue("as_on_a_gpu")
    with emulated() as made:
        found = pruned_as(copy.deepcopy(model), SHAPE, *words)
    assert len(made) == 1  # the first round is not recorded, the second is, and the others are run from it
    same(found, plain)
    assert plain.scores is not None and found.scores is not None
    for name, values in plain.scores.items():
        torch.testing.assert_close(found.scores[name], values, rtol=1e-9 if dtype == "float64" else 0, atol=0)


def test_equal_scores_are_told_apart_by_their_order(as_on_a_gpu: None) -> None:
    """Twins among the channels: every score comes twice or more, so the order decides in every round."""
    torch.manual_seed(0)
    model = Chain(norm=False)
    with torch.no_grad():
        for weight in (model.conv1.weight, model.conv2.weight, model.fc.weight):
            weight[1::2] = weight[::2]
            if weight.shape[1] % 2 == 0:
                weight[:, 1::2] = weight[:, ::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "pay", lambda device, dtype: False)
        patch.setattr("pai_bench.masks.allocation.keep_largest", selection.keep_largest_by_sorting)
        plain = pruned_as(copy.deepcopy(model), SHAPE, *WORDS)
    with emulated():
        found = pruned_as(copy.deepcopy(model), SHAPE, *WORDS)
    assert sum(plain.num_tied) > 0
    same(found, plain)


def test_rounds_that_cannot_be_captured_say_why_once(caplog: pytest.LogCaptureFixture) -> None:
    class Peeks(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 if float(x.sum()) > 0 else 2)

    caplog.set_level("INFO")
    torch.manual_seed(0)
    model = Peeks()
    plain = pruned_as(copy.deepcopy(model), SHAPE, *WORDS)
    with emulated() as made:
        found = pruned_as(copy.deepcopy(model), SHAPE, *WORDS)
    lines = [line for line in caplog.messages if "one by one" in line]
    assert not made and len(lines) == 1
    assert lines[0].startswith("the kernels of SynFlow are launched one by one: its rounds cannot be captured (")
    same(found, plain)


def test_counts_of_layers_are_taken_with_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = {"a": torch.rand(4, 5, generator=Generator().manual_seed(0)) < 0.5, "b": torch.zeros(3, dtype=torch.bool)}
    expected = masks.counts(mask)
    assert expected == [int(kept.sum()) for kept in mask.values()]
    fake = {name: kept.to("meta") for name, kept in mask.items()}
    looks = []
    monkeypatch.setattr(torch, "stack", lambda numbers: looks.append(len(numbers)) or torch.tensor(expected))
    assert masks.counts(fake) == expected and looks == [2]
