"""From a network to a mask: selection, scores, and the memory that they take."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks import textbook
from benchmarks.measure import clocked, in_turn, seconds
from benchmarks.subjects import Setting, flops, parts, pruned, subnetwork, trainer
from benchmarks.table import Row
from pai_bench.analysis.mode import mode
from pai_bench.assembly import Parts
from pai_bench.config import composition
from pai_bench.core import Mask, Round
from pai_bench.masks import masks
from pai_bench.masks.selection import Pool, kth_largest
from pai_bench.pruning.pruned import Pruned
from pai_bench.system import devices

MEGABYTE = 2**20


def selection(setting: Setting) -> Iterator[Row]:
    """The exact threshold of many scores against what the peers call for it."""
    number = 300_000 if setting.quick else 14_700_000
    generator = Generator().manual_seed(0)
    values = torch.randn(number, generator=generator).abs() * torch.exp(3 * torch.randn(number, generator=generator))
    values = values.to(setting.device)
    for density in (0.5, 0.1, 0.01):
        k = round(density * number)
        found: dict[str, Tensor] = {}

        def ours(k: int = k, found: dict[str, Tensor] = found) -> None:
            found["ours"] = kth_largest([Pool(values, number)], k)

        def kthvalue(k: int = k, found: dict[str, Tensor] = found) -> None:
            found["kthvalue"] = torch.kthvalue(values, number - k + 1).values

        variants = {"ours": clocked(ours, setting.device), "kthvalue": clocked(kthvalue, setting.device)}
        times = in_turn(variants, 1 if setting.quick else 5)
        yield Row(
            f"threshold of {number:,} scores, {100 * density:g} % kept, over torch.kthvalue",
            times.ratio("kthvalue", "ours"),
            target=2.5,
            goal=8,
            exact=bool(found["ours"] == found["kthvalue"]),
            time=times.seconds("ours"),
            lower_bound=setting.rates.lower_bound(moved=values.nbytes),
        )


class _Brighter(nn.Module):
    """A network that multiplies its input by a factor first, which cannot change the order of SynFlow's scores."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images * self.factor)
        return logits


def _moved(one: Mask, other: Mask) -> int:
    """Kept weights of one mask that another, in the same order, does not keep."""
    return sum(int((kept & ~also).sum()) for kept, also in zip(one.values(), other.values(), strict=True))


# Bars and aims of float32 and float64, by network and by whether all 100 rounds are run.
_SYNFLOW: dict[tuple[str, bool], list[tuple[float | None, float | None]]] = {
    ("vgg16", False): [(3.0, 6), (1.5, 4)],
    ("vgg16", True): [(4.0, 6), (2.2, 4)],
    ("resnet18", False): [(None, 6), (None, 4)],
    ("resnet18", True): [(None, 6), (None, 4)],
    ("resnet20", False): [(1.1, 2), (0.9, 2)],
    ("resnet20", True): [(1.1, 2), (0.9, 2)],
}


def _synflow_parts(setting: Setting, net: str, dtype: str, rounds: int) -> Parts:
    return parts(
        setting.device,
        f"model={net}",
        "pruner=synflow",
        "sparsity=0.99",
        "training=cifar",
        f"pruner.dtype={dtype}",
        f"schedule.rounds={rounds}",
        "schedule.rounding=up",
    )


def _size(model: nn.Module, dtype: str) -> int:
    """Bytes of the prunable weights in a precision."""
    return masks.total(masks.prunable(model)) * (8 if dtype == "float64" else 4)


def synflow(setting: Setting) -> Iterator[Row]:
    """Whole SynFlow searches against the published loop, with its masks."""
    rounds = 3 if setting.quick else 100 if setting.full else 20
    for net in ("resnet20",) if setting.quick else ("vgg16", "resnet18", "resnet20"):
        found: dict[str, Pruned] = {}
        expected: list[Mask] = []
        runs = {dtype: _synflow_parts(setting, net, dtype, rounds) for dtype in ("float32", "float64")}
        model = runs["float32"].build("init")
        num_prunable = masks.total(masks.full(model))
        counts = textbook.synflow_counts(num_prunable, 0.01, rounds)

        def published(model: nn.Module = model, counts: list[int] = counts, into: list[Mask] = expected) -> float:
            copied = textbook.Masked(model)
            return seconds(lambda: into.append(textbook.synflow(copied, (3, 32, 32), counts)), setting.device)

        def ours(dtype: str, runs: dict[str, Parts] = runs, into: dict[str, Pruned] = found) -> float:
            training = trainer(runs[dtype])
            return seconds(lambda: into.update({dtype: pruned(runs[dtype], training)}), setting.device)

        times = in_turn(
            {"published": published, "float32": lambda: ours("float32"), "float64": lambda: ours("float64")},
            1 if setting.quick else 2 if net != "resnet20" or setting.full else 5,
            warm_up=int(net == "resnet20"),
        )
        brighter = trainer(runs["float64"])
        brighter.model = _Brighter(brighter.model, 1.1)
        moved = _moved(found["float64"].mask, pruned(runs["float64"], brighter).mask)
        differs, what = _moved(found["float32"].mask, expected[-1]), "differ from the published mask"
        if differs and any(found["float32"].num_tied):
            exact = textbook.synflow(textbook.Masked(model), (3, 32, 32), counts, exactly=True)
            differs = _moved(found["float32"].mask, exact)
            what += ", but for equal scores, all of which published code drops"
        checks = {"float32": (differs, what), "float64": (moved, "move with the input")}
        for dtype, (target, goal) in zip(runs, _SYNFLOW[net, setting.full], strict=True):
            number, what = checks[dtype]
            yield Row(
                f"SynFlow {net}, {rounds} rounds, {dtype}, over the published loop",
                times.ratio("published", dtype),
                target=target,
                goal=goal,
                exact=number == 0 and masks.kept(found[dtype].mask) == counts[-1],
                time=times.seconds(dtype),
                lower_bound=setting.rates.lower_bound(
                    flops=found[dtype].flops, precision=dtype, moved=rounds * 5 * _size(model, dtype)
                ),
                note=f"{number} of {counts[-1]:,} kept weights {what}",
            )


def resnet50(setting: Setting) -> Iterator[Row]:
    """SynFlow where the published loop overflows and leaves nothing."""
    # Few rounds reach no high sparsity: they would cut every path at once.
    rounds, size, sparsity = (2, 64, 0.5) if setting.quick else (100 if setting.full else 10, 224, 0.9)
    of = parts(
        setting.device,
        "model=resnet50",
        "pruner=synflow",
        f"sparsity={sparsity}",
        f"schedule.rounds={rounds}",
        "training=imagenet",
        size=size,
        num_classes=1000,
        num_train=2,
    )
    training, found = trainer(of), []
    took = seconds(lambda: found.append(pruned(of, training)), setting.device)
    (result,) = found
    finite = result.scores is not None and all(bool(values.isfinite().all()) for values in result.scores.values())
    num_kept = masks.num_kept(sparsity, masks.total(result.mask))
    bound = setting.rates.lower_bound(
        flops=result.flops, precision="float64", moved=rounds * 5 * _size(training.model, "float64")
    )
    yield Row(
        f"SynFlow resnet50 at {size}, float64, one round",
        took / rounds,
        "s",
        exact=finite and masks.kept(result.mask) == num_kept,
        time=took / rounds,
        lower_bound=bound / rounds,
        note=f"finite, {masks.kept(result.mask):,} of {masks.total(result.mask):,} kept",
    )


def gradients(setting: Setting) -> Iterator[Row]:
    """SNIP against the one pass that it cannot do without, GraSP against two forward passes."""
    for net in ("resnet20",) if setting.quick else ("vgg16", "resnet20"):
        few = {"snip": ("pruner.scoring_data.total=20",), "grasp": ("pruner.scoring_data.per_class=2",)}
        for method, row in (("snip", _snip), ("grasp", _grasp)):
            more = few[method] if setting.quick else ()
            yield row(setting, net, parts(setting.device, f"model={net}", f"pruner={method}", "sparsity=0.9", *more))


def _snip(setting: Setting, net: str, of: Parts) -> Row:
    assert of.pruner.score is not None and of.pruner.scoring_data is not None
    model, score = of.build("init"), of.pruner.score
    ((images, labels),) = of.data.draw(of.pruner.scoring_data, Generator(), torch.float32)
    subject = subnetwork(of, model, masks.full(model))
    found: dict[str, dict[str, Tensor]] = {}

    def ours() -> None:
        found["ours"] = score(subject, [(images, labels)], F.cross_entropy, Generator())

    def plain() -> None:
        values = zip(masks.prunable(model).items(), textbook.gradients(model, images, labels), strict=True)
        found["plain"] = {name: gradient for (name, _), gradient in values}

    with mode(model, of.pruner.mode == "train"):
        variants = {"ours": clocked(ours, setting.device), "plain": clocked(plain, setting.device)}
        times = in_turn(variants, 1 if setting.quick else 3)
        counted = flops(ours)
    weights = masks.prunable(model)
    exact = all(
        torch.equal(found["ours"][name], (weights[name].detach() * gradient).abs())
        for name, gradient in found["plain"].items()
    )
    return Row(
        f"SNIP {net}, {len(labels)} images, time over a forward and backward pass",
        times.ratio("ours", "plain"),
        target=1.15,
        goal=1.03,
        at_most=True,
        exact=exact,
        time=times.seconds("ours"),
        lower_bound=setting.rates.lower_bound(flops=counted),
        note="scores equal |w g|",
    )


def _grasp(setting: Setting, net: str, of: Parts) -> Row:
    assert of.pruner.score is not None and of.pruner.scoring_data is not None
    model, score = of.build("init"), of.pruner.score
    ((images, labels),) = of.data.draw(of.pruner.scoring_data, Generator(), torch.float32)
    subject, copied = subnetwork(of, model, masks.full(model)), textbook.Masked(model)
    first = images.contiguous()  # channels first, as published loaders give them
    found: dict[str, dict[str, Tensor]] = {}

    def ours() -> None:
        found["ours"] = score(subject, [(images, labels)], F.cross_entropy, Generator())

    def published() -> None:
        found["published"] = textbook.grasp(copied, first, labels, 200.0)

    with mode(model, True), mode(copied, True):
        variants = {"ours": clocked(ours, setting.device), "published": clocked(published, setting.device)}
        times = in_turn(variants, 1 if setting.quick else 2 if net == "vgg16" else 3)
        counted = flops(ours)
    difference = max(
        float((values - found["published"][name]).abs().max() / values.abs().max())
        for name, values in found["ours"].items()
    )
    return Row(
        f"GraSP {net}, {len(labels)} images, over two forward passes",
        times.ratio("published", "ours"),
        target=1.2,
        goal=1.5,
        exact=difference < 1e-3,
        time=times.seconds("ours"),
        lower_bound=setting.rates.lower_bound(flops=counted),
        note=f"scores differ by {difference:.0e} of the largest" if difference else "scores are equal",
    )


def memory(setting: Setting) -> Iterator[Row]:
    """By how much a round of each method raises the peak of a fresh process."""
    names = sorted(path.stem for path in (composition.CONF / "pruner").glob("*.yaml") if path.stem != "dense")
    if setting.quick:
        names = ["ntk_sap", "synflow"]  # one that draws images and weights, and one that needs none
    # A process that has imported everything and done nothing is the parent of all that are measured.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scoring", "torch_pruning"])
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        peaks = pool.map(_peak, names, [str(setting.device)] * len(names))
        for name, (own, grown) in zip(names, peaks, strict=True):
            yield Row(
                f"memory of a round of {name} on resnet20",
                grown / MEGABYTE,
                "MB",
                at_most=True,
                note=f"the network itself is {own / MEGABYTE:.1f} MB",
            )


def _peak(pruner: str, device_name: str) -> tuple[int, int]:
    """Bytes of the network, and by how many one round raises the peak."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    of = parts(device, "model=resnet20", f"pruner={pruner}", "sparsity=0.5", "training=cifar", num_train=2560)
    of, training = replace(of, rounds=[Round(0.5)]), trainer(of)
    own = sum(parameter.nbytes for parameter in training.model.parameters())
    devices.start_memory(device)
    before = devices.peak_memory_bytes(device)
    pruned(of, training)
    return own, devices.peak_memory_bytes(device) - before
