"""The device of a run: which one, what precision it offers, how much memory was used."""

import platform
import resource
import sys

import torch

from pai_bench.errors import ConfigError

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick(name: str) -> torch.device:
    """The device that a setting names; "auto" is the GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    device = torch.device(name)
    if not available[device.type] or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(f"device={name}: torch {torch.__version__} finds none here; use device=auto or device=cpu")
    return device


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses a training precision that the device cannot compute in.

    Raises:
        ConfigError: it cannot.
    """
    if precision == "float16" and device.type != "cuda":
        raise ConfigError(f"training.precision=float16: {device.type} has none; use bfloat16 or float32")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.precision=bfloat16: this GPU has none; use float16 or float32")


def describe(device: torch.device) -> str:
    """The hardware behind a device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on a GPU, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
