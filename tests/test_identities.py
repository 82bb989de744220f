"""The mathematics of the methods: statements that are true for a reason, in float64, on small networks."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from conftest import Chain, Untrained, drawn, residual
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis import paths, signal
from pai_bench.analysis.gradients import hessian_gradient, mean_gradient
from pai_bench.analysis.mode import mode
from pai_bench.core import (
    Ablation,
    Batches,
    Pruner,
    Rounding,
    Scores,
    ScoringData,
    Selection,
    Subnetwork,
    TrainingLength,
)
from pai_bench.errors import UserError
from pai_bench.masks import allocation, masks, selection
from pai_bench.pruners import (
    force,
    gradient_flow,
    gradient_norm,
    grasp,
    magnitude,
    neural_tangent_transfer,
    phew,
    prospr,
    snip,
    synflow,
)
from pai_bench.pruners import random as random_pruner
from pai_bench.pruning import schedules
from pai_bench.pruning.rounds import prune

SHAPE = (3, 8, 8)
PLAIN = {"absolute": False, "class_halves": False, "draws": 1, "redraw_linear": False}


def subnetwork(model: nn.Module, mask: masks.Mask | None = None) -> Subnetwork:
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    mask = masks.full(model) if mask is None else mask
    masks.apply_(model, mask)
    return Subnetwork(model, mask, initial, SHAPE)


def taken(
    score: Callable[..., Scores], model: nn.Module, batches: Batches, training: bool, **settings: object
) -> Scores:
    with mode(model, training):
        return score(subnetwork(model), batches, F.cross_entropy, Generator().manual_seed(0), **settings)


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    return Chain().double()


@pytest.fixture
def images(batches: Batches) -> Batches:
    return [(images.double(), labels) for images, labels in batches]


def assert_close(a: Tensor | float, b: Tensor | float, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=1e-14
    )


# SynFlow --------------------------------------------------------------------------------------------------------------


def flow(model: nn.Module) -> float:
    """R: the sum of the outputs for an all-ones image when every number in the model is made positive."""
    positive = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in [*positive.parameters(), *positive.buffers()]:
            if tensor.is_floating_point():
                tensor.abs_()
        return float(positive(torch.ones((1, *SHAPE), dtype=torch.float64)).sum())


def test_synflow_every_layer_of_a_chain_has_the_same_sum(chain: nn.Module) -> None:
    scores = taken(synflow.score, chain, [], False)
    for values in scores.values():
        assert (values >= 0).all()
        assert_close(values.sum(), flow(chain), 1e-12)


def test_synflow_is_conserved_through_every_channel(chain: nn.Module) -> None:
    scores = taken(synflow.score, chain, [], False)
    assert_close(scores["conv1.weight"].sum((1, 2, 3)), scores["conv2.weight"].sum((0, 2, 3)), 1e-12)
    assert_close(scores["conv2.weight"].sum((1, 2, 3)), scores["fc.weight"].sum(0), 1e-12)


def test_synflow_branches_of_a_residual_block_add_up() -> None:
    torch.manual_seed(0)
    model = residual().double()
    scores = {name: values.sum() for name, values in taken(synflow.score, model, [], False).items()}
    assert_close(scores["stages.1.0.conv1.weight"], scores["stages.1.0.conv2.weight"], 1e-12)
    assert_close(scores["stages.1.0.conv2.weight"] + scores["stages.1.0.shortcut.0.weight"], flow(model), 1e-12)
    assert scores["stages.0.0.conv1.weight"] < flow(model)  # the rest goes through the identity
    for name in ("conv.weight", "fc.weight"):
        assert_close(scores[name], flow(model), 1e-12)


def test_synflow_ignores_signs_and_data(chain: nn.Module, images: Batches) -> None:
    before = taken(synflow.score, chain, images, False)
    with torch.no_grad():
        for weight in masks.prunable(chain).values():
            weight.mul_(torch.randint(0, 2, weight.shape) * 2 - 1)
    after = taken(synflow.score, chain, [], False)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_synflow_scaling_one_layer_scales_all_scores(chain: nn.Module) -> None:
    before = taken(synflow.score, chain, [], False)
    with torch.no_grad():
        chain.conv2.weight.mul_(3)
    after = taken(synflow.score, chain, [], False)
    for name in before:
        assert_close(after[name], 3 * before[name], 1e-12)


def test_synflow_pruned_weights_score_zero(chain: nn.Module) -> None:
    generator = Generator().manual_seed(0)
    mask = {name: torch.rand(tensor.shape, generator=generator) < 0.5 for name, tensor in masks.full(chain).items()}
    net = subnetwork(chain, mask)
    with mode(chain, False):
        scores = synflow.score(net, [], F.cross_entropy, generator)
    assert all((scores[name][~mask[name]] == 0).all() for name in mask)
    assert all((scores[name][mask[name]] > 0).any() for name in mask)


def test_synflow_equals_autograd_on_a_rewritten_network(chain: nn.Module) -> None:
    """Against a second computation: the model itself rewritten to absolute values, backward through .grad."""
    positive = copy.deepcopy(chain).eval()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    positive(torch.ones((1, *SHAPE), dtype=torch.float64)).sum().backward()
    scores = taken(synflow.score, chain, [], False)
    for name, parameter in masks.prunable(positive).items():
        assert parameter.grad is not None
        assert_close(scores[name], parameter * parameter.grad, 1e-12)


def test_synflow_in_float32_equals_the_published_loop() -> None:
    """Masks multiply the weights, absolute values everywhere, all in float32: as the authors' code does it."""
    torch.manual_seed(0)
    model = Chain(bias=True)
    rounds, density = 20, 0.05
    theirs, mask = copy.deepcopy(model).eval(), masks.full(model)
    ours = masks.full(model)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.abs_()
    for i in range(1, rounds + 1):
        leaves = {
            name: (w * mask[name].float()).detach().requires_grad_() for name, w in masks.prunable(theirs).items()
        }
        image = torch.ones((1, *SHAPE))
        torch.func.functional_call(theirs, leaves, (image,)).sum().backward()
        reference = {name: (leaf.grad * leaf).detach().abs() for name, leaf in leaves.items()}
        with mode(model, False):
            scores = synflow.score(subnetwork(model, ours), [], F.cross_entropy, Generator())
        assert all(torch.equal(scores[name], reference[name]) for name in scores)
        k = round(density ** (i / rounds) * masks.total(mask))
        together = torch.cat([values.flatten() for values in reference.values()])
        threshold = torch.kthvalue(together, len(together) - k).values
        mask = {name: values > threshold for name, values in reference.items()}
        ours = allocation.global_topk(scores, ours, k, Generator(), min_density=0.0).mask
        assert all(torch.equal(ours[name], mask[name]) for name in ours)


class Norms(nn.Module):
    """Patches, layer norms and attention: the output can fall when a weight's size grows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out, self.fc = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        position = torch.linspace(0, 1, x.shape[1] * 8, dtype=x.dtype).view(1, -1, 8)
        q, k, v = self.qkv(self.before(x + position)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.fc(self.after(x).mean(1))


@pytest.mark.parametrize(("make", "training"), [(Chain, True), (Norms, False)], ids=["batch statistics", "layer norm"])
def test_synflow_takes_the_size_where_the_flow_falls(make: Callable[[], nn.Module], training: bool) -> None:
    """The authors' code takes the size of w dR/dw, which matters where a norm lets the flow fall as a weight grows."""
    torch.manual_seed(0)
    model = make().double()
    signed = copy.deepcopy(model).train(training)
    with torch.no_grad():
        for parameter in signed.parameters():
            parameter.abs_()
    signed(torch.ones((1, *SHAPE), dtype=torch.float64)).sum().backward()
    scores = taken(synflow.score, model, [], training)
    falls = 0
    for name, parameter in masks.prunable(signed).items():
        assert parameter.grad is not None
        product = (parameter * parameter.grad).detach()
        falls += int((product < -1e-6 * product.abs().max()).sum())
        torch.testing.assert_close(scores[name], product.abs(), rtol=1e-9, atol=1e-12)
    assert falls > 20


def test_synflow_says_when_it_overflows(chain: nn.Module) -> None:
    with torch.no_grad():
        for weight in masks.prunable(chain).values():
            weight.mul_(1e15)
    with pytest.raises(UserError, match=r"SynFlow overflows float32 on this model; set pruner.dtype=float64"):
        taken(synflow.score, copy.deepcopy(chain).float(), [], False)
    scores = taken(synflow.score, chain, [], False)
    assert_close(scores["fc.weight"].sum(), flow(chain), 1e-12)


# Whole searches against the authors' loops, with the numbers of weights that their code keeps -------------------------

Draw = Callable[[ScoringData, Generator, torch.dtype], Batches]


def search(
    model: nn.Module, pruner: Pruner, density: float, rounds: int, rounding: Rounding, draw: Draw
) -> tuple[list[masks.Mask], masks.Mask]:
    """The masks with which the rounds of a search begin, and the one that it finds."""
    seen: list[masks.Mask] = []
    assert pruner.score is not None
    score = pruner.score

    def watched(net: Subnetwork, *rest: Any) -> Scores:
        seen.append({name: kept.clone() for name, kept in net.mask.items()})
        return score(net, *rest)

    def topk(scores: Scores, candidates: masks.Mask, keep: int, generator: Generator) -> Selection:
        return selection.keep_largest(scores, candidates, keep)

    found = prune(
        model, dataclasses.replace(pruner, score=watched), topk,
        schedules.exponential(1 - density, TrainingLength(1, 1), rounds=rounds, rounding=rounding),
        ablation=Ablation(), initial=drawn(model), input_shape=SHAPE, draw=draw, training=Untrained(),
        loss=F.cross_entropy, seed=0, record=lambda metrics, epoch: None,
    )  # fmt: skip
    return seen, found.mask


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_search_by_synflow_is_the_authors_loop_bit_for_bit(dtype: Literal["float32", "float64"]) -> None:
    """100 rounds; theirs prune trunc((1 - d_i) N) weights by a threshold over all, with masks in the network."""
    torch.manual_seed(0)
    model = Chain(bias=True)
    density, number = 0.1, 626
    weights = {name: w.detach().to(getattr(torch, dtype)).abs() for name, w in masks.prunable(model).items()}
    others = {name: p.detach().to(getattr(torch, dtype)).abs() for name, p in model.named_parameters()}
    theirs = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
    factors = {name: torch.ones_like(w) for name, w in weights.items()}
    expected = []
    for i in range(1, 101):
        expected.append({name: factor.bool() for name, factor in factors.items()})
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        image = torch.ones((1, *SHAPE), dtype=getattr(torch, dtype))
        state = others | {name: leaf * factors[name] for name, leaf in leaves.items()}
        torch.func.functional_call(theirs, state, (image,)).sum().backward()
        sizes = torch.cat([(leaf.grad * leaf).detach().abs().flatten() for leaf in leaves.values()])
        threshold = sizes.sort().values[int((1 - density ** (i / 100)) * number) - 1]
        parts = (sizes > threshold).split([w.numel() for w in weights.values()])
        factors = {name: part.view(w.shape).to(w.dtype) for (name, w), part in zip(weights.items(), parts, strict=True)}
    pruner = Pruner(synflow.score, "eval", None, getattr(torch, dtype))
    seen, found = search(copy.deepcopy(model), pruner, density, 100, "up", lambda *_: [])
    assert masks.kept(found) == sum(int(factor.sum()) for factor in factors.values()) == 63
    for ours, mask in zip([*seen, found], [*expected, {n: f.bool() for n, f in factors.items()}], strict=True):
        assert all(torch.equal(ours[name], mask[name]) for name in mask)
    nearest, _ = search(copy.deepcopy(model), pruner, density, 100, "nearest", lambda *_: [])
    assert [masks.kept(mask) for mask in nearest] != [masks.kept(mask) for mask in seen]


@pytest.mark.parametrize("method", ["force", "iterative SNIP"])
@pytest.mark.parametrize("official_loss", [False, True])
def test_a_search_by_force_or_iterative_snip_is_the_authors_loop_bit_for_bit(
    method: str, official_loss: bool, batches: Batches
) -> None:
    """10 rounds in train mode; theirs keep all that reach the trunc(d_i N)-th largest score. FORCE starts from w0."""
    torch.manual_seed(0)
    model = Chain(bias=True).double()
    density, number = 0.13, 626
    images = [[(x.double() + 0.1 * i, y)] for i, (x, y) in enumerate([batches[0]] * 10)]
    start = {name: w.detach().clone() for name, w in masks.prunable(model).items()}
    kept = {name: torch.ones_like(w) for name, w in start.items()}
    expected = []
    for i in range(1, 11):
        expected.append({name: factor.bool() for name, factor in kept.items()})
        net = copy.deepcopy(model).train()
        with torch.no_grad():
            for name, w in masks.prunable(net).items():
                w.copy_(start[name] * kept[name])
        ((x, y),) = images[i - 1]
        (F.nll_loss if official_loss else F.cross_entropy)(net(x), y).backward()
        scores = {}
        for name, w in masks.prunable(net).items():
            assert w.grad is not None
            scores[name] = ((start[name] if method == "force" else w) * w.grad).detach().abs()
        k = int(math.exp(i / 10 * math.log(density)) * number)
        threshold = torch.cat([s.flatten() for s in scores.values()]).topk(k).values[-1]
        assert threshold > 0  # or all that are zero would stay
        kept = {name: (s >= threshold).double() for name, s in scores.items()}
    functions = {
        ("force", False): force.score, ("force", True): force.score_true_logit,
        ("iterative SNIP", False): snip.score, ("iterative SNIP", True): snip.score_true_logit,
    }  # fmt: skip
    pruner = Pruner(
        functions[method, official_loss], "train", ScoringData(None, 12, 12, False), regrow=method == "force"
    )
    for rounding in ("down", "nearest"):
        left = iter(images)
        seen, found = search(copy.deepcopy(model), pruner, density, 10, rounding, lambda *_, left=left: next(left))
        equal = [
            all(torch.equal(ours[name], mask[name]) for name in mask)
            for ours, mask in zip([*seen, found], [*expected, {n: f.bool() for n, f in kept.items()}], strict=True)
        ]
        assert all(equal) if rounding == "down" else not all(equal)


# SNIP -----------------------------------------------------------------------------------------------------------------


def test_snip_is_the_derivative_of_the_loss_by_the_mask(chain: nn.Module, images: Batches) -> None:
    """By central differences: multiply one weight by 1 + h and 1 - h."""
    scores = taken(snip.score, chain, images, False)
    joined = (torch.cat([x for x, _ in images]), torch.cat([y for _, y in images]))
    chain.eval()
    for name, index in (("conv1.weight", (2, 1, 0, 2)), ("conv2.weight", (5, 3, 1, 1)), ("fc.weight", (1, 4))):
        weight, h = masks.prunable(chain)[name], 1e-6
        original = weight.detach()[index].clone()
        values = []
        for factor in (1 + h, 1 - h):
            with torch.no_grad():
                weight[index] = original * factor
                values.append(F.cross_entropy(chain(joined[0]), joined[1]).item())
        with torch.no_grad():
            weight[index] = original
        assert_close(scores[name][index], abs(values[0] - values[1]) / (2 * h), 1e-5)


def test_snip_signed_sums_are_equal_in_every_layer_without_norm_and_bias(images: Batches) -> None:
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    weights, gradients = mean_gradient(subnetwork(model), images, F.cross_entropy)
    sums = [(weights[name] * gradients[name]).sum() for name in weights]
    assert abs(sums[0]) > 1e-6
    for value in sums[1:]:
        assert_close(value, sums[0], 1e-9)


def test_snip_signed_sums_of_a_filter_vanish_before_batch_norm(chain: nn.Module, images: Batches) -> None:
    """In train mode the loss does not change when a filter is scaled, so sum of w dL/dw over the filter is zero."""
    chain.norm1.eps = chain.norm2.eps = 1e-30
    with mode(chain, True):
        weights, gradients = mean_gradient(subnetwork(chain), images, F.cross_entropy)
    for name in ("conv1.weight", "conv2.weight"):
        products = weights[name] * gradients[name]
        assert products.abs().sum() > 1e-4
        assert products.sum((1, 2, 3)).abs().max() < 1e-13
    assert (weights["fc.weight"] * gradients["fc.weight"]).sum().abs() > 1e-4


def test_snip_weighs_every_image_the_same(chain: nn.Module, images: Batches) -> None:
    joined = [(torch.cat([x for x, _ in images]), torch.cat([y for _, y in images]))]
    parts, whole = taken(snip.score, chain, images, False), taken(snip.score, chain, joined, False)
    for name in whole:
        assert_close(parts[name], whole[name], 1e-10)


def test_snip_pruned_weights_score_zero(chain: nn.Module, images: Batches) -> None:
    mask = {name: torch.arange(t.numel()).view(t.shape) % 2 == 0 for name, t in masks.full(chain).items()}
    scores = snip.score(subnetwork(chain, mask), images, F.cross_entropy, Generator())
    assert all((scores[name][~mask[name]] == 0).all() for name in mask)


# GraSP ----------------------------------------------------------------------------------------------------------------


def explicit_hessian_gradient(model: nn.Module, images: Batches, temperature: float) -> dict[str, Tensor]:
    """Hg from the whole Hessian of the mean loss over the prunable weights, by torch.func.hessian."""
    weights = {name: weight.detach() for name, weight in masks.prunable(model).items()}
    sizes = [weight.numel() for weight in weights.values()]
    x, y = torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])

    def loss(flat: Tensor) -> Tensor:
        parts = {n: p.view(w.shape) for (n, w), p in zip(weights.items(), flat.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)) / temperature, y)

    flat = torch.cat([weight.flatten() for weight in weights.values()])
    product = torch.func.hessian(loss)(flat) @ torch.func.grad(loss)(flat)
    return {n: p.view(w.shape) for (n, w), p in zip(weights.items(), product.split(sizes), strict=True)}


class Small(nn.Module):
    """195 prunable weights, smooth, so that its Hessian is everywhere defined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, bias=True)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(torch.tanh(self.norm(self.conv(x))), 2).flatten(1))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_grasp_equals_the_explicit_hessian(images: Batches, temperature: float, num_batches: int) -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    images = [(x, y % 3) for x, y in images[:num_batches]]
    weights, products = hessian_gradient(subnetwork(model), images, F.cross_entropy, temperature=temperature)
    expected = explicit_hessian_gradient(model, images, temperature)
    scores = grasp.score(subnetwork(model), images, F.cross_entropy, Generator(), temperature=temperature, **PLAIN)
    for name in expected:
        scale = expected[name].abs().max()
        assert_close(products[name] / scale, expected[name] / scale, 1e-9)
        assert_close(scores[name], weights[name] * products[name], 0)


def test_grasp_high_scores_are_those_whose_removal_shrinks_the_gradient(images: Batches) -> None:
    """The first-order change of |g|^2 when weight q is scaled by 1 - h is -2 h w_q (Hg)_q: the sign, by differences."""
    torch.manual_seed(0)
    model = Small().double().eval()
    images = [(x, y % 3) for x, y in images]
    scores = grasp.score(subnetwork(model), images, F.cross_entropy, Generator(), temperature=1.0, **PLAIN)
    weight, index, h = model.fc.weight, (1, 7), 1e-6
    norms = []
    for factor in (1 + h, 1 - h):
        with torch.no_grad():
            weight[index] *= factor
        _, gradients = mean_gradient(subnetwork(model), images, F.cross_entropy)
        norms.append(sum(float((g**2).sum()) for g in gradients.values()))
        with torch.no_grad():
            weight[index] /= factor
    assert_close((norms[0] - norms[1]) / (2 * h), 2 * scores["fc.weight"][index], 1e-6)


def test_grasp_layer_sums_before_batch_norm(chain: nn.Module, images: Batches) -> None:
    """Scale invariance in train mode: the sum of w * (Hg) over a convolution is minus its squared gradient norm."""
    chain.norm1.eps = chain.norm2.eps = 1e-30
    with mode(chain, True):
        net = subnetwork(chain)
        _, gradients = mean_gradient(net, images[:1], F.cross_entropy, temperature=2.0)
        scores = grasp.score(net, images[:1], F.cross_entropy, Generator(), temperature=2.0, **PLAIN)
    for name in ("conv1.weight", "conv2.weight"):
        assert_close(scores[name].sum(), -(gradients[name] ** 2).sum(), 1e-8)


def test_grasp_temperature_is_more_than_a_scale(chain: nn.Module, images: Batches) -> None:
    cold, hot = (taken(grasp.score, chain, images, True, temperature=t, **PLAIN) for t in (1.0, 200.0))
    together = torch.stack([torch.cat([s.flatten() for s in scores.values()]) for scores in (cold, hot)])
    assert torch.corrcoef(together)[0, 1] < 0.999


def test_second_derivatives_exist_for_attention() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=4)
    images = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    net = Subnetwork(model, masks.full(model), {}, (3, 32, 32))
    scores = grasp.score(net, images, F.cross_entropy, Generator(), temperature=200.0, **PLAIN)
    assert scores.keys() == masks.prunable(model).keys() and "blocks.0.attn.qkv.weight" in scores
    assert all(values.isfinite().all() and values.any() for values in scores.values())


# Magnitude and random -------------------------------------------------------------------------------------------------


def test_magnitude_is_the_absolute_weight(chain: nn.Module) -> None:
    scores = taken(magnitude.score, chain, [], False)
    assert all(torch.equal(scores[name], weight.abs()) for name, weight in masks.prunable(chain).items())


def test_random_depends_on_the_generator_alone(chain: nn.Module) -> None:
    net = subnetwork(chain)
    a, b, other = (random_pruner.score(net, [], F.cross_entropy, Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], other[name]) for name in a)


# Rescaling symmetry ---------------------------------------------------------------------------------------------------


def test_rescaling_a_hidden_channel_moves_magnitude_but_not_synflow_and_snip(images: Batches) -> None:
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    before = {
        "synflow": taken(synflow.score, model, [], False),
        "snip": taken(snip.score, model, images, False),
        "magnitude": taken(magnitude.score, model, [], False),
    }
    with torch.no_grad():
        model.conv1.weight[2] *= 4
        model.conv2.weight[:, 2] /= 4
    for name in before["snip"]:
        assert_close(taken(synflow.score, model, [], False)[name], before["synflow"][name], 1e-12)
        assert_close(taken(snip.score, model, images, False)[name], before["snip"][name], 1e-9)
    assert not torch.equal(
        taken(magnitude.score, model, [], False)["conv1.weight"], before["magnitude"]["conv1.weight"]
    )
    assert math.isfinite(flow(model))


# FORCE, iterative SNIP, ProsPr ----------------------------------------------------------------------------------------

PROSPR = {"steps": 3, "lr": 0.1, "momentum": 0.9, "detach_momentum": False, "first_order": False}


@pytest.mark.parametrize("training", [False, True])
def test_force_and_prospr_without_steps_are_snip(chain: nn.Module, images: Batches, training: bool) -> None:
    one = images[:1]
    expected = taken(snip.score, chain, one, training)
    for found in (
        taken(force.score, chain, one, training),
        taken(prospr.score, chain, one, training, **PROSPR | {"steps": 0}),
        taken(prospr.score, chain, one, training, **PROSPR | {"lr": 1e-12}),
        taken(prospr.score, chain, one, training, **PROSPR | {"steps": 0, "first_order": True}),
    ):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-11)


def test_force_scores_what_is_pruned_with_the_gradient_of_the_masked_network(chain: nn.Module, images: Batches) -> None:
    mask = {
        name: torch.rand(w.shape, generator=Generator().manual_seed(3)) < 0.5 for name, w in masks.full(chain).items()
    }
    net = subnetwork(chain, mask)
    initial = net.initial
    masks.apply_(chain, mask)
    with mode(chain, True):
        scores = force.score(net, images[:1], F.cross_entropy, Generator())
        chain.train()
        F.cross_entropy(chain(images[0][0]), images[0][1]).backward()
    for name, weight in masks.prunable(chain).items():
        assert weight.grad is not None
        assert_close(scores[name], (initial[name] * weight.grad).abs(), 1e-9)
        assert (scores[name][~mask[name]] > 0).any()


def test_the_released_force_loss_is_minus_the_mean_logit_of_the_true_class(chain: nn.Module, images: Batches) -> None:
    scores = taken(force.score_true_logit, chain, images[:1], False)
    chain.eval()
    logits = chain(images[0][0])
    (-logits[torch.arange(len(logits)), images[0][1]]).mean().backward()
    for name, weight in masks.prunable(chain).items():
        assert weight.grad is not None
        assert_close(scores[name], (weight * weight.grad).abs(), 1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_prospr_is_the_derivative_through_the_steps(images: Batches, momentum: float, num_batches: int) -> None:
    """Against finite differences: train twice with a mask entry moved a little, and see how the loss moves."""
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    chosen = images[:num_batches]
    found = taken(prospr.score, model, chosen, True, **PROSPR | {"momentum": momentum})

    def loss_after(name: str, index: int, step: float) -> float:
        trained = copy.deepcopy(model)
        parameters = dict(trained.named_parameters())
        with torch.no_grad():
            parameters[name].view(-1)[index] *= 1 + step
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=momentum)
        for i in range(3):
            optimizer.zero_grad()
            x, y = chosen[i % num_batches]
            F.cross_entropy(trained(x), y).backward()
            optimizer.step()
        x, y = chosen[3 % num_batches]
        return F.cross_entropy(trained(x), y).item()

    for name, index in (("conv1.weight", 7), ("conv2.weight", 100), ("fc.weight", 5)):
        numeric = (loss_after(name, index, 1e-5) - loss_after(name, index, -1e-5)) / 2e-5
        assert_close(found[name].view(-1)[index], abs(numeric), 1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_prospr_of_the_authors_code_holds_the_first_momentum_constant(images: Batches, momentum: float) -> None:
    """Against finite differences in which the first step goes along the gradient of the network that was not moved."""
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    settings = PROSPR | {"lr": 0.5, "momentum": momentum}
    found = taken(prospr.score, model, images, True, **settings | {"detach_momentum": True})
    through = taken(prospr.score, model, images, True, **settings)
    first = [p.detach() for p in model.parameters()]
    held = torch.autograd.grad(F.cross_entropy(model(images[0][0]), images[0][1]), list(model.parameters()))

    def loss_after(name: str, index: int, step: float) -> float:
        trained = copy.deepcopy(model)
        with torch.no_grad():
            dict(trained.named_parameters())[name].view(-1)[index] *= 1 + step
        buffers = [g.clone() for g in held]
        for i in range(3):
            x, y = images[i % 2]
            gradients = torch.autograd.grad(F.cross_entropy(trained(x), y), list(trained.parameters()))
            if momentum == 0:
                buffers = list(gradients)
            elif i > 0:
                buffers = [momentum * b + g for b, g in zip(buffers, gradients, strict=True)]
            with torch.no_grad():
                for p, b in zip(trained.parameters(), buffers, strict=True):
                    p -= 0.5 * b
        x, y = images[1]
        return F.cross_entropy(trained(x), y).item()

    for name, index in (("conv1.weight", 7), ("conv2.weight", 100), ("fc.weight", 5)):
        numeric = (loss_after(name, index, 1e-5) - loss_after(name, index, -1e-5)) / 2e-5
        assert_close(found[name].view(-1)[index], abs(numeric), 1e-5)
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), first, strict=True))
    differ = max(float((found[n] - through[n]).abs().max() / through[n].abs().max()) for n in found)
    assert (differ > 0.01) == (momentum > 0)


def test_first_order_prospr_is_the_initial_weight_times_the_gradient_after_the_steps(images: Batches) -> None:
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    found = taken(prospr.score, model, images[:1], True, **PROSPR | {"first_order": True})
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images[0][0]), images[0][1]).backward()
        if _ < 3:
            optimizer.step()
    for name, weight in masks.prunable(model).items():
        assert weight.grad is not None
        assert_close(found[name], (initial[name] * weight.grad).abs(), 1e-9)


# GraSP's variants, Fisher, gradient flow ------------------------------------------------------------------------------


def test_grasp_variants(chain: nn.Module, images: Batches) -> None:
    settings = {"temperature": 200.0, **PLAIN}
    plain = taken(grasp.score, chain, images, True, **settings)
    size = taken(grasp.score, chain, images, True, **settings | {"absolute": True})
    assert all(torch.equal(size[name], plain[name].abs()) for name in plain)
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    order = y.argsort(stable=True)
    halves = [(x[order[:10]], y[order[:10]]), (x[order[10:]], y[order[10:]])]
    by_hand = taken(grasp.score, chain, halves, True, **settings)
    split = taken(grasp.score, chain, images, True, **settings | {"class_halves": True})
    for name in plain:
        assert_close(split[name], by_hand[name], 1e-9)
    redrawn = taken(grasp.score, chain, images, True, **settings | {"redraw_linear": True})
    assert not torch.allclose(redrawn["fc.weight"], plain["fc.weight"])
    noise = torch.randn(chain.fc.weight.shape, generator=Generator().manual_seed(0)).double() * (2 / 12) ** 0.5
    with torch.no_grad():
        chain.fc.weight.copy_(noise)
    for name, values in taken(grasp.score, chain, images, True, **settings).items():
        assert_close(redrawn[name], values, 1e-9)


def test_grasp_draws_as_many_of_every_class_several_times(chain: nn.Module) -> None:
    """Two draws of two images of each of four classes: four chunks of two classes each."""
    generator = Generator().manual_seed(0)
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.tensor([3, 0, 1, 2] * 4)
    of = {label: [i for i in range(16) if y[i] == label] for label in range(4)}
    chunks = [
        [of[a][start], of[a][start + 1], of[b][start], of[b][start + 1]]
        for start in (0, 2) for a, b in ((0, 1), (2, 3))
    ]  # fmt: skip
    settings = {"temperature": 200.0, **PLAIN}
    by_hand = taken(grasp.score, chain, [(x[chunk], y[chunk]) for chunk in chunks], True, **settings)
    drawn_twice = settings | {"class_halves": True, "draws": 2}
    found = taken(grasp.score, chain, [(x[:10], y[:10]), (x[10:], y[10:])], True, **drawn_twice)
    once = taken(grasp.score, chain, [(x, y)], True, **settings | {"class_halves": True})
    for name in found:
        assert_close(found[name], by_hand[name], 1e-9)
        assert not torch.allclose(found[name], once[name])
    with pytest.raises(UserError, match=r"pruner.score.draws=9: of 16 images a half is left without any"):
        taken(grasp.score, chain, [(x, y)], True, **settings | {"class_halves": True, "draws": 9})


def every_weight_times_hessian_gradient(model: nn.Module, images: Batches, temperature: float) -> dict[str, Tensor]:
    """w (Hg) of every parameter from an assembled Hessian, over all parameters, in eval mode."""
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach() for _, p in model.named_parameters()]
    flat = torch.cat([v.flatten() for v in values])
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))

    def loss_at(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [v.numel() for v in values])
        state = {n: part.view(v.shape) for n, part, v in zip(names, parts, values, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)) / temperature, y)

    gradient = torch.autograd.functional.jacobian(loss_at, flat)
    hessian = torch.autograd.functional.hessian(loss_at, flat)
    products = flat * (hessian @ gradient)
    parts = torch.split(products, [v.numel() for v in values])
    return {n: part.view(v.shape) for n, part, v in zip(names, parts, values, strict=True)}


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_gradient_preservation_equals_the_explicit_hessian_over_all_parameters(
    images: Batches, temperature: float
) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)
    model = nn.Sequential(*layers).double().eval()
    expected = every_weight_times_hessian_gradient(model, images, temperature)
    settings = {"temperature": temperature, "absolute": False}
    found = taken(gradient_flow.gradient_preservation, model, images, False, **settings)
    sizes = taken(gradient_flow.gradient_preservation, model, images, False, **settings | {"absolute": True})
    for name in found:
        assert_close(found[name], expected[name], 1e-7)
        assert torch.equal(sizes[name], found[name].abs())


def test_measures_of_loss_preservation(chain: nn.Module, images: Batches) -> None:
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    chain.eval()
    F.cross_entropy(chain(x) / 5, y).backward()
    loss = taken(gradient_flow.loss_preservation, chain, images, False, temperature=5.0, signed=False)
    signed = taken(gradient_flow.loss_preservation, chain, images, False, temperature=5.0, signed=True)
    biased = taken(gradient_flow.score, chain, images, False, temperature=5.0, from_initial=False)
    for name, weight in masks.prunable(chain).items():
        assert weight.grad is not None
        assert_close(signed[name], weight * weight.grad, 1e-9)
        assert_close(loss[name], signed[name].abs(), 1e-12)
        assert_close(biased[name], weight.abs() * loss[name], 1e-12)
        # Over filters the sum of sizes bounds the size of the sum (triangle inequality).
        assert (loss[name].flatten(1).sum(1) >= signed[name].flatten(1).sum(1).abs() - 1e-15).all()


def test_biased_loss_from_the_initialization_weighs_by_the_distance_moved(chain: nn.Module, images: Batches) -> None:
    net = subnetwork(chain)
    with torch.no_grad():
        chain.conv1.weight.add_(0.1)
    with mode(chain, False):
        scores = gradient_flow.score(net, images, F.cross_entropy, Generator(), temperature=1.0, from_initial=True)
        plain = gradient_flow.loss_preservation(
            net, images, F.cross_entropy, Generator(), temperature=1.0, signed=False
        )
    assert not scores["conv2.weight"].any()
    assert_close(scores["conv1.weight"], 0.1 * plain["conv1.weight"], 1e-9)


def test_fisher_is_the_mean_squared_gradient_of_single_images(chain: nn.Module, images: Batches) -> None:
    found = taken(gradient_norm.fisher, chain, images, False, per_example=True, temperature=1.0)
    of_batches = taken(gradient_norm.fisher, chain, images, False, per_example=False, temperature=5.0)
    chain.eval()

    def squares(batches: Batches, temperature: float) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(weight) for name, weight in masks.prunable(chain).items()}
        for x, y in batches:
            chain.zero_grad()
            F.cross_entropy(chain(x) / temperature, y).backward()
            for name, weight in masks.prunable(chain).items():
                sums[name] += weight.grad**2 * len(y) / 20  # a batch counts by its size
        return sums

    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in images for i in range(len(y))]
    for scores, expected in ((found, squares(singles, 1)), (of_batches, squares(images, 5))):
        for name, weight in masks.prunable(chain).items():
            assert_close(scores[name], weight.detach() ** 2 * expected[name], 1e-9)
    with pytest.raises(UserError, match=r"pruner.mode=train: an image by itself has no batch statistics"):
        taken(gradient_norm.fisher, chain, images, True, per_example=True, temperature=1.0)


def test_batch_norm_scores_are_those_of_the_norm_behind_the_filter(chain: nn.Module, images: Batches) -> None:
    with torch.no_grad():
        chain.norm1.weight.uniform_(-1, 1)
        chain.norm1.bias.uniform_(-1, 1)
    scores = taken(gradient_flow.batch_norm, chain, [], False, taylor=False, temperature=5.0)
    # To the last bit: equal scales are equal scores, whatever order a device sums in.
    assert torch.equal(scores["conv1.weight"].amax((1, 2, 3)), chain.norm1.weight.detach().abs())
    taylor = taken(gradient_flow.batch_norm, chain, images, False, taylor=True, temperature=5.0)
    expected = torch.zeros(6, dtype=torch.float64)
    chain.eval()
    for x, y in images:
        chain.zero_grad()
        (F.cross_entropy(chain(x) / 5, y)).backward()
        for p in (chain.norm1.weight, chain.norm1.bias):
            expected += (p.detach() * p.grad) ** 2 * len(y) / 20  # a batch counts by its size
    assert_close(taylor["conv1.weight"].amax((1, 2, 3)), expected, 1e-9)


def test_grasp_of_a_pruned_network_looks_at_the_gradient_that_training_follows(
    chain: nn.Module, images: Batches
) -> None:
    """Moving the kept weights changes the squared norm of their gradient by 2 d'H g, with g on them alone."""
    chain.eval()
    generator = Generator().manual_seed(0)
    mask = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in masks.full(chain).items()}
    net = subnetwork(chain, mask)
    scores = grasp.score(net, images, F.cross_entropy, Generator(), temperature=1.0, **PLAIN)
    weights = {name: (w * mask[name]).detach() for name, w in net.weights.items()}

    def squared_norm(step: float) -> float:
        moved = {name: (1 + step) * w for name, w in weights.items()}
        _, gradients = mean_gradient(net, images, F.cross_entropy, at=moved)
        return sum(float((g[mask[name]] ** 2).sum()) for name, g in gradients.items())

    change = (squared_norm(1e-5) - squared_norm(-1e-5)) / 2e-5
    assert_close(sum(float(s.sum()) for s in scores.values()), change / 2, 1e-6)


# The norm under gradient flow -----------------------------------------------------------------------------------------


def test_derivatives_of_the_norms_under_gradient_flow(images: Batches) -> None:
    """Integrates d theta / dt = -g by RK4 and compares central differences with the measured quantities."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda w: F.cross_entropy(torch.func.functional_call(model, w, (x,)), y))(at)

    def flowed(time: float, steps: int = 4) -> dict[str, Tensor]:
        state, h = start, time / steps
        for _ in range(steps):
            k1 = gradient(state)
            k2 = gradient({n: state[n] - h / 2 * k1[n] for n in state})
            k3 = gradient({n: state[n] - h / 2 * k2[n] for n in state})
            k4 = gradient({n: state[n] - h * k3[n] for n in state})
            state = {n: state[n] - h / 6 * (k1[n] + 2 * k2[n] + 2 * k3[n] + k4[n]) for n in state}
        return state

    def norm(vector: dict[str, Tensor]) -> float:
        return float(sum((v**2).sum() for v in vector.values()))

    h = 1e-4
    before, after = flowed(-h), flowed(h)
    found = signal.gradient_flow(subnetwork(model), images, F.cross_entropy)
    assert_close(found["flow/parameter_norm"] ** 2, norm(start), 1e-12)
    assert_close((norm(after) - norm(before)) / (2 * h), -2 * found["flow/weight_gradient"], 1e-5)
    second = (norm(after) - 2 * norm(start) + norm(before)) / h**2
    assert_close(second, 2 * (found["flow/gradient_norm"] ** 2 + found["flow/weight_hessian_gradient"]), 1e-5)
    of_gradient = (norm(gradient(after)) - norm(gradient(before))) / (2 * h)
    assert_close(of_gradient, -2 * found["flow/gradient_hessian_gradient"], 1e-5)
    losses = [F.cross_entropy(torch.func.functional_call(model, w, (x,)), y).item() for w in (before, after)]
    assert_close((losses[1] - losses[0]) / (2 * h), -(found["flow/gradient_norm"] ** 2), 1e-5)
    assert_close(found["flow/loss"], F.cross_entropy(model(x), y).item(), 1e-9)


def test_filter_norms_before_batch_norm_are_conserved_by_the_flow(chain: nn.Module, images: Batches) -> None:
    """In train mode the output does not depend on a filter's scale, so w g sums to zero over it."""
    signed = taken(gradient_flow.loss_preservation, chain, images[:1], True, temperature=1.0, signed=True)
    for name in ("conv1.weight", "conv2.weight"):
        sums, sizes = signed[name].flatten(1).sum(1).abs(), signed[name].flatten(1).abs().sum(1)
        assert (sums < 1e-3 * sizes).all()


# PHEW and Neural Tangent Transfer -------------------------------------------------------------------------------------

WALKS = {"kernels": False, "batch_size": 16}


@pytest.mark.parametrize("make", [Chain, residual])
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_phew_keeps_weights_on_paths_and_large_ones(make: Callable[[], nn.Module], density: float) -> None:
    torch.manual_seed(0)
    model = make()
    k = round(density * masks.total(masks.full(model)))
    net = dataclasses.replace(subnetwork(model), num_kept=lambda: k)
    scores = phew.score(net, [], F.cross_entropy, Generator().manual_seed(0), **WALKS)
    mask = selection.keep_largest(scores, masks.full(model), k).mask
    reached = paths.effective(model, mask, SHAPE)
    assert masks.kept(mask) == k and masks.kept(reached) >= k - len(mask)  # the last walk may be cut short
    weights = {name: weight.detach().abs() for name, weight in masks.prunable(model).items()}
    for name in ("conv1.weight", "conv2.weight") if make is Chain else ("stages.1.0.conv1.weight",):
        assert weights[name][mask[name]].mean() > weights[name].mean()
    whole = phew.score(net, [], F.cross_entropy, Generator().manual_seed(0), **WALKS | {"kernels": True})
    kept = selection.keep_largest(whole, masks.full(model), k).mask
    partial = sum(int((t.flatten(2).any(2) & ~t.flatten(2).all(2)).sum()) for t in kept.values() if t.ndim == 4)
    assert partial <= 2 * len(kept)


def test_phew_walks_in_proportion_to_the_weights() -> None:
    """Two layers of one input, three hidden units and one output: the units are visited as their weights say."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.2], [-0.3], [0.5]]))
        model[3].weight.fill_(1.0)
    first = torch.zeros(3)
    for seed in range(2000):
        net = dataclasses.replace(subnetwork(model), num_kept=lambda: 1, input_shape=(1, 1, 1))
        settings = WALKS | {"batch_size": 1}
        scores = phew.score(net, [], F.cross_entropy, Generator().manual_seed(seed), **settings)
        first[scores["1.weight"].argmax()] += 1
    assert torch.allclose(first / 2000, torch.tensor([0.2, 0.3, 0.5]), atol=0.04)


TRANSFER = {"steps": 30, "lr": 5e-3, "kernel": "kept", "kernel_weight": 1e-3, "decay": 0.0}


def test_the_tangent_kernel_is_that_of_explicit_jacobians(images: Batches) -> None:
    torch.manual_seed(0)
    model = Chain(norm=False).double().eval()
    net, x = subnetwork(model), images[0][0][:4]
    outputs, kernel = neural_tangent_transfer._outputs_and_kernel(net, x, net.weights)
    rows = []
    for image in x:
        for k in range(4):
            gradients = torch.autograd.grad(model(image[None])[0, k], list(masks.prunable(model).values()))
            rows.append(torch.cat([g.flatten() for g in gradients]))
    jacobian = torch.stack(rows).view(4, 4, -1)
    assert_close(kernel, torch.einsum("akp,blp->akbl", jacobian[:2], jacobian[2:]), 1e-9)
    assert_close(outputs, model(x), 1e-12)


@pytest.mark.parametrize("kernel", ["kept", "all"])
def test_transfer_is_adam_on_explicit_kernels(kernel: str) -> None:
    """Three steps on a masked network with biases against rows of Jacobians; of all positions, biases move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    mask = {n: torch.rand(w.shape) < 0.5 for n, w in masks.full(model).items()}
    weights = list(mask)
    counted = [n for n, _ in model.named_parameters()] if kernel == "all" else weights
    dense, student = copy.deepcopy(model), copy.deepcopy(model)
    net = Subnetwork(copy.deepcopy(model), mask, drawn(model), (3, 2, 2))
    masks.apply_(net.model, mask)
    settings = {"steps": 3, "lr": 0.05, "kernel_weight": 0.5, "decay": 0.01}
    found = neural_tangent_transfer.transfer(
        net, [(x, torch.zeros(6))], F.cross_entropy, Generator(), **settings, kernel=kernel
    )

    def outputs_and_kernel(at: dict[str, Tensor], factor: masks.Mask) -> tuple[Tensor, Tensor]:
        logits, rows = torch.func.functional_call(model, at, (x,)), []
        for value in logits.flatten():
            parts = torch.autograd.grad(value, [at[n] for n in counted], create_graph=True)
            kept = [p * factor[n] if n in factor else p for n, p in zip(counted, parts, strict=True)]
            rows.append(torch.cat([p.flatten() for p in kept]))
        jacobian = torch.stack(rows)
        return logits, jacobian[:9] @ jacobian[9:].T

    density = sum(int(kept.sum()) for kept in mask.values()) / 75
    moving = dict(student.named_parameters())
    optimizer = torch.optim.Adam([moving[n] for n in counted], lr=0.05)
    target, of_dense = outputs_and_kernel(dict(dense.named_parameters()), {})
    for _ in range(3):
        at = {n: p * mask[n] if n in mask else p for n, p in moving.items()}
        logits, own = outputs_and_kernel(at, mask if kernel == "kept" else {})
        size = sum((at[n] ** 2).sum() for n in weights)
        value = ((logits - target) ** 2).sum() / 18 + 0.5 * ((own - of_dense) ** 2).sum() / 81
        optimizer.zero_grad()
        (value + 0.01 / density * size).backward(inputs=[moving[n] for n in counted])
        optimizer.step()
    assert sorted(found) == sorted(counted)
    for name, values in found.items():
        expected = moving[name] * mask[name] if name in mask else moving[name]
        assert_close(values, expected.detach(), 1e-7)
        assert (values - dict(dense.named_parameters())[name]).abs().max() > 0.01


def test_transfer_brings_outputs_and_kernel_closer_to_the_dense_network(images: Batches) -> None:
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    mask = {
        name: torch.rand(w.shape, generator=Generator().manual_seed(1)) < 0.4 for name, w in masks.full(model).items()
    }
    net = subnetwork(model, mask)

    def distances(weights: dict[str, Tensor]) -> tuple[float, float]:
        kernel_of = neural_tangent_transfer._outputs_and_kernel
        dense = kernel_of(net, images[0][0], net.initial)
        sparse = kernel_of(net, images[0][0], {name: w * mask[name] for name, w in weights.items()}, mask)
        return tuple(float((a - b).square().mean()) for a, b in zip(dense, sparse, strict=True))  # type: ignore[return-value]

    with mode(model, False):
        before = distances(net.initial)
        moved = neural_tangent_transfer.transfer(net, images[:1], F.cross_entropy, Generator(), **TRANSFER)
        after = distances(moved)
        heavy = neural_tangent_transfer.transfer(
            net, images[:1], F.cross_entropy, Generator(), **TRANSFER | {"kernel_weight": 1.0}
        )
    assert after[0] < 0.5 * before[0]
    assert distances(heavy)[1] < before[1]
    assert all(not moved[name][~mask[name]].any() for name in mask)
