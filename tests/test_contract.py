"""What holds for every pruner, whatever its method: a yaml in conf/pruner is under test by existing."""

import copy

import pytest
import torch
from conftest import composed, options
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench import allocation, experiment, masks, measures
from pai_bench.core import Batches, Pruner, Scores, Subnetwork

PRUNERS = options("pruner")
SCORED = [name for name in PRUNERS if name != "dense"]


def pruner_of(name: str) -> Pruner:
    return experiment._pruner(composed(f"pruner={name}", "sparsity=0.5")["pruner"])


def take(name: str, model: nn.Module, batches: Batches, mask: masks.Mask | None = None, seed: int = 0) -> Scores:
    pruner = pruner_of(name)
    initial = {key: weight.detach().clone() for key, weight in masks.prunable(model).items()}
    net = Subnetwork(model, masks.full(model) if mask is None else mask, initial, (3, 8, 8))
    with measures.mode(model, pruner.mode == "train"):
        assert pruner.score is not None
        return pruner.score(net, batches, F.cross_entropy, Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PRUNERS)
def test_pruner_composes_and_names_itself(name: str) -> None:
    cfg = composed(f"pruner={name}", "sparsity=0.5")
    assert cfg["pruner"]["name"] == name
    assert (name == "dense") == (cfg["pruner"]["score"] is None)


@pytest.mark.parametrize("name", SCORED)
def test_scores_cover_the_prunable_weights(name: str, net: nn.Module, batches: Batches) -> None:
    scores = take(name, net, batches)
    weights = masks.prunable(net)
    assert list(scores) == list(weights)
    for key, values in scores.items():
        assert values.shape == weights[key].shape
        assert values.is_floating_point() and not values.requires_grad
        assert values.isfinite().all()
    assert any(values.any() for values in scores.values())


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_a_function_of_their_arguments(name: str, net: nn.Module, batches: Batches) -> None:
    first, second = take(name, net, batches), take(name, net, batches)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SCORED)
def test_scoring_leaves_no_trace(name: str, net: nn.Module, batches: Batches) -> None:
    net.conv2.requires_grad_(False) if hasattr(net, "conv2") else None
    net.train()
    next(net.modules()).training = True
    norm = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    norm.eval()
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    wants = [parameter.requires_grad for parameter in net.parameters()]
    random = torch.get_rng_state()
    take(name, net, batches)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == wants
    assert [key for key, parameter in net.named_parameters() if parameter.grad is not None] == ["fc.weight"]
    assert torch.equal(net.fc.weight.grad, torch.ones_like(net.fc.weight))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", SCORED)
def test_a_pruned_weight_stays_pruned(name: str, net: nn.Module, batches: Batches) -> None:
    mask = masks.full(net)
    for sparsity in (0.3, 0.6, 0.8):
        before = mask
        mask = allocation.global_topk(take(name, net, batches, mask), mask, sparsity, Generator())
        masks.apply_(net, mask)
        assert masks.kept(mask) == masks.num_kept(sparsity, masks.total(mask))
        assert not any((mask[key] & ~before[key]).any() for key in mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("allocate", options("allocation"))
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_every_allocation_keeps_exactly_k(allocate: str, sparsity: float, tied: bool, net: nn.Module) -> None:
    function = experiment._function(composed(f"allocation={allocate}")["allocation"])
    generator = Generator().manual_seed(0)
    candidates = masks.full(net)
    scores = {
        key: torch.ones(mask.shape) if tied else torch.rand(mask.shape, generator=generator)
        for key, mask in candidates.items()
    }
    mask = function(scores, candidates, sparsity, generator)
    assert list(mask) == list(candidates)
    assert all(mask[key].dtype == torch.bool and mask[key].shape == candidates[key].shape for key in mask)
    assert masks.kept(mask) == round(round(1 - sparsity, 12) * masks.total(mask))
