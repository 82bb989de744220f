"""Ablations: each breaks one thing on purpose to test a claim, and fits one hook of core.Ablation."""

import torch
from torch import Generator, Tensor

from pai_bench.batches import Drawn, labels_of
from pai_bench.core import Batch, Batches, Mask, Scores, State
from pai_bench.errors import ConfigError


def random_labels(batches: Batches, generator: Generator) -> Batches:
    """The labels that scores see, drawn uniformly from those present.

    Raises:
        ConfigError: the labels are the targets of a regression.

    Reference: Su et al. 2020, arXiv:2009.11094.
    Deviates: their code relabels the whole dataset and then takes equally many images of each new class, so classes
        are balanced. Here they are not.
    """
    before = labels_of(batches)
    for labels in before:
        _require_classes("random_labels", labels)
    present = torch.unique(torch.cat(before))
    drawn = [torch.randint(len(present), labels.shape, generator=generator).to(labels.device) for labels in before]
    return Drawn(lambda number: batches[number][0], [present[labels] for labels in drawn])


def _require_classes(name: str, labels: Tensor) -> None:
    if labels.is_floating_point():
        raise ConfigError(f"ablation={name}: it changes classes, and this data is a regression; choose another")


def random_pixels(batches: Batches, generator: Generator) -> Batches:
    """The images that scores see, with permuted pixels: every image has its own order, the same for all channels.

    Reference: Su et al. 2020, arXiv:2009.11094.
    Deviates: the released code, which random_pixels_official follows, also mixes channels, augments the images
        afterwards, and draws random labels.
    """
    labels = labels_of(batches)
    num_pixels = batches[0][0][0, 0].numel()
    # All orders are drawn here, as int32 to save memory. Images are made when a batch is asked for.
    orders = [torch.stack([_order(num_pixels, generator).int() for _ in of_batch]) for of_batch in labels]

    def images(number: int) -> Tensor:
        before = batches[number][0]
        flat = before.flatten(2)  # (B, C, H * W)
        order = orders[number].to(before.device).long()
        return torch.empty_like(before).copy_(flat.gather(2, order[:, None].expand_as(flat)).view(before.shape))

    return Drawn(images, labels)


def _order(number: int, generator: Generator) -> Tensor:
    return torch.randperm(number, generator=generator)


def random_pixels_official(images: Tensor, labels: Tensor, generator: Generator) -> Batch:
    """Images (B, H, W, C) with all values of an image permuted, channels included, and permuted labels.

    The images are the stored ones. They are cropped and flipped afterwards.

    Raises:
        ConfigError: the labels are the targets of a regression.

    Reference: Su et al. 2020, arXiv:2009.11094, released code.
    Deviates: their code draws a label for every image of the dataset and then takes equally many images of each new
        class. Here the labels of the drawn images are permuted, so classes are as balanced.
    """
    _require_classes("random_pixels_official", labels)
    flat = images.flatten(1)
    shuffled = torch.empty_like(flat)
    for after, before in zip(
        shuffled, flat, strict=True
    ):  # the orders of all images would take eight times their memory
        after.copy_(before[_order(len(before), generator).to(before.device)])
    return shuffled.view(images.shape), labels[_order(len(labels), generator).to(labels.device)]


def invert(scores: Scores, candidates: Mask, generator: Generator) -> Scores:
    """Scores that rank the candidates in reverse: the highest becomes the lowest. The order of ties is reversed too.

    They are ranks, so signed scores and zeros are reversed too. 1/score reverses neither.

    Reference: Frankle et al. 2021, arXiv:2009.08576, section 5.
    """
    values = torch.cat([scores[name][mask] for name, mask in candidates.items()])
    ranks = torch.empty(len(values), dtype=torch.float64, device=values.device)
    order = values.argsort(descending=True, stable=True)  # the order in which they would be kept
    ranks[order] = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    inverted, start = {}, 0
    for name, mask in candidates.items():
        number = int(mask.sum())
        inverted[name] = torch.zeros_like(scores[name], dtype=torch.float64)
        inverted[name][mask] = ranks[start : start + number]
        start += number
    return inverted


def shuffle(mask: Mask, generator: Generator) -> Mask:
    """The mask, permuted within every layer: densities stay, positions become random.

    Reference: Frankle et al. 2021, arXiv:2009.08576, section 5; Su et al. 2020, arXiv:2009.11094.
    """
    return {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator).to(tensor.device)].view(tensor.shape)
        for name, tensor in mask.items()
    }


def reinitialize(state: State, fresh: State, mask: Mask, generator: Generator) -> State:
    """The weights of another draw of the initialization. The mask stays.

    Reference: Frankle and Carbin 2019, arXiv:1803.03635, section 2; Frankle et al. 2021, arXiv:2009.08576, section 5.
    """
    return fresh


def shuffle_weights(state: State, fresh: State, mask: Mask, generator: Generator) -> State:
    """The kept weights of every layer, permuted among their positions. The mask stays.

    Reference: Su et al. 2020, arXiv:2009.11094.
    """
    shuffled = dict(state)
    for name, kept in mask.items():
        values = state[name][kept]
        shuffled[name] = state[name].clone()
        shuffled[name][kept] = values[torch.randperm(len(values), generator=generator).to(values.device)]
    return shuffled
