"""The device of a run: which one, what precision it offers, how much memory was used."""

import os
import platform
import resource
import secrets
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from pai_bench import files
from pai_bench.errors import ConfigError
from pai_bench.world import World

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick(name: str, world: World) -> torch.device:
    """The device that a setting names; "auto" is a GPU if there is one.

    Of several processes of a run each has its own GPU; of several runs each takes the GPU with the fewest others.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and world.size > 1:
        if device.index is not None:
            raise ConfigError(f"device={name}: each of {world.size} processes needs its own GPU; use device=cuda")
        # A launcher may show every process nothing but its own.
        device = torch.device("cuda", world.local_rank if torch.cuda.device_count() > 1 else 0)
    elif device == torch.device("cuda") and torch.cuda.device_count() > 1:
        device = torch.device("cuda", _least_used())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: torch {torch.__version__} finds none here; use device=auto or device=cpu")
    return device


_taken: dict[int, FileLock] = {}  # the GPU of this process and its lock, held until the process ends


def _least_used() -> int:
    """The GPU with the fewest processes of ours on this machine. The same at every call from one process."""
    if not _taken:
        folder = files.private_folder(Path(tempfile.gettempdir()) / f"pai_bench-{os.getuid()}")
        names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
        with FileLock(folder / "gpus.lock"):
            numbers = [sum(not _free(lock) for lock in folder.glob(f"gpu-{name}-*.lock")) for name in names]
            index = numbers.index(min(numbers))
            _taken[index] = FileLock(folder / f"gpu-{names[index]}-{secrets.token_hex(4)}.lock")
            _taken[index].acquire()
    return next(iter(_taken))


def _free(path: Path) -> bool:
    """Whether nobody holds a lock; its file is removed then."""
    try:
        with FileLock(path, blocking=False):
            path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def num_cores(device: torch.device) -> int:
    """The cores that fall to this process: those it may use, shared among the GPUs or processes of this machine."""
    allowed = len(os.sched_getaffinity(0))
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return min(allowed, int(os.environ["SLURM_CPUS_PER_TASK"]))
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":  # a run has one GPU, and leaves the other ones to other runs
        sharing = max(sharing, torch.cuda.device_count())
    return max(allowed // sharing, 1)


def reproducible() -> AbstractContextManager[None]:
    """Convolutions on a GPU in true float32, by an algorithm that gives the same result every time: for scores."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def fast() -> AbstractContextManager[None]:
    """The fastest convolutions on a GPU, but still in true float32 where the precision is float32: for training."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)


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


def wait(device: torch.device) -> None:
    """Waits until a device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_memory(device: torch.device) -> None:
    """Starts counting peak memory anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held: allocated on a GPU since `start_memory`, resident in this process since its start else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
