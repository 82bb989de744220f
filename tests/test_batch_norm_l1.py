"""The L1 penalty on the scales of batch norms: the gradient of a term of the loss, however steps are taken."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import test_captured
import test_compact
import torch
from conftest import Chain, composed
from few_images import RECIPE
from few_images import trainer as training_of
from test_captured import graphs_on
from test_compact import with_dead_channels
from test_optimizers import METHODS, RATES, half
from torch import nn

from pai_bench.errors import ConfigError
from pai_bench.learned.settings import recipe_of
from pai_bench.system import devices
from pai_bench.training import objectives
from pai_bench.training.optimizer import Optimizer
from pai_bench.training.trainer import Trainer

__all__ = ["graphs_on"]  # a fixture

L1 = 0.05
SCALES = ("norm1.weight", "norm2.weight")


def of(name: str, l1: float = L1) -> dict[str, Any]:
    return {"optimizer": lambda: METHODS[name][0], "lr": RATES[name], "batch_norm_l1": l1}


def trained(name: str, l1: float, prepare: Any = lambda model: None) -> Trainer:
    torch.manual_seed(0)
    model = Chain(bias=True)
    trainer = training_of(model, replace(RECIPE, **of(name, l1)))
    prepare(model)
    mask = half(model) | {"norm1.weight": torch.arange(6) > 1}  # of pruned filters
    trainer.until(mask, 2)
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_as_the_penalty_in_the_loss_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_setting, without = trained(name, L1), trained(name, 0.0)
    plain = objectives.loss

    def penalise(model: nn.Module) -> None:
        def loss(*arguments: Any, **settings: Any) -> Any:
            penalty = sum(model.get_parameter(scale).abs().sum() for scale in SCALES)
            return plain(*arguments, **settings) + L1 * penalty

        monkeypatch.setattr(objectives, "loss", loss)

    in_loss = trained(name, 0.0, penalise)
    for key, value in in_loss.model.state_dict().items():
        assert torch.equal(of_setting.model.state_dict()[key], value), key
    scales = [sum(one.model.get_parameter(s).detach().abs().sum() for s in SCALES) for one in (of_setting, without)]
    assert scales[0] < scales[1]


def test_a_step_moves_scales_by_the_sign_alone_and_leaves_zeros() -> None:
    net = nn.BatchNorm1d(3)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([0.5, -0.25, 0.0]))
    optimizer = Optimizer(
        METHODS["sgd without momentum"][0], [(dict(net.named_parameters()), 0.0)], lr=0.5, l1=0.25, penalised=["weight"]
    )
    net.weight.grad, net.bias.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert net.weight.tolist() == [0.375, -0.125, 0.0] and not net.bias.any()


@pytest.mark.parametrize("method", ["sgd_nesterov", "adamw"])
def test_captured_steps_have_the_penalty(method: str, graphs_on: torch.device) -> None:
    devices.prepare(graphs_on, "float32")
    torch.manual_seed(0)
    net = Chain()
    with devices.reproducible(graphs_on):
        captured, plain = (
            test_captured.trained(net, graphs_on, capture=capture, recipe=of(method)) for capture in (True, False)
        )
        without = test_captured.trained(net, graphs_on, recipe=of(method, 0.0))
    assert captured._steps._captured is not None
    test_captured.assert_same(captured, plain)
    assert not torch.equal(without.model.norm1.weight, plain.model.norm1.weight)


@pytest.mark.parametrize("method", ["sgd_nesterov", "adamw"])
def test_scales_of_dead_channels_shrink_in_a_compact_network_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})
    model, mask = with_dead_channels()
    whole, small = (
        test_compact.trained(copy.deepcopy(model), mask, compact, 3, recipe=of(method)) for compact in (False, True)
    )
    assert small.trained is not small.model
    test_compact.assert_same(whole, small, mask)
    dead = small.model.norm1.weight[:3]  # nothing reads these channels, so nothing but penalty and decay moves them
    without = test_compact.trained(copy.deepcopy(model), mask, True, 3, recipe=of(method, 0.0))
    assert (dead < without.model.norm1.weight[:3]).all()


def test_a_network_without_batch_norm_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_norm_l1=0\.05: the network has no batch norm with a scale"):
        training_of(Chain(norm=False), replace(RECIPE, batch_norm_l1=L1))


def test_a_search_that_learns_its_mask_has_no_penalty_on_what_it_trains() -> None:
    run = composed("search=edge_popup", "sparsity=0.5", "training.batch_norm_l1=1e-4")
    assert run.search is not None and run.training.batch_norm_l1 == 1e-4
    assert recipe_of(run.search, run.training).batch_norm_l1 == 0
