"""What time is taken with, and what this machine can do at best: the rates behind every lower bound."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pai_bench.runs.provenance import provenance
from pai_bench.system import devices

Variant = Callable[[], float]  # does something once and returns the seconds that count


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long a function takes, the work that it leaves to the device included."""
    devices.wait(device)
    started = time.perf_counter()
    function()
    devices.wait(device)
    return time.perf_counter() - started


def clocked(function: Callable[[], Any], device: torch.device) -> Variant:
    """A variant all of which counts."""
    return lambda: seconds(function, device)


@dataclass(frozen=True)
class Times:
    """Seconds of variants that were taken in turn, so that what slows the machine down slows all of them."""

    taken: dict[str, list[float]]

    def seconds(self, variant: str) -> float:
        """The median of a variant."""
        return statistics.median(self.taken[variant])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long one variant takes as another: the median over the rounds, pair by pair."""
        pairs = zip(self.taken[slow], self.taken[fast], strict=True)
        return statistics.median(one / other for one, other in pairs)


def in_turn(variants: dict[str, Variant], rounds: int, warm_up: int = 1) -> Times:
    """Takes every variant once in each round, after rounds that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, variant in variants.items():
            took = variant()
            if number >= warm_up:
                taken[name].append(took)
    return Times(taken)


@dataclass(frozen=True)
class Rates:
    """The most that was seen of a device: operations a second in each precision, and bytes a second."""

    gemm: dict[str, float]
    convolution: dict[str, float]
    memory: float

    def lower_bound(self, *, flops: float = 0.0, precision: str = "float32", moved: float = 0.0) -> float:
        """Seconds below which so many operations and bytes cannot be done, if the two overlap."""
        precision = precision if precision in self.gemm else "float32"  # a processor has no TF32
        best = max(self.gemm[precision], self.convolution[precision])
        return max(flops / best, moved / self.memory)


def rates(device: torch.device, quick: bool = False) -> Rates:
    """Measures a device with large matrix products, 3x3 convolutions and copies."""
    scale = (4 if device.type == "cpu" else 16) if not quick else 1
    size, images, length = 512 * scale, 16 * scale, scale * 25_000_000

    def best(function: Callable[[], Any]) -> float:
        seconds(function, device)
        return min(seconds(function, device) for _ in range(2 if quick else 5))

    gemm, convolution = {}, {}
    devices.prepare(device, "float32")
    with torch.no_grad():
        for precision in ("float32", "float64", "bfloat16", *(("tfloat32",) if device.type == "cuda" else ())):
            devices.prepare(device, precision)
            dtype = getattr(torch, precision.removeprefix("t"))
            # A processor without bfloat16 takes minutes for a large product.
            side = size // 4 if precision == "bfloat16" and device.type == "cpu" else size
            matrix = torch.randn(side, side, device=device).to(dtype)
            gemm[precision] = 2 * side**3 / best(partial(torch.matmul, matrix, matrix))
            pixels = torch.randn(images, 128, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
            kernel = torch.randn(128, 128, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
            took = best(partial(F.conv2d, pixels, kernel, padding=1))
            convolution[precision] = 2 * 9 * 128 * pixels.numel() / took
        source = torch.ones(length, device=device)
        target = torch.empty_like(source)
        memory = 2 * source.nbytes / best(lambda: target.copy_(source))
    return Rates(gemm, convolution, memory)


def machine(device: torch.device, measured: Rates) -> dict[str, str]:
    """What the figures were taken on, in words."""
    versions = provenance()
    commit = str(versions["commit"])[:12] + (" with changes" if versions["dirty"] else "")

    def gigaflops(found: dict[str, float]) -> str:
        return ", ".join(f"{precision} {rate / 1e9:,.0f}" for precision, rate in found.items())

    described = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "software": f"Python {versions['python']}, torch {torch.__version__}, pai_bench at {commit}",
        "GEMM, GFLOP/s": gigaflops(measured.gemm),
        "3x3 convolution, GFLOP/s": gigaflops(measured.convolution),
        "memory, GB/s": f"{measured.memory / 1e9:,.0f} (copy: read and written)",
    }
    return described | ({"GPU": devices.describe(device)} if device.type == "cuda" else {})


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                flags = information.read_text().split()
                units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
                return f"{line.partition(':')[2].strip()} ({', '.join(units)})"
    return platform.processor() or platform.machine()
