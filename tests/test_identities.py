"""The mathematics of the methods: statements that are true for a reason, in float64, on small networks."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import Chain, residual
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench import allocation, masks, measures
from pai_bench.core import Batches, Scores, Subnetwork
from pai_bench.errors import UserError
from pai_bench.gradients import hessian_gradient, mean_gradient
from pai_bench.pruners import grasp, magnitude, snip, synflow
from pai_bench.pruners import random as random_pruner

SHAPE = (3, 8, 8)


def subnetwork(model: nn.Module, mask: masks.Mask | None = None) -> Subnetwork:
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    return Subnetwork(model, masks.full(model) if mask is None else mask, initial, SHAPE)


def taken(
    score: Callable[..., Scores], model: nn.Module, batches: Batches, training: bool, **settings: object
) -> Scores:
    with measures.mode(model, training):
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
    import copy

    positive = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in [*positive.parameters(), *positive.buffers()]:
            if tensor.is_floating_point():
                tensor.abs_()
        return float(positive(torch.ones((1, *SHAPE), dtype=torch.float64)).sum())


def test_synflow_every_layer_of_a_chain_has_the_same_sum(chain: nn.Module) -> None:
    scores = taken(synflow.score, chain, [], False, dtype="float64")
    for values in scores.values():
        assert (values >= 0).all()
        assert_close(values.sum(), flow(chain), 1e-12)


def test_synflow_is_conserved_through_every_channel(chain: nn.Module) -> None:
    scores = taken(synflow.score, chain, [], False, dtype="float64")
    assert_close(scores["conv1.weight"].sum((1, 2, 3)), scores["conv2.weight"].sum((0, 2, 3)), 1e-12)
    assert_close(scores["conv2.weight"].sum((1, 2, 3)), scores["fc.weight"].sum(0), 1e-12)


def test_synflow_branches_of_a_residual_block_add_up() -> None:
    torch.manual_seed(0)
    model = residual().double()
    scores = {name: values.sum() for name, values in taken(synflow.score, model, [], False, dtype="float64").items()}
    assert_close(scores["stages.1.0.conv1.weight"], scores["stages.1.0.conv2.weight"], 1e-12)
    assert_close(scores["stages.1.0.conv2.weight"] + scores["stages.1.0.shortcut.0.weight"], flow(model), 1e-12)
    assert scores["stages.0.0.conv1.weight"] < flow(model)  # the rest goes through the identity
    for name in ("conv.weight", "fc.weight"):
        assert_close(scores[name], flow(model), 1e-12)


def test_synflow_ignores_signs_and_data(chain: nn.Module, images: Batches) -> None:
    before = taken(synflow.score, chain, images, False, dtype="float64")
    with torch.no_grad():
        for weight in masks.prunable(chain).values():
            weight.mul_(torch.randint(0, 2, weight.shape) * 2 - 1)
    after = taken(synflow.score, chain, [], False, dtype="float64")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_synflow_scaling_one_layer_scales_all_scores(chain: nn.Module) -> None:
    before = taken(synflow.score, chain, [], False, dtype="float64")
    with torch.no_grad():
        chain.conv2.weight.mul_(3)
    after = taken(synflow.score, chain, [], False, dtype="float64")
    for name in before:
        assert_close(after[name], 3 * before[name], 1e-12)


def test_synflow_pruned_weights_score_zero(chain: nn.Module) -> None:
    generator = Generator().manual_seed(0)
    mask = {name: torch.rand(tensor.shape, generator=generator) < 0.5 for name, tensor in masks.full(chain).items()}
    net = subnetwork(chain, mask)
    with measures.mode(chain, False):
        scores = synflow.score(net, [], F.cross_entropy, generator, dtype="float64")
    assert all((scores[name][~mask[name]] == 0).all() for name in mask)
    assert all((scores[name][mask[name]] > 0).any() for name in mask)


def test_synflow_equals_autograd_on_a_rewritten_network(chain: nn.Module) -> None:
    """Against a second computation: the model itself rewritten to absolute values, backward through .grad."""
    import copy

    positive = copy.deepcopy(chain).eval()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    positive(torch.ones((1, *SHAPE), dtype=torch.float64)).sum().backward()
    scores = taken(synflow.score, chain, [], False, dtype="float64")
    for name, parameter in masks.prunable(positive).items():
        assert parameter.grad is not None
        assert_close(scores[name], parameter * parameter.grad, 1e-12)


def test_synflow_in_float32_equals_the_published_loop() -> None:
    """Masks multiply the weights, absolute values everywhere, all in float32: as the authors' code does it."""
    import copy

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
        with measures.mode(model, False):
            scores = synflow.score(subnetwork(model, ours), [], F.cross_entropy, Generator(), dtype="float32")
        assert all(torch.equal(scores[name], reference[name]) for name in scores)
        k = round(density ** (i / rounds) * masks.total(mask))
        together = torch.cat([values.flatten() for values in reference.values()])
        threshold = torch.kthvalue(together, len(together) - k).values
        mask = {name: values > threshold for name, values in reference.items()}
        ours = allocation.global_topk(scores, ours, 1 - k / masks.total(ours), Generator())
        assert all(torch.equal(ours[name], mask[name]) for name in ours)


def test_synflow_says_when_it_overflows(chain: nn.Module) -> None:
    with torch.no_grad():
        for weight in masks.prunable(chain).values():
            weight.mul_(1e15)
    with pytest.raises(UserError, match=r"SynFlow overflows float32 on this model; set pruner.score.dtype=float64"):
        taken(synflow.score, chain, [], False, dtype="float32")
    scores = taken(synflow.score, chain, [], False, dtype="float64")
    assert_close(scores["fc.weight"].sum(), flow(chain), 1e-12)


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
    with measures.mode(chain, True):
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
    scores = grasp.score(subnetwork(model), images, F.cross_entropy, Generator(), temperature=temperature)
    for name in expected:
        scale = expected[name].abs().max()
        assert_close(products[name] / scale, expected[name] / scale, 1e-9)
        assert_close(scores[name], weights[name] * products[name], 0)


def test_grasp_high_scores_are_those_whose_removal_shrinks_the_gradient(images: Batches) -> None:
    """The first-order change of |g|^2 when weight q is scaled by 1 - h is -2 h w_q (Hg)_q: the sign, by differences."""
    torch.manual_seed(0)
    model = Small().double().eval()
    images = [(x, y % 3) for x, y in images]
    scores = grasp.score(subnetwork(model), images, F.cross_entropy, Generator(), temperature=1.0)
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
    with measures.mode(chain, True):
        net = subnetwork(chain)
        _, gradients = mean_gradient(net, images[:1], F.cross_entropy, temperature=2.0)
        scores = grasp.score(net, images[:1], F.cross_entropy, Generator(), temperature=2.0)
    for name in ("conv1.weight", "conv2.weight"):
        assert_close(scores[name].sum(), -(gradients[name] ** 2).sum(), 1e-8)


def test_grasp_temperature_is_more_than_a_scale(chain: nn.Module, images: Batches) -> None:
    cold, hot = (taken(grasp.score, chain, images, True, temperature=t) for t in (1.0, 200.0))
    together = torch.stack([torch.cat([s.flatten() for s in scores.values()]) for scores in (cold, hot)])
    assert torch.corrcoef(together)[0, 1] < 0.999


def test_second_derivatives_exist_for_attention() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=4)
    images = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    net = Subnetwork(model, masks.full(model), {}, (3, 32, 32))
    scores = grasp.score(net, images, F.cross_entropy, Generator(), temperature=200.0)
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
        "synflow": taken(synflow.score, model, [], False, dtype="float64"),
        "snip": taken(snip.score, model, images, False),
        "magnitude": taken(magnitude.score, model, [], False),
    }
    with torch.no_grad():
        model.conv1.weight[2] *= 4
        model.conv2.weight[:, 2] /= 4
    for name in before["snip"]:
        assert_close(taken(synflow.score, model, [], False, dtype="float64")[name], before["synflow"][name], 1e-12)
        assert_close(taken(snip.score, model, images, False)[name], before["snip"][name], 1e-9)
    assert not torch.equal(
        taken(magnitude.score, model, [], False)["conv1.weight"], before["magnitude"]["conv1.weight"]
    )
    assert math.isfinite(flow(model))
