"""What matters most on a GPU: searches, images a second and how busy it is, and several runs that share it."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Generator
from torch.profiler import ProfilerActivity, profile

from benchmarks import scoring, textbook
from benchmarks.data import textbook_loader
from benchmarks.measure import seconds
from benchmarks.subjects import Setting, ignore, parts, pruned, trainer
from benchmarks.table import Row
from benchmarks.training import TINY, WHOLE, random_mask, textbook_optimizer
from pai_bench.analysis import cost
from pai_bench.assembly import Parts
from pai_bench.core import Mask, OnDevice
from pai_bench.system import devices, graphs, layout, mps
from pai_bench.training.captured import CapturedStep
from pai_bench.training.evaluation import Evaluation, Evaluator
from pai_bench.training.recording import Observers
from pai_bench.training.step import Execution, Step
from pai_bench.training.trainer import Trainer

# Networks in the order of their importance, the images of an epoch and their size.
_NETS: dict[str, dict[str, int]] = {
    "resnet20": {"num_train": 12_800},
    "vgg16": {"num_train": 12_800},
    "resnet18": {"num_train": 6_400},
    "resnet50": {"num_train": 640, "size": 224, "num_classes": 1000},
}
_PRECISIONS = ("bfloat16", "tfloat32", "float32")
_QUICK = {"num_train": 24}
_SMALL = ("training.batch_size=8",)


def _of(setting: Setting, net: str, precision: str, *words: str, **more: int) -> Parts:
    """The parts of a run of a network in a precision, small ones where everything is."""
    shape = _QUICK if setting.quick else _NETS[net]
    small = (*_SMALL, *TINY.get(net, ())) if setting.quick else ()
    return parts(
        setting.device,
        f"model={net}",
        *WHOLE,
        *small,
        f"training.precision={precision}",
        "training.lr=0.01",
        *words,
        **(shape | more),
    )


def _trainer(of: Parts, capture: bool) -> Trainer:
    """The trainer of a run, whose steps are captured or not."""
    execution = Execution(of.device, of.run.channels_last, of.run.compile, capture)
    model, recipe = of.build("init"), of.run.training
    return Trainer(model, of.data, recipe, execution, Observers(ignore), seed=0, compact_training=False)


def images(setting: Setting) -> Iterator[Row]:
    """Images a second of whole epochs of masked training, captured and not, and how busy the device is."""
    for net in ("resnet20",) if setting.quick else _NETS:
        yield from _published(setting, net)
        for precision in _PRECISIONS:
            of = _of(setting, net, precision)
            mask = random_mask(of, 0.1)
            rates = {}
            for capture in (True, False):
                rates[capture], row = _images(setting, of, net, mask, capture)
                judged = setting.device.type == "cuda" and capture and (net, precision) == ("resnet20", "bfloat16")
                if not capture:
                    row = replace(row, note=f"captured {rates[True] / rates[False]:.2f} times as fast; {row.note}")
                yield replace(row, target=50_000 if judged else None, goal=250_000 if judged else None)


def _images(setting: Setting, of: Parts, net: str, mask: Mask, capture: bool) -> tuple[float, Row]:
    """Images a second of training, and their row."""
    training, number = _trainer(of, capture), of.data.num_examples["train"]

    def epoch() -> None:
        training.until(mask, round(training.epoch) + 1)

    epoch()  # chooses algorithms, and records the step
    took = min(seconds(epoch, setting.device) for _ in range(1 if setting.quick else 3))
    counted = 6 * number * sum(cost.multiply_adds(training.model, of.data.input_shape).values())
    observed, precision = worked(epoch, setting.device), of.run.training.precision
    return number / took, Row(
        f"training of {net}, {precision}, {'captured' if capture else 'kernel by kernel'}",
        number / took,
        "images/s",
        time=took,
        lower_bound=setting.rates.lower_bound(flops=counted, precision=precision),
        note="" if observed is None else f"the device works {100 * observed[0] / observed[1]:.0f} % of an epoch",
    )


def _published(setting: Setting, net: str) -> Iterator[Row]:
    """The plain loop with a DataLoader of processes, for comparison. It has images of CIFAR's size."""
    if net == "resnet50":
        return
    precision = "tfloat32"  # torch's own default, in convolutions
    of = _of(setting, net, precision)
    copied = textbook.Masked(of.build("init"), random_mask(of, 0.1))
    number, workers = of.data.num_examples["train"], 0 if setting.quick else devices.num_cores(setting.device)
    loader = textbook_loader(number, of.run.training.batch_size, workers)
    optimizer = textbook_optimizer(of, copied)

    def epoch() -> None:
        textbook.epoch(copied, loader, optimizer, setting.device)

    epoch()
    yield Row(
        f"training of {net}, {precision}, published loop over a DataLoader of {workers} processes",
        number / seconds(epoch, setting.device),
        "images/s",
    )


def compiled(setting: Setting) -> Iterator[Row]:
    """torch.compile inside the captured step."""
    for net in ("resnet20", "vgg16"):
        of = _of(setting, net, "bfloat16", "compile=true")
        _, row = _images(setting, of, net, random_mask(of, 0.1), capture=True)
        yield replace(row, name=f"{row.name}, compiled")


def evaluation(setting: Setting) -> Iterator[Row]:
    """Images a second of evaluation, captured and not."""
    size, number = (8, 20) if setting.quick else (512, 20_480)
    of = _of(setting, "resnet20", "bfloat16", num_test=number)
    found: list[Evaluation] = []
    for capture in (True, False):
        training = _trainer(of, capture)
        step = training.network.step
        evaluator = Evaluator(of.data, Execution(of.device, of.run.channels_last, False, capture))
        step.net.eval()

        def evaluate(evaluator: Evaluator = evaluator, step: Step = step) -> None:
            batches = ((layout.laid_out(x, step.layout), y) for x, y in of.data.evaluation("test", size))
            found.append(evaluator(step, batches, size))

        evaluate()
        yield Row(
            f"evaluation of resnet20, bfloat16, {'captured' if capture else 'kernel by kernel'}",
            number / min(seconds(evaluate, setting.device) for _ in range(3)),
            "images/s",
            exact=found[-1] == found[0] if setting.quick else None,
        )


def synflow(setting: Setting) -> Iterator[Row]:
    """SynFlow in its 100 rounds, against the published loop, with the bars of a GPU."""
    for row in scoring.synflow(replace(setting, full=not setting.quick)):
        vgg = row.name.startswith("SynFlow vgg16") and "float32" in row.name
        yield replace(row, target=4 if vgg else None, goal=50 if vgg else None)


def compact(setting: Setting) -> Iterator[Row]:
    """Captured steps without dead channels, compared with captured steps of the whole network."""
    for net in ("resnet20",) if setting.quick else ("resnet20", "vgg16", "resnet18"):
        for compression in (10,) if setting.quick else (10, 100, 1000):
            words = ("pruner=synflow", f"compression={compression}", f"schedule.rounds={8 if setting.quick else 20}")
            found = _of(setting, net, "bfloat16", *words)
            mask = pruned(found, trainer(found)).mask
            took, costs = {}, {}
            for how in ("auto", "off"):
                of = _of(setting, net, "bfloat16", f"training.compact={how}")
                took[how], costs[how] = _step_seconds(setting, of, mask)
            yield Row(
                f"compact step of {net}, synflow at {compression}x, over a whole one, both captured",
                took["off"] / took["auto"],
                time=took["auto"],
                lower_bound=setting.rates.lower_bound(
                    flops=6 * costs["auto"] * of.run.training.batch_size, precision="bfloat16"
                ),
                note=f"{100 * costs['auto'] / costs['off']:.1f} % of the multiply-adds",
            )


def _step_seconds(setting: Setting, of: Parts, mask: Mask) -> tuple[float, int]:
    """Seconds of a step under a mask, captured where there are graphs, and the multiply-adds of its network."""
    network, size = trainer(of).network, of.run.training.batch_size
    network.apply_mask(mask)
    with network.training_for(10**12) as step:  # long enough for a compact network to be looked for
        step.net.train()
        macs = sum(cost.multiply_adds(step.net, of.data.input_shape).values())
        assert isinstance(of.data, OnDevice)
        tables = of.data.tables(Generator(), Generator())
        num_steps = of.data.num_examples["train"] // size
        if graphs.supported(setting.device):
            captured = CapturedStep(step, of.data, tables, size, num_steps)
            captured.begin(tables, [0.01] * num_steps, 0)
            steps: list[Callable[[], None]] = [captured] * num_steps
        else:
            batch = of.data.gather(tables, slice(0, size))
            steps = [partial(step, *batch, size)] * num_steps
        steps[0]()
        took = seconds(lambda: [one() for one in steps[1:]], setting.device)
    return took / (num_steps - 1), macs


def worked(function: Any, device: torch.device) -> tuple[float, float] | None:
    """Seconds in which some kernel runs, and seconds of the function, while it is observed.

    None: there is no GPU to ask.
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        took = seconds(function, device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA"
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy / 1e6, took


def replicas(setting: Setting) -> Iterator[Row]:
    """Several runs at once, each a process of its own, against one run that has the device to itself."""
    cores = devices.num_cores(setting.device)
    on_gpu = setting.device.type == "cuda"
    crowds = (2,) if setting.quick else (8, 4, 2) if on_gpu else (cores,)
    alone = _together(setting, 1, 1 if setting.quick else cores)
    for crowd in crowds:
        if crowd > 1:
            with mps.shared(crowd, int(on_gpu)) as shared:
                rate = _together(setting, crowd, max(cores // crowd, 1))
            yield Row(
                f"{crowd} runs of resnet20 at once, images/s of all over one run alone",
                rate / alone,
                note=f"{rate:,.0f} images/s over {alone:,.0f}" + ("; by CUDA MPS" if shared else ""),
            )


def _together(setting: Setting, number: int, num_threads: int) -> float:
    """Images a second of so many processes that train side by side."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(number), context.Queue()
    arguments = (str(setting.device), setting.quick, num_threads, barrier, rates)
    processes = [context.Process(target=_replica, args=arguments) for _ in range(number)]
    for process in processes:
        process.start()
    found = [rates.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return float(sum(found))


def _replica(device_name: str, quick: bool, num_threads: int, barrier: Barrier, rates: Any) -> None:
    torch.set_num_threads(num_threads)
    device = torch.device(device_name)
    number = 32 if quick else 51_200 if device.type == "cuda" else 640
    small = ("training.batch_size=8",) if quick else ()
    of = parts(device, "model=resnet20", *WHOLE, *small, "training.lr=0.01", num_train=number)
    mask, training = random_mask(of, 0.1), trainer(of)
    training.until(mask, 1)
    barrier.wait()
    started = time.perf_counter()
    training.until(mask, 2 if quick else 4)
    devices.wait(device)
    rates.put((1 if quick else 3) * number / (time.perf_counter() - started))
