"""ImageNet's crops: what they are, and who decodes them when."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from image_data import CPU, imagenet, load, photographs
from PIL import Image
from torch import Generator
from torch.utils.data import DataLoader

from pai_bench import assembly
from pai_bench.batches import labels_of
from pai_bench.core import DataSettings, ScoringData
from pai_bench.data import decode
from pai_bench.errors import DataError
from pai_bench.system import layout

__all__ = ["photographs"]  # a fixture


def test_imagenet_gives_crops_of_224_pixels(photographs: Path) -> None:
    data = imagenet(photographs)
    assert data.num_examples == {"train": 8, "validation": 0, "test": 4}
    ((images, labels),) = data.evaluation("test", 10)
    assert images.shape == (4, 3, 224, 224) and labels.tolist() == [0, 0, 1, 1]
    from torchvision import transforms

    usual = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    image = usual(Image.open(photographs / "imagenet" / "val" / "n02" / "1.JPEG").convert("RGB"))
    # resizing a tensor and resizing a PIL image round differently, by a level or two of 255
    assert (images[3] - image).abs().max() < 2.5 / 255 / 0.224


def test_imagenet_augmentation_does_not_depend_on_the_number_of_workers(photographs: Path) -> None:
    def epoch(workers: int, augment: int) -> torch.Tensor:
        cfg = composed("dataset=imagenet", "dataset.subset=true", f"data_dir={photographs}", f"num_workers={workers}")
        data = assembly.load_data(cfg, CPU)
        batches = data.train(3, Generator().manual_seed(0), Generator().manual_seed(augment))
        return torch.cat([images for images, _ in batches])

    random = torch.get_rng_state()
    alone, shared, other = epoch(0, 0), epoch(2, 0), epoch(0, 1)
    assert alone.shape == (8, 3, 224, 224)
    assert torch.equal(alone, shared) and not torch.equal(alone, other)
    assert torch.equal(torch.get_rng_state(), random)


def test_imagenet_scoring_examples_are_plain_and_balanced(photographs: Path) -> None:
    data = imagenet(photographs)
    ((images, labels),) = data.draw(ScoringData(3, None, 10, False), Generator().manual_seed(0), torch.float32)
    assert images.shape == (6, 3, 224, 224) and torch.bincount(labels).tolist() == [3, 3]
    plain = torch.cat([images for images, _ in data.evaluation("train", 10)])
    assert all(any(torch.equal(image, other) for other in plain) for image in images)


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_scoring_batches_are_decoded_once_each_when_they_are_asked_for(
    workers: int, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    plain = decode.decode
    monkeypatch.setattr("pai_bench.data.imagenet.decode", lambda path: (decoded.append(path), plain(path))[1])
    data = imagenet(photographs, f"num_workers={workers}")
    batches = data.draw(ScoringData(None, 7, 3, True), Generator().manual_seed(0), torch.float64)
    assert [len(labels) for labels in labels_of(batches)] == [3, 4] and not decoded
    assert not multiprocessing.active_children()
    images, _ = batches[0]
    assert images.dtype == torch.float64 and images.stride() == layout.strides(images.shape, torch.contiguous_format)
    assert len(decoded) == (0 if workers else 3)  # workers have lists of their own
    walks = [list(batches), list(batches)]
    assert len(decoded) == (0 if workers else 7)
    assert not multiprocessing.active_children()
    assert all(torch.equal(a, b) for a, b in zip(*([x for x, _ in walk] for walk in walks), strict=True))
    at_once = data.draw(ScoringData(None, 7, 7, True), Generator().manual_seed(0), torch.float64)
    assert torch.equal(at_once[0][0], torch.cat([images for images, _ in walks[0]]))
    assert torch.equal(at_once[0][1], torch.cat(labels_of(batches)))
    single = data.draw(ScoringData(None, 7, 7, True), Generator().manual_seed(0), torch.float32)
    torch.testing.assert_close(single[0][0].double(), at_once[0][0], rtol=1e-6, atol=1e-6)


def test_imagenet_goes_on_with_the_loader_where_training_stopped(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[DataLoader[Any]] = []
    monkeypatch.setattr(
        "pai_bench.data.imagenet.DataLoader",
        lambda *args, **rest: loaders.append(DataLoader(*args, **rest)) or loaders[-1],
    )

    def epoch(start: int, stop: int, augment: int = 0) -> list[Any]:
        batches = data.train(2, Generator().manual_seed(0), Generator().manual_seed(augment), start)
        return [batch for _, batch in zip(range(start, stop), batches, strict=False)]

    data = imagenet(photographs, "num_workers=2")
    whole, other = epoch(0, 4), epoch(0, 4, augment=1)
    assert len(loaders) == 2 and len(whole) == 4
    assert not multiprocessing.active_children()  # at the end of an epoch

    def check(batches: list[Any], expected: list[Any]) -> None:
        assert len(batches) == len(expected)
        assert all(
            torch.equal(a, b) for one, two in zip(batches, expected, strict=True) for a, b in zip(one, two, strict=True)
        )

    loaders.clear()
    check([*epoch(0, 1), *epoch(1, 3), *epoch(3, 4)], whole)
    assert len(loaders) == 1 and not multiprocessing.active_children()
    loaders.clear()
    check(epoch(0, 2), whole[:2])
    assert len(multiprocessing.active_children()) == 2
    check(epoch(2, 3, augment=1), other[2:3])  # the step fits, the images are others
    check(epoch(1, 2, augment=1), other[1:2])  # the images fit, the clock was put back
    check(epoch(2, 4, augment=1), other[2:])
    assert len(loaders) == 3 and not multiprocessing.active_children()
    epoch(0, 1)
    assert len(multiprocessing.active_children()) == 2
    data = imagenet(photographs)
    assert not multiprocessing.active_children()  # processes end with the dataset


def test_a_loader_that_failed_is_not_gone_on_with(photographs: Path) -> None:
    data = imagenet(photographs)
    file = photographs / "imagenet" / "train" / "n01" / "1.JPEG"
    whole = file.read_bytes()
    list(zip(range(1), data.train(1, Generator().manual_seed(0), Generator()), strict=False))
    file.write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        list(data.train(1, Generator().manual_seed(0), Generator(), 1))
    file.write_bytes(whole)
    assert len(list(data.train(1, Generator().manual_seed(0), Generator(), 1))) == 7


def test_an_incomplete_imagenet_is_refused_unless_asked_for(photographs: Path) -> None:
    with pytest.raises(DataError, match=r"has 2 classes, 8 training and 4 val images, not 1,000"):
        load("dataset=imagenet", data_dir=photographs)
    with pytest.raises(DataError, match=r"there is no folder .*elsewhere.train.*dataset.root="):
        load("dataset=imagenet", f"dataset.root={photographs / 'elsewhere'}", data_dir=photographs)


def test_a_place_says_nothing_of_the_data() -> None:
    """Where images lie and how they are decoded is no part of a run's identity: DataSettings hold nothing else."""
    assert set(DataSettings.__dataclass_fields__) == {"data_dir", "download", "device", "num_workers", "share"}
