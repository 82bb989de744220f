"""The smaller network without dead channels computes and learns the same."""

import copy

import pytest
import torch
from conftest import pruned_as
from test_filters import NETWORKS, SHAPE, model_of, pruned_of, unsettled
from torch import nn
from torch.nn import functional as F

from pai_bench.analysis import cost
from pai_bench.analysis.mode import mode
from pai_bench.masks import masks
from pai_bench.training import compact_model

# Chains, where nothing is summed: all that is masked can go.
EXACT = ["vgg11", "vgg11 with hidden linear layers", "mobilenet", "conv-relu-norm, flattened"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_smaller_network_gives_the_same_outputs(name: str, rounds: int) -> None:
    model = unsettled(NETWORKS[name]()).double()
    pruned = pruned_of(model, 0.6, rounds)
    assert masks.kept(pruned.units) == round(0.4 * masks.total(pruned.units))
    before = copy.deepcopy(model.state_dict())
    small = compact_model.compact(model, pruned.mask_with_coupled, SHAPE).model
    images = torch.randn(3, *SHAPE, dtype=torch.float64)
    with mode(model, False), mode(small, False), torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert sizes[0] < (0.5 if name in EXACT else 0.95) * sizes[1]
    # Where nothing is summed, what is left is dense: the mask said all there was to remove.
    if name in EXACT:
        assert sum((p != 0).sum() for p in masks.prunable(small).values()) == masks.kept(pruned.mask)
        assert masks.total(masks.prunable(small)) == masks.kept(pruned.mask)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_its_dead_channels_a_network_computes_and_learns_the_same(name: str) -> None:
    model = unsettled(NETWORKS[name]()).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it would draw other numbers for fewer units
    mask = pruned_as(model, SHAPE, "pruner=synflow", "schedule.rounds=8", "sparsity=0.99").mask
    state = copy.deepcopy(model.state_dict())
    compact = compact_model.compact(model, mask, SHAPE)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    full, small = (sum(cost.multiply_adds(m, SHAPE).values()) for m in (model, compact.model))
    assert small < (0.95 if "densenet" in name or "efficientnet" in name else 0.7) * full
    images, labels = torch.randn(6, *SHAPE, dtype=torch.float64), torch.arange(6)
    # With batch statistics of constant channels a DenseNet turns a change of 1e-15 in the image into one of 1e-6.
    for training in (False,) if "densenet" in name else (True, False):
        for network in (model, compact.model):
            network.train(training)
            network.zero_grad()
            F.cross_entropy(network(images), labels).backward()
        theirs, ours = dict(model.named_parameters()), dict(compact.model.named_parameters())
        assert theirs.keys() == ours.keys()
        scale = 1e-10 * max(float(parameter.grad.abs().max()) for parameter in theirs.values())
        for key, parameter in ours.items():
            expected = compact.gather(key, theirs[key].grad)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=scale)
        # What is gone has no gradient: only weight decay moves it.
        for key, places in compact.gone(mask).items():
            assert not theirs[key].grad.flatten()[places].any()
        for key, buffer in compact.model.named_buffers():
            torch.testing.assert_close(buffer, compact.gather(key, dict(model.named_buffers())[key]))


def test_channels_can_be_left_in_eights() -> None:
    model = model_of("vgg11").double()
    mask = pruned_as(model, SHAPE, "pruner=synflow", "schedule.rounds=8", "sparsity=0.99").mask
    compact, exact = compact_model.compact(model, mask, SHAPE, multiple=8), compact_model.compact(model, mask, SHAPE)
    images = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(compact.model(images), model(images), rtol=1e-9, atol=1e-9)
    widths = [[w.shape[0] for w in masks.prunable(c.model).values()][:-1] for c in (compact, exact)]
    assert all(eights % 8 == 0 and 0 <= eights - least < 8 for eights, least in zip(*widths, strict=True))


def test_entries_of_the_smaller_network_go_back_to_their_places() -> None:
    model = model_of("vgg11").to(memory_format=torch.channels_last)
    mask = pruned_as(model, SHAPE, "pruner=synflow", "schedule.rounds=8", "sparsity=0.99").mask
    compact = compact_model.compact(model, mask, SHAPE)
    assert compact.places
    before = copy.deepcopy(model.state_dict())
    for name, tensor in compact.model.state_dict().items():
        compact.scatter_(name, tensor, model.state_dict()[name])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, tensor in compact.model.state_dict().items():
        compact.scatter_(name, torch.full_like(tensor, 7), model.state_dict()[name])
    for name, value in model.state_dict().items():
        kept = compact.gather(name, value)
        assert (kept == 7).all() and (value == 7).sum() == kept.numel()
