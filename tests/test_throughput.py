"""Images per second of the loader, of training, and of both."""

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, composed
from emulated_graphs import emulated
from image_data import photographs

from pai_bench.data.resident import Resident
from pai_bench.errors import ConfigError
from pai_bench.launch import throughput
from pai_bench.training.step import Step

__all__ = ["photographs"]  # a fixture

TINY = ("model.widths=[4,6]", "model.blocks=[1,1]", "training.batch_size=8", "device=cpu")


def test_every_way_of_holding_data_is_measured(photographs: Path) -> None:
    streamed = ("dataset=imagenet", "dataset.subset=true", f"data_dir={photographs}", "num_workers=1")
    for dataset in ((), (*streamed, "dataset.size=32", "dataset.resize=36")):
        rates = throughput.measure(composed(*TINY, *dataset), 0.1)
        assert list(rates) == ["loader", "training", "both"] and min(rates.values()) > 0


def test_a_slow_loader_slows_all_but_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, train = [], Resident.train

    def slow(self: Resident, *arguments: Any) -> Iterator[Any]:
        for batch in train(self, *arguments):
            time.sleep(0.05)
            loaded.append(time.perf_counter())
            yield batch

    monkeypatch.setattr(Resident, "train", slow)
    rates = throughput.measure(composed(*TINY), 0.5)
    assert max(rates["loader"], rates["both"]) <= 8 / 0.05
    # Training alone is fed with one batch: there is a time without loading, as long as it is measured.
    assert max(later - earlier for earlier, later in itertools.pairwise(loaded)) > 0.5


def test_what_training_alone_does_are_the_steps_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    take = Step.__call__

    def counted(self: Step, images: torch.Tensor, labels: torch.Tensor, num_images: int) -> None:
        assert self.net.training
        before = self.sums.clone()
        take(self, images, labels, num_images)
        assert not torch.equal(self.sums, before)
        sizes.append(num_images)

    monkeypatch.setattr(Step, "__call__", counted)
    rates = throughput.measure(composed(*TINY), 0.1)
    assert len(sizes) > 4 and sum(sizes) > 0.15 * rates["training"] and max(sizes) == 8


def test_on_a_gpu_what_is_measured_are_captured_steps() -> None:
    with emulated() as graphs:
        throughput.measure(composed(*TINY), 0.1)
    assert len(graphs) == 2  # of training alone, and of both together


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="throughput is measured in one process, and these are 2; start one"):
        throughput.measure(composed(*TINY), 0.1)


def test_the_script_names_the_limit_and_refuses_as_a_run_does(tmp_path: Path) -> None:
    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "throughput.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    done = script(*TINY, "--seconds", "0.2")
    assert done.returncode == 0, done.stderr
    heading, *lines, limit = done.stdout.splitlines()
    assert heading.split() == ["images/s"]
    assert [re.sub(r"\s+[\d,]+$", "", line) for line in lines] == ["loader", "training", "both"]
    assert re.fullmatch("(loader|training) is the limit: (loader|training) alone does .* times as many", limit)
    assert not list(tmp_path.iterdir())
    refused = script("training.batch_size=1")
    assert refused.returncode == 2 and refused.stderr == "config error: training.batch_size=1: give 2 or more\n"
