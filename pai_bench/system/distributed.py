"""What the processes of one run must agree on. In a run of one process these functions do nothing."""

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from pai_bench.core import Mask, Selection, Weights
from pai_bench.errors import ConfigError
from pai_bench.system import preemption
from pai_bench.system.world import World, world

T = TypeVar("T")
log = logging.getLogger(__name__)
_SILENT_SECONDS = 5.0  # how long the first process waits for the others before it says so


def start(device: torch.device) -> None:
    """Connects the processes of this run. Later calls do nothing.

    Raises:
        ConfigError: SLURM does not say where the first process runs.
        PreemptedError: a signal came while this process waited for the others.
    """
    here = world()
    if here.size == 1 or distributed.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", "")
        try:
            shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            port = _port(int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", 0)))
            os.environ["MASTER_ADDR"] = shown.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
            raise ConfigError(
                f"{here.variable}={here.size}: scontrol does not tell the hosts of these processes ({error}); start "
                f"them with srun or torchrun, or unset {here.variable} if there are none"
            ) from error
        os.environ["MASTER_PORT"] = str(port)
    os.environ |= {"RANK": str(here.rank), "WORLD_SIZE": str(here.size), "LOCAL_RANK": str(here.local_rank)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    _meet(here, lambda: distributed.init_process_group(backend, timeout=timedelta(hours=1)))


def _port(job: int, step: int) -> int:
    """A port for one step of a SLURM job. Jobs that share a machine have different ids, so have the steps of a job."""
    # Steps lie far apart: the next job may be on this machine, too.
    return 20000 + (job + 4999 * step) % 40000


def _meet(here: World, join: Callable[[], None]) -> None:
    """Joins the other processes in a thread. The main thread can then log that it waits, and end at a signal.

    Raises:
        PreemptedError: a signal came.
    """
    failed: list[Exception] = []

    def work() -> None:
        try:
            join()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="meet", daemon=True)
    thread.start()
    # Usually the first process waits for another one, and says so. The others speak up later: the first may be missing.
    patience, level = (_SILENT_SECONDS, logging.WARNING) if here.rank == 0 else (6 * _SILENT_SECONDS, logging.ERROR)
    said, started = False, time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        preemption.check()
        if not said and thread.is_alive() and time.monotonic() - started > patience:
            said = True
            log.log(
                level,
                "process %d of %d waits for the others at %s:%s; if there are none, unset %s",
                here.rank,
                here.size,
                os.environ["MASTER_ADDR"],
                os.environ.get("MASTER_PORT", "?"),
                here.variable,
            )
    if failed:
        raise failed[0]


def _alone() -> bool:
    return not distributed.is_initialized() or distributed.get_world_size() == 1


def agree(action: Callable[[], T]) -> T:
    """Runs an action in the first process. Every process then returns, or raises, what the action gave there."""
    if _alone():
        return action()
    outcome: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            outcome = [(True, action())]
        except Exception as error:
            outcome = [(False, error)]
    distributed.broadcast_object_list(outcome, 0)
    succeeded, value = outcome[0]
    if not succeeded:
        value.shared = True
        raise value
    result: T = value
    return result


def check_same(run_id: str) -> None:
    """Refuses processes that were started with different settings: they would be taken for the processes of one run.

    Raises:
        ConfigError: the names of their runs differ.
    """
    if _alone():
        return
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, run_id)
    if len(names := list(dict.fromkeys(found))) > 1:
        here = world()
        raise ConfigError(
            f"{here.variable}={here.size}: the processes of one run have different settings ({names[0]}, {names[1]}); "
            f"give all of them the same, or unset {here.variable} where each is to do a run of its own"
        )


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if not _alone():
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


class _Total(torch.autograd.Function):
    """`total` with a gradient. Each summand enters the sum in every process, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return total(gradient)


def from_first(value: Mask | Weights | Selection) -> Any:
    """The tensors of the first process, instead of those that this process has computed."""
    if _alone():
        return value
    if isinstance(value, Selection):
        scale = value.scale if value.scale is None else from_first(value.scale)
        return replace(value, mask=from_first(value.mask), scale=scale)
    received = {}
    for name, tensor in value.items():
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
        distributed.broadcast(sent, 0)
        received[name] = sent.to(tensor.dtype)
    return received


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, with gradients averaged over the processes."""
    if _alone():
        return model
    devices, parallel = [device] if device.type == "cuda" else None, nn.parallel.DistributedDataParallel
    # From torch 2.13 on broadcast_buffers has another name.
    names = ("forward_sync_buffers", "broadcast_buffers")
    keeps_buffers: Any = {next(name for name in names if name in signature(parallel).parameters): False}
    return parallel(model, device_ids=devices, **keeps_buffers)


@contextmanager
def synchronised_norms(model: nn.Module) -> Iterator[None]:
    """Inside the block, batch norms in train mode compute their statistics over the batches of all processes.

    So the number of processes changes a result only by rounding errors. The modules keep their types, because scores
    and other libraries look at the types.
    """
    every = [] if _alone() else [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [module for module in every if not isinstance(module, nn.SyncBatchNorm)]  # which does it by itself
    for module in norms:
        module.forward = partial(_synchronised, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _synchronised(module: _BatchNorm, x: Tensor) -> Tensor:
    """What a norm returns. Its own forward runs, which may do more than to normalise, such as apply an activation.

    Raises:
        ConfigError: it normalises in another way than by torch's function.
    """
    forward, plain, num_calls = type(module).forward, functional.batch_norm, 0

    def counted(*given: Any, **named: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return _batch_norm(*given, **named)

    functional.batch_norm = counted if module.training else plain
    try:
        result: Tensor = forward(module, x)
    finally:
        functional.batch_norm = plain
    if module.training and not num_calls:
        raise ConfigError(
            f"{type(module).__name__}: this batch norm does not call torch.nn.functional.batch_norm, so processes "
            "cannot share its statistics; use one process"
        )
    return result


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm, with statistics over the batches of all processes."""
    if not training:
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn)
    if x.is_cuda:  # torch's operation for GPUs: one collective forward, one backward, no waiting
        from torch.nn.modules._functions import SyncBatchNorm

        everyone = distributed.group.WORLD, distributed.get_world_size()
        result: Tensor = SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, running_mean, running_var, eps, momentum, *everyone
        )
        return result
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    values = x if x.dtype == torch.float64 else x.float()
    count = total(torch.tensor(x.numel() / x.shape[1], dtype=values.dtype, device=x.device))
    mean: Tensor = _Total.apply(values.sum(dims)) / count  # type: ignore[no-untyped-call]
    centred = values - mean.view(shape)
    variance: Tensor = _Total.apply(centred.square().sum(dims)) / count  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * count / (count - 1), momentum)
    result = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)
    return result.to(x.dtype)
