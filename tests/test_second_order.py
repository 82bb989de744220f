"""LAMP and second-order scores, against hand computation and exact derivatives."""

import pytest
import torch
from scored import assert_close, subnetwork, taken
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.core import Batches, Subnetwork
from pai_bench.errors import UserError
from pai_bench.masks import allocation, masks
from pai_bench.pruners import lamp, second_order

BOTH = {"curvature": "hessian", "first_order": "minus", "probes": 1, "temperature": 1.0}


def one_layer(values: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(values.shape[1], values.shape[0], bias=False)).double()
    model[1].weight.data.copy_(values)  # type: ignore[operator, union-attr]
    return model


def test_lamp_of_three_weights() -> None:
    scores = taken(lamp.score, one_layer(torch.tensor([[2.0, -1.0, 3.0]])), [], False)["1.weight"]
    assert_close(scores, torch.tensor([[4 / 13, 1 / 14, 1.0]], dtype=torch.float64), 1e-15)


def test_lamp_collapses_no_layer_and_ranks_within_layers_like_magnitude(chain: nn.Module) -> None:
    scores = taken(lamp.score, chain, [], False)
    for name, weight in masks.prunable(chain).items():
        assert scores[name].max() == 1.0
        order = weight.detach().abs().flatten().argsort(descending=True)
        assert (scores[name].flatten()[order].diff() <= 0).all()
    kept = allocation.global_topk(scores, masks.full(chain), 3, Generator(), min_density=0.0).mask
    assert [int(mask.sum()) for mask in kept.values()] == [1, 1, 1]


def test_lamp_of_equal_and_of_pruned_weights() -> None:
    model = one_layer(torch.tensor([[1.0, 1.0, 0.0, 5.0]]))
    mask = {"1.weight": torch.tensor([[True, True, True, False]])}
    scores = lamp.score(subnetwork(model, mask), [], F.cross_entropy, Generator())["1.weight"]
    assert scores.tolist() == [[1.0, 0.5, 0.0, 0.0]]


class Quadratic(nn.Module):
    """Logits that are linear in the weights, so that a quadratic loss has a constant Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits - F.one_hot(labels, 3)) ** 2).sum(1).mean() / 2


@pytest.fixture
def quadratic() -> tuple[Subnetwork, Batches]:
    torch.manual_seed(0)
    model = Quadratic().double().eval()
    # Orthogonal inputs: the Hessian is diagonal, and one random sign vector gives it exactly.
    images = torch.eye(6, dtype=torch.float64).view(6, 6, 1, 1) * torch.arange(1.0, 7.0).view(6, 1, 1, 1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Subnetwork(model, masks.full(model), weights, (6, 1, 1)), [
        (images[:4], labels[:4]),
        (images[4:], labels[4:]),
    ]


def test_it_is_the_change_of_a_quadratic_loss_when_one_weight_is_removed(quadratic: tuple[Subnetwork, Batches]) -> None:
    net, batches = quadratic
    scores = second_order.score(net, batches, squared, Generator().manual_seed(0), **BOTH)["fc.weight"]  # type: ignore[arg-type]
    joined, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    before = squared(net(joined, net.weights), labels)
    for index in ((0, 0), (1, 3), (2, 5)):
        without = {name: weight.clone() for name, weight in net.weights.items()}
        without["fc.weight"][index] = 0
        assert_close(scores[index], (squared(net(joined, without), labels) - before).abs(), 1e-10)


def test_the_official_sign_is_the_other_one(quadratic: tuple[Subnetwork, Batches]) -> None:
    net, batches = quadratic
    made = {
        first: second_order.score(
            net,
            batches,
            squared,
            Generator().manual_seed(0),
            **BOTH | {"first_order": first},  # type: ignore[arg-type]
        )["fc.weight"]
        for first in ("minus", "plus", "none")
    }
    # With a positive curvature |s - f| + |s + f| = 2 max(|s|, |f|), so the three determine each other.
    first = (made["plus"] ** 2 - made["minus"] ** 2) / (4 * made["none"])
    assert_close((made["none"] - first).abs(), made["minus"], 1e-8)
    assert (made["plus"] != made["minus"]).any() and (made["none"] >= 0).all()


def test_random_signs_come_to_the_diagonal_of_the_hessian(images: Batches) -> None:
    """The estimate has the mean H_ii and the variance sum of H_ij^2 over j != i, divided by the number of probes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    shown, labels = torch.cat([x for x, _ in images])[:, :, :1, :2], torch.cat([y for _, y in images])

    def loss_of(flat: Tensor) -> Tensor:
        hidden = torch.tanh(shown.flatten(1) @ flat[:24].view(4, 6).T)
        return F.cross_entropy(hidden @ flat[24:].view(4, 4).T, labels)

    weights = torch.cat([weight.detach().flatten() for weight in masks.prunable(model).values()])
    hessian = torch.autograd.functional.hessian(loss_of, weights)
    diagonal, others = hessian.diagonal(), (hessian**2).sum(1) - hessian.diagonal() ** 2  # type: ignore[union-attr, operator]
    for probes in (25, 400):
        settings = BOTH | {"first_order": "none", "probes": probes}
        scores = taken(second_order.score, model, [(shown, labels)], False, **settings)
        found = torch.cat([values.flatten() for values in scores.values()]) / (weights**2 / 2)
        errors = (found - diagonal) / (others / probes).sqrt()
        assert errors.abs().max() < 4
        assert 0.7 < errors.square().mean().sqrt() < 1.4


def test_with_the_fisher_information_of_single_images(chain: nn.Module, images: Batches) -> None:
    settings = {"curvature": "fisher", "first_order": "none", "probes": 1, "temperature": 1.0}
    scores = taken(second_order.score, chain, images, False, **settings)
    net = subnetwork(chain.eval())
    total = torch.zeros_like(net.weights["fc.weight"])
    joined, labels = torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])
    for i in range(len(labels)):
        weights = net.masked()
        loss = F.cross_entropy(net(joined[i : i + 1], weights), labels[i : i + 1])
        total += torch.autograd.grad(loss, weights["fc.weight"])[0] ** 2 / len(labels)
    assert_close(scores["fc.weight"], total * net.weights["fc.weight"] ** 2 / 2, 1e-10)
    with pytest.raises(UserError, match=r"pruner.mode=train"):
        taken(second_order.score, chain, images, True, **settings)
