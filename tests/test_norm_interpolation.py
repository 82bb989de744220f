"""Norms that are moved while a batch passes: gradients are those of the function, and all ways of training agree."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_captured
import test_compact
import torch
from conftest import Chain, composed, residual
from emulated_graphs import emulated
from few_images import CPU, RECIPE, FewImages, half, trainer
from safetensors.torch import load_file
from test_captured import graphs_on
from torch import Generator, nn
from torch.nn import functional as F
from whole_runs import TINY, directory_of

from pai_bench import experiment
from pai_bench.errors import ConfigError, PreemptedError
from pai_bench.masks import masks
from pai_bench.runs.directory import RunDirectory
from pai_bench.system import devices, preemption
from pai_bench.training.norms import NormInterpolation, shares
from pai_bench.training.step import Execution, Step

__all__ = ["graphs_on"]  # a fixture

MOVED: Any = {"norm_interpolation": "uniform"}


class Normed(nn.Module):
    """Layer norm, group norm and a norm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.group, self.plain, self.layer = nn.GroupNorm(2, 6), nn.BatchNorm2d(6, affine=False), nn.LayerNorm(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.plain(self.group(self.conv(x)))).mean((2, 3))
        logits: torch.Tensor = self.fc(self.layer(x))
        return logits


@pytest.mark.parametrize("build", [Chain, residual, Normed])
def test_gradients_are_those_of_the_function_with_moved_norms(build: Any) -> None:
    torch.manual_seed(0)
    net, share = build().double(), 0.375
    norms = [name for name, m in net.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))]
    named = {name: p for name, p in net.named_parameters() if name.rpartition(".")[0] in norms}
    with torch.no_grad():
        for parameter in named.values():
            parameter.uniform_(-1, 2)
    images, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    moved = {n: (1 - share) * p + (share if n.endswith("weight") else 0.0) for n, p in named.items()}
    net.train()
    F.cross_entropy(torch.func.functional_call(net, moved, (images,)), labels).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    before = copy.deepcopy(dict(net.named_parameters()))
    interpolation = NormInterpolation(net, CPU)
    interpolation.share.fill_(share)
    with interpolation.during_pass():
        F.cross_entropy(net(images), labels).backward()
    assert len(named) >= 4
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_network_without_norms_is_refused() -> None:
    with pytest.raises(ConfigError, match="norm_interpolation=uniform: the network has no norm with a scale"):
        Step(Chain(norm=False), replace(RECIPE, **MOVED), Execution(CPU, False, False))


def test_norms_that_are_not_moved_train_as_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Chain()
    monkeypatch.setattr("pai_bench.training.norms.shares", lambda number, generator: [0.0] * number)
    one, other = (trainer(copy.deepcopy(net), replace(RECIPE, norm_interpolation=v)) for v in (None, "uniform"))
    for training in (one, other):
        training.until(half(net), 2)
    test_captured.assert_same(one, other)


def test_every_step_has_its_own_share() -> None:
    seen: list[float] = []
    torch.manual_seed(0)
    training = trainer(Chain(), replace(RECIPE, **MOVED))
    step = training.network.step
    assert step.norms is not None
    inner, norms = step.update, step.norms

    def update() -> None:
        seen.append(float(norms.share))
        inner()

    step.update = update  # type: ignore[method-assign]
    training.until(masks.full(training.model), 2)
    assert len(set(seen)) == 10 and all(0 <= share < 1 for share in seen)
    assert torch.tensor(shares(4000, Generator().manual_seed(0))).mean() == pytest.approx(0.5, abs=0.02)


def test_captured_steps_train_as_single_ones(graphs_on: torch.device) -> None:
    torch.manual_seed(0)
    net = Chain()
    with devices.reproducible(graphs_on):
        pair = [test_captured.trained(net, graphs_on, capture=capture, recipe=MOVED) for capture in (True, False)]
        plain = test_captured.trained(net, graphs_on)
    assert pair[0]._steps._captured is not None and pair[1]._steps._captured is None
    test_captured.assert_same(*pair)
    assert not torch.equal(plain.model.fc.weight, pair[0].model.fc.weight)


def test_captured_steps_on_batches_train_as_single_ones() -> None:
    torch.manual_seed(0)
    net = Chain()
    with emulated():
        pair = [trainer(copy.deepcopy(net), replace(RECIPE, **MOVED), capture=capture) for capture in (True, False)]
        for training in pair:
            training.until(half(net), 2)
    assert pair[0]._steps._on_batch is not None and pair[1]._steps._on_batch is None
    test_captured.assert_same(*pair)


def test_a_compact_network_trains_as_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})
    model, mask = test_compact.with_dead_channels()
    whole, small = (test_compact.trained(model, mask, compact, 3, recipe=dict(MOVED)) for compact in (False, True))
    assert small.trained is not small.model
    test_compact.assert_same(whole, small, mask)


def test_training_that_is_taken_up_in_the_middle_of_an_epoch_is_the_same() -> None:
    torch.manual_seed(0)
    net, recipe = Chain(), replace(RECIPE, **MOVED)
    whole = trainer(copy.deepcopy(net), recipe)
    whole.until(half(net), 2)
    saved: dict[str, Any] = {}

    class StoppedError(Exception): ...

    def checkpoint(epoch_ended: bool) -> None:
        if first.clock == 7:
            saved.update(copy.deepcopy(first.state()))
            raise StoppedError

    first = trainer(copy.deepcopy(net), recipe, checkpoint=checkpoint)
    with pytest.raises(StoppedError):
        first.until(half(net), 2)
    second = trainer(copy.deepcopy(net), recipe, FewImages())
    second.load_state(saved, half(net))
    second.until(half(net), 2)
    test_captured.assert_same(whole, second)


def test_a_run_that_searches_transfers_and_is_interrupted_ends_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(results: Path) -> Any:
        search = ["pruner=magnitude", "sparsity=0.6", "schedule=lr_rewind", "schedule.levels=1", "cache_gb=0"]
        moved = ["training.norm_interpolation=uniform", "transfer=fan_in", "checkpoint_minutes=0"]
        return composed(*TINY, *search, *moved, f"results_dir={results}")

    experiment.run(config(tmp_path / "whole"))
    record = RunDirectory.record
    for stop in (1, 3):  # while the search trains, and while the ticket does
        with monkeypatch.context() as patched:

            def interrupted(self: RunDirectory, metrics: dict[str, float], epoch: float, stop: int = stop) -> None:
                record(self, metrics, epoch)
                if epoch == stop:
                    patched.setattr(preemption, "_received", ["SIGTERM"])

            patched.setattr(RunDirectory, "record", interrupted)
            with pytest.raises(PreemptedError):
                experiment.run(config(tmp_path / "parts"))
        monkeypatch.setattr(preemption, "_received", [])
    experiment.run(config(tmp_path / "parts"))
    one, other = directory_of(tmp_path / "whole"), directory_of(tmp_path / "parts")
    assert json.loads((other / "status.json").read_text())["attempt"] == 3
    weights = [load_file(path / "model.safetensors") for path in (one, other)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    rows = [json.loads((path / "result.json").read_text()) for path in (one, other)]
    for key in ("test_loss", "train_loss", "transfer_overlap", "sign_agreement", "train_examples"):
        assert rows[0][key] == rows[1][key] is not None, key
    assert (one / "mask.json").read_text() == (other / "mask.json").read_text()


def test_names_of_runs_know_it_only_where_it_is_asked_for() -> None:
    plain = composed("pruner=magnitude", "sparsity=0.5")
    assert composed("pruner=magnitude", "sparsity=0.5", "training.norm_interpolation=null").id == plain.id
    moved = composed("pruner=magnitude", "sparsity=0.5", "training.norm_interpolation=uniform")
    assert moved.id != plain.id and moved.method == plain.method and moved.chain != plain.chain
    with pytest.raises(ConfigError, match=r"training\.norm_interpolation=true"):
        composed("training.norm_interpolation=true")
