"""Networks of conf/model, built for images of the shapes of datasets."""

from conftest import composed
from torch import nn

from pai_bench.core import Shape
from pai_bench.system import seeding

MNIST, CIFAR, TINY, IMAGENET = (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 224, 224)


def build(*overrides: str, shape: Shape = CIFAR, num_classes: int = 10, seed: int = 0) -> nn.Module:
    with seeding.seeded(seed, "init"):
        return composed(*overrides).model(shape, num_classes)
