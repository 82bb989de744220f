"""PHEW and Neural Tangent Transfer: what is true of them for a reason."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import Chain, composed, drawn, pruned_as, residual
from scored import SHAPE, assert_close, subnetwork
from test_filters import Flattened
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis import paths, walk
from pai_bench.analysis.mode import mode
from pai_bench.core import (
    Batches,
    Subnetwork,
)
from pai_bench.errors import ConfigError
from pai_bench.masks import masks, selection
from pai_bench.pruners import (
    neural_tangent_transfer,
    phew,
)

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


def test_phew_starts_at_every_unit_of_every_first_layer() -> None:
    """Two branches read the image. With an even number of inputs, each saw only every second of them."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x).relu() + self.b(x).relu())

    torch.manual_seed(0)
    net = dataclasses.replace(subnetwork(Branches()), input_shape=(8,), num_kept=lambda: 140)
    scores = phew.score(net, [], F.cross_entropy, Generator().manual_seed(0), **WALKS)
    assert all((scores[name] > 1).any(0).all() for name in ("a.weight", "b.weight"))


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


def test_phew_walks_past_no_convolution_of_a_block() -> None:
    """One walk forward and one backward take a weight of every layer, but for the two branches of a projection."""
    model = composed("model=resnet20").model((3, 32, 32), 10)
    for seed in range(3):
        net = dataclasses.replace(subnetwork(model), num_kept=lambda: 1, input_shape=(3, 32, 32))
        settings = WALKS | {"batch_size": 1}
        scores = phew.score(net, [], F.cross_entropy, Generator().manual_seed(seed), **settings)
        taken = {name: int((values > 1).sum()) for name, values in scores.items()}
        alone = [name for name in taken if not name.startswith(("stages.1.0.", "stages.2.0."))]
        assert len(alone) == 16 and all(taken[name] in (1, 2) for name in alone)  # two, or twice the same
        for stage in (1, 2):  # each walk takes the shortcut, or both convolutions
            first, second, shortcut = (
                taken[f"stages.{stage}.0.{part}.weight"] for part in ("conv1", "conv2", "shortcut.0")
            )
            assert (first > 0) == (second > 0) and 1 <= shortcut + max(first, second) <= 2


def test_phew_walks_in_both_directions_although_one_would_do() -> None:
    """Of one turn of many walks: a walk forward starts at the first inputs, a walk backward at any input it meets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 30, bias=False), nn.ReLU(), nn.Linear(30, 5, bias=False))
    net = dataclasses.replace(subnetwork(model), num_kept=lambda: 60, input_shape=(1, 20, 20))
    scores = phew.score(net, [], F.cross_entropy, Generator().manual_seed(0), kernels=False, batch_size=100)
    mask = selection.keep_largest(scores, masks.full(model), 60).mask
    inputs = mask["1.weight"].any(0).nonzero().flatten()
    forward = int((inputs < 100).sum())
    assert len(inputs) > 25 and 0.35 < forward / len(inputs) < 0.85 and inputs.max() > 200


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


def test_phew_walks_through_frozen_layers() -> None:
    torch.manual_seed(0)
    model = Chain()
    plain = pruned_as(copy.deepcopy(model), SHAPE, "pruner=phew", "sparsity=0.8")
    model.conv1.requires_grad_(False)
    frozen = pruned_as(model, SHAPE, "pruner=phew", "sparsity=0.8")
    assert all(torch.equal(kept, frozen.mask[name]) for name, kept in plain.mask.items())


def test_phew_refuses_a_flattened_map_with_its_channels_apart() -> None:
    model = Flattened((0, 2, 3, 1), gated=False)
    with pytest.raises(ConfigError, match="the channels of conv2 do not lie next to each other in fc"):
        walk.steps(model, (3, 32, 32))
    assert walk.steps(Flattened((0, 1, 2, 3), gated=False), (3, 32, 32))
