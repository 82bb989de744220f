"""The physically smaller network of a finished run: built, checked against the masked one, measured and written."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from pai_bench import masks, measures, structure
from pai_bench.core import Shape
from pai_bench.errors import DataError, UserError


def trained(directory: Path) -> tuple[nn.Module, Shape]:
    """The network of a finished run with its final weights, in eval mode on the CPU, and the shape of its images.

    Raises:
        DataError: the directory holds no finished run, or one without its weights.
    """
    from hydra.utils import instantiate
    from safetensors.torch import load_file

    for name, remedy in (
        ("result.json", "it is not the directory of a finished run"),
        ("model.safetensors", "the weights were not kept; run it again, elsewhere, with save_model=true"),
    ):
        if not (directory / name).is_file():
            raise DataError(f"{directory}: there is no {name}: {remedy}")
    row = json.loads((directory / "result.json").read_text())
    call: Any = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml").model)
    call.pop("name")
    shape: Shape = tuple(row["input_shape"])
    model: nn.Module = instantiate(call, _partial_=True, _convert_="all")(shape, row["num_classes"])
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval(), shape


def latencies(models: list[nn.Module], shape: Shape, batch_size: int, repeats: int) -> list[float]:
    """Median seconds of a forward pass of each network on a batch of random images, taken in turn."""
    images = torch.randn(batch_size, *shape)
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            for model, taken in zip(models, times, strict=True):
                started = time.perf_counter()
                model(images)
                if repeat >= 2:  # the first calls choose algorithms
                    taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def export(directory: Path, output: Path, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Writes the smaller network of a run as a torch.export program for batches of any size.

    Returns:
        parameters, multiply-adds and latency of the masked network and of the small one.

    Raises:
        DataError: the directory holds no finished run, or one without its weights.
        UserError: the small network does not give the same outputs.
    """
    model, shape = trained(directory)
    nonzero = {name: parameter != 0 for name, parameter in model.named_parameters()}
    small = structure.compact(model, nonzero, shape).model.eval()
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
            "prunable": masks.total(masks.prunable(network)),
            "nonzero": int(sum(weight.count_nonzero() for weight in masks.prunable(network).values())),
            "multiply_adds": sum(measures.multiply_adds(network, shape).values()),
            "latency_ms": 1000 * latency,
            "difference": difference,
        }
        for name, network, latency in zip(("masked", "small"), (model, small), seconds, strict=True)
    ]


def _difference(model: nn.Module, small: nn.Module, shape: Shape) -> float:
    """The largest difference of the outputs on random images, relative to the largest output."""
    images = torch.randn(8, *shape)
    with torch.inference_mode():
        expected: Tensor = model(images)
        return float((small(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
