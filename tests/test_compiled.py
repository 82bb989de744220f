"""Networks behind torch.compile: their steps and evaluations are those of plain ones, captured or not."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import Chain
from emulated_graphs import emulated
from few_images import CPU, RECIPE, half
from few_images import trainer as training_of
from test_captured import resident
from torch import nn

from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.training.compiled import Compiled


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """torch.compile without the machine code, which takes a minute to make. Lists the shapes that it compiles for."""
    shapes = []
    make = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        shapes.append(next(value.shape for value in inputs if value.shape[1:] == (3, 12, 12)))
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda net, **settings: make(net, backend=backend, **settings))
    return shapes


@pytest.mark.parametrize("graphs_there", [False, True])
def test_compiled_steps_and_evaluations_equal_plain_ones(
    compiler: list[torch.Size], graphs_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pai_bench.training.recording._EVALUATION_BATCH", 5)
    torch.manual_seed(0)
    net = Chain()
    with emulated() if graphs_there else nullcontext():
        one, other = (
            training_of(copy.deepcopy(net), RECIPE, resident(CPU), compile_model=compiled) for compiled in (True, False)
        )
        for training in (one, other):
            training.until(half(net), 2)
    for (name, value), plain in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.allclose(one.state()["sums"], other.state()["sums"])
    # The network, once for steps and once for evaluations. Smaller last batches are not compiled for.
    assert {shape[0] for shape in compiler} == {5, 8}
    assert graphs_there or len(compiler) == 2


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_every_network_of_a_family_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the code of their forward pass, and by default torch compiles one code eight times at most."""
    num_graphs, make = 0, torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda net, **settings: make(net, backend=backend, **settings))
    for depth in range(1, 13):
        Compiled(Deep(depth))(torch.zeros(2, 4))
        assert num_graphs == depth


def test_a_network_that_cannot_be_compiled_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler\nand a long story")

    make = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **settings: make(net, backend=backend, **settings))
    training = training_of(Chain(), RECIPE, resident(CPU), compile_model=True)
    with pytest.raises(
        ConfigError, match=r"^compile=true: torch.compile fails here \(.*no compiler\); use compile=false$"
    ):
        training.until(masks.full(training.model), 1)
