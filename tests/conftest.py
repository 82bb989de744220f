"""What every test shares: composed configs, two tiny networks, a few labelled images."""

import os

# OpenMP reads it when torch is imported. Threads that wait would take the time of the tests beside them.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict
from processes import ROOT, Ended, run_script
from torch import nn
from torch.nn import functional as F

from pai_bench.config import checks, composition
from pai_bench.config.schema import RunConfig
from pai_bench.core import Batches, Shape, TrainingLength, Weights
from pai_bench.launch import names
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.rounds import prune

CONF = ROOT / "conf"

Compose = Callable[..., dict[str, Any]]
RunCli = Callable[..., Ended]

# The smallest sweep.
TWO_RUNS = ["-m", "model=lenet300", "training.epochs=1", "tracker=none", "pruner=magnitude", "sparsity=0.5", "seed=0,1"]


# Tests of whole runs in processes of their own, and of many networks: left out on the oldest torch.
SLOW = {
    "test_benchmarks", "test_compact", "test_distributed", "test_experiments", "test_families", "test_faults",
    "test_installed", "test_matching", "test_missing_packages", "test_ownership", "test_paper_numbers",
    "test_preemption", "test_published", "test_readme", "test_report_figures", "test_report_page",
    "test_report_tables", "test_resume", "test_reuse", "test_rewire_runs", "test_run", "test_run_methods",
    "test_site", "test_slurm", "test_slurm_settings", "test_sweeps", "test_verify",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


def options(group: str) -> list[str]:
    """Every option of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@lru_cache
def composed(*overrides: str) -> RunConfig:
    """The completed config of `python run.py *overrides`."""
    composition.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
        of_hydra = config.hydra
        with open_dict(config):
            config.pop("hydra")
        run = checks.complete(composition.resolved(config))
        changes_model = any(override.startswith("model.") for override in overrides)
        return names.with_changes(run, of_hydra) if changes_model else run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run side by side
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A test that starts a process of ours inside this one leaves no handlers behind."""
    log = logging.getLogger("pai_bench")
    handlers, propagate, level, raises = list(log.handlers), log.propagate, log.level, logging.raiseExceptions
    yield
    log.handlers, log.propagate, logging.raiseExceptions = handlers, propagate, raises
    log.setLevel(level)


class Chain(nn.Module):
    """conv-norm-relu twice, pooling, linear: no branches."""

    def __init__(self, norm: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=bias)
        self.norm1, self.norm2 = (nn.BatchNorm2d(6), nn.BatchNorm2d(8)) if norm else (nn.Identity(), nn.Identity())
        self.fc = nn.Linear(8, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def residual() -> nn.Module:
    from pai_bench.models.resnet import ResNet

    model = ResNet(3, 4, [4, 6], [1, 1])
    nn.init.zeros_(model.fc.bias)  # a bias adds flow of its own to SynFlow's R
    return model


def drawn(model: nn.Module) -> Weights:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def pruned_as(
    model: nn.Module,
    input_shape: Shape,
    *overrides: str,
    draw: Callable[..., Batches] = lambda examples, generator, dtype: [],
    **more: Any,
) -> Pruned:
    """What a config makes of a model, where the rounds come before training."""
    cfg = composed(*overrides)
    return prune(
        model,
        cfg.pruner,
        cfg.allocation,
        cfg.schedule(cfg.sparsity, TrainingLength(1, 1)),
        initial=drawn(model),
        input_shape=input_shape,
        draw=draw,
        loss=F.cross_entropy,
        seed=0,
        **more,
    )


@pytest.fixture(params=["chain", "residual"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Chain() if request.param == "chain" else residual()


@pytest.fixture
def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 3, 8, 8, generator=generator)  # channels first, as scores are given them
    labels = torch.randint(4, (20,), generator=generator)
    return [(images[:12], labels[:12]), (images[12:], labels[12:])]


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    return Chain().double()


@pytest.fixture
def images(batches: Batches) -> Batches:
    return [(images.double(), labels) for images, labels in batches]


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCli:
    """Runs run.py as a user would, in its own results folder; returns the finished process."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> Ended:
        return run_script("run.py", *arguments, f"results_dir={tmp_path / 'results'}", cwd=tmp_path, env=env)

    return run
