"""What short recipes need: a one-cycle rate, flips that alternate, images that grow. All of it by the epoch alone."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Chain, composed
from emulated_graphs import emulated
from few_images import CPU, RECIPE
from few_images import trainer as training_of
from image_data import all_images, load, numbered, photographs
from torch import Generator, Tensor, nn

from pai_bench.assembly import examined
from pai_bench.core import ByEpoch, DataSettings, ScoringData
from pai_bench.data.resident import Resident
from pai_bench.errors import ConfigError
from pai_bench.launch import compose, overrides
from pai_bench.masks import masks
from pai_bench.system import seeding
from pai_bench.training.recipe import image_size, learning_rate
from pai_bench.training.step import Execution
from pai_bench.training.steps import Steps

__all__ = ["photographs"]  # a fixture


def test_a_one_cycle_rate_rises_and_falls_on_straight_lines() -> None:
    recipe = composed("training=cifar_fast").training
    rates = {0: 0.0, 1: 0.08, 2.5: 0.2, 5: 0.4, 14.5: 0.2, 19.25: 0.1, 24: 0.0}
    for epoch, rate in rates.items():
        assert learning_rate(recipe, epoch) == pytest.approx(rate, abs=1e-12)
    without_warm_up = replace(recipe, warmup_epochs=0)
    assert [learning_rate(without_warm_up, epoch) for epoch in (0, 6, 24)] == pytest.approx([0.4, 0.3, 0.0])


@pytest.mark.parametrize(
    ("epochs", "sizes", "expected"),
    [
        ([11, 13], [160, 192], [160] * 12 + [192] * 4),  # 176 lies half way between two multiples of 32
        ([2, 6], [64, 192], [64, 64, 64, 96, 128, 160, 192, 192]),
        ([0, 2, 4], [64, 128, 96], [64, 96, 128, 128, 96, 96]),
        ([0], [96], [96, 96]),
    ],
    ids=["imagenet_16", "a ramp", "up and down", "one size"],
)
def test_images_have_the_sizes_of_their_epochs(epochs: list[int], sizes: list[int], expected: list[int]) -> None:
    recipe = replace(RECIPE, image_sizes=sizes, image_size_epochs=epochs)
    assert [image_size(recipe, epoch) for epoch in range(len(expected))] == expected
    assert image_size(RECIPE, 3) is None


def test_the_sixteen_epochs_grow_as_written() -> None:
    recipe = composed("training=imagenet_16", "dataset=imagenet").training
    assert [image_size(recipe, epoch) for epoch in range(16)] == [160] * 12 + [192] * 4


# Flips that alternate -------------------------------------------------------------------------------------------------


def flipped(data: Any, epoch: int, seed: int = 0) -> dict[int, bool]:
    """Whether each image is mirrored in an epoch, by the name that its pixels have."""
    data = data.in_epoch(epoch, None)
    batches = data.train(7, Generator().manual_seed(seed + epoch), Generator().manual_seed(100 + seed + epoch))
    return mirrored(torch.cat([images for images, _ in batches]))


def mirrored(images: Tensor) -> dict[int, bool]:
    """Whether each image is mirrored, by the name that its pixels have."""
    return {int(image[0].max()): bool(image[2, 0, 0] > image[2, 0, -1]) for image in images.round()}


def test_every_image_is_mirrored_in_every_second_epoch() -> None:
    data = numbered(60, flip="alternating", padding=0)
    assert isinstance(data, ByEpoch)
    epochs = [flipped(data, number) for number in range(1, 7)]
    assert all(len(epoch) == 60 for epoch in epochs)
    for before, after in itertools.pairwise(epochs):
        assert all(after[image] is not mirrored for image, mirrored in before.items())
    assert 15 < sum(epochs[0].values()) < 45
    # The epoch decides, and neither what is drawn nor what came before.
    assert flipped(numbered(60, flip="alternating", padding=0), 4, seed=9) == epochs[3]


def test_other_flips_know_no_epochs() -> None:
    for flip in (True, False):
        data = numbered(20, flip=flip, padding=0)
        assert data.in_epoch(5) is data
    assert not any(flipped(numbered(20, flip=False, padding=0), 2).values())


def test_crops_and_scoring_images_are_those_of_random_flips() -> None:
    alternating, random = (numbered(40, flip=flip) for flip in ("alternating", True))
    one, other = (
        data.in_epoch(2).tables(Generator().manual_seed(1), Generator().manual_seed(2))
        for data in (alternating, random)
    )
    assert all(torch.equal(*tables) for tables in zip(one[:-1], other[:-1], strict=True))
    for augment in (True, False):
        asked = ScoringData(per_class=2, total=None, batch_size=4, augment=augment)
        drawn = [data.draw(asked, Generator().manual_seed(3), torch.float32) for data in (alternating, random)]
        for (images, _), (others, _) in zip(*drawn, strict=True):
            assert torch.equal(images, others)


class Seen:
    """A step that looks at its images and does nothing."""

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.optimizer = recipe, SimpleNamespace(lr=0.0)
        self.batches: list[Tensor] = []

    def __call__(self, images: Tensor, labels: Tensor, num_images: int) -> None:
        self.batches.append(images.clone())


def seen(data: Any, recipe: Any, clocks: list[int], ends: list[int]) -> list[Tensor]:
    """The batches that steps see when each call begins at a clock and ends at another, within an epoch."""
    step: Any = Seen(recipe)
    steps = Steps(data, recipe, Execution(CPU, False, False), step)
    for clock, end in zip(clocks, ends, strict=True):
        number = clock // steps._per_epoch + 1
        order, augment = (seeding.generator(0, name, number) for name in ("order", "augment"))
        taken = steps.taken(step, clock, order, augment)
        for _ in range(end - clock):
            next(taken)
        taken.close()
    return step.batches


def test_training_sees_the_flips_of_its_epoch_resumed_or_not() -> None:
    recipe = replace(RECIPE, batch_size=10)
    whole = seen(numbered(30, flip="alternating", padding=0), recipe, [0, 3, 6], [3, 6, 9])
    broken = seen(numbered(30, flip="alternating", padding=0), recipe, [4, 6], [6, 9])
    assert all(torch.equal(one, other) for one, other in zip(whole[4:], broken, strict=True))
    first, second = (mirrored(torch.cat(whole[start : start + 3])) for start in (0, 3))
    assert all(second[image] is not side for image, side in first.items())


def alternating() -> Resident:
    pixels = np.random.default_rng(0).integers(0, 256, (43, 12, 12, 3), dtype=np.uint8)
    images = pixels, np.arange(43) % 4
    place = DataSettings(Path(), False, CPU, 0)
    return Resident(images, images, 4, place, validation=0.0, mean=None, std=None, padding=2, flip="alternating")


def test_a_short_recipe_resumes_bit_for_bit_and_is_captured_as_it_is() -> None:
    recipe = replace(RECIPE, lr_schedule="linear", warmup_epochs=1, label_smoothing=0.2)
    torch.manual_seed(0)
    net = Chain()
    whole, broken = (training_of(copy.deepcopy(net), recipe, alternating()) for _ in range(2))
    mask = masks.full(net)
    whole.until(mask, 3)
    broken.until(mask, 1.5)
    state = copy.deepcopy(broken.state())
    later = training_of(Chain(), recipe, alternating())
    later.load_state(state, mask)
    later.until(mask, 3)
    with emulated() as made:
        captured = training_of(copy.deepcopy(net), recipe, alternating())
        captured.until(mask, 3)
    assert made
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, later.model.state_dict()[name]), name
        torch.testing.assert_close(captured.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


# Images that grow -----------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(photographs: Path) -> Iterator[Any]:
    words = ("dataset=imagenet", f"dataset.root={photographs / 'imagenet'}", "dataset.subset=true")
    yield load(*words, "dataset.size=96", "dataset.resize=100", data_dir=photographs)


def test_streamed_images_grow_and_evaluation_does_not(streamed: Any) -> None:
    recipe = replace(RECIPE, batch_size=4, image_sizes=[32, 64], image_size_epochs=[1, 2])
    per_epoch = len(list(streamed.train(4, Generator(), Generator())))
    clocks = [per_epoch * epoch for epoch in range(3)]
    batches = seen(streamed, recipe, clocks, [clock + per_epoch for clock in clocks])
    assert [batch.shape[-1] for batch in batches] == [32] * per_epoch + [32] * per_epoch + [64] * per_epoch
    assert all_images(streamed, "test").shape[-2:] == (96, 96)
    assert streamed.input_shape == (3, 96, 96)
    # An epoch of another size goes on where it was left, and equals the one that was not left.
    broken = seen(streamed, recipe, [clocks[2], clocks[2] + 1], [clocks[2] + 1, clocks[2] + per_epoch])
    assert all(torch.equal(one, other) for one, other in zip(broken, batches[2 * per_epoch :], strict=True))
    # The size of the dataset gives what the dataset alone gives.
    plain, sized = (seen(streamed.in_epoch(1, size), RECIPE, [0], [1]) for size in (None, 96))
    assert torch.equal(plain[0], sized[0]) and plain[0].shape[-1] == 96


# Settings -------------------------------------------------------------------------------------------------------------

IMAGENET = ["dataset=imagenet", "training=imagenet_16"]
WRONG = {
    "images in memory": (["training=imagenet_16"], r"training.image_sizes=\[160,192\]: give null"),
    "no multiples": ([*IMAGENET, "training.image_sizes=[150,192]"], "training.image_sizes=.*multiples of 32"),
    "epochs that are missing": ([*IMAGENET, "training.image_size_epochs=null"], "image_size_epochs=null: give one for"),
    "epochs that fall": ([*IMAGENET, "training.image_size_epochs=[13,11]"], "image_size_epochs=.*rising order"),
    "an epoch twice": ([*IMAGENET, "training.image_size_epochs=[11,11]"], "image_size_epochs=.*rising order"),
    "an unknown flip": (["dataset.flip=sometimes"], "dataset.flip=sometimes: give true or false or alternating"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_in_one_line(name: str) -> None:
    words, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        composed(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["training=cifar"], []),
        (["training=cifar", "training.epochs=0"], []),
        (["training=imagenet_16", "dataset=imagenet", "training.epochs=13"], []),  # 186 pixels are 192 in steps of 32
        (
            ["training=cifar", "training.epochs=100"],
            ["training.lr_milestones=[60,120]: there is no epoch [120] with training.epochs=100; give others"],
        ),
        (
            ["training=cifar_fast", "training.epochs=4"],
            [
                "training.warmup_epochs=5: the learning rate never reaches training.lr with training.epochs=4; give "
                "others"
            ],
        ),
        (
            ["training=imagenet_16", "dataset=imagenet", "training.epochs=8"],
            ["training.image_size_epochs=[11,13]: images never have 192 pixels with training.epochs=8; give others"],
        ),
    ],
)
def test_what_a_recipe_of_another_length_does_not_reach_is_said(
    words: list[str], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    overrides._say_once.cache_clear()
    for _ in range(2):
        compose.compose(["tracker=none", *words])
    assert caplog.messages == said


def test_milestones_beside_another_schedule_are_told(caplog: pytest.LogCaptureFixture) -> None:
    overrides._say_once.cache_clear()
    compose.compose(["tracker=none", "training=cifar", "training.lr_schedule=cosine"])
    assert caplog.messages == []
    compose.compose(["tracker=none", "training=cifar_fast", "training.lr_milestones=[3]"])
    assert caplog.messages == ["training.lr_milestones=[3]: it has no effect with training.lr_schedule=linear"]


def test_a_network_of_one_size_is_refused_before_the_search() -> None:
    run = composed("training=imagenet_16", "dataset=imagenet", "pruner=snip", "sparsity=0.5", "tracker=none")
    parts = SimpleNamespace(run=run, data=SimpleNamespace(input_shape=(3, 176, 176), num_classes=10))
    fixed = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 11 * 11, 10))
    with pytest.raises(ConfigError, match=r"training.image_sizes=\[160,192\]: .*does not take images of 3x160x160"):
        examined(parts, fixed)
    examined(parts, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)))


def test_what_changes_results_changes_names() -> None:
    names = [
        composed("dataset=cifar10", *words).id
        for words in (
            [],
            ["dataset.flip=alternating"],
            ["training=cifar_fast"],
            ["training=cifar_fast", "training.lr_schedule=cosine"],
        )
    ]
    sizes = [composed(*IMAGENET, *words).id for words in ([], ["training.image_sizes=[128,192]"])]
    assert len({*names, *sizes}) == 6
    same = ["training.lr_schedule=linear", "training.lr_milestones=[3]", "training.lr_gamma=0.5"]
    assert composed(*same).id == composed(same[0]).id
