"""How often a round waits for a GPU: counted on a CPU, whose tensors take the place of a GPU's."""

import copy
import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import Chain, pruned_as
from emulated_graphs import counted_reads, emulated
from torch import Generator, Tensor, nn

from pai_bench.core import Batches
from pai_bench.errors import UserError
from pai_bench.masks import clearing, masks, selection
from pai_bench.pruning import checks, values
from pai_bench.pruning.pruned import Pruned
from pai_bench.system import devices

SHAPE = (3, 8, 8)
BATCHES = [(torch.randn(8, *SHAPE, generator=Generator().manual_seed(0), dtype=torch.float64), torch.arange(8) % 4)] * 2


def draw(examples: Any, generator: Generator, dtype: torch.dtype) -> Batches:
    return BATCHES


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Chain(bias=True)


# The scores are checked with one look, their choice has one, and the end of a round is waited for.
@pytest.mark.parametrize(
    ("words", "most"),
    [
        (("pruner=synflow",), 3),
        (("pruner=force",), 3),
        (("pruner=iter_snip",), 3),
        (("pruner=grasp",), 3),
        (("pruner=prospr",), 3),
        (("pruner=px",), 3),
        (("pruner=fisher",), 3),
        (("pruner=synflow", "allocation=uniform"), 3),
        (("pruner=iter_snip", "allocation=erk"), 3),
        # Two choices, and their union is counted.
        (("pruner=iter_snip", "allocation=global_min_density"), 5),
    ],
    ids=str,
)
def test_a_round_waits_for_the_device_a_few_times(words: tuple[str, ...], most: int, model: nn.Module) -> None:
    words = ("sparsity=0.8", "schedule=exponential", "schedule.rounds=5", *words)
    plain = pruned_as(copy.deepcopy(model), SHAPE, *words, draw=draw)
    ends: list[int] = []
    with emulated(), counted_reads() as reads:
        found = pruned_as(
            copy.deepcopy(model), SHAPE, *words, draw=draw, record=lambda metrics, epoch: ends.append(reads.number)
        )
    in_rounds = [after - before for before, after in itertools.pairwise(ends)]
    assert in_rounds == 4 * [most], in_rounds
    same(found, plain)


def same(one: Pruned, other: Pruned) -> None:
    assert one.scores is not None and other.scores is not None
    assert all(torch.equal(kept, other.mask[name]) for name, kept in one.mask.items())
    assert all(torch.equal(scores, other.scores[name]) for name, scores in one.scores.items())
    assert (one.sparsities, one.num_tied, one.flops) == (other.sparsities, other.num_tied, other.flops)


def test_what_waits_is_counted() -> None:
    tensor, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    ways: list[Callable[[], Any]] = [
        lambda: float(tensor[0]), lambda: tensor.tolist(), lambda: tensor.numpy(), lambda: tensor[mask],
        lambda: mask.nonzero(), lambda: torch.equal(tensor, tensor), lambda: bool(mask.any()), lambda: torch.tensor(1),
        lambda: devices.wait(tensor.device),
    ]  # fmt: skip
    with counted_reads() as reads:
        for number, way in enumerate(ways):
            assert reads.number == number
            way()
        assert reads.number == len(ways)
        tensor.masked_fill(mask, 0).sum().isfinite()
        torch.where(mask, tensor, 0.0)
        assert reads.number == len(ways)


def overflowing(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in masks.prunable(model).values():
            weight.mul_(1e15)
    return model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pruner=synflow", "pruner.dtype=float32"), "round 1 of 3: SynFlow overflows float32 on this model; set "),
        (("pruner=px", "pruner.dtype=float32"), "round 1 of 3: PX overflows float32 on this model; "),
        (("pruner=px_official_2024", "pruner.dtype=float32"), "round 1 of 3: PX overflows float32 on this model"),
        (("pruner=snip", "pruner.dtype=float32"), r"round 1 of 3: \d+ of 162 scores of conv1.weight are not finite"),
    ],
)
def test_errors_are_those_of_the_cpu_and_come_before_a_weight_is_pruned(words: tuple[str, ...], message: str) -> None:
    torch.manual_seed(0)
    model = overflowing(Chain(norm=False))
    before = copy.deepcopy(model.state_dict())
    words = (*words, "sparsity=0.8", "schedule=exponential", "schedule.rounds=3")

    def large(examples: Any, generator: Generator, dtype: torch.dtype) -> Batches:
        return [(images.to(dtype), labels) for images, labels in BATCHES]

    said = []
    for where in (nullcontext(), counted_reads()):
        with where, pytest.raises(UserError, match=message) as raised:
            pruned_as(model, SHAPE, *words, draw=large)
        said.append(str(raised.value))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert said[0] == said[1]


def ties() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = Generator().manual_seed(0)
    shapes = {"a": (4, 5), "b": (30,), "c": (6, 7)}
    scores = {name: torch.randint(4, shape, generator=generator).double() for name, shape in shapes.items()}
    return scores, {name: torch.rand(shape, generator=generator) < 0.7 for name, shape in shapes.items()}


def test_the_choices_of_layers_share_a_look() -> None:
    scores, candidates = ties()
    counts = {"a": 3, "b": 0, "c": 20}
    plain = selection.keep_largest_of_each(scores, candidates, counts)
    with counted_reads() as reads:
        found = selection.keep_largest_of_each(scores, candidates, counts)
        assert reads.number == 1
        assert masks.counts(found.mask) == [3, 0, 20] and reads.number == 1
        with pytest.raises(ValueError, match=f"cannot keep 31 of {int(candidates['b'].sum())} weights"):
            selection.keep_largest_of_each(scores, candidates, counts | {"b": 31})
    assert all(torch.equal(kept, found.mask[name]) for name, kept in plain.mask.items())
    assert found.num_tied == plain.num_tied > 0


def test_a_noted_count_does_not_outlive_a_change() -> None:
    mask = torch.ones(5, dtype=torch.bool)
    with counted_reads() as reads:
        assert masks.count(mask) == masks.count(mask) == 5 and reads.number == 2
        masks.note_counts({"": mask})
        assert masks.count(mask) == 5 and reads.number == 3
        mask[0] = False
        assert masks.kept({"": mask}) == 4
        assert masks.kept({"": mask.clone()}) == 4


def test_a_look_at_scores_finds_what_a_look_at_each_layer_finds() -> None:
    scores, candidates = ties()
    silenced = scores | {"a": torch.zeros(4, 5), "c": torch.full((6, 7), torch.nan).where(~candidates["c"], 0.0)}
    for these in (scores, silenced, {name: torch.zeros_like(score) for name, score in scores.items()}):
        results: list[Any] = []
        for where in (nullcontext(), counted_reads()):
            with where:
                results.append(checks.silent(these, candidates))
                try:
                    checks.check_scores(these, candidates)
                    results.append(None)
                except UserError as error:
                    results.append(str(error))
        assert results[:2] == results[2:]
    assert "every score is zero" in results[-1]


def test_weights_return_as_by_indexing(model: nn.Module) -> None:
    expected, generator = copy.deepcopy(model), Generator().manual_seed(0)
    weights = masks.prunable(expected)
    returned = {name: torch.rand(weight.shape, generator=generator) < 0.3 for name, weight in weights.items()}
    initial = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight[returned[name]] = initial[name][returned[name]]
    with counted_reads() as reads:
        values.restore_(model, initial, returned)
        assert reads.number == 0
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_several_tensors_are_cleared_as_one_by_one(dtype: torch.dtype) -> None:
    generator = Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (2, 3, 3, 3), (5,))]
    found[0][0, :3] = torch.tensor([-0.0, torch.nan, torch.inf])
    found[1] = found[1].to(memory_format=torch.channels_last)
    kept = [torch.rand(weight.shape, generator=generator) < 0.5 for weight in found]
    expected = [weight.clone() for weight in found]
    for weight, mask in zip(expected, kept, strict=True):
        clearing.clear_plainly_(weight, mask)
    clearing.clear_all_(found, kept)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert all(torch.equal(one.view(bits), other.view(bits)) for one, other in zip(found, expected, strict=True))
    assert any(~mask.all() for mask in kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pruner", ["synflow", "force", "iter_snip"])
def test_a_gpu_is_waited_for_as_often(pruner: str, model: nn.Module) -> None:
    on_gpu = [(images.cuda(), labels.cuda()) for images, labels in BATCHES]
    words = (f"pruner={pruner}", "sparsity=0.8", "schedule=exponential", "schedule.rounds=5")
    ends: list[int] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")

            def record(metrics: dict[str, float], epoch: float) -> None:
                ends.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))

            pruned_as(model.cuda(), SHAPE, *words, draw=lambda *_: on_gpu, record=record)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert max(after - before for before, after in itertools.pairwise(ends[1:])) <= 3
