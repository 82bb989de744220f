"""Points of the plane as a dataset: what is drawn, how it is split, and in which batches it comes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from torch import Generator, Tensor

from pai_bench.core import Batches, Data, DataSettings, OnDevice, ScoringData, Shard
from pai_bench.data.planted_circle import planted_circle
from pai_bench.errors import ConfigError
from pai_bench.models.circle_ticket import BORDERS

CPU = torch.device("cpu")
PLACE = DataSettings(Path(), False, CPU, 0)
SHAPE = (2, 1, 1)


def circle(share: Shard = PLACE.share, **settings: Any) -> Data:
    defaults = {"num_examples": 1_000, "test_fraction": 0.1, "noise": 0.01, "seed": 0, "validation": 0.0}
    return planted_circle(DataSettings(Path(), False, CPU, 0, share), **(defaults | settings))


def everything(data: Data, split: str) -> tuple[Tensor, Tensor]:
    images, labels = zip(*data.evaluation(split, 64), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_data_has_the_size_and_the_classes_of_the_paper() -> None:
    data = composed("dataset=planted_circle", "model=planted").dataset(PLACE)
    assert data.num_examples == {"train": 9_000, "validation": 0, "test": 1_000}
    assert (data.input_shape, data.num_classes) == (SHAPE, 4)
    images, labels = everything(data, "train")
    squares = images.flatten(1).double().square().sum(1)
    classes = torch.bucketize(squares, torch.tensor(BORDERS, dtype=torch.float64))
    wrong = classes != labels
    assert wrong.double().mean() == pytest.approx(0.01, abs=0.003)
    assert ((classes - labels)[wrong].abs() == 1).all()  # the second likeliest class is a neighbour
    # Between its borders, the runner-up of class 1 changes where 5 (r - 0.2) = 10 (0.5 - r).
    of_one = wrong & (classes == 1)
    assert torch.equal(labels[of_one], torch.where(squares[of_one] < 0.4, 0, 2))
    assert images.min() < -0.99 and images.max() > 0.99 and images.dtype == torch.float32


def test_the_seed_of_the_data_decides_it_and_no_other_generator_does() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = circle(), circle(), circle(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.checksum == again.checksum != other.checksum
    assert torch.equal(everything(first, "test")[0], everything(again, "test")[0])
    clean, noisy = circle(noise=0.0), circle(noise=1.0)
    assert torch.equal(everything(clean, "train")[0], everything(noisy, "train")[0])
    assert (everything(clean, "train")[1] != everything(noisy, "train")[1]).all()


def test_an_epoch_shows_every_point_once_and_any_part_of_it_is_the_same() -> None:
    data = circle(num_examples=101, test_fraction=0.2)
    assert isinstance(data, OnDevice)

    def epoch(start: int = 0, seed: int = 0, of: Data = data) -> Batches:
        return list(of.train(16, Generator().manual_seed(seed), Generator(), start))

    batches = epoch()
    assert [len(labels) for _, labels in batches] == [16] * 5  # a single point is left over, and left out
    points, of_split = torch.cat([images for images, _ in batches]), everything(data, "train")[0]
    assert len({tuple(p.flatten().tolist()) for p in points}) == 80
    assert {tuple(p.flatten().tolist()) for p in points} < {tuple(p.flatten().tolist()) for p in of_split}
    for (images, labels), (later, later_labels) in zip(batches[2:], epoch(start=2), strict=True):
        assert torch.equal(images, later) and torch.equal(labels, later_labels)
    assert not torch.equal(epoch(seed=1)[0][0], batches[0][0])
    tables = data.tables(Generator().manual_seed(0), Generator())
    assert torch.equal(data.gather(tables, torch.arange(16, 32))[0], batches[1][0])
    shares = [epoch(of=circle(Shard(rank, 2), num_examples=101, test_fraction=0.2)) for rank in (0, 1)]
    for whole, *parts in zip(batches, *shares, strict=True):
        assert torch.equal(whole[0][0::2], parts[0][0]) and torch.equal(whole[0][1::2], parts[1][0])


def test_every_process_evaluates_other_batches() -> None:
    whole = circle()
    parts = [list(circle(Shard(rank, 2)).evaluation("test", 30)) for rank in (0, 1)]
    ordered = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
    assert torch.equal(torch.cat([images for images, _ in ordered]), everything(whole, "test")[0])


def test_scoring_points_are_drawn_as_images_are() -> None:
    data = circle()
    wanted = ScoringData(per_class=5, total=None, batch_size=19, augment=False)

    def scored_on(**settings: Any) -> Batches:
        return data.draw(wanted, Generator().manual_seed(3), torch.float64, **settings)

    batches = scored_on()
    assert [images.shape for images, _ in batches] == [(20, *SHAPE)]  # the single left-over point joins
    images, labels = batches[0]
    assert images.dtype == torch.float64 and torch.equal(labels.bincount(), torch.tensor([5] * 4))
    assert torch.equal(images, images.float().double()) and torch.equal(images, scored_on()[0][0])

    def mirrored(stored: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        assert stored.shape == (20, 1, 1, 2) and torch.equal(of, labels)
        return -stored, of.flip(0)

    ((changed, of_changed),) = scored_on(change=mirrored)
    assert torch.equal(changed, -images) and torch.equal(of_changed, labels.flip(0))
    with pytest.raises(ConfigError, match=r"pruner.scoring_data.per_class=9000: class 0 has .* training images"):
        data.draw(ScoringData(9_000, None, 10, False), Generator(), torch.float32)


def test_points_are_held_out_for_validation() -> None:
    data = circle(validation=0.2)
    assert data.num_examples == {"train": 720, "validation": 180, "test": 100}
    train, held = (
        {tuple(p.flatten().tolist()) for p in everything(data, split)[0]} for split in ("train", "validation")
    )
    assert not train & held


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_examples": 4}, "dataset.test_fraction=0.1: of 4 points it leaves no test point; give more"),
        ({"num_examples": 3, "test_fraction": 0.9}, "of 3 points it leaves no training point; give less"),
        ({"num_examples": 3, "test_fraction": 0.7}, "dataset: 1 training image is too few"),
        ({"validation": 0.0001}, "dataset.validation=0.0001: .* no validation image"),
    ],
    ids=["test", "train", "one", "validation"],
)
def test_splits_without_points_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        circle(**settings)
