"""Training: what a mask costs, what the whole loop gains, and what dead channels give back."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import textbook
from benchmarks.data import textbook_loader
from benchmarks.measure import clocked, in_turn
from benchmarks.subjects import Setting, Steps, clock, parts, pruned, step_seconds, trainer
from benchmarks.table import Row
from pai_bench.analysis import cost
from pai_bench.assembly import Parts
from pai_bench.core import Call, Mask
from pai_bench.masks import masks
from pai_bench.training.recording import num_resurrected
from pai_bench.training.trainer import Trainer

WHOLE = ("training=cifar", "training.compact=off")  # steps on the full network, whatever the mask
# Narrow and shallow enough for seconds, yet with every kind of layer.
TINY = {"resnet20": ("model.widths=[8,16]", "model.blocks=[1,1]"), "vgg16": ()}


class _Operators(TorchDispatchMode):
    """Counts the operators that reach the backend while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def random_mask(of: Parts, density: float) -> Mask:
    """A mask that keeps the same share of every layer, at random."""
    return {
        name: torch.rand(kept.shape, generator=torch.Generator().manual_seed(0)).to(kept.device) < density
        for name, kept in masks.full(of.build("init")).items()
    }


def textbook_optimizer(of: Parts, net: nn.Module) -> torch.optim.Optimizer:
    """torch's own SGD with the settings of a recipe."""
    recipe = of.run.training
    assert isinstance(recipe.optimizer, Call)
    settings = recipe.optimizer.settings
    return torch.optim.SGD(
        net.parameters(),
        lr=recipe.lr,
        momentum=settings["momentum"],
        nesterov=settings["nesterov"],
        weight_decay=recipe.weight_decay,
    )


def masking(setting: Setting) -> Iterator[Row]:
    """A masked step of training against a dense one, and against weight * mask in every forward pass."""
    small = TINY["resnet20"] if setting.quick else ()
    batch = ("training.batch_size=16",) if setting.quick else ()
    of = parts(setting.device, "model=resnet20", *WHOLE, *small, *batch)
    mask = random_mask(of, 0.1)
    held = {"dense": masks.full(of.build("init")), "masked": mask}

    operators = {}
    for name, kept in held.items():
        counter = _Operators()
        steps = Steps(of, kept, 2, partial(getattr, counter, "number"))
        steps()
        with counter:
            *_, before, after = steps()
        operators[name] = after - before
    published = textbook.Masked(of.build("init"), mask)
    published_steps = [_counted_step(of, net) for net in (of.build("init"), published)]
    yield Row(
        "operators that a mask adds to a step of resnet20",
        operators["masked"] - operators["dense"],
        "",
        target=2,
        goal=1,
        at_most=True,
        timed=False,
        note=f"to {operators['dense']}; weight * mask adds {published_steps[1] - published_steps[0]}",
    )

    counted = 3 * 2 * sum(cost.multiply_adds(of.build("init"), of.data.input_shape).values())
    timed = {name: Steps(of, kept, 2 if setting.quick else 3, clock) for name, kept in held.items()}
    times = in_turn(
        {name: partial(step_seconds, steps) for name, steps in timed.items()},
        1 if setting.quick else 5,
    )
    yield Row(
        "masked step of resnet20, time over a dense one",
        times.ratio("masked", "dense"),
        target=1.03,
        goal=1.01,
        at_most=True,
        time=times.seconds("masked"),
        lower_bound=setting.rates.lower_bound(flops=counted * of.run.training.batch_size),
    )
    yield _kept_weights(setting, small)


def _counted_step(of: Parts, net: nn.Module) -> int:
    """Operators of a step with torch's own optimizer."""
    images, labels = next(of.data.train(of.run.training.batch_size, torch.Generator(), torch.Generator()))
    optimizer = textbook_optimizer(of, net)
    for _ in range(2):  # the first step makes the buffers of the momentum
        counter = _Operators()
        with counter:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return counter.number


def _kept_weights(setting: Setting, small: tuple[str, ...]) -> Row:
    """Ten steps of the product and of weight * mask on the same batch."""
    num_steps = 10
    # The memory format decides in which order convolutions add.
    of = parts(
        setting.device,
        "model=resnet20",
        *WHOLE,
        *small,
        "channels_last=false",
        "training.batch_size=32",
        "training.lr=0.01",
    )
    mask = random_mask(of, 0.1)
    steps = Steps(of, mask, num_steps, clock)
    published = textbook.Masked(of.build("init"), mask)
    steps()
    images, labels = steps.batch
    batch = (images.contiguous(), labels)
    textbook.epoch(published, [batch] * num_steps, textbook_optimizer(of, published), setting.device)
    ours = dict(steps.network.model.named_parameters())
    held = num_resurrected(steps.network.model, mask) == 0
    differ = sum(int((ours[name] != weight)[mask[name]].sum()) for name, weight in published.weights.items())
    return Row(
        f"kept weights that differ from weight * mask after {num_steps} steps of SGD",
        differ,
        "",
        target=0,
        goal=0,
        at_most=True,
        timed=False,
        exact=differ == 0 and held,
        note="pruned weights are zero",
    )


# Bars and aims by network and precision.
_LOOP: dict[tuple[str, str], tuple[float, float]] = {
    ("resnet20", "float32"): (1.25, 1.6),
    ("resnet20", "bfloat16"): (1.8, 2.5),
    ("vgg16", "float32"): (1.0, 1.15),
    ("vgg16", "bfloat16"): (1.7, 2.1),
}


def loop(setting: Setting) -> Iterator[Row]:
    """Whole epochs of masked training, data included, against a DataLoader and weight * mask in float32."""
    for net in ("resnet20",) if setting.quick else ("resnet20", "vgg16"):
        num_images = 64 if setting.quick else 1280 if net == "resnet20" else 256
        small = (*TINY[net], "training.batch_size=32") if setting.quick else ()
        runs = {
            precision: parts(
                setting.device,
                f"model={net}",
                *WHOLE,
                *small,
                f"training.precision={precision}",
                "training.lr=0.01",
                num_train=num_images,
            )
            for precision in ("float32", "bfloat16")
        }
        of = runs["float32"]
        mask = random_mask(of, 0.1)
        trainers = {precision: trainer(run) for precision, run in runs.items()}
        published = textbook.Masked(of.build("init"), mask)
        optimizer, loader = textbook_optimizer(of, published), textbook_loader(num_images, of.run.training.batch_size)

        def epoch(precision: str, trainers: dict[str, Trainer] = trainers, mask: Mask = mask) -> float:
            training = trainers[precision]
            before = training.seconds  # evaluation excluded, which the published epoch has none of
            training.until(mask, round(training.epoch) + 1)
            return training.seconds - before

        times = in_turn(
            {
                "published": clocked(
                    partial(textbook.epoch, published, loader, optimizer, setting.device), setting.device
                ),
                "float32": lambda: epoch("float32"),
                "bfloat16": lambda: epoch("bfloat16"),
            },
            1 if setting.quick else 3,
        )
        counted = 6 * num_images * sum(cost.multiply_adds(of.build("init"), of.data.input_shape).values())
        for precision in runs:
            target, goal = _LOOP[net, precision]
            took = times.seconds(precision)
            slow = precision == "bfloat16" and not setting.fast_bfloat16
            yield Row(
                f"training loop of {net}, {precision}, over DataLoader and weight * mask in float32",
                times.ratio("published", precision),
                target=None if slow else target,
                goal=goal,
                time=took,
                lower_bound=setting.rates.lower_bound(flops=counted, precision=precision),
                note=f"{num_images / took:,.0f} images/s over {num_images / times.seconds('published'):,.0f}"
                + ("; bfloat16 is no faster on this machine" if slow else ""),
            )


_METHODS = ("synflow", "snip", "grasp", "magnitude", "random")
# Bars and aims by network, method and compression.
_COMPACT: dict[tuple[str, str, int], tuple[float, float]] = {
    ("vgg16", "synflow", 100): (2.3, 3.3),
    ("vgg16", "synflow", 1000): (4.5, 7),
}


def compact(setting: Setting) -> Iterator[Row]:
    """Steps without dead channels, compared with steps of the whole network."""
    few = {"synflow": (1000,), "magnitude": (100, 1000)}  # the latter scores once for both
    for net in ("vgg16",) if setting.quick else ("vgg16", "resnet18"):
        for method, compressions in (few if setting.quick else dict.fromkeys(_METHODS, (10, 100, 1000))).items():
            for compression, mask in _found(setting, net, method, compressions):
                yield _compact(setting, net, method, compression, mask)


def _found(setting: Setting, net: str, method: str, compressions: tuple[int, ...]) -> Iterator[tuple[int, Mask]]:
    """The masks of a method at some compressions."""
    rounds = 8 if setting.quick else 100 if setting.full else 20
    more = {
        "synflow": (f"schedule.rounds={rounds}",),
        "grasp": () if setting.full else ("pruner.scoring_data.per_class=2",),  # a fifth of the time
    }.get(method, ())
    scores = None
    for compression in compressions:
        of = parts(
            setting.device, f"model={net}", "training=cifar", f"pruner={method}", f"compression={compression}", *more
        )
        if scores is None or len(of.rounds) > 1:
            training = trainer(of)
            result = pruned(of, training)
            scores = result.scores
            yield compression, result.mask
        else:  # a method of one shot has the same scores at every sparsity
            everything = masks.full(training.model)
            keep = masks.num_kept(of.run.sparsity, masks.total(everything))
            yield compression, of.allocate(training.model)(scores, everything, keep, torch.Generator()).mask


def _compact(setting: Setting, net: str, method: str, compression: int, mask: Mask) -> Row:
    precision = "bfloat16" if setting.fast_bfloat16 else "float32"
    batch_size = 8 if setting.quick else 64 if net == "vgg16" else 16
    steps = {}
    for how in ("auto", "off"):
        of = parts(
            setting.device,
            f"model={net}",
            "training=cifar",
            f"training.compact={how}",
            f"training.precision={precision}",
            f"training.batch_size={batch_size}",
            "training.lr=0.01",
        )
        steps[how] = Steps(of, mask, 2, clock)
    steps["auto"]()
    small, whole = steps["auto"].network.trained, steps["auto"].network.model
    costs = [sum(cost.multiply_adds(one, of.data.input_shape).values()) for one in (small, whole)]
    name = f"compact step of {net}, {method} at {compression}x, over a plain step"
    collapsed = masks.collapsed(mask)
    broken = f"; {len(collapsed)} layers collapsed" if collapsed else ""
    target, goal = _COMPACT.get((net, method, compression), (None, None))
    if small is whole:
        return Row(
            name, 1.0, target=target, goal=goal, note=f"too few channels are dead: the whole network is trained{broken}"
        )
    times = in_turn({how: partial(step_seconds, one) for how, one in steps.items()}, 1, warm_up=0)
    difference = _difference(whole, small)
    return Row(
        name,
        times.ratio("off", "auto"),
        target=target,
        goal=goal,
        exact=difference < 1e-12,
        time=times.seconds("auto"),
        lower_bound=setting.rates.lower_bound(flops=6 * costs[0] * batch_size, precision=precision),
        note=f"{100 * costs[0] / costs[1]:.1f} % of the multiply-adds, outputs differ by {difference:.0e}{broken}",
    )


def _difference(whole: nn.Module, small: nn.Module) -> float:
    """By how much the outputs of two networks differ in float64, of the largest."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = images.to(next(whole.parameters()).device)
    with torch.no_grad():
        one, other = (copy.deepcopy(net).double().train()(images) for net in (whole, small))
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
