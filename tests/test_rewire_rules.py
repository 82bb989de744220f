"""The rules of conf/rewire: what holds for all of them, and small examples that are computed by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import composed, options
from torch import Generator, Tensor

from pai_bench.core import Mask, TrainingLength, Weights
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.rewiring.drop_and_grow import decayed
from pai_bench.rewiring.rewire import RewireProgress
from pai_bench.training.rewires import Rewiring, rewire_steps

RULES = [name for name in options("rewire") if name != "none"]
CONSTANT = [name for name in RULES if name not in ("gradual", "granet", "acdc", "mest_soft")]
SHAPES = {"conv": (6, 3, 3, 3), "middle": (20, 30), "fc": (4, 10)}
KEEP = 120  # of 802


def config_of(name: str, *more: str) -> Rewiring:
    pruner = "dense" if name in ("gradual", "acdc") else "random"
    return composed(f"pruner={pruner}", f"rewire={name}", "sparsity=0.85", *more).rewire


class Network:
    """Weights, gradients and their mean, drawn anew for every rewire, under a mask that a rule moves."""

    def __init__(self, rewire: Rewiring, steps: list[int], seed: int = 0) -> None:
        self.rewire, self.steps = rewire, steps
        self.generator = Generator().manual_seed(seed)
        start = rewire.start_sparsity
        self.mask = {name: self.noise(shape) > -0.2 if start is None or start > 0 else torch.ones(shape) > 0
                     for name, shape in SHAPES.items()}  # fmt: skip
        self.kept_at_start = dict(zip(self.mask, masks.counts(self.mask), strict=True))
        self.keep = KEEP if start is not None else masks.kept(self.mask)

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def drawn(self) -> tuple[Weights, Weights, Weights]:
        weights, gradients, momentum = ({name: self.noise(shape) for name, shape in SHAPES.items()} for _ in range(3))
        if self.rewire.revive == "zero":
            weights = {name: weight * self.mask[name] for name, weight in weights.items()}
        gradients = gradients if self.rewire.gradients else {}
        return weights, gradients, {} if self.rewire.momentum is None else momentum

    def move(self, number: int) -> tuple[Mask, Mask]:
        """The mask before and after a rewire, which is checked to change no argument."""
        step, first, last = self.steps[number - 1], self.steps[0], self.steps[-1]
        progress = RewireProgress(
            number,
            number == len(self.steps),
            step / 100,
            (step - first) / (last - first),
            self.kept_at_start,
            self.keep,
        )
        given = self.drawn()
        before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in (*given, self.mask)]
        assert self.rewire.rule is not None
        after = [self.rewire.rule(*given, self.mask, progress, Generator().manual_seed(number)) for _ in range(2)]
        for tensors, copies in zip((*given, self.mask), before, strict=True):
            assert all(torch.equal(tensor, copies[name]) for name, tensor in tensors.items())
        assert all(torch.equal(kept, after[1][name]) for name, kept in after[0].items())  # the generator decides
        assert {name: (kept.shape, kept.dtype) for name, kept in after[0].items()} == {
            name: (torch.Size(shape), torch.bool) for name, shape in SHAPES.items()
        }
        was, self.mask = self.mask, after[0]
        return was, self.mask


def moved(name: str) -> list[tuple[Mask, Mask]]:
    """All rewires of an option, in a training of 100 steps."""
    rewire = config_of(name)
    steps = list(range(0, 100, 7)) if rewire.at is None else rewire_steps(rewire, TrainingLength(1, 100))
    network = Network(rewire, steps)
    return [network.move(number) for number in range(1, len(steps) + 1)]


@pytest.mark.parametrize("name", CONSTANT)
def test_every_layer_keeps_its_number_to_the_unit(name: str) -> None:
    for before, after in moved(name):
        assert masks.counts(before) == masks.counts(after)


@pytest.mark.parametrize("name", RULES)
def test_masks_move_and_end_at_the_number_that_is_asked_for(name: str) -> None:
    way = moved(name)
    assert any(not torch.equal(before[layer], after[layer]) for before, after in way for layer in SHAPES)
    start, end = way[0][0], way[-1][1]
    assert masks.kept(end) == (KEEP if config_of(name).reaches_target else masks.kept(start))


@pytest.mark.parametrize("name", RULES)
def test_another_sparsity_at_the_start_is_for_the_rules_that_fall_to_the_target(name: str) -> None:
    words = ["pruner=random", f"rewire={name}", "sparsity=0.85"]
    if name in ("gradual", "granet", "acdc"):
        assert composed(*words, "rewire.start_sparsity=0.5").start_sparsity == 0.5
        return
    refused = rf"^rewire\.start_sparsity=0\.5: rewire={name} ends with as many .* reach sparsity=0\.85; give null, or"
    with pytest.raises(ConfigError, match=refused):
        composed(*words, "rewire.start_sparsity=0.5")
    assert composed(*words, "rewire.start_sparsity=0.85").start_sparsity == 0.85


@pytest.mark.parametrize("name", [name for name in CONSTANT if "itop" not in name])
def test_nothing_is_exchanged_at_the_end(name: str) -> None:
    before, after = moved(name)[-1]
    assert all(torch.equal(before[layer], kept) for layer, kept in after.items())


def test_the_fraction_that_is_dropped_falls_to_the_last() -> None:
    for decay in ("cosine", "linear", "cubic"):
        values = [decayed(0.3, 0.005, decay, at / 10) for at in range(11)]  # type: ignore[arg-type]
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(0.3) and values[-1] == 0.005
    assert decayed(0.3, 0.0, "cosine", 0.5) == pytest.approx(0.15)
    assert decayed(0.3, 0.0, "cosine", 0.25) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))
    assert decayed(0.3, 0.0, "cubic", 0.5) == pytest.approx(0.3 / 8)
    assert decayed(0.3, 0.0, "constant", 1.0) == 0.3


# By hand --------------------------------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([5.0, -4.0, 3.0, -2.0, 0.0, 0.0, 0.0, 0.0])
MASK = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]) > 0


def by_rule(
    name: str,
    *more: str,
    weights: Tensor = WEIGHTS,
    mask: Tensor = MASK,
    gradients: Any = None,
    momentum: Any = None,
    keep: int = 4,
    start: int | None = None,
    **at: Any,
) -> list[int]:
    """The positions that a rule keeps of one layer."""
    rule = config_of(name, *more).rule
    assert rule is not None
    at = {"number": 1, "last": False, "time": 0.0, "fraction": 0.0} | at
    kept_at_start = {"w": int(mask.sum()) if start is None else start}
    progress = RewireProgress(**at, kept_at_start=kept_at_start, keep=keep)
    values = [{} if value is None else {"w": torch.tensor(value)} for value in (gradients, momentum)]
    after = rule({"w": weights}, *values, {"w": mask}, progress, Generator().manual_seed(0))["w"]
    found: list[int] = after.nonzero().flatten().tolist()
    return found


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    # Half of four: 3 and -2 go; of what is not kept, the gradients -9 and 6 are the largest.
    half = "rewire.rule.drop_fraction=0.5"
    assert by_rule("rigl", half, gradients=[0.0, 0, 1, 2, 6, -9, 3, 0]) == [0, 1, 4, 5]
    # The weight that was dropped a moment ago has one of the largest, so it comes back.
    assert by_rule("rigl", half, gradients=[99.0, 99, 1, 7, 6, -9, 3, 0]) == [0, 1, 3, 5]
    assert by_rule("rigl", gradients=[0.0, 0, 1, 2, 6, -9, 3, 0]) == [0, 1, 2, 5]  # 0.3 of four is one
    assert by_rule("rigl", half, gradients=[0.0, 0, 1, 2, 6, -9, 3, 0], fraction=1.0) == [0, 1, 2, 3]


def test_snfs_grows_by_the_mean_of_the_gradients() -> None:
    half = "rewire.rule.drop_fraction=0.5"
    assert by_rule("snfs", half, momentum=[0.0, 0, 1, 2, 6, -9, 3, 0]) == [0, 1, 4, 5]


def test_set_grows_at_random() -> None:
    half = "rewire.rule.drop_fraction=0.5"
    rule = config_of("set", half).rule
    assert rule is not None
    progress = RewireProgress(1, False, 0.0, 0.0, {"w": 4}, 4)
    seen = torch.zeros(8)
    for seed in range(300):
        after = rule({"w": WEIGHTS}, {}, {}, {"w": MASK}, progress, Generator().manual_seed(seed))["w"]
        assert after[:2].all() and int(after.sum()) == 4
        seen += after
    assert all(60 < number < 140 for number in seen[2:])  # two of six grow: 100 of 300


def test_gradual_keeps_the_largest_and_lets_them_return() -> None:
    # -2 is kept and 3 pruned; 3 is larger, so they change places.
    weights, mask = torch.tensor([5.0, -4.0, 3.0, -2.0]), torch.tensor([1, 1, 0, 1]) > 0
    assert by_rule("gradual", weights=weights, mask=mask, keep=3, last=True) == [0, 1, 2]
    # On the way from 4 to 2: at half of it an eighth of the two is left to be pruned, which is none.
    full = torch.ones(4) > 0
    assert by_rule("gradual", weights=weights, mask=full, keep=2, fraction=0.5) == [0, 1]
    assert by_rule("gradual", weights=weights, mask=full, keep=2, fraction=0.2) == [0, 1, 2]  # 2 + 2 * 0.512
    assert by_rule("gradual", weights=weights, mask=full, keep=2, fraction=0.0) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["gradual", "acdc"])
def test_a_rule_prunes_layers_alike_or_the_network(name: str) -> None:
    weights = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([4.0, 3, 2, 1])}
    mask = {name: torch.ones(4) > 0 for name in weights}
    progress = RewireProgress(1, True, 0.0, 1.0, {"a": 4, "b": 4}, 4)
    counts = {}
    for scope in ("layer", "global"):
        rule = config_of(name, f"rewire.rule.scope={scope}").rule
        assert rule is not None
        counts[scope] = masks.counts(rule(weights, {}, {}, mask, progress, Generator()))
    assert counts == {"layer": [2, 2], "global": [4, 0]}


def test_granet_prunes_and_then_exchanges() -> None:
    words = ("rewire.rule.drop_fraction=0.5", "rewire.rule.prune_until=0.5")
    gradients = [0.0, 0, 9, 0, 1, 2, 3, 4]
    # From four to two: 5 and -4 stay. One of the two goes, and the largest gradient of all others comes.
    assert by_rule("granet", *words, gradients=gradients, keep=2, start=4, fraction=0.5) == [0, 2]
    # After the pruning the exchange goes on: of two, ceil(0.005 * 2) = 1.
    again = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0]) > 0
    values = torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 0])
    assert by_rule(
        "granet",
        *words,
        weights=values,
        mask=again,
        gradients=[0.0, 0, 0, 0, 0, 0, 0, 4],
        keep=2,
        start=4,
        fraction=1.0,
    ) == [0, 7]


def test_acdc_compresses_and_decompresses_in_turn() -> None:
    full = torch.ones(8) > 0
    assert by_rule("acdc", mask=full, keep=2, number=1) == [0, 1]
    assert by_rule("acdc", keep=2, number=2) == list(range(8))
    assert by_rule("acdc", mask=full, keep=2, number=3) == [0, 1]
    assert by_rule("acdc", mask=full, keep=2, number=4, last=True) == [0, 1]
    times = rewire_steps(config_of("acdc"), TrainingLength(100, 10))
    assert times[:3] == [99, 149, 199] and times[-2:] == [749, 849] and len(times) % 2 == 1


def test_mest_exchanges_less_in_every_phase() -> None:
    weights = torch.arange(20.0, 0, -1) * (torch.arange(20) < 10)
    mask = torch.arange(20) < 10
    for time, dropped in ((0.0, 2), (0.6, 1), (0.8, 0)):
        found = by_rule("mest", weights=weights, mask=mask, keep=10, time=time)
        assert len(found) == 10 and found[: 10 - dropped] == list(range(10 - dropped))
        surplus = "rewire.rule.surplus=[0.1,0.05,0.0]"  # of the 20 weights of the layer
        found = by_rule("mest_soft", surplus, weights=weights, mask=mask, keep=10, time=time)
        assert found[:10] == list(range(10)) and len(found) == 10 + dropped
    more = torch.arange(20) < 12
    assert by_rule("mest_soft", weights=weights, mask=more, start=10, keep=10, last=True) == list(range(10))
    with pytest.raises(ConfigError, match=r"rewire\.rule\.until=\[0\.5, 0\.4, 1\.0\].*rising order"):
        by_rule("mest", "rewire.rule.until=[0.5,0.4,1.0]")


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_mest_soft_has_the_sparsities_of_the_scripts_of_its_authors(sparsity: float) -> None:
    number = round(1000 * (1 - sparsity))
    mask = torch.arange(1000) < number
    weights = torch.arange(1000.0, 0, -1) * mask
    bounds = {0.9: (0.85, 0.875, 0.9), 0.95: (0.9, 0.925, 0.95)}[sparsity]
    for epoch, bound in zip((0, 90, 120), bounds, strict=True):
        found = by_rule("mest_soft", weights=weights, mask=mask, keep=number, time=epoch / 160)
        assert 1 - len(found) / 1000 == pytest.approx(bound)


@pytest.mark.parametrize(("name", "setting"), [("rigl", "gradients=false"), ("granet", "gradients=false")])
def test_a_rule_says_what_it_lacks(name: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"rewire.{setting}"):
        by_rule(name)
    with pytest.raises(ConfigError, match=r"rewire\.momentum=null"):
        by_rule("snfs")


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every_steps": 10, "end": 0.25}, [0, 10, 20]),
        ({"every_steps": 25, "begin": 0.5}, [50, 75]),
        ({"every_steps": 100}, [0]),
        ({"every_epochs": 2.0, "begin": 0.4}, [40, 60, 80]),
        ({"every_epochs": 0.05}, list(range(100))),  # a step at least: an epoch has ten
        ({"every_steps": 30, "begin": None}, [29, 59, 89]),  # after 30 steps, and so on
        ({"every_steps": 30, "begin": None, "skip_step": True}, [30, 60, 90]),  # in the place of the next one
        ({"every_steps": 50, "begin": None}, [49]),  # after the last step nothing moves
        ({"at": [0.0, 0.1, 0.5, 0.999]}, [0, 9, 49]),  # an epoch has 10 steps: when 1 and 5 epochs are done
        ({"at": [0.1, 0.5], "skip_step": True}, [10, 50]),
    ],
)
def test_at_which_steps_a_mask_moves(settings: dict[str, Any], steps: list[int]) -> None:
    assert rewire_steps(Rewiring(lambda *_: {}, **settings), TrainingLength(10, 10)) == steps


def test_a_training_without_a_rewire_is_refused() -> None:
    rewire = Rewiring(lambda *_: {}, every_steps=1, begin=0.97, end=0.98, name="mine")
    with pytest.raises(ConfigError, match=r"rewire=mine: no step of 10 lies between rewire\.begin=0\.97 and"):
        rewire_steps(rewire, TrainingLength(1, 10))
    with pytest.raises(ConfigError, match=r"rewire=granet: its first rewire comes after 1000 of 230 steps; give a sh"):
        rewire_steps(config_of("granet"), TrainingLength(10, 23))
    with pytest.raises(
        ConfigError, match=r"rewire\.every_steps=100: 2 rewires in 230 steps make no gradual way from rew"
    ):
        rewire_steps(config_of("gradual"), TrainingLength(10, 23))
    with pytest.raises(
        ConfigError, match=r"rewire\.every_epochs=8: 1 rewire in 230 steps make no gradual way from rewi"
    ):
        rewire_steps(replace(config_of("gradual"), every_steps=None, every_epochs=8.0), TrainingLength(10, 23))
    with pytest.raises(ConfigError, match=r"rewire\.at=\[0\.98\]: no time lies before the last step of a tr"):
        rewire_steps(replace(config_of("acdc"), at=[0.98]), TrainingLength(1, 23))
    with pytest.raises(ConfigError, match=r"rewire\.at=\[.*\]: two times are one step of a training of 10 steps"):
        rewire_steps(config_of("acdc"), TrainingLength(1, 10))
