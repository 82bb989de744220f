"""SNIP, FORCE, ProsPr and the simple baselines, against explicit derivatives."""

import copy
import dataclasses

import pytest
import torch
from conftest import Chain, composed
from scored import assert_close, subnetwork, taken
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis.gradients import mean_gradient
from pai_bench.analysis.mode import mode
from pai_bench.core import (
    Batches,
)
from pai_bench.masks import masks
from pai_bench.pruners import (
    force,
    magnitude,
    prospr,
    snip,
)
from pai_bench.pruners import random as random_pruner


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


def test_magnitude_is_the_absolute_weight(chain: nn.Module) -> None:
    scores = taken(magnitude.score, chain, [], False)
    assert all(torch.equal(scores[name], weight.abs()) for name, weight in masks.prunable(chain).items())


def test_random_depends_on_the_generator_alone(chain: nn.Module) -> None:
    net = subnetwork(chain)
    a, b, other = (random_pruner.score(net, [], F.cross_entropy, Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], other[name]) for name in a)


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


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "px"])
def test_a_grouped_convolution_scores_as_a_dense_one_whose_other_blocks_are_pruned(name: str, images: Batches) -> None:
    def of_groups(groups: int) -> nn.Sequential:
        layers = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=groups, bias=False), nn.ReLU()
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 4, bias=False)).double().eval()

    torch.manual_seed(0)
    grouped, dense = of_groups(2), of_groups(1)
    mask = masks.full(dense)
    mask["2.weight"][:3, 2:], mask["2.weight"][3:, :2] = False, False
    with torch.no_grad():
        for layer in (0, 5):
            dense[layer].weight.copy_(grouped[layer].weight)
        dense[2].weight[mask["2.weight"]] = grouped[2].weight.flatten()
    score = composed(f"pruner={name}", "sparsity=0.5").pruner.score
    assert score is not None
    found = score(subnetwork(grouped), images, F.cross_entropy, Generator())
    expected = score(subnetwork(dense, mask), images, F.cross_entropy, Generator())
    for layer in ("0.weight", "5.weight"):
        assert_close(found[layer], expected[layer], 1e-9)
    assert_close(found["2.weight"].flatten(), expected["2.weight"][mask["2.weight"]], 1e-9)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.third = nn.Linear(4, 4, bias=False)
        if tied:
            self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.third(self.second(self.first(x.flatten(1)).relu()).relu())
        return logits


def test_a_weight_of_two_layers_has_the_sum_of_what_it_does_in_both(images: Batches) -> None:
    torch.manual_seed(0)
    tied, apart = Tied(True).double().eval(), Tied(False).double().eval()
    apart.load_state_dict(tied.state_dict())
    weights, gradients = mean_gradient(subnetwork(apart), images, F.cross_entropy)
    both = gradients["second.weight"] + gradients["third.weight"]
    found = taken(snip.score, tied, images, False)
    assert "third.weight" not in found
    assert_close(found["second.weight"], (weights["second.weight"] * both).abs(), 1e-9)
    synflow = composed("pruner=synflow", "sparsity=0.5").pruner.score
    assert synflow is not None
    of_tied, of_both = (synflow(subnetwork(net), [], F.cross_entropy, Generator()) for net in (tied, apart))
    assert_close(of_tied["second.weight"], of_both["second.weight"] + of_both["third.weight"], 1e-9)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_norm_of_a_pruned_filter_stays_as_it_is_through_the_steps_of_prospr(
    images: Batches, first_order: bool
) -> None:
    """As if the filter were not there. Its readers are kept, as behind a sum, so its shift has a gradient."""

    def of_filters(number: int) -> nn.Sequential:
        layers = nn.Conv2d(3, number, 3, bias=False), nn.BatchNorm2d(number), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(number, 4)).double().train()

    torch.manual_seed(0)
    model, without = of_filters(3), of_filters(2)
    gone = torch.tensor([True, False, False])
    coupled = {"1.weight": ~gone, "1.bias": ~gone}
    mask = masks.full(model)
    mask["0.weight"][gone] = False
    masks.apply_(model, mask | coupled)
    state, settings = model.state_dict(), PROSPR | {"first_order": first_order}
    of_channels = {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    smaller = {name: value[~gone] if name in of_channels else value for name, value in state.items()}
    without.load_state_dict(smaller | {"4.weight": state["4.weight"][:, ~gone]})
    net = dataclasses.replace(subnetwork(model, mask), coupled=coupled)
    found = prospr.score(net, images, F.cross_entropy, Generator(), **settings)
    expected = taken(prospr.score, without, images, True, **settings)
    assert_close(found["0.weight"][~gone], expected["0.weight"], 1e-9)
    assert_close(found["4.weight"][:, ~gone], expected["4.weight"], 1e-9)
