"""Whole runs of seconds: their settings, and all that they leave."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from processes import in_child
from safetensors.torch import load_file

from pai_bench import experiment

TINY = [
    "model.widths=[4,6]", "model.blocks=[1,1]", "training.epochs=2", "training.warmup_epochs=1",
    "training.batch_size=256",
    "tracker=none", "save_model=true", "save_scores=true", "num_workers=0", "channels_last=true",
    "training.compact=off",
]  # fmt: skip

# Every kind of state that a run goes through: rounds, training between rounds, rewinding, filters, new weights.
RUNS = {
    "synflow": ["pruner=synflow", "sparsity=0.8", "schedule.rounds=6"],
    "force": ["pruner=force", "sparsity=0.8", "schedule.rounds=3"],
    "rewinding to a step": [
        "pruner=magnitude", "sparsity=0.6", "schedule=rewind", "schedule.levels=2", "schedule.rewind_epoch=null",
        "schedule.rewind_step=4",
    ],
    "filters": ["pruner=filter_loss", "sparsity=0.5", "schedule.rounds=2", "pruner.scoring_data.total=64"],
    "gradual": [
        "pruner=magnitude", "sparsity=0.5", "schedule=gradual", "schedule.end_epoch=2", "schedule.every_steps=3",
    ],
    "shuffled weights": ["pruner=magnitude", "sparsity=0.6", "schedule=exponential", "schedule.rounds=3",
                         "ablation=shuffle_mask"],
    "shuffled filters": ["pruner=filter_magnitude", "sparsity=0.5", "schedule=exponential", "schedule.rounds=3",
                         "ablation=shuffle_mask"],
    "sanity check": ["pruner=snip", "sparsity=0.5", "ablation=invert_scores", "diagnostics=gradient_flow"],
    "sanity check in rounds": [
        "pruner=magnitude", "sparsity=0.5", "schedule=rewind", "schedule.levels=2", "schedule.rewind_epoch=1",
        "ablation=invert_scores",
    ],
    "dead channels": [
        "pruner=synflow", "sparsity=0.97", "schedule.rounds=4", "training.compact=auto", "training.epochs=3",
    ],
    "dead channels in rounds": [
        "pruner=magnitude", "sparsity=0.98", "schedule=rewind", "schedule.levels=2", "schedule.rewind_epoch=1",
        "training.compact=auto",
    ],
    "moving mask": ["pruner=random", "sparsity=0.7", "rewire=snfs", "rewire.every_steps=3", "rewire.end=1"],
    "moving mask that returns values": [
        "pruner=magnitude", "sparsity=0.7", "rewire=gradual", "rewire.start_sparsity=0.2", "rewire.every_steps=2",
    ],
    "early bird": [
        "pruner=filter_batch_norm", "sparsity=0.5", "allocation=global", "schedule=early_bird", "schedule.num_masks=2",
        "schedule.max_distance=1", "schedule.latest=1", "training.epochs=3", "training.batch_norm_l1=0.001",
    ],
    "reinit": ["pruner=snip", "sparsity=0.5", "ablation=reinit", "dataset.validation=0.1"],
}  # fmt: skip


def config_of(name: str, results: Path, *more: str) -> dict[str, Any]:
    return composed(*TINY, *RUNS[name], f"results_dir={results}", *more)


def directory_of(results: Path) -> Path:
    (directory,) = results.glob("[!.]*")
    return directory


def outcome(results: Path) -> dict[str, Any]:
    """All that a run leaves, but for times and for what it took over from an attempt before."""
    directory = directory_of(results)
    timed = ("seconds", "images_per_second", "peak_memory", "speedup", "reused_examples", "cache_hit")
    row = {
        k: v for k, v in json.loads((directory / "result.json").read_text()).items() if not any(t in k for t in timed)
    }
    curve = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
    return {
        "row": row,
        "curve": [{k: v for k, v in line.items() if "per_second" not in k} for line in curve],
        "mask report": json.loads((directory / "mask.json").read_text()),
        **{name: load_file(directory / f"{name}.safetensors") for name in ("mask", "scores", "model")},
        "files": sorted(path.name for path in directory.iterdir()),
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() - {"seconds"}
    for key in found:
        value = expected[key]
        if key in ("mask", "scores", "model"):
            assert found[key].keys() == value.keys()
            assert all(torch.equal(found[key][name], tensor) for name, tensor in value.items()), key
        else:
            assert found[key] == value, key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What an uninterrupted run of each kind leaves."""
    kept: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in kept:
            results = tmp_path_factory.mktemp("whole")
            started = time.perf_counter()
            pid = in_child(lambda: experiment.run(config_of(name, results)))
            assert os.waitpid(pid, 0)[1] == 0
            kept[name] = outcome(results) | {"seconds": time.perf_counter() - started}
        return kept[name]

    return of


# Small enough for seconds: an eighth of a ResNet-20.
SMALL = [
    "model=resnet20",
    "model.widths=[4,8,8]",
    "model.blocks=[1,1,1]",
    "training.epochs=2",
    "training.batch_size=128",
]


def only_run(tmp_path: Path) -> Path:
    (directory,) = (path for path in (tmp_path / "results").iterdir() if not path.name.startswith("."))
    return directory


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())
