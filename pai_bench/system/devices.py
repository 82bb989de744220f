"""The device of a run: which one, what precision it offers, how much memory was used."""

import logging
import os
import platform
import resource
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from pai_bench.errors import ConfigError
from pai_bench.system import files
from pai_bench.system.world import World

log = logging.getLogger(__name__)

AUTOCAST = {"float32": None, "tfloat32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    elif device == torch.device("cuda"):  # some of torch's functions take no GPU without a number
        device = torch.device("cuda", _least_used() if torch.cuda.device_count() > 1 else 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
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


def prepare(device: torch.device, precision: str) -> None:
    """Sets how everything that this process computes from now on is rounded, and where; once, at the start of a run.

    float32 is IEEE everywhere. tfloat32 lets a GPU round the factors of matrix products and convolutions to ten bits,
    where it has units for that; elsewhere it is float32. Convolutions take whichever algorithm is fastest.
    """
    if device.type == "cuda" and device.index is not None:
        # What names no GPU would open a context on the first, whichever the run is on.
        torch.cuda.set_device(device)
    tf32 = precision == "tfloat32" and device.type == "cuda"
    _set_flags(_Flags(tf32, tf32, benchmark=True, deterministic=False))


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Runs a block in IEEE precision, by algorithms that give the same result every time: for scores.

    What has no such algorithm is named in the log, once.
    """
    before = _flags()
    _set_flags(_Flags(False, False, benchmark=False, deterministic=True))
    # On a CPU every algorithm is deterministic, and torch would fill each new tensor with NaN.
    strict, strictly = device.type == "cuda", torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings(record=strict) as caught:
            if strict:
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        for warning in caught or []:
            _tell(warning)
    finally:
        if strict:
            torch.use_deterministic_algorithms(strictly, warn_only=warn_only)
        _set_flags(before)


class _Flags(NamedTuple):
    """What torch keeps for the whole process."""

    matmul_tf32: bool
    cudnn_tf32: bool
    benchmark: bool
    deterministic: bool


def _flags() -> _Flags:
    cudnn = torch.backends.cudnn
    return _Flags(torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)


def _set_flags(flags: _Flags) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags.matmul_tf32, flags.cudnn_tf32
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags.benchmark, flags.deterministic


_told: set[str] = set()  # operations


def _tell(warning: warnings.WarningMessage) -> None:
    """Logs that an operation is not deterministic, once for each operation; hands on any other warning."""
    message = str(warning.message)
    if "determinis" not in message:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    elif (operation := message.split()[0]) not in _told:
        _told.add(operation)
        log.info(
            "%s has no deterministic algorithm here; scores can differ between runs in their last digits", operation
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs in a precision of training."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses a training precision that the device cannot compute in.

    Raises:
        ConfigError: it cannot.
    """
    if precision == "float16" and device.type != "cuda":
        raise ConfigError(f"training.precision=float16: {device.type} has none; use bfloat16 or float32")
    if (
        precision == "bfloat16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError("training.precision=bfloat16: this GPU has none; use float16 or float32")


def describe(device: torch.device) -> str:
    """The hardware behind a device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {device.type}, {threads} {'thread' if threads == 1 else 'threads'}"


def wait(device: torch.device) -> None:
    """Waits until a device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Gives memory that no tensor holds any more back to the GPU: after a run, so that the next one finds it whole."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


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
