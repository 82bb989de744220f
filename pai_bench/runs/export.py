"""Exports of a finished run for other programs: its mask, and the physically smaller network, checked and measured."""

import io
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pai_bench.analysis import cost
from pai_bench.config.checks import identified
from pai_bench.config.composition import read
from pai_bench.config.schema import RunConfig
from pai_bench.core import Mask, Shape, State
from pai_bench.errors import DataError, UserError
from pai_bench.masks import masks, weight_files
from pai_bench.runs import status
from pai_bench.runs.summary import weights_again
from pai_bench.system import files, seeding
from pai_bench.training import compact_model


def trained(directory: Path, trusted: bool = False) -> tuple[nn.Module, Shape]:
    """The network of a finished run with its final weights, in eval mode on the CPU, and the shape of its images.

    Raises:
        DataError: the directory holds no finished run, or a run that did not keep its weights.
    """
    from safetensors.torch import load_file

    model, shape, _ = _built(directory, trusted)
    if not (directory / "model.safetensors").is_file():
        raise DataError(f"{directory}: there is no model.safetensors, so {weights_again(directory)}")
    model.load_state_dict(load_file(directory / "model.safetensors"))  # converts half precision too
    return model, shape


def initial(directory: Path, trusted: bool = False) -> tuple[nn.Module, Shape]:
    """The network of a finished run with its initial weights, in eval mode on the CPU, and the shape of its images.

    Raises:
        DataError: the directory holds no finished run.
        ConfigError: the initialization came from a file that is gone or has changed.
    """
    model, shape, run = _built(directory, trusted)
    if run.weights is not None:
        identified(run, "weights")
        weight_files.load_(model, run.weights)
    return model, shape


def _built(directory: Path, trusted: bool) -> tuple[nn.Module, Shape, RunConfig]:
    """The network of a finished run, initialized by its seed, in eval mode; the shape of its images; its config."""
    row = status.finished(directory)
    if row is None:
        raise DataError(f"{directory}: there is no whole result.json: it is not the directory of a finished run")
    run = read(directory / "config.yaml", trusted)
    shape: Shape = tuple(row["input_shape"])
    with seeding.seeded(run.seed, "init"):
        model: nn.Module = run.model(shape, row["num_classes"])
    return model.eval(), shape, run


def export_mask(directory: Path, output: Path, weights: Literal["initial", "final"], trusted: bool = False) -> Mask:
    """Writes the mask of a run for other programs, and returns it. The file's ending chooses the format.

    .safetensors and .npz hold bool arrays by parameter name. .pt holds a state dict with NAME_mask and NAME_orig; it
    can be loaded into a network that torch.nn.utils.prune has prepared.

    Args:
        weights: which weights the state dict holds: those before training, or those at the end of the run.

    Raises:
        DataError: the directory holds no finished run, or the run did not keep these weights.
        ConfigError: the initialization came from a file that is gone or has changed.
    """
    from safetensors.torch import load_file

    model, _ = (trained if weights == "final" else initial)(directory, trusted)
    mask: Mask = load_file(directory / "mask.safetensors")
    if output.suffix == ".safetensors":
        content = files.tensor_bytes(mask)
    else:
        buffer = io.BytesIO()
        if output.suffix == ".npz":
            first = [name for name in masks.prunable(model) if name in mask]
            order = [*first, *(name for name in mask if name not in first)]
            np.savez_compressed(buffer, **{name: mask[name].numpy() for name in order})  # type: ignore[arg-type]
        else:
            torch.save(_as_torch_prunes(model.state_dict(), mask), buffer)
        content = buffer.getvalue()
    files.write_atomically(output, content)
    return mask


def _as_torch_prunes(state: State, mask: Mask) -> State:
    """The state dict that the network would have under torch.nn.utils.prune."""
    pruned: State = {}
    for name, value in state.items():
        if name in mask:
            pruned |= {f"{name}_orig": value, f"{name}_mask": mask[name].to(value.dtype)}
        else:
            pruned[name] = value
    return pruned


def latencies(models: list[nn.Module], shape: Shape, batch_size: int, repeats: int) -> list[float]:
    """Median seconds of a forward pass of each network on a batch of random images. The networks take turns."""
    images = torch.randn(batch_size, *shape)
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            for model, seconds in zip(models, times, strict=True):
                started = time.perf_counter()
                model(images)
                if repeat >= 2:  # the first calls choose algorithms
                    seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def export(directory: Path, output: Path, batch_size: int, repeats: int, trusted: bool = False) -> list[dict[str, Any]]:
    """Writes the smaller network of a run as a torch.export program, for batches of any size.

    Returns:
        Parameters, multiply-adds and latency of the masked network and of the small network.

    Raises:
        DataError: the directory holds no finished run, or a run that did not keep its weights.
        UserError: the outputs of the small network differ from those of the masked network.
    """
    from safetensors.torch import load_file

    model, shape = trained(directory, trusted)
    masked = load_file(directory / "mask.safetensors")
    nonzero = {name: parameter != 0 for name, parameter in model.named_parameters()}
    small = compact_model.compact(model, nonzero, shape).model.eval()
    difference = _difference(model, small, shape)
    if difference > 1e-4:
        raise UserError(f"{directory}: the small network's outputs differ by {difference:.2g}; it is not written")
    images = torch.randn(2, *shape)
    program = torch.export.export(small, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, output)
    seconds = latencies([model, small], shape, batch_size, repeats)
    return [
        {
            "network": name,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "prunable": sum(weight.numel() for weight in weights),
            "nonzero": int(sum(weight.count_nonzero() for weight in weights)),
            "multiply_adds": sum(cost.multiply_adds(network, shape).values()),
            "latency_ms": 1000 * latency,
            "difference": difference,
        }
        for name, network, latency in zip(("masked", "small"), (model, small), seconds, strict=True)
        for weights in [[weight for key, weight in masks.prunable(network).items() if key in masked]]
    ]


def _difference(model: nn.Module, small: nn.Module, shape: Shape) -> float:
    """The largest difference of the outputs on random images, relative to the largest output."""
    images = torch.randn(8, *shape)
    with torch.inference_mode():
        expected: Tensor = model(images)
        return float((small(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
