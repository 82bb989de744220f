"""Scores that look at images, on a GPU: what their rounds repeat as CUDA graphs, here emulated on a CPU too."""

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Chain, composed, drawn, options, pruned_as, residual
from emulated_graphs import emulated
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis.cost import CountFlops
from pai_bench.batches import Drawn
from pai_bench.core import Batches, Mask, Round, Watch
from pai_bench.masks import masks
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.rounds import prune
from pai_bench.system import counters, graphs

SHAPE = (3, 8, 8)
SIZES = (4, 4, 3)  # of the batches: the last is another
ROUNDS = ("schedule=exponential", "schedule.rounds=3")
# They go through the gradients of analysis/gradients.py, or are recorded whole.
REPEATED = [
    name
    for name in options("pruner")
    if composed(f"pruner={name}", "sparsity=0.5").pruner.scoring_data is not None
    and not name.startswith(("px", "ntt", "npb"))
]
PROBED = ["taylor2", "taylor2_official", "optimal_brain_damage"]  # with the diagonal of the Hessian
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def images(
    examples: Any, generator: Generator, dtype: torch.dtype, device: str = "cpu", sizes: Sequence[int] = SIZES
) -> Batches:
    """New batches in each round, whose images are made when they are asked for."""
    number = int(torch.randint(1 << 20, (), generator=generator))

    def made(batch: int) -> Tensor:
        noise = torch.randn(sizes[batch], *SHAPE, generator=Generator().manual_seed(number + batch))
        return noise.to(device, dtype)

    return Drawn(made, [(torch.arange(size) % 4).to(device) for size in sizes])


def found(model: nn.Module, *words: str, device: str = "cpu", sizes: Sequence[int] = SIZES) -> Pruned:
    """The search of a config on a copy of a model."""
    where = copy.deepcopy(model).to(device)
    rounds = () if "schedule=one_shot" in words else ROUNDS
    return pruned_as(where, SHAPE, "sparsity=0.8", *rounds, *words, draw=partial(images, device=device, sizes=sizes))


def same(one: Pruned, other: Pruned) -> None:
    assert one.scores is not None and other.scores is not None
    assert list(one.mask) == list(other.mask) and list(one.scores) == list(other.scores)
    assert all(torch.equal(kept, other.mask[name]) for name, kept in one.mask.items())
    assert all(torch.equal(values, other.scores[name]) for name, values in one.scores.items())
    assert (one.sparsities, one.num_tied, one.flops) == (other.sparsities, other.num_tied, other.flops)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Chain(bias=True)


@pytest.fixture(autouse=True)
def pays_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_PAYS", 2)


@pytest.mark.parametrize("name", REPEATED)
def test_a_captured_search_finds_the_scores_and_the_mask_of_a_plain_one(name: str, model: nn.Module) -> None:
    probes = ["pruner.score.probes=2"] if name in PROBED else []
    words = [f"pruner={name}", *probes]
    plain = found(model, *words)
    with emulated() as made:
        captured = found(model, *words)
    assert made
    same(captured, plain)


@gpu
@pytest.mark.parametrize("name", REPEATED)
def test_a_captured_search_on_a_gpu(name: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, made = graphs.recorded, []
    monkeypatch.setattr(graphs, "recorded", lambda *of, **how: made.append(recorded(*of, **how)) or made[-1])
    captured = found(model, f"pruner={name}", device="cuda")
    assert made
    monkeypatch.setattr(graphs, "supported", lambda device: False)
    same(captured, found(model, f"pruner={name}", device="cuda"))


@pytest.mark.parametrize("words", [("pruner=force",), ("pruner=snip", "pruner.mode=eval_after_pass")], ids=str)
def test_a_network_with_branches(words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    branched = residual()
    plain = found(branched, *words)
    with emulated() as made:
        captured = found(branched, *words)
    assert made
    same(captured, plain)


@pytest.mark.parametrize("name", ["grasp", "filter_gradient_preservation", "iter_snip"])
def test_one_batch_in_each_round(name: str, model: nn.Module) -> None:
    """Then the product with the Hessian needs the masks of the round."""
    words = (f"pruner={name}", "schedule.rounds=6")
    plain = found(model, *words, sizes=[12])
    with emulated() as made:
        captured = found(model, *words, sizes=[12])
    assert len(made) == 1
    same(captured, plain)


class Moves:
    """Training that moves all weights and statistics of a model in place."""

    epoch = age_epochs = 0.0

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def until(self, mask: Mask, epoch: float, watch: Watch | None = None) -> None:
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                tensor.mul_(1.25) if tensor.is_floating_point() else tensor.add_(1)
        masks.apply_(self.model, mask)

    def rewind(self, mask: Mask, epoch: float, weights: bool) -> None:
        raise AssertionError


def test_weights_that_are_trained_between_the_rounds(model: nn.Module) -> None:
    def moved(emulate: bool) -> Pruned:
        copied = copy.deepcopy(model)
        cfg = composed("pruner=fisher_taylor2", "sparsity=0.8")
        rounds = [Round(0.1 * number, until_epoch=float(number)) for number in range(1, 6)]
        with emulated() if emulate else nullcontext([]) as made:
            pruned = prune(
                copied, cfg.pruner, cfg.allocation, rounds,
                initial=drawn(copied), input_shape=SHAPE, draw=images, loss=F.cross_entropy, seed=0,
                training=Moves(copied),
            )  # fmt: skip
        assert bool(made) == emulate
        return pruned

    same(moved(True), moved(False))


class Drops(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Peeks(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if float(x.detach().sum()) > 0 else 2)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Drops, "random numbers are drawn"), (Peeks, "operation not permitted")], ids=str
)
def test_what_cannot_be_captured_is_launched_one_by_one(
    kind: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    torch.manual_seed(0)
    network = kind()
    plain = found(network, "pruner=iter_snip")
    with emulated() as made:
        captured = found(network, "pruner=iter_snip")
    same(captured, plain)
    lines = [line for line in caplog.messages if "one by one" in line]
    assert not made and len(lines) == 1
    assert lines[0].startswith(f"the kernels of the scores are launched one by one: they cannot be captured ({reason}")


def test_one_round_is_recorded_where_it_repeats_a_pass(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fisher in one shot is a pass for each image. Its operations are counted, whoever does them."""
    monkeypatch.setattr(graphs, "_PAYS", 8)
    for words, number in (
        (("pruner=fisher", "schedule=one_shot"), 1),  # 11 images
        (("pruner=snip", "schedule=one_shot"), 0),  # two batches of one size and a smaller one
        (("pruner=prospr_first_order", "schedule.rounds=8"), 0),
        (("pruner=prospr_first_order", "schedule.rounds=9"), 1),
    ):
        plain = found(model, *words)
        with emulated() as made:
            same(found(model, *words), plain)
        assert len(made) == number, words


@pytest.mark.parametrize("words", [("pruner=fisher", "schedule=one_shot"), ("pruner=px_squared", "schedule.rounds=3")])
def test_whoever_counts_beside_a_round_counts_what_runs_from_a_record(
    words: tuple[str, ...], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the cache of scores does, and a condition."""
    monkeypatch.setattr(graphs, "_PAYS", 8)
    counted = []
    for capture in (False, True):
        with emulated() if capture else nullcontext(), CountFlops() as counter:
            pruned = found(model, *words)
        counted.append((counter.flops, pruned.flops))
    assert counted[0] == counted[1] and counted[0][0] >= counted[0][1] > 0
    assert not counters.active


def test_a_record_holds_for_what_it_was_made_of(model: nn.Module) -> None:
    """Not for another setting, another mode, other shapes, or a model that has moved in memory."""
    repeater = graphs.Repeater(torch.device("cpu"), model)
    repeater.begin(100)
    calls = []

    def scaled(factor: float, tensors: list[Tensor]) -> list[Tensor]:
        calls.append(factor)
        return [tensor * factor * model.fc.bias.detach()[0] for tensor in tensors]

    def check(factor: float, *shape: int) -> bool:
        """Whether the function was called and not a record of it."""
        number, tensor = len(calls), torch.rand(shape)
        (result,) = repeater(partial(scaled, factor), 1, [tensor])
        assert torch.equal(result, tensor * factor * model.fc.bias.detach()[0])
        return len(calls) > number

    with emulated() as made:
        assert check(2.0, 3) and check(2.0, 3) and not check(2.0, 3) and len(made) == 1
        with torch.no_grad():
            model.fc.bias.mul_(3)
        assert not check(2.0, 3)
        assert check(2.5, 3) and check(2.0, 4)
        model.eval()
        assert check(2.0, 3)
        model.train()
        assert not check(2.0, 3)
        model.fc.bias.data = model.fc.bias.data * 3
        assert check(2.0, 3) and check(2.0, 3) and not check(2.0, 3) and len(made) == 2


def test_records_end_with_the_search(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = [], graphs.Repeater.__init__

    def noted(self: graphs.Repeater, *of: Any) -> None:
        init(self, *of)
        made.append(weakref.ref(self))

    monkeypatch.setattr(graphs.Repeater, "__init__", noted)
    gc.disable()
    try:
        with emulated() as recorded:
            found(model, "pruner=force")
        assert recorded and [reference() for reference in made] == [None]
    finally:
        gc.enable()


def test_other_obstacles_are_named(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    double: Callable[..., list[Tensor]] = lambda number, tensors: [2 * tensor for tensor in tensors]  # noqa: E731

    def called(*settings: Any) -> int:
        repeater = graphs.Repeater(torch.device("cpu"), model)
        repeater.begin(100)
        with emulated() as made:
            for number in settings or [0]:
                for _ in range(3):
                    (result,) = repeater(partial(double, number), 1, [torch.ones(2)])
                    assert torch.equal(result, 2 * torch.ones(2))
        return len(made)

    assert called() == 1 and called(*range(12)) == 8 and called([]) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert called() == 0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert called() == 0
    assert [line.partition("one by one: ")[2] for line in caplog.messages] == [
        "8 passes are recorded already",
        "unhashable type: 'list'",
        "autocast is on",
        "several processes search",
    ]
