"""The device of a run: which one it is, which precisions it offers, how much memory was used."""

import logging
import os
import platform
import resource
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pai_bench.errors import ConfigError
from pai_bench.system import cores, files
from pai_bench.system.world import World

log = logging.getLogger(__name__)

AUTOCAST = {"float32": None, "tfloat32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick(name: str, world: World) -> torch.device:
    """The device that a setting names; "auto" is a GPU if there is one.

    If a run has several processes, each has its own GPU. A run of one process takes the GPU with the fewest other runs.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and world.size > 1:
        if device.index is not None:
            raise ConfigError(f"device={name}: each of {world.size} processes needs its own GPU; use device=cuda")
        number = torch.cuda.device_count()
        if world.local_size > number > 1:
            raise ConfigError(
                f"device={name}: {world.local_size} processes on this machine need a GPU each, and it shows {number}; "
                "start as many processes as it has GPUs"
            )
        # Some launchers show each process only its own GPU.
        device = torch.device("cuda", world.local_rank if number > 1 else 0)
    elif device == torch.device("cuda"):  # some functions of torch need the GPU's number
        device = torch.device("cuda", _least_used() if torch.cuda.device_count() > 1 else 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here; use device=auto or "
            "device=cpu, or install the build of torch for your GPU"
        )
    return device


_lock_of_gpu: dict[int, FileLock] = {}  # the GPU of this process, and its lock: held until the process ends


def _least_used() -> int:
    """The GPU with the fewest of our processes on this machine. One process gets the same answer at every call."""
    if not _lock_of_gpu:
        folder = files.private_folder(Path(tempfile.gettempdir()) / f"pai_bench-{os.getuid()}")
        names = [_name_of_gpu(index) for index in range(torch.cuda.device_count())]
        with FileLock(folder / "gpus.lock"):
            numbers = [sum(not _free(lock) for lock in folder.glob(f"gpu-{name}-*.lock")) for name in names]
            index = numbers.index(min(numbers))
            _lock_of_gpu[index] = FileLock(folder / f"gpu-{names[index]}-{secrets.token_hex(4)}.lock")
            _lock_of_gpu[index].acquire()
    return next(iter(_lock_of_gpu))


def _name_of_gpu(index: int) -> str:
    """What all processes of this machine call a GPU."""
    properties = torch.cuda.get_device_properties(index)
    if hasattr(properties, "uuid"):
        return str(properties.uuid)
    # torch 2.4 does not know it. A process may see some of the GPUs, and then counts these.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[index].strip() if index < len(visible) and visible[index].strip() else str(index)


def _free(path: Path) -> bool:
    """Whether no process holds this lock. If so, its file is removed."""
    try:
        with FileLock(path, blocking=False):
            path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def num_cores(device: torch.device) -> int:
    """How many cores this process should use: the allowed ones, divided among the GPUs or processes of this machine."""
    allowed = cores.num_allowed()
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return min(allowed, int(os.environ["SLURM_CPUS_PER_TASK"]))
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":  # a run uses one GPU; the other GPUs are for other runs
        sharing = max(sharing, torch.cuda.device_count())
    return max(allowed // sharing, 1)


def prepare(device: torch.device, precision: str) -> None:
    """Sets the GPU and the rounding of everything that this process computes. Called once, at the start of a run.

    float32 is IEEE everywhere. With tfloat32, a GPU that has the units for it rounds the factors of matrix products
    and convolutions to ten bits; other hardware computes in float32. Convolutions use the fastest algorithm.
    """
    if device.type == "cuda" and device.index is not None:
        # Calls that name no GPU would open a context on the first GPU, even if the run uses another one.
        torch.cuda.set_device(device)
    tf32 = precision == "tfloat32" and device.type == "cuda"
    _set_algorithms(tf32=tf32, benchmark=True, deterministic=False)


@contextmanager
def settings_restored() -> Iterator[None]:
    """Runs a block, and gives torch back the settings of precision and algorithms that it had before."""
    restore = _algorithms_kept()
    try:
        yield
    finally:
        restore()


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Runs a block in IEEE precision and with deterministic algorithms. Scores are computed in such a block.

    The log names, once, each operation that has no deterministic algorithm.
    """
    restore = _algorithms_kept()
    _set_algorithms(tf32=False, benchmark=False, deterministic=True)
    # A CPU needs no strict mode: all its algorithms are deterministic. In that mode torch fills new tensors with NaN.
    strict, strictly = device.type == "cuda", torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings(record=strict) as caught:
            if strict:
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        for warning in caught or []:
            _log_operation(warning)
    finally:
        if strict:
            torch.use_deterministic_algorithms(strictly, warn_only=warn_only)
        restore()


def _algorithms_kept() -> Callable[[], None]:
    """What gives torch back the settings of precision and algorithms that it has now."""
    cudnn, operations = torch.backends.cudnn, _operations()
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    precisions = [operation.fp32_precision for operation in operations]
    older = None if operations else (torch.get_float32_matmul_precision(), cudnn.allow_tf32)

    def restore() -> None:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]

    return restore


def _set_algorithms(*, tf32: bool, benchmark: bool, deterministic: bool) -> None:
    cudnn, operations = torch.backends.cudnn, _operations()
    cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
    for number, operation in enumerate(operations):
        operation.fp32_precision = "tf32" if tf32 and number < _NUM_OF_GPU else "ieee"
    if not operations:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        cudnn.allow_tf32 = tf32


_NUM_OF_GPU = 3  # of the operations below; the others are of a CPU


def _operations() -> list[Any]:
    """Where the precision of each kind of operation is set, if someone has set it there; otherwise none.

    torch has had this interface since 2.9. Once it was used, torch may refuse to read the older settings.
    """
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return []
    of_cpu = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    if all(where.fp32_precision == "none" for where in (backends, *of_cpu[1:])):
        try:
            _ = torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
            return []
        except RuntimeError:
            pass
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, *of_cpu]


_logged_operations: set[str] = set()


def _log_operation(warning: warnings.WarningMessage) -> None:
    """Logs once for each operation that it is not deterministic. Passes on any other warning."""
    message = str(warning.message)
    if "determinis" not in message:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    elif (operation := message.split()[0]) not in _logged_operations:
        _logged_operations.add(operation)
        log.info(
            "%s has no deterministic algorithm here; scores can differ between runs in their last digits", operation
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward passes use a training precision."""
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
    """The name of the hardware of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {device.type}, {threads} {'thread' if threads == 1 else 'threads'}"


def wait(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Gives the memory that no tensor uses back to the GPU. Called after a run, so that the next run can use it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def start_memory(device: torch.device) -> None:
    """Resets the count of peak memory, on devices that can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of a GPU since `start_memory`; on a CPU that of this process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
