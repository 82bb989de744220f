"""A run, and its mask as a file that others train."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from safetensors.torch import load_file
from torch import Tensor
from whole_runs import TINY, directory_of

from pai_bench import experiment
from pai_bench.masks import masks
from pai_bench.masks.parametrization import parametrize_
from pai_bench.runs.export import initial

Tensors = dict[str, Tensor]


def run(results: Path, *overrides: str) -> Path:
    experiment.run(composed(*TINY, *overrides, f"results_dir={results}"))
    return directory_of(results)


def row_of(directory: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return row


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose mask is trained again; its directory."""
    torch.set_num_threads(1)  # as every test has it
    return run(tmp_path_factory.mktemp("found"), "pruner=snip", "sparsity=0.8", "seed=3", "cache_gb=0")


@pytest.fixture
def mask(found: Path) -> Tensors:
    return load_file(found / "mask.safetensors")


def in_model_order(mask: Tensors, directory: Path) -> Tensors:
    return {name: mask[name] for name in masks.prunable(initial(directory)[0])}


def parametrized(mask: Tensors, directory: Path) -> Tensors:
    model, _ = initial(directory)
    parametrize_(model, mask)
    return model.state_dict()
