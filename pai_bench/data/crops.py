"""Crops of ImageNet: random crops for training, central crops for evaluation. Pixels stay uint8."""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_AREA = (0.08, 1.0)  # range of the area of a random crop, as a fraction of the image
_LOG_RATIO = torch.log(torch.tensor([3 / 4, 4 / 3]))  # range of width / height
_ATTEMPTS = 10  # how often a crop is drawn until it lies within the image


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """The resized image: bilinear with antialiasing, in integers."""
    # torch resizes contiguous pixels of three bytes fast. A slice of an image is not contiguous, so it is copied.
    images = image.contiguous()[None].permute(0, 3, 1, 2)
    resized = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)


def random_box(height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop. Draws the same numbers as torchvision's RandomResizedCrop.

    Reference: Szegedy et al. 2014, arXiv:1409.4842, section 6.
    """
    for _ in range(_ATTEMPTS):
        area = height * width * torch.empty(1).uniform_(*_AREA, generator=generator).item()
        low, high = _LOG_RATIO.tolist()
        ratio = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(torch.randint(0, room + 1, (1,), generator=generator)) for room in (height - h, width - w))
            return top, left, h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(image: Tensor, size: int, seed: int) -> Tensor:
    """A random crop of (H, W, 3) uint8, resized to (size, size, 3), and mirrored with probability 0.5."""
    generator = Generator().manual_seed(seed)
    top, left, height, width = random_box(image.shape[0], image.shape[1], generator)
    cropped = _resized(image[top : top + height, left : left + width], size, size)
    return cropped.flip(1) if torch.rand(1, generator=generator) < 0.5 else cropped


def central_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """The central (size, size, 3) of (H, W, 3) uint8. Before that, the shorter side is resized to `resize` pixels."""
    height, width, _ = image.shape
    short = min(height, width)
    if short != resize:
        height, width = resize * height // short, resize * width // short
        image = _resized(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]
