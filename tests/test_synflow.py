"""SynFlow: what is true of it for a reason, in float64, on small networks."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from conftest import Chain, residual
from scored import SHAPE, assert_close, subnetwork, taken
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis.mode import mode
from pai_bench.core import (
    Batches,
)
from pai_bench.errors import UserError
from pai_bench.masks import allocation, masks
from pai_bench.pruners import (
    magnitude,
    snip,
    synflow,
)


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
