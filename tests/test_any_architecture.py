"""Networks that are no option of ours: what is prunable, what is scored, what is refused."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import composed, pruned_as
from network_builds import CIFAR, MNIST, TINY, build
from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench import assembly, experiment
from pai_bench.analysis import cost, operations, paths, signal
from pai_bench.analysis.cost import CountFlops
from pai_bench.analysis.mode import mode
from pai_bench.core import Mask, Scores, Shape, Subnetwork
from pai_bench.errors import ConfigError
from pai_bench.masks import masks, selection
from pai_bench.pruners import synflow
from pai_bench.system import seeding

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
    return build("model=timm", f"model.name={architecture}", *ANY[architecture], shape=(3, 32, 32))


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
    counts = cost.multiply_adds(model, (3, 32, 32))
    assert [name for name in counts if name != operations.ACTIVATIONS] == list(mask) and all(counts.values())


@pytest.mark.parametrize("architecture", ANY)
@pytest.mark.parametrize("pruner", ["magnitude", "snip", "grasp", "synflow", "prospr"])
def test_scores_exist_for_every_architecture(architecture: str, pruner: str) -> None:
    model = anything(architecture).double()  # as scores are by default
    settings = composed(f"pruner={pruner}", "sparsity=0.5").pruner
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    net = Subnetwork(model, masks.full(model), initial, (3, 32, 32))
    batch = (torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.arange(2))
    assert settings.score is not None
    with mode(model, settings.mode == "train"), seeding.seeded(0, "score"):
        scores = settings.score(net, [batch], F.cross_entropy, torch.Generator())
    assert list(scores) == list(net.mask)
    assert all(values.isfinite().all() for values in scores.values())
    mask = selection.keep_largest(scores, net.mask, masks.total(net.mask) // 2).mask
    masks.apply_(model, mask)
    if pruner != "magnitude":  # ranks layers by their initialization, and so may empty a classifier
        assert masks.kept(paths.effective(model, mask, (3, 32, 32))) > 0
        assert signal.output_depends_on_input(model, batch[0])


def test_synflow_says_once_where_its_theory_does_not_hold(caplog: pytest.LogCaptureFixture) -> None:
    def warned(architecture: str) -> list[str]:
        caplog.clear()
        model = anything(architecture).double()
        mask = masks.full(model)
        for _ in range(2):
            net = Subnetwork(model, mask, {}, (3, 32, 32))
            with mode(model, False):
                scores = synflow.score(net, [], F.cross_entropy, torch.Generator())
            mask = selection.keep_largest(scores, mask, masks.kept(mask) // 2).mask
        return [record.getMessage() for record in caplog.records]

    assert warned("vit_tiny_patch16_224") == [
        "SynFlow's conservation laws do not hold through attention, layer norm; its scores are taken as they come"
    ]
    assert "sigmoid gates" in warned("mobilenetv3_small_050")[0]
    assert warned("resnet50") == []


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.LocalResponseNorm(2), nn.RMSNorm([4, 30, 30])])
def test_every_norm_but_batch_norm_is_named(norm: nn.Module) -> None:
    assert synflow._without_conservation(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    assert not synflow._without_conservation(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


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
    assert scores[packed].shape == (36, 12) and scores[packed][24:].all()  # the rows of values
    # SynFlow's image of ones makes all tokens alike, so that queries and keys change nothing.
    assert scores[packed][:24].all() if pruner != "synflow" else scores[packed][:24].abs().max() < 1e-9
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
