"""Rounds of scores that look at images: their kernels launched one by one, and as CUDA graphs."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Generator
from torch.nn import functional as F

from benchmarks.gpu import worked
from benchmarks.measure import clocked, in_turn, seconds
from benchmarks.subjects import Setting, flops, parts, pruned, subnetwork, trainer
from benchmarks.table import Row
from pai_bench.analysis.mode import mode
from pai_bench.assembly import Parts
from pai_bench.core import Scores
from pai_bench.masks import masks
from pai_bench.pruning import scoring
from pai_bench.pruning.pruned import Pruned
from pai_bench.system import devices, graphs

METHODS = ("force", "iter_snip", "grasp", "prospr")
_ROUNDS_AHEAD = 1000  # enough that recording pays


def rounds(setting: Setting) -> Iterator[Row]:
    """The scores of a round, captured and not, and a round of a whole search."""
    few = ("pruner.scoring_data.per_class=null", "pruner.scoring_data.total=16", "pruner.scoring_data.batch_size=8")
    for net in ("resnet20",) if setting.quick else ("resnet20", "vgg16"):
        small = ("model.widths=[4,6]", "model.blocks=[1,1]", *few) if setting.quick else ()
        number = 3 if setting.quick else 20
        for method in METHODS:
            words = (f"model={net}", f"pruner={method}", "sparsity=0.9", *small)
            schedule = ("schedule=exponential", f"schedule.rounds={number}")
            of = parts(setting.device, *words, *schedule, num_train=640)
            yield _scores(setting, net, method, of)
            yield _search(setting, net, method, of)


def _scores(setting: Setting, net: str, method: str, of: Parts) -> Row:
    """How many times as fast the scores of a round are if they are captured."""
    assert of.pruner.score is not None and of.pruner.scoring_data is not None
    score, dtype = of.pruner.score, scoring.DTYPES[of.pruner.dtype]
    model = scoring.copy_for_scores(of.build("init"), dtype)
    batches = of.data.draw(of.pruner.scoring_data, Generator(), dtype)
    batches = [batches[number] for number in range(len(batches))]
    plain = subnetwork(of, model, masks.full(model))
    repeater = graphs.Repeater(setting.device, model)
    repeater.begin(_ROUNDS_AHEAD)
    subjects = {"plain": plain, "captured": replace(plain, repeat=repeater)}
    found: dict[str, Scores] = {}

    def take(how: str) -> None:
        found[how] = score(subjects[how], batches, F.cross_entropy, Generator())

    with mode(model, of.pruner.mode == "train"), devices.reproducible(setting.device):
        variants = {
            "plain": clocked(lambda: take("plain"), setting.device),
            "captured": clocked(lambda: take("captured"), setting.device),
        }
        # The second round records, and the third has the record.
        times = in_turn(variants, 1 if setting.quick else 5, warm_up=3)
        observed, counted = worked(lambda: take("plain"), setting.device), flops(lambda: take("plain"))
    return Row(
        f"scores of a round of {method} on {net}, captured, over kernel by kernel",
        times.ratio("plain", "captured"),
        exact=all(torch.equal(values, found["plain"][name]) for name, values in found["captured"].items()),
        time=times.seconds("captured"),
        lower_bound=setting.rates.lower_bound(flops=counted, precision=of.pruner.dtype),
        note=f"kernel by kernel {1e3 * times.seconds('plain'):.3g} ms"
        + ("" if observed is None else f"; its passes keep the device at work for {1e3 * observed[0]:.3g} ms"),
    )


def _search(setting: Setting, net: str, method: str, of: Parts) -> Row:
    """A round of a search, with its images, its choice and its mask."""
    found: list[Pruned] = []
    training, number = trainer(of), len(of.rounds)
    took = seconds(lambda: found.append(pruned(of, training)), setting.device) / number
    return Row(
        f"search by {method} on {net}, {number} rounds, one round",
        took,
        "s",
        time=took,
        lower_bound=setting.rates.lower_bound(flops=found[0].flops / number, precision=of.pruner.dtype),
        exact=masks.kept(found[0].mask) == masks.num_kept(of.rounds[-1].sparsity, masks.total(found[0].mask)),
    )
