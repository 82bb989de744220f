"""Masks that move in the loop: zeros, optimizer state, costs, captured steps, and training that is taken up again."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Chain
from emulated_graphs import emulated
from few_images import CPU, RECIPE, half
from few_images import trainer as training_of
from test_captured import Dropped, assert_same, resident
from test_optimizers import METHODS, RATES
from test_rewire_rules import CONSTANT, RULES, config_of
from torch import nn

from pai_bench.core import Mask, TrainingLength, Weights
from pai_bench.data.resident import Resident
from pai_bench.errors import LostWorkerError, UserError
from pai_bench.masks import masks
from pai_bench.rewiring import set as sparse_evolutionary
from pai_bench.rewiring.rewire import RewireProgress
from pai_bench.training.moving_mask import MovingMask
from pai_bench.training.rewires import Rewiring
from pai_bench.training.trainer import Trainer

EPOCHS = 3
EVERY: dict[str, Any] = {"every_steps": 4}


def rewire_of(name: str) -> Rewiring:
    """An option of conf/rewire, with rewires that fit a short training."""
    rewire = config_of(name)
    if rewire.at is not None:
        return replace(rewire, at=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.85])
    return replace(rewire, every_epochs=None, **EVERY)


def weights_of(net: nn.Module) -> Weights:
    return {name: weight.detach().clone() for name, weight in masks.prunable(net).items()}


def start_of(rewire: Rewiring, net: nn.Module) -> Mask:
    return masks.full(net) if rewire.start_sparsity == 0 else half(net)


def training(rewire: Rewiring | None, net: nn.Module, state: Any = None, **settings: Any) -> Trainer:
    """A trainer of 18 steps on 43 images, whose mask moves where a rewire is given."""
    recipe = replace(RECIPE, epochs=EPOCHS, **settings.pop("recipe", {}))
    net = copy.deepcopy(net)
    unmasked = weights_of(net)
    trainer = training_of(net, recipe, resident(CPU), **settings)
    start = start_of(rewire, net) if rewire is not None else half(net)
    if state is not None:
        trainer.load_state(state, start)
    if rewire is None:
        trainer.until(start, 0)
        return trainer
    keep = 200 if rewire.start_sparsity is not None else masks.kept(start)
    steps = trainer.progress.steps_per_epoch
    length = TrainingLength(EPOCHS, steps)
    trainer.move_mask(MovingMask(rewire, start, keep=keep, length=length, seed=0, unmasked=unmasked))
    return trainer


def net_of(kind: Callable[[], nn.Module] = Chain) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def watched(trainer: Trainer, epoch: float = EPOCHS) -> list[tuple[Mask, Mask, dict[str, Any]]]:
    """Trains, and returns of every rewire the masks and copies of the weights and the state after it."""
    found = []
    moving = trainer.moving
    assert moving is not None
    real = moving._move

    def move(step: Any, gradients: Any, clock: int) -> None:
        before = moving.mask
        weights = {name: step.net.get_parameter(name).detach().clone() for name in before}
        state = copy.deepcopy(step.optimizer.state)
        real(step, gradients, clock)
        after = {name: step.net.get_parameter(name).detach().clone() for name in before}
        found.append((before, moving.mask, {"weights": weights, "state": state, "after": after,
                      "state after": copy.deepcopy(step.optimizer.state)}))  # fmt: skip

    moving._move = move  # type: ignore[method-assign]
    trainer.until({}, epoch)
    return found


@pytest.mark.parametrize("method", ["sgd_nesterov", "adamw"])
@pytest.mark.parametrize("name", RULES)
def test_new_weights_start_from_nothing_and_others_go_on(name: str, method: str) -> None:
    rewire = rewire_of(name)
    recipe = {"optimizer": lambda: METHODS[method][0], "lr": RATES[method]}
    trainer = training(rewire, net_of(), recipe=recipe)
    way = watched(trainer)
    assert len(way) > 2
    pruned_at: dict[str, torch.Tensor] = {}
    for before, after, seen in way:
        forgets = rewire.forget == "all" and any((kept & ~before[layer]).any() for layer, kept in after.items())
        if forgets:
            assert not any(state.any() for tensors in seen["state after"].values() for state in tensors.values())
        for layer, kept in after.items():
            new, stayed, gone = kept & ~before[layer], kept & before[layer], ~kept
            weights, was = seen["after"][layer], seen["weights"][layer]
            assert not weights[gone].any() and torch.equal(weights[stayed], was[stayed])
            if rewire.revive == "zero":
                assert not weights[new].any()
            elif new.any():
                assert torch.equal(weights[new], pruned_at[layer][new])
            for key in trainer.network.step.optimizer._method.per_weight:
                state, earlier = seen["state after"][key][layer], seen["state"][key][layer]
                assert not state[new].any() and not state[gone].any()
                assert forgets or torch.equal(state[stayed], earlier[stayed])
            pruned_at[layer] = torch.where(before[layer], was, pruned_at.get(layer, was))
    if name in CONSTANT:
        assert all(masks.counts(before) == masks.counts(after) for before, after, _ in way)
    assert trainer.network.mask is trainer.moving.mask is not None  # type: ignore[union-attr]
    model = trainer.model
    assert not any(model.get_parameter(layer)[~kept].any() for layer, kept in trainer.network.mask.items())


def test_a_weight_of_gradual_pruning_returns_with_its_value() -> None:
    rewire = replace(rewire_of("gradual"), every_steps=1, rule=partial(_toggling, layer="conv2.weight"))
    way = watched(training(rewire, net_of()), 1.0)
    (_, first, seen), (_, second, again) = way[0], way[1]
    returned = second["conv2.weight"] & ~first["conv2.weight"]
    assert returned.any() and again["after"]["conv2.weight"][returned].all()
    assert torch.equal(again["after"]["conv2.weight"][returned], seen["weights"]["conv2.weight"][returned])


def test_the_way_counts_from_the_start_where_the_first_rewire_comes_after_an_interval() -> None:
    seen: dict[Any, list[float]] = {}
    for begin, skip in ((None, False), (None, True), (0.0, False)):
        fractions = seen[begin, skip] = []

        def rule(*given: Any, fractions: list[float] = fractions) -> Mask:
            fractions.append(given[4].fraction)
            mask: Mask = given[3]
            return mask

        rewire = Rewiring(rule, every_steps=6, begin=begin, skip_step=skip)
        training(rewire, net_of()).finish({}, EPOCHS)
    # Of 18 steps 6 and 12 are done; the third time lies after the last step. A cubic has then made a part of its way.
    assert seen[None, False] == [pytest.approx(6 / 18), pytest.approx(12 / 18)]
    assert seen[None, True] == [pytest.approx(6 / 17), pytest.approx(12 / 17)]
    assert seen[0.0, False] == [0, pytest.approx(6 / 17), pytest.approx(12 / 17)]


def test_where_a_rewire_follows_a_step_that_step_is_done() -> None:
    def progress_of(rewire: Rewiring, epochs: int, *clocks: int) -> list[RewireProgress]:
        start, length = start_of(rewire, net_of()), TrainingLength(epochs, 6)
        moving = MovingMask(rewire, start, keep=1, length=length, seed=0, unmasked={})
        return [moving._progress(clock) for clock in clocks]

    itop = replace(config_of("set_itop"), every_steps=6, end=2 / 3)
    (last,) = progress_of(itop, 3, 11)  # of 18 steps 12 are done
    assert last.last and last.fraction == 1 and last.time == pytest.approx(2 / 3)
    every_five = config_of("mest", "rewire.begin=null")
    before, at = progress_of(every_five, 160, 85 * 6 - 1, 90 * 6 - 1)  # its first phase ends with 90 epochs
    assert before.time < 0.5625 == at.time
    ((done,), (begun,)) = (
        progress_of(Rewiring(lambda *_: {}, **when), 10, clock)
        for when, clock in (({"at": [0.5]}, 29), ({"every_steps": 30}, 30))
    )
    assert done.time == begun.time == 0.5


def _toggling(
    weights: Any, gradients: Any, momentum: Any, mask: Mask, progress: Any, generator: Any, *, layer: str
) -> Mask:
    if progress.last:
        keep = torch.zeros(sum(kept.numel() for kept in mask.values()))
        keep[: progress.keep] = 1
        parts = keep.split([kept.numel() for kept in mask.values()])
        return {name: part.view(kept.shape) > 0 for (name, kept), part in zip(mask.items(), parts, strict=True)}
    odd = {name: kept | ~kept for name, kept in mask.items()}
    if progress.number % 2:
        odd[layer] = torch.arange(odd[layer].numel()).view(odd[layer].shape) % 2 == 0
    return odd


def test_a_rewire_of_rigl_takes_the_place_of_a_step_and_one_of_set_comes_after_it() -> None:
    for name, moves in (("rigl", False), ("set", True)):
        rewire = replace(rewire_of(name), every_steps=100)  # the first step alone
        trainer = training(rewire, net_of())
        before = {key: value.clone() for key, value in trainer.model.named_parameters()}
        trainer.until({}, 1 / trainer.progress.steps_per_epoch)
        bias = trainer.model.get_parameter("norm1.weight")
        assert torch.equal(bias, before["norm1.weight"]) != moves
        state = trainer.network.step.optimizer.state["momentum"]["norm1.weight"]
        assert bool(state.any()) == moves
        assert int(trainer.model.norm1.num_batches_tracked) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_set_that_drops_nothing_is_static_training_bit_for_bit(precision: str) -> None:
    rule = partial(sparse_evolutionary.rule, drop_fraction=0.0, last_drop_fraction=0.0, decay="cosine")
    still = replace(rewire_of("set"), rule=rule)
    recipe = {"precision": precision}
    moving, static = training(still, net_of(Dropped), recipe=recipe), training(None, net_of(Dropped), recipe=recipe)
    moving.until({}, EPOCHS)
    static.until(static.network.mask, EPOCHS)
    assert_same(moving, static)
    assert moving.moving is not None and moving.moving.way.num_rewires > 1 and moving.moving.way.churn == 0


def test_the_gradients_are_those_of_all_weights_at_the_masked_ones() -> None:
    seen: dict[str, Any] = {}

    def rule(weights: Any, gradients: Any, momentum: Any, mask: Mask, progress: Any, generator: Any) -> Mask:
        seen.update(weights=weights, gradients=gradients)
        return mask

    trainer = training(Rewiring(rule, every_steps=100, gradients=True), net_of())
    step, mask = trainer.network.step, half(net_of())
    images, labels = next(iter(resident(CPU).train(8, torch.Generator(), torch.Generator())))
    alone = copy.deepcopy(trainer.model).train()
    loss = nn.functional.cross_entropy(alone(images), labels, label_smoothing=RECIPE.label_smoothing)
    loss.backward()
    step.net.train()
    assert trainer.moving is not None
    trainer.moving.step(step, images, labels, 8, 0)
    for name, kept in mask.items():
        torch.testing.assert_close(seen["gradients"][name], alone.get_parameter(name).grad)
        assert not alone.get_parameter(name).detach()[~kept].any() and seen["gradients"][name][~kept].any()


def test_the_mean_of_gradients_is_that_of_every_step() -> None:
    trainer = training(replace(rewire_of("snfs"), momentum=0.75), net_of())
    step = trainer.network.step
    expected = {name: torch.zeros_like(value) for name, value in step.averages.items()}
    real = step.backward

    def backward(*batch: Any) -> None:
        real(*batch)
        for name, mean in expected.items():
            grad = step.net.get_parameter(name).grad
            assert grad is not None
            mean.copy_(0.75 * mean + 0.25 * grad)

    step.backward = backward  # type: ignore[method-assign]
    trainer.until({}, 1)
    for name, mean in expected.items():
        torch.testing.assert_close(step.averages[name], mean)
        assert mean.any()


@pytest.mark.parametrize("name", RULES)
def test_training_that_is_taken_up_between_rewires_ends_as_if_it_had_not_stopped(name: str) -> None:
    rewire = rewire_of(name)
    whole = training(rewire, net_of(Dropped))
    states: list[Any] = []
    broken = training(rewire, net_of(Dropped), checkpoint=lambda ended: states.append(copy.deepcopy(broken.state())))
    for trainer in (whole, broken):
        trainer.finish({}, EPOCHS)
    assert_same(whole, broken)
    assert broken.moving is not None and whole.moving is not None
    for state in states[2::5]:
        later = training(rewire, net_of(Dropped), state)
        later.finish({}, EPOCHS)
        assert_same(later, whole)
        assert later.moving is not None
        assert all(torch.equal(kept, later.moving.mask[layer]) for layer, kept in whole.moving.mask.items())
        assert all(torch.equal(kept, later.moving.explored[layer]) for layer, kept in whole.moving.explored.items())
        assert later.moving.way == whole.moving.way


def test_churn_is_kept_where_an_evaluation_loses_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    rewire = rewire_of("set")
    whole: list[dict[str, float]] = []
    training(rewire, net_of(), record=lambda metrics, epoch: whole.append(metrics)).finish({}, EPOCHS)
    states: list[Any] = []
    lines: list[dict[str, float]] = []

    def record(metrics: dict[str, float], epoch: float) -> None:
        lines.append(metrics)
        if len(lines) == 2:
            monkeypatch.setattr(Resident, "evaluation", lost)

    def lost(*_: Any) -> Any:
        raise LostWorkerError("gone")

    settings: dict[str, Any] = {"record": record, "checkpoint": lambda _: states.append(copy.deepcopy(broken.state()))}
    broken = training(rewire, net_of(), **settings)
    with pytest.raises(LostWorkerError):
        broken.finish({}, EPOCHS)
    monkeypatch.undo()
    broken = training(rewire, net_of(), states[-1], **settings)
    broken.finish({}, EPOCHS)
    timed = "train_images_per_second"
    assert [line | {timed: 0} for line in lines] == [line | {timed: 0} for line in whole]
    assert whole[2]["rewire/churn"] > 0


@pytest.mark.parametrize("name", RULES)
def test_captured_steps_see_the_mask_move(name: str) -> None:
    rewire = rewire_of(name)
    with emulated() as made:
        captured, plain = (training(rewire, net_of(Dropped), capture=capture) for capture in (True, False))
        for trainer in (captured, plain):
            trainer.finish({}, EPOCHS)
    assert captured._steps._captured is not None and plain._steps._captured is None
    assert len(made) <= 3  # a step, and the evaluation of whole batches: no rewire asks for another capture
    assert_same(captured, plain)
    assert captured.moving is not None and plain.moving is not None
    assert all(torch.equal(kept, plain.moving.mask[layer]) for layer, kept in captured.moving.mask.items())


def test_what_is_explored_grows_and_the_curve_says_so() -> None:
    lines: list[dict[str, float]] = []
    trainer = training(rewire_of("set"), net_of(), record=lambda metrics, epoch: lines.append(metrics))
    trainer.finish({}, EPOCHS)
    assert trainer.moving is not None
    epochs = [line for line in lines if "rewire/explored" in line]
    assert len(epochs) == EPOCHS
    density = masks.kept(half(net_of())) / masks.total(half(net_of()))
    explored = [density, *(line["rewire/explored"] for line in epochs)]
    assert explored == sorted(explored) and density < explored[1] <= 1
    assert [line["rewire/density"] for line in epochs] == [pytest.approx(density)] * EPOCHS
    churn = [line["rewire/churn"] for line in epochs]
    assert churn == sorted(churn, reverse=True) and churn[0] > churn[-1] > 0


def test_costs_are_those_of_the_convention() -> None:
    macs = {"conv1.weight": 1000, "conv2.weight": 2000, "fc.weight": 10, "activations": 7}
    dense = sum(macs.values())
    densities = masks.densities(half(net_of()))
    sparse = sum(number * densities.get(name, 1.0) for name, number in macs.items())
    per_step = {"set": 3 * sparse, "snfs": 2 * sparse + dense}
    rare = replace(rewire_of("rigl"), every_steps=6, end=1.0)  # at 3 of 18 steps
    per_step["rigl"] = (3 * sparse * 5 + 2 * sparse + dense) / 6
    for name, expected in per_step.items():
        trainer = training(rare if name == "rigl" else rewire_of(name), net_of())
        trainer.finish({}, EPOCHS)
        assert trainer.moving is not None
        # The layers keep their numbers, so the mean over all steps is exact.
        assert trainer.moving.multiply_adds(macs, trainer.clock) == pytest.approx(expected), name
    trainer = training(rewire_of("acdc"), net_of())
    trainer.finish({}, EPOCHS)
    assert trainer.moving is not None
    assert sparse < trainer.moving.multiply_adds(macs, trainer.clock) < 3 * dense


def test_a_rule_that_misses_the_end_is_told() -> None:
    rewire = Rewiring(lambda *given: given[3], every_steps=4, start_sparsity=0.5, name="mine")
    with pytest.raises(UserError, match=r"rewire=mine: its last mask keeps \d+ weights, not 200"):
        training(rewire, net_of()).finish({}, EPOCHS)
    rewire = Rewiring(lambda *_: {}, every_steps=4, name="mine")
    with pytest.raises(UserError, match="rewire=mine: its rule returns no mask of this network"):
        training(rewire, net_of()).finish({}, EPOCHS)


def test_gradients_that_are_not_finite_end_the_run_with_a_remedy() -> None:
    net = net_of()
    with torch.no_grad():
        net.get_parameter("fc.weight").fill_(3e38)
    with pytest.raises(UserError, match="not finite"):
        training(rewire_of("rigl"), net).until({}, EPOCHS)
