"""What the methods of learning a mask do, by hand on small layers, and what a run that is interrupted comes to."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from emulated_graphs import emulated
from processes import in_child
from safetensors.torch import load_file
from test_learned import network, ran, words_of
from test_resume import outcome
from torch import Generator, Tensor, nn

from pai_bench import assembly, learning
from pai_bench.core import TrainingLength, Weights
from pai_bench.errors import ConfigError, PreemptedError
from pai_bench.learned import biprop, gem_miner, initial, iterand
from pai_bench.learned.method import Occasion
from pai_bench.learned.network import LearnedNetwork
from pai_bench.masks import masks
from pai_bench.runs.checkpoints import Checkpoints


def layer(*values: float) -> nn.Module:
    """A linear layer of one output without a bias, with these weights."""
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([values]))
    return model


def with_scores(net: LearnedNetwork, *values: float) -> LearnedNetwork:
    with torch.no_grad():
        net.scores[0].copy_(torch.tensor([values]))
    return net


def occasion(number: int = 1, total: int = 1, fresh: Weights | None = None, seed: int = 0) -> Occasion:
    return Occasion(number, total, lambda: fresh or {}, Generator().manual_seed(seed))


# How it begins --------------------------------------------------------------------------------------------------------


def test_frozen_weights_are_a_signed_constant_or_as_drawn() -> None:
    weight = torch.tensor([[0.3, -2.0, 0.0, 1e-9], [-1.0, 1.0, -1.0, 1.0]])
    size = (2 / 4) ** 0.5
    constant = initial.frozen("signed_constant", False)(weight, 0.25)
    assert torch.allclose(constant, size * torch.tensor([[1.0, -1, 0, 1], [-1, 1, -1, 1]]))
    assert torch.equal(initial.frozen("drawn", False)(weight, 0.25), weight)
    assert torch.allclose(initial.frozen("signed_constant", True)(weight, 0.25), 2 * constant)
    assert torch.allclose(initial.frozen("drawn", True)(weight, 0.25), 2 * weight)


def test_scores_begin_as_torch_draws_weights() -> None:
    weight = torch.empty(50, 4, 3, 3)
    scores = initial.kaiming_uniform(weight, Generator().manual_seed(0))
    assert scores.abs().max() <= 1 / 6 and scores.abs().max() > 0.99 / 6 and abs(scores.mean()) < 0.01
    assert initial.unit_uniform(weight, Generator().manual_seed(0)).min() >= 0


# biprop ---------------------------------------------------------------------------------------------------------------


def test_binary_weights_have_the_mean_size_of_those_kept() -> None:
    net = with_scores(network("biprop", layer(0.5, -2.0, 4.0, -8.0), {"0.weight": 2}), -0.9, 0.1, 0.8, 0.2)
    assert net.mask()["0.weight"].tolist() == [[True, False, True, False]]
    alpha = (0.5 + 4.0) / 2
    assert net.effective()["0.weight"].tolist() == [[alpha, 0.0, alpha, 0.0]]
    images = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    net(images).sum().backward()
    # The gradient of an applied weight is its input. A score gets it times the weight, not the binary one.
    signs = torch.tensor([[-1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(net.scores[0].grad, signs * images * torch.tensor([[0.5, -2.0, 4.0, -8.0]]))


def test_a_layer_with_nothing_kept_has_no_binary_weights() -> None:
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert torch.equal(biprop.binary(torch.ones(2, 2), nothing), torch.zeros(2, 2))


# IteRand --------------------------------------------------------------------------------------------------------------


def test_iterand_draws_weights_outside_the_mask_again() -> None:
    method = iterand.iterand(weights="drawn", scale_fan=False, every_steps=3, probability=0.25, scores="signed")
    assert method.event is not None
    assert list(method.event.steps(TrainingLength(2, 5))) == [3, 6, 9]
    assert list(method.event.steps(TrainingLength(2, 6))) == [3, 6, 9], "not after the last step"
    before = torch.linspace(1, 2, 4000)
    model = layer(*before.tolist())
    net = LearnedNetwork(model, method, {"0.weight": 1000}, Generator().manual_seed(0), affine="none")
    kept, fresh = net.mask()["0.weight"], {"0.weight": torch.full((1, 4000), -3.0)}
    method.event.happen_(net, occasion(fresh=fresh, seed=1))
    after = model[0].weight.detach()
    assert torch.equal(after[kept], before[None][kept]), "what is chosen stays"
    moved = after[~kept] == -3.0
    assert torch.equal(after[~kept][~moved], before[None][~kept][~moved])
    assert 600 < int(moved.sum()) < 900, "a quarter of 3,000"
    once = after.clone()
    method.event.happen_(net, occasion(fresh=fresh, seed=1))
    assert torch.equal(once, model[0].weight), "the same again, as when an interrupted run goes on"
    method.event.happen_(net, occasion(fresh=fresh, seed=2))
    assert not torch.equal(once, model[0].weight)


def test_iterand_ranks_signed_scores_or_their_magnitudes() -> None:
    kept = {}
    for scores in ("signed", "magnitude"):
        method = iterand.iterand(weights="drawn", scale_fan=False, every_steps=3, probability=0.1, scores=scores)
        first = method.draw(torch.empty(100, 600), Generator().manual_seed(0))
        bound = (6 / 600) ** 0.5 if scores == "signed" else 600**-0.5
        assert 0.99 * bound < float(first.abs().max()) <= bound and abs(float(first.mean())) < bound / 50
        net = LearnedNetwork(layer(1.0, 2, 3, 4), method, {"0.weight": 2}, Generator().manual_seed(0), affine="none")
        with torch.no_grad():
            net.scores[0].copy_(torch.tensor([[-3.0, 2.0, 1.0, -0.5]]))
        kept[scores] = net.mask()["0.weight"].flatten().tolist()
    assert kept == {"signed": [False, True, True, False], "magnitude": [True, True, False, False]}


@pytest.mark.parametrize("scheme", ["kaiming_normal_fan_in", "xavier_normal"])
def test_a_run_draws_again_by_the_law_of_its_network(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [f"model.init.conv={scheme}", "model.widths=[20,20]", "search.method.probability=1"]
    cfg = composed(*words_of("iterand", *more))
    parts = assembly.assembled(cfg, torch.device("cpu"))
    net = learning.learned_network(parts)
    before = {name: weight.clone() for name, weight in net.weights.items()}
    happened: list[int] = []

    class Learner:
        """A trainer that trains nothing."""

        num_epochs = 2
        progress = type("Progress", (), {"steps_per_epoch": 6})()

        def until(self, mask: Any, epoch: float) -> None:
            happened.append(round(epoch * 6))

        finish = until

    learning._train_scores(parts, net, Learner())  # type: ignore[arg-type]
    assert happened == [2, 4, 6, 8, 10, 12] and int(net.num_events) == 5
    name = next(name for name in before if before[name].ndim == 4 and before[name].numel() > 2000)
    outside = ~net.mask()[name]
    assert not (net.weights[name] == before[name])[outside].any()
    assert torch.equal(net.weights[name][~outside], before[name][~outside])
    assert float(net.weights[name][outside].std() / before[name].std()) == pytest.approx(1, abs=0.1)
    again = {name: weight.clone() for name, weight in net.weights.items()}
    learning._train_scores(parts, net, Learner())  # type: ignore[arg-type]
    assert all(torch.equal(weight, again[name]) for name, weight in net.weights.items()), "each happens once"


# Gem-Miner ------------------------------------------------------------------------------------------------------------


def test_gem_miner_freezes_by_a_geometric_schedule() -> None:
    assert [gem_miner.num_left(10_000, 100, number, 4) for number in range(5)] == [10_000, 3162, 1000, 316, 100]
    method = gem_miner.gem_miner(weights="drawn", scale_fan=False, freeze_every_epochs=5)
    assert method.event is not None
    for epochs, times in [(6, [35]), (10, [35]), (11, [35, 70]), (150, [35 * n for n in range(1, 30)])]:
        assert list(method.event.steps(TrainingLength(epochs, 7))) == times
    with pytest.raises(ConfigError, match=r"freeze_every_epochs=5: the search ends with epoch 5, so no weight would"):
        method.event.steps(TrainingLength(5, 7))


def test_gem_miner_keeps_what_lies_above_the_threshold_and_is_not_frozen_out() -> None:
    net = network("gem_miner", layer(1, 1, 1, 1, 1, 1), 2)
    with_scores(net, 0.1, 0.6, 0.7, 0.3, 0.9, 0.5)
    assert net.mask()["0.weight"].tolist() == [[False, True, True, False, True, False]]
    assert net.method.event is not None
    net.method.event.happen_(net, occasion(1, 2))  # 6 * (2 / 6) ** (1 / 2) = 3.46
    assert net.candidates["0.weight"].tolist() == [[False, True, True, False, True, False]]
    with_scores(net, 1.0, 0.6, 0.7, 1.0, 0.2, 0.5)
    assert net.mask()["0.weight"].tolist() == [[False, True, True, False, False, False]]
    net(torch.ones(1, 6)).sum().backward()
    assert (net.scores[0].grad != 0).tolist() == [[False, True, True, False, True, False]]
    net.method.event.happen_(net, occasion(2, 2))
    assert masks.kept(net.candidates) == 2


@pytest.mark.parametrize(
    ("scores", "left", "kept"),
    [
        ([0.1, 0.6, 0.7, 0.3, 0.9, 0.5], 6, [2, 4]),  # three lie above the threshold
        ([0.1, 0.2, 0.3, 0.4, 0.6, 0.5], 6, [4, 5]),  # one does
        ([0.9, 0.8, 0.7, 0.6, 0.2, 0.1], 1, [0, 1]),  # one is not frozen out: the next highest score returns
    ],
)
def test_gem_miner_ends_with_the_exact_number(scores: list[float], left: int, kept: list[int]) -> None:
    net = with_scores(network("gem_miner", layer(1, 1, 1, 1, 1, 1), 2), *scores)
    for name, stays in net.candidates.items():
        stays.copy_(torch.arange(6)[None] < left if name else stays)
    mask = net.final().mask
    assert mask["0.weight"].nonzero()[:, 1].tolist() == kept
    net.settle_(mask)
    assert torch.equal(net.mask()["0.weight"], mask["0.weight"]) and not net.settle_(mask)


def test_gem_miner_puts_scores_back_between_their_limits() -> None:
    net = with_scores(network("gem_miner", layer(1, 1, 1), 2), -0.5, 0.25, 1.5)
    images = torch.ones(1, 3)
    net.eval()(images)
    assert net.scores[0].tolist() == [[-0.5, 0.25, 1.5]], "an evaluation changes nothing"
    net.train()(images)
    assert net.scores[0].tolist() == [[0.0, 0.25, 1.0]]


# Frozen, and interrupted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edge_popup", "biprop", "gem_miner", "iterand"])
def test_training_scores_leaves_the_weights_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets: list[tuple[LearnedNetwork, dict[str, Tensor]]] = []
    real = learning.learned_network

    def noted(parts: assembly.Parts) -> LearnedNetwork:
        net = real(parts)
        nets.append((net, {key: value.clone() for key, value in net.state_dict().items()}))
        return net

    monkeypatch.setattr(learning, "learned_network", noted)
    ran(name, tmp_path, "training.epochs=0", "search.method.probability=0" if name == "iterand" else "seed=0")
    ((net, before),) = nets
    after = net.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    parameters = {key for key, _ in net.model.named_parameters(prefix="model")}
    assert not changed & parameters
    assert {f"scores.{number}" for number in range(len(net.names))} <= changed


@pytest.mark.parametrize("name", ["biprop", "gem_miner", "iterand"])
def test_captured_steps_learn_what_plain_steps_learn(name: str, tmp_path: Path) -> None:
    _, plain = ran(name, tmp_path / "plain", "training.epochs=0")
    with emulated() as made:
        _, captured = ran(name, tmp_path / "captured", "training.epochs=0")
    assert made, "the step is captured"
    for file in ("scores", "model", "mask"):
        expected = load_file(plain / f"{file}.safetensors")
        for key, found in load_file(captured / f"{file}.safetensors").items():
            torch.testing.assert_close(found, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["iterand", "gem_miner"])
def test_a_search_that_is_interrupted_at_every_turn_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    words = ["save_model=true", "training.batch_size=300", "checkpoint_minutes=0"]
    assert os.waitpid(in_child(lambda: ran(name, tmp_path / "whole", *words)), 0)[1] == 0

    def attempt() -> None:
        real, offers = Checkpoints.offer, 0

        def offer(self: Checkpoints, epoch_ended: bool = False) -> None:
            nonlocal offers
            real(self, epoch_ended)
            offers += 1
            if offers == 7:
                raise PreemptedError("here")

        Checkpoints.offer = offer  # type: ignore[method-assign]
        ran(name, tmp_path / "parts", *words)

    attempts = 1
    while (status := os.waitpid(in_child(attempt), 0)[1]) != 0:
        assert os.WEXITSTATUS(status) == 75
        attempts += 1
        assert attempts < 20
    assert attempts > 2
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    for key, value in whole.items():
        if key in ("mask", "scores", "model"):
            assert all(torch.equal(parts[key][name], tensor) for name, tensor in value.items()), key
        else:
            assert parts[key] == value, key
