"""What TensorBoard shows of a run: read back with its own reader."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import composed
from safetensors.torch import save_file
from torch import tensor

from pai_bench import experiment
from pai_bench.errors import ConfigError
from pai_bench.runs import tracking
from pai_bench.runs.replay import replay
from pai_bench.runs.tracker import Guarded, Run

pytest.importorskip("tensorboard")

SMALL = ["model=lenet300", "training=smoke", "training.epochs=2", "tracker=tensorboard", "device=cpu"]


def read(directory: Path) -> Any:
    """What TensorBoard reads of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"), {"tensors": 0, "scalars": 0, "histograms": 0})
    return found.Reload()


def scalars(found: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(name)]


def curve(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]


def test_curves_densities_and_the_row_can_be_read_back(tmp_path: Path) -> None:
    words = ["pruner=synflow", "sparsity=0.8", "schedule.rounds=3", "save_scores=true", f"results_dir={tmp_path}"]
    cfg = composed(*SMALL, *words)
    row = experiment.run(cfg)
    found = read(cfg.directory)
    lines = curve(cfg.directory)
    evaluated = [(int(line["epoch"]), line["test_top1"]) for line in lines if "test_top1" in line]
    assert scalars(found, "test_top1")[: len(evaluated)] == [(step, pytest.approx(top1)) for step, top1 in evaluated]
    assert [step for step, _ in scalars(found, "prune/sparsity")] == [1, 2, 3]
    layers = json.loads((cfg.directory / "mask.json").read_text())["layers"]
    densities = [(number, pytest.approx(layer["density"])) for number, layer in enumerate(layers, start=1)]
    assert scalars(found, "density by layer") == densities
    assert not [name for name in found.Tags()["scalars"] if name.startswith("layer/")]
    (scores,) = found.Histograms("scores (log10)")
    assert 0 < scores.histogram_value.num <= row["num_prunable"]
    config = json.loads(found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()[8:-4])
    assert (config["sparsity"], config["seed"], config["provenance"]["host"] != "") == (0.8, 0, True)
    assert "_hparams_/session_start_info" in found.summary_metadata


def test_a_run_that_goes_on_is_written_once(tmp_path: Path) -> None:
    lines = [{"epoch": float(epoch), "test_top1": epoch / 10} for epoch in range(5)]
    first = tracking.tensorboard(Run("a", "g", tmp_path, {}, []))
    for line in lines[:4]:
        first.record({"test_top1": line["test_top1"]}, line["epoch"])
    first.finish({}, 75)
    again = tracking.tensorboard(Run("a", "g", tmp_path, {}, [], lines[:3], 1))
    for line in lines[3:]:
        again.record({"test_top1": line["test_top1"], "test_loss": float("nan")}, line["epoch"])
    again.finish({}, 0)
    assert scalars(read(tmp_path), "test_top1") == [(n, pytest.approx(n / 10)) for n in range(5)]
    assert "test_loss" not in read(tmp_path).Tags()["scalars"]


def test_a_run_can_be_written_later(tmp_path: Path) -> None:
    cfg = composed(*SMALL, "pruner=magnitude", "sparsity=0.5", f"results_dir={tmp_path}")
    experiment.run(cfg)
    live = scalars(read(cfg.directory), "test_top1")
    assert replay(cfg.directory, cfg, cfg.tracker)
    assert scalars(read(cfg.directory), "test_top1") == live


def test_both_trackers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = ["tracker=wandb_and_tensorboard", "tracker.project=mine", "pruner=magnitude", "sparsity=0.5"]
    cfg = composed(*SMALL, *words, f"results_dir={tmp_path}")
    assert cfg.tracker.settings["project"] == "mine"
    experiment.run(cfg)
    assert len(scalars(read(cfg.directory), "test_loss")) >= 3


def test_a_tracker_that_fails_is_named_once_and_ends_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    class Broken:
        delivers = True

        def record(self, metrics: dict[str, float], epoch: float) -> None:
            raise OSError("disk full")

        def mask(self, file: Path) -> None:
            raise AssertionError("it is called no more")

        finish = mask

    with caplog.at_level("WARNING", logger="pai_bench"):
        tracker = Guarded("mine", lambda run: Broken(), Run("a", "g", tmp_path, {}, []))
        assert tracker.delivers
        tracker.record({}, 0.0)
        tracker.record({}, 1.0)
        tracker.mask(tmp_path)
        tracker.finish({}, 0)
    assert not tracker.delivers
    (said,) = caplog.messages
    assert said == "tracker=mine failed to record metrics (OSError: disk full); the run goes on without it"


def test_what_is_not_installed_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tracker=tensorboard: tensorboard is not installed; pip install tensorboard"):
        composed("tracker=tensorboard", "seed=77")


def test_the_histogram_counts_scores_by_their_size(tmp_path: Path) -> None:
    from pai_bench.runs import pictures

    assert pictures.magnitudes(tmp_path) is None
    save_file({"a": tensor([0.0, 1.0, -10.0]), "b": tensor([[1000.0]])}, tmp_path / "scores.safetensors")
    found = pictures.magnitudes(tmp_path)
    assert found is not None and sorted(found) == [0.0, 1.0, 3.0]
    counts, edges = pictures.histogram(found)
    assert (counts.sum(), len(edges), edges[0], edges[-1]) == (3, 65, 0.0, 3.0)
