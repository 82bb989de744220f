"""What matters most on a GPU: searches, images a second and how busy it is, and several runs that share it."""

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import scoring, textbook
from benchmarks.data import textbook_loader
from benchmarks.measure import seconds
from benchmarks.subjects import Setting, parts, trainer
from benchmarks.table import Row
from benchmarks.training import WHOLE, random_mask, textbook_optimizer
from pai_bench.analysis import cost
from pai_bench.system import devices
from pai_bench.training.trainer import Trainer


def synflow(setting: Setting) -> Iterator[Row]:
    """The rows of the CPU, with the bars of a GPU."""
    for row in scoring.synflow(setting):
        vgg = row.name.startswith("SynFlow vgg16") and "float32" in row.name
        yield replace(row, target=20 if vgg else None, goal=50 if vgg else None)


def images(setting: Setting) -> Iterator[Row]:
    """Images a second of whole epochs of masked training, and the share of the time in which the device works."""
    small = ("training.batch_size=8",) if setting.quick else ()
    cases: list[tuple[str, str, dict[str, int]]] = [
        (net, precision, {"num_train": 64 if setting.quick else 51_200})
        for net in (("resnet20",) if setting.quick else ("resnet20", "vgg16"))
        for precision in ("float32", "bfloat16")
    ]
    if not setting.quick:
        cases.append(("resnet50", "bfloat16", {"num_train": 2560, "size": 224, "num_classes": 1000}))
    for net, precision, shape in cases:
        of = parts(
            setting.device,
            f"model={net}",
            *WHOLE,
            *small,
            f"training.precision={precision}",
            "training.lr=0.01",
            **shape,
        )
        mask = random_mask(of, 0.1)
        training, number = trainer(of), shape["num_train"]

        def epoch(training: Trainer = training, mask: dict[str, torch.Tensor] = mask) -> None:
            training.until(mask, round(training.epoch) + 1)

        epoch()  # chooses algorithms
        took = min(seconds(epoch, setting.device) for _ in range(1 if setting.quick else 3))
        counted = 6 * number * sum(cost.multiply_adds(training.model, of.data.input_shape).values())
        busy = _busy(epoch, setting.device)
        judged = setting.device.type == "cuda" and net == "resnet20" and precision == "bfloat16"
        yield Row(
            f"training of {net}, {precision}, batch {of.run.training.batch_size}",
            number / took,
            "images/s",
            target=100_000 if judged else None,
            goal=250_000 if judged else None,
            time=took,
            lower_bound=setting.rates.lower_bound(flops=counted, precision=precision),
            note="" if busy is None else f"the device works {100 * busy:.0f} % of an epoch",
        )
        if net == "resnet20" and precision == "float32":
            yield _published(setting, net, number, number / took)


def _published(setting: Setting, net: str, number: int, ours: float) -> Row:
    """The plain loop with a DataLoader of processes, for comparison."""
    of = parts(setting.device, f"model={net}", *WHOLE, "training.lr=0.01")
    copied = textbook.Masked(of.build("init"), random_mask(of, 0.1))
    workers = 0 if setting.quick else devices.num_cores(setting.device)
    loader = textbook_loader(number, of.run.training.batch_size, workers)
    optimizer = textbook_optimizer(of, copied)

    def epoch() -> None:
        textbook.epoch(copied, loader, optimizer, setting.device)

    epoch()
    took = seconds(epoch, setting.device)
    return Row(
        f"training of {net}, float32, over a DataLoader of {workers} processes",
        ours * took / number,
        note=f"{number / took:,.0f} images/s",
    )


def _busy(function: Any, device: torch.device) -> float | None:
    """The share of a function's time in which some kernel runs; None where there is no GPU to ask."""
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
    return busy / (took * 1e6)


def replicas(setting: Setting) -> Iterator[Row]:
    """Several runs at once, each a process of its own, against one run that has the device to itself."""
    cores = devices.num_cores(setting.device)
    crowds = (2,) if setting.quick else (2, 4, 8) if setting.device.type == "cuda" else (cores,)
    alone = _together(setting, 1, 1 if setting.quick else cores)
    for crowd in crowds:
        if crowd > 1:
            rate = _together(setting, crowd, max(cores // crowd, 1))
            yield Row(
                f"{crowd} runs of resnet20 at once, images/s of all over one run alone",
                rate / alone,
                note=f"{rate:,.0f} images/s over {alone:,.0f}",
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
