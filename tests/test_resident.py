"""Datasets held on the device: batches, augmentation, validation, scoring batches, settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from image_data import CPU, all_images, all_labels, load, numbered
from torch import Generator

from pai_bench.batches import Drawn, labels_of
from pai_bench.core import DataSettings, ScoringData, num_steps
from pai_bench.data import resident
from pai_bench.data.resident import Resident
from pai_bench.errors import ConfigError, DataError
from pai_bench.pruning import ablations
from pai_bench.system import layout


def test_evaluation_gives_every_image_once_in_order_and_unchanged() -> None:
    data = numbered(7)
    images = all_images(data, "test").round()
    assert images.shape == (4, 3, 6, 5)
    assert torch.equal(images[:, 0], torch.arange(1.0, 5.0).view(4, 1, 1).expand(4, 6, 5))
    assert torch.equal(images[:, 1], torch.arange(1.0, 7.0).view(1, 6, 1).expand(4, 6, 5))
    assert torch.equal(images[:, 2], torch.arange(1.0, 6.0).view(1, 1, 5).expand(4, 6, 5))
    assert all_labels(data, "test") == [0, 1, 2, 0]


def test_augmentation_is_a_crop_of_the_zero_padded_image_and_a_flip() -> None:
    data = numbered(40)
    seen = set()
    for epoch in range(40):
        for images, labels in data.train(16, Generator().manual_seed(epoch), Generator().manual_seed(epoch)):
            for image, label in zip(images.round(), labels, strict=True):
                number = int(image[0].max())
                assert int(label) == (number - 1) % 3
                flipped = image.flip(2) if _falls(image[2]) else image
                row, column = _offset(flipped[1].max(1).values, 6), _offset(flipped[2].max(0).values, 5)
                seen.add((row, column, _falls(image[2])))
                assert torch.equal(flipped, _crop(number, row, column))
    assert seen == {(row, column, flip) for row in range(5) for column in range(5) for flip in (False, True)}


def _falls(columns: torch.Tensor) -> bool:
    visible = columns.max(0).values
    visible = visible[visible > 0]
    return bool(visible[0] > visible[-1])


def _offset(visible: torch.Tensor, size: int) -> int:
    """Where a crop starts in the padded image, from the names of the rows (or columns) that it shows."""
    first = int((visible > 0).nonzero()[0])
    return int(visible[first]) - 1 + 2 - first


def _crop(number: int, row: int, column: int) -> torch.Tensor:
    padded = torch.zeros(3, 10, 9)
    padded[0, 2:8, 2:7] = number
    padded[1, 2:8, 2:7] = torch.arange(1.0, 7.0)[:, None]
    padded[2, 2:8, 2:7] = torch.arange(1.0, 6.0)
    return padded[:, row : row + 6, column : column + 5]


def test_an_epoch_shows_every_image_once_and_is_decided_by_its_generators() -> None:
    data = numbered(23, padding=0, flip=False)

    def epoch(order: int, augment: int) -> list[int]:
        batches = data.train(5, Generator().manual_seed(order), Generator().manual_seed(augment))
        return torch.cat([images[:, 0, 0, 0] for images, _ in batches]).round().int().tolist()

    assert sorted(epoch(0, 0)) == list(range(1, 24))
    assert epoch(0, 0) == epoch(0, 1) != epoch(1, 0)


@pytest.mark.parametrize(("num_examples", "steps"), [(20, 4), (21, 4), (22, 5), (24, 5), (25, 5)])
def test_a_trailing_batch_of_one_image_is_left_out(num_examples: int, steps: int) -> None:
    batches = list(numbered(num_examples).train(5, Generator(), Generator()))
    assert len(batches) == steps == num_steps(num_examples, 5)
    assert all(len(labels) > 1 for _, labels in batches)


def test_validation_comes_from_the_training_images_in_equal_shares_and_never_changes() -> None:
    whole, data, again = numbered(60), numbered(60, validation=0.2), numbered(60, validation=0.2)
    assert whole.num_examples == {"train": 60, "validation": 0, "test": 4}
    assert data.num_examples == {"train": 48, "validation": 12, "test": 4}
    train, validation = (set(all_images(data, split)[:, 0, 0, 0].round().tolist()) for split in ("train", "validation"))
    assert len(train) == 48 and len(validation) == 12 and not train & validation
    assert sorted(all_labels(data, "validation")) == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(all_images(data, "validation"), all_images(again, "validation"))


def test_mean_and_deviation_are_measured_on_the_training_images_when_not_given() -> None:
    data = numbered(9, mean=None, std=None)
    images = all_images(data, "train")
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_what_is_given_of_mean_and_deviation_is_used() -> None:
    data = numbered(9, mean=[0.1, 0.2, 0.3], std=None)
    measured = numbered(9, mean=None, std=None)
    shift = all_images(data, "test") - all_images(measured, "test")
    assert (shift.flatten(2).std(2) < 1e-3).all() and shift.abs().min() > 1e-3


def standardised(**settings: Any) -> tuple[Resident, np.ndarray]:
    """Twelve images, each standardised by itself, and their bytes. One is grey; in one a single byte differs."""
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    images[3] = 77
    images[4] = 200
    images[4, 2, 1, 0] = 201
    given = images, np.arange(12) % 3
    place = DataSettings(Path(), False, CPU, 0)
    defaults = {"validation": 0.0, "mean": None, "std": None, "padding": 2, "flip": True}
    return Resident(given, given, 3, place, standardize="per_image", **(defaults | settings)), images


def by_definition(images: np.ndarray) -> np.ndarray:
    """(x - mean) / max(deviation, 1 / sqrt(number of values)) of each image, in float64; (N, C, H, W)."""
    values = images.astype(np.float64)
    mean, deviation = (values.mean((1, 2, 3), keepdims=True), values.std((1, 2, 3), keepdims=True))
    return ((values - mean) / np.maximum(deviation, 1 / np.sqrt(values[0].size))).transpose(0, 3, 1, 2)


def test_an_image_is_standardised_by_its_own_mean_and_deviation() -> None:
    data, images = standardised()
    found, expected = all_images(data, "test").double().numpy(), by_definition(images)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found.mean((1, 2, 3))).max() < 1e-6
    deviations = found.std((1, 2, 3))
    assert deviations[3] == 0 and 0.9 < deviations[4] < 0.999  # the least divisor is 1 / sqrt(90)
    assert np.abs(np.delete(deviations, [3, 4]) - 1).max() < 1e-6


def test_crops_are_standardised_with_their_padding() -> None:
    data, images = standardised()
    black = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    crops = [black[:, i : i + 6, j : j + 5] for i in range(5) for j in range(5)]
    allowed = by_definition(np.concatenate([crop for plain in crops for crop in (plain, plain[:, :, ::-1])]))
    for batch, _ in data.train(5, Generator().manual_seed(0), Generator().manual_seed(1)):
        for image in batch.double().numpy():
            assert np.abs(allowed - image).max((1, 2, 3)).min() < 1e-5


def test_scores_see_standardised_images_in_their_precision() -> None:
    data, images = standardised(flip=False)
    examples = ScoringData(per_class=None, total=12, balanced=False, batch_size=5, augment=False)
    (drawn,) = [data.draw(examples, Generator().manual_seed(0), torch.float64)]
    found = torch.cat([batch for batch, _ in drawn]).numpy()
    distance = np.abs(found[:, None] - by_definition(images)[None]).max((2, 3, 4))
    assert found.dtype == np.float64 and sorted(distance.argmin(1)) == list(range(12))
    assert distance.min(1).max() < 1e-12


def test_two_normalisations_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"dataset.standardize=per_image: give dataset.mean=null and dataset.std=null"
    ):
        standardised(mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(
        ConfigError, match=r"dataset.standardize=per_image: give dataset.mean=null and dataset.std=null"
    ):
        composed("dataset=cifar10", "dataset.standardize=per_image")
    chosen = composed("dataset=cifar10", "dataset.standardize=per_image", "dataset.mean=null", "dataset.std=null")
    assert chosen.id != composed("dataset=cifar10").id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": [0.5]}, r"dataset.mean=\[0.5\]: the images have 3 channels"),
        (
            {"validation": 0.001},
            "dataset.validation=0.001: of 9 images it leaves no validation image; give a larger",
        ),
        (
            {"validation": 0.99},
            "dataset.validation=0.99: of 9 images it leaves no training image; give a smaller",
        ),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbered(9, **settings)


def test_scoring_examples_are_balanced_and_plain_on_request() -> None:
    data = numbered(60)
    batches = data.draw(
        ScoringData(per_class=4, total=None, batch_size=5, augment=False), Generator().manual_seed(0), torch.float32
    )
    labels = torch.cat([labels for _, labels in batches])
    images = torch.cat([images for images, _ in batches])
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    assert labels.tolist() != sorted(labels.tolist())
    plain = all_images(data, "train")
    assert all(any(torch.equal(image, other) for other in plain) for image in images)
    augmented = data.draw(ScoringData(4, None, 5, augment=True), Generator().manual_seed(0), torch.float32)
    assert not all(any(torch.equal(image, other) for other in plain) for image in augmented[0][0])
    other = data.draw(ScoringData(4, None, 5, augment=False), Generator().manual_seed(1), torch.float32)
    assert not torch.equal(other[0][0], batches[0][0])


def test_scoring_examples_in_all_are_drawn_whatever_their_class() -> None:
    data = numbered(60)
    batches = data.draw(ScoringData(None, 60, 60, False), Generator().manual_seed(0), torch.float32)
    assert len({int(image[0].max().round()) for image in batches[0][0]}) == 60


def test_a_total_can_be_balanced_and_a_number_per_class_need_not_be() -> None:
    data = numbered(60)
    ((_, labels),) = data.draw(
        ScoringData(None, 14, 60, False, balanced=True), Generator().manual_seed(0), torch.float32
    )
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    unbalanced = data.draw(ScoringData(4, None, 60, False, balanced=False), Generator().manual_seed(0), torch.float32)
    in_all = data.draw(ScoringData(None, 12, 60, False), Generator().manual_seed(0), torch.float32)
    assert torch.equal(unbalanced[0][0], in_all[0][0])
    assert torch.bincount(unbalanced[0][1]).tolist() != [4, 4, 4]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (ScoringData(None, 2, 5, False, balanced=True), "pruner.scoring_data.total=2: there are 3 classes; give more"),
        (
            ScoringData(21, None, 5, False, balanced=False),
            "pruner.scoring_data.per_class=21: there are 60 training images",
        ),
        (ScoringData(21, None, 5, False), "pruner.scoring_data.per_class=21: class 0 has 20 training images"),
        (ScoringData(None, 61, 5, False), "pruner.scoring_data.total=61: there are 60 training images"),
    ],
)
def test_too_few_images_to_score_are_refused(examples: ScoringData, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbered(60).draw(examples, Generator(), torch.float32)


@pytest.mark.parametrize("augment", [False, True])
def test_scoring_images_are_normalised_in_the_precision_asked_for(augment: bool) -> None:
    data = numbered(60, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])
    raw = numbered(60)  # whose pixels are whole numbers
    examples = ScoringData(None, 9, 4, augment)
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        batches = data.draw(examples, Generator().manual_seed(0), dtype)
        stored = raw.draw(examples, Generator().manual_seed(0), torch.float32)
        for (images, labels), (pixels, same) in zip(batches, stored, strict=True):
            bytes_ = pixels.round().numpy().astype(np.float64)
            expected = (bytes_ / 255 - np.reshape([0.4914, 0.4822, 0.4465], (3, 1, 1))) / np.reshape(
                [0.2023, 0.1994, 0.2010], (3, 1, 1)
            )
            assert images.dtype == dtype and torch.equal(labels, same)
            assert images.stride() == layout.strides(images.shape, torch.contiguous_format)
            np.testing.assert_allclose(images.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_scoring_images_are_made_when_they_are_asked_for_and_are_the_same_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    normalise = resident.Normalisation.__call__
    monkeypatch.setattr(
        resident.Normalisation,
        "__call__",
        lambda self, pixels, *rest: (made.append(len(pixels)), normalise(self, pixels, *rest))[1],
    )

    def invert(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (images + torch.randint(9, images.shape, generator=noise)).byte(), labels

    for change in ((), (invert,)):
        noise = Generator().manual_seed(5)
        batches = numbered(60).draw(ScoringData(None, 12, 5, True), Generator().manual_seed(0), torch.float64, *change)
        drawn = noise.get_state()
        assert [len(labels) for labels in labels_of(batches)] == [5, 5, 2] and len(batches) == 3 and not made
        first, again = list(batches), list(batches)
        assert made == [5, 5, 2, 5, 5, 2]
        assert torch.equal(noise.get_state(), drawn)  # the change is done once, when the images are drawn
        picked = [batches[0], batches[-2], *batches[2:]]
        for one, two, three in zip(first, again, picked, strict=True):
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))
        with pytest.raises(IndexError):
            batches[3]
        made.clear()


@pytest.mark.parametrize(
    ("number", "size", "sizes"),
    [(11, 5, [5, 6]), (12, 5, [5, 5, 2]), (10, 5, [5, 5]), (1, 5, [1]), (6, 5, [6]), (3, 1, [1, 1, 1]), (3, 9, [3])],
)
def test_a_single_left_over_image_joins_the_scoring_batch_before_it(number: int, size: int, sizes: list[int]) -> None:
    batches = numbered(60).draw(ScoringData(None, number, size, False), Generator().manual_seed(0), torch.float32)
    assert [len(images) for images, _ in batches] == [len(labels) for labels in labels_of(batches)] == sizes
    whole = numbered(60).draw(ScoringData(None, number, 60, False), Generator().manual_seed(0), torch.float32)
    assert torch.equal(torch.cat([images for images, _ in batches]), whole[0][0])


def test_random_labels_make_no_image() -> None:
    batches = numbered(60).draw(ScoringData(None, 12, 5, False), Generator().manual_seed(0), torch.float32)
    relabelled = ablations.random_labels(batches, Generator().manual_seed(1))
    assert all(torch.equal(one, two) for (one, _), (two, _) in zip(batches, relabelled, strict=True))
    assert [len(labels) for labels in labels_of(relabelled)] == [5, 5, 2]
    assert not all(map(torch.equal, labels_of(batches), labels_of(relabelled)))
    blind = Drawn(lambda number: pytest.fail("an image was made"), labels_of(batches))
    assert all(
        map(torch.equal, labels_of(ablations.random_labels(blind, Generator().manual_seed(1))), labels_of(relabelled))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": [0.2, 0.0, 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"std": [0.2, -1.0, 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"std": [0.2, float("nan"), 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"std": [0.2, float("inf"), 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"mean": [0.2, float("nan"), 0.2]}, "dataset.mean=.*give finite numbers"),
        ({"padding": 5}, "dataset.padding=5: the images have 5x6 pixels; give 0 to 4"),
        ({"padding": 6, "padding_mode": "reflect"}, "dataset.padding=6: the images have 5x6 pixels; give 0 to 4"),
        ({"padding": -1}, "dataset.padding=-1: the images have 5x6 pixels; give 0 to 4"),
    ],
)
def test_values_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbered(9, **settings)


def test_a_wrong_deviation_is_found_before_the_data_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.std=\[0\.?0?\]"):
        load("dataset=mnist", "dataset.std=[0.0]", data_dir=tmp_path)


@pytest.mark.parametrize(("dataset", "size"), [("cifar10", 32), ("cifar100", 32), ("tiny_imagenet", 64)])
def test_a_padding_of_a_whole_image_is_found_before_the_data_is_looked_for(dataset: str, size: int) -> None:
    composed(f"dataset={dataset}", f"dataset.padding={size - 1}")
    with pytest.raises(ConfigError, match=rf"^dataset.padding={size}: give one in \[0, {size - 1}\]$"):
        composed(f"dataset={dataset}", f"dataset.padding={size}")


@pytest.mark.parametrize("value", range(0, 256, 5))  # rounding must not give any of them a deviation
def test_a_channel_of_one_value_is_named(value: int) -> None:
    images = np.zeros((4, 6, 5, 3), np.uint8)
    images[..., 0] = images[..., 2] = np.arange(5)
    images[..., 1] = value
    place, labels = DataSettings(Path(), False, CPU, 0), np.array([0, 1, 0, 1])
    settings: dict[str, Any] = {"validation": 0.0, "mean": None, "std": None, "padding": 0, "flip": False}
    with pytest.raises(ConfigError, match=r"dataset.std: channel 1 has one value"):
        Resident((images, labels), (images, labels), 2, place, **settings)


def test_one_training_image_is_too_few() -> None:
    with pytest.raises(ConfigError, match="1 training image is too few"):
        numbered(1)


def test_a_reflected_border_is_that_of_torchvision() -> None:
    from torchvision.transforms.functional import pad

    data = numbered(3, padding=3, padding_mode="reflect", flip=False)
    image = all_images(numbered(3), "train")[1].round()
    padded = pad(image, [3, 3, 3, 3], padding_mode="reflect")
    for row in range(7):
        for column in range(7):
            crop = data._windows[1, row, column].view(6, 5, 3).permute(2, 0, 1)
            assert torch.equal(crop.float(), padded[:, row : row + 6, column : column + 5])


@pytest.mark.parametrize("axes", [(0, 3, 1, 2), (0, 2, 1, 3), (1, 2, 3, 0)])
@pytest.mark.parametrize(("padding", "padding_mode"), [(0, None), (0, "reflect"), (2, None), (2, "reflect")])
def test_the_layout_of_an_array_in_memory_changes_no_pixel(
    padding: int, padding_mode: Any, axes: tuple[int, int, int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    back = np.argsort(axes)
    other = np.ascontiguousarray(pixels.transpose(axes)).transpose(back)  # CIFAR's is the first of them
    labels, place = np.arange(12) % 3, DataSettings(Path(), False, CPU, 0)
    given: Any = {"validation": 0.0, "mean": [0.0] * 3, "std": [1 / 255] * 3, "flip": False}
    given |= {"padding": padding, "padding_mode": padding_mode}
    data = Resident((other, labels), (other, labels), 3, place, **given)
    plain = Resident((pixels, labels), (pixels, labels), 3, place, **given)
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(all_images(data, "train").round().byte(), wanted)
    assert torch.equal(all_images(data, "test").round().byte(), wanted)
    trained, expected = (
        torch.cat([images for images, _ in each.train(4, Generator().manual_seed(1), Generator().manual_seed(2))])
        for each in (data, plain)
    )
    assert torch.equal(trained, expected)
    order = torch.randperm(12, generator=Generator().manual_seed(1))
    assert padding or torch.equal(trained.round().byte(), wanted[order])


def test_black_borders_rename_no_run() -> None:
    plain = composed("dataset=cifar10", "training=cifar")
    settings = {key: value for key, value in plain.dataset.settings.items() if key != "padding_mode"}
    without = replace(plain, dataset=replace(plain.dataset, settings=settings))
    reflected = composed("dataset=cifar10", "training=cifar", "dataset.padding_mode=reflect")
    assert plain.id == without.id != reflected.id


@pytest.mark.parametrize(
    ("split", "labels", "said"),
    [
        (0, [0, 1, -100, 2], "the training labels are -100 to 2, and there are 3 classes"),
        (1, [0, 1, 3, 2], "the test labels are 0 to 3, and there are 3 classes"),
        (0, [0, 1, 2], "4 training images have 3 labels"),
    ],
)
def test_labels_that_no_output_is_for_are_refused(split: int, labels: list[int], said: str) -> None:
    images = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3, 1)
    parts = [(images, np.array([0, 1, 2, 0])) for _ in range(2)]
    parts[split] = (parts[split][0], np.array(labels))
    with pytest.raises(DataError, match=f"dataset: {said}"):
        Resident(
            *parts, 3, DataSettings(Path(), False, CPU, 0), validation=0.0, mean=[0.5], std=[0.5], padding=0, flip=False
        )
