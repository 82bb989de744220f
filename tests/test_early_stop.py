"""Looks at the held-out images within an epoch: they find the lowest loss, and change nothing else."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain, composed
from few_images import RECIPE, FewImages, half, trainer
from torch import nn
from torch.nn import functional as F

from pai_bench import experiment
from pai_bench.core import Batch
from pai_bench.errors import ConfigError, LostWorkerError
from pai_bench.training.trainer import Trainer

WITH_DROPOUT = [
    "dataset=digits", "dataset.validation=0.2", "model=lenet300", "model.hidden=[16]", "training=digits",
    "training.epochs=2", "training.batch_size=50", "tracker=none", "pruner=magnitude", "sparsity=0.5",
]  # fmt: skip


UNSTEADY = replace(RECIPE, lr=1.0)  # so that losses rise within epochs


class Dropping(Chain):
    """Draws random numbers in every step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.2, self.training)


def recorded(net: nn.Module, **settings: Any) -> tuple[Trainer, list[dict[str, float]]]:
    lines: list[dict[str, float]] = []
    settings |= {"data": FewImages(validation=20), "record": lambda metrics, epoch: lines.append(metrics)}
    return trainer(net, UNSTEADY, **settings), lines


def loss_and_accuracy(net: nn.Module, data: FewImages) -> tuple[float, float]:
    with torch.no_grad():
        net.eval()
        (images, labels), *_ = data.evaluation("validation", 100)
        loss = float(F.cross_entropy(net(images), labels))
        (images, labels), *_ = data.evaluation("test", 100)
        return loss, float((net(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("every", [1, 3])
def test_the_lowest_loss_is_found_within_an_epoch(every: int) -> None:
    torch.manual_seed(0)
    net = Chain()
    mask = half(net)
    looking, lines = recorded(copy.deepcopy(net), validate_every=every)
    looking.until(mask, 3)

    # The same training, stopped at every step: five steps an epoch, the end of an epoch always counts.
    found: list[tuple[float, int, float]] = []
    stopping = trainer(net, UNSTEADY, data=FewImages(validation=20))
    for step in range(1, 16):
        stopping.until(mask, step / 5)
        if step % every == 0 or step % 5 == 0:
            loss, accuracy = loss_and_accuracy(stopping.trained, FewImages(validation=20))
            found.append((loss, step, accuracy))
        ended = step // 5
        if step % 5 == 0:
            lowest = min(found)
            line = lines[ended]
            assert line["lowest_validation_loss"] == pytest.approx(lowest[0], rel=1e-5)
            assert line["early_stop_epoch"] == pytest.approx(lowest[1] / 5)
            assert line["test_top1_at_early_stop"] == pytest.approx(lowest[2])
    assert lines[1]["early_stop_epoch"] < 1 < lines[2]["early_stop_epoch"] < 2


def test_looking_changes_no_step() -> None:
    torch.manual_seed(0)
    net = Dropping()
    mask = half(net)
    (looking, _), (blind, lines) = (recorded(copy.deepcopy(net), validate_every=every) for every in (1, None))
    looking.until(mask, 2)
    blind.until(mask, 2)
    assert all(map(torch.equal, looking.model.parameters(), blind.model.parameters()))
    assert all(map(torch.equal, looking.model.buffers(), blind.model.buffers()))
    assert "early_stop_epoch" not in lines[-1]


def test_a_new_mask_and_another_start_count_anew() -> None:
    torch.manual_seed(0)
    net = Chain()
    mask = half(net)
    looking, lines = recorded(net, validate_every=2, keep_epochs=[0.0])
    looking.until(mask, 2)
    first = lines[-1]["lowest_validation_loss"]
    looking.rewind(mask, 0.0, True)
    looking.until(mask, 1)
    again = lines[-1]
    assert again["lowest_validation_loss"] == pytest.approx(lines[1]["lowest_validation_loss"]) != first
    assert 0 < again["early_stop_epoch"] <= 1


def test_a_run_that_is_interrupted_at_every_step_finds_the_same(tmp_path: Path) -> None:
    words = [*WITH_DROPOUT, "validate_every_steps=7", "checkpoint_minutes=0"]
    whole = experiment.run(composed(*words, f"results_dir={tmp_path / 'whole'}"))

    class StoppedError(Exception):
        pass

    cfg = composed(*words, f"results_dir={tmp_path / 'broken'}")
    steps = Trainer._save_mid_epoch

    def save_and_stop(self: Trainer) -> None:
        steps(self)
        if self.clock % 5 == 0 and self.clock not in seen:
            seen.add(self.clock)
            raise StoppedError

    seen: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_mid_epoch", save_and_stop)
        for _ in range(100):
            try:
                broken = experiment.run(cfg)
                break
            except StoppedError:
                continue
    assert len(seen) > 5
    for column in ("early_stop_epoch", "test_top1_at_early_stop", "test_top1", "best_test_top1"):
        assert broken[column] == whole[column], column
    coarse = experiment.run(composed(*WITH_DROPOUT, f"results_dir={tmp_path / 'coarse'}"))
    assert coarse["test_top1"] == whole["test_top1"] and coarse["early_stop_epoch"] in (1, 2)
    assert coarse["id"] != whole["id"]


class Losing(FewImages):
    """Loses the workers in one of its evaluations, after the first batch, when torch's random numbers have moved."""

    def __init__(self, at: int) -> None:
        super().__init__(validation=20)
        self.left = at

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        torch.rand(3)  # as a loader does
        for number, batch in enumerate(super().evaluation(split, batch_size)):
            self.left -= number == 0
            if self.left == 0:
                raise LostWorkerError("gone")
            yield batch


@pytest.mark.parametrize("at", range(1, 15))
def test_an_evaluation_that_loses_its_workers_is_made_up_for_to_the_bit(at: int) -> None:
    torch.manual_seed(0)
    net = Dropping()
    mask = half(net)
    whole, expected = recorded(copy.deepcopy(net), validate_every=2)
    whole.finish(mask, 2)
    lines: list[dict[str, float]] = []
    saved: list[tuple[Any, int]] = []

    def training(data: FewImages) -> Trainer:
        settings: dict[str, Any] = {"validate_every": 2, "record": lambda metrics, epoch: lines.append(metrics)}
        return trainer(copy.deepcopy(net), UNSTEADY, data=data, **settings, checkpoint=lambda _: save())

    def save() -> None:
        saved.append((copy.deepcopy(broken.state()), len(lines)))

    broken = training(Losing(at))
    try:
        broken.finish(mask, 2)
    except LostWorkerError:
        state, number = saved[-1]
        assert state["progress"] == broken.progress.state()  # it was saved when the workers were lost
        del lines[number:]
        broken = training(FewImages(validation=20))
        broken.load_state(state, mask)
        broken.finish(mask, 2)
    else:
        assert at > 10  # evaluations: ten, and one more wherever a look finds the lowest loss
    assert all(map(torch.equal, broken.model.parameters(), whole.model.parameters()))
    timed = "train_images_per_second"
    assert [line | {timed: 0} for line in lines] == [line | {timed: 0} for line in expected]
    counted = [each.progress.state() | {"seconds": 0, "epoch_seconds": 0} for each in (broken, whole)]
    assert counted[0] == counted[1]


def test_looks_need_images_that_are_held_out() -> None:
    with pytest.raises(ConfigError, match=r"validate_every_steps=100: no images are held out; add dataset.validation"):
        composed("validate_every_steps=100")
