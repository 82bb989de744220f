"""Sanity checks: what is broken on purpose to test a claim. Each function fits one hook of core.Ablation."""

import torch
from torch import Generator, Tensor

from pai_bench.core import Batch, Batches, Drawn, Mask, Scores, State, labels_of


def random_labels(batches: Batches, generator: Generator) -> Batches:
    """Scores see labels drawn uniformly from those present.

    Reference: Su et al. 2020, arXiv:2009.11094.
    Deviates: their code relabels the whole dataset and then takes as many images of each of these classes, so that
        classes are balanced; here they are not.
    """
    before = labels_of(batches)
    present = torch.unique(torch.cat(before))
    drawn = [torch.randint(len(present), labels.shape, generator=generator).to(labels.device) for labels in before]
    return Drawn(lambda number: batches[number][0], [present[labels] for labels in drawn])


def random_pixels(batches: Batches, generator: Generator) -> Batches:
    """Scores see images whose pixels are permuted, every image in its own way, its channels together.

    Reference: Su et al. 2020, arXiv:2009.11094.
    Deviates: in the released code, which random_pixels_official follows, channels mix, images are augmented afterwards,
        and the labels are random, too.
    """
    labels = labels_of(batches)
    num_pixels = batches[0][0][0, 0].numel()
    # Every order is drawn here, in integers of half the width, and images are made when a batch is asked for.
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
    """Scores see images (B, H, W, C) all of whose values trade places, channels included, and labels that do so too.

    The images are those that are stored: they are cropped and flipped afterwards.

    Reference: Su et al. 2020, arXiv:2009.11094, released code.
    Deviates: their code draws a label for every image of the dataset and then takes as many images of each of these
        classes; here the labels of the images that are drawn trade places, so that classes are as balanced.
    """
    flat = images.flatten(1)
    shuffled = torch.empty_like(flat)
    for after, before in zip(shuffled, flat, strict=True):  # the orders of all at once take eight times the images
        after.copy_(before[_order(len(before), generator).to(before.device)])
    return shuffled.view(images.shape), labels[_order(len(labels), generator).to(labels.device)]


def invert(scores: Scores, candidates: Mask, generator: Generator) -> Scores:
    """Ranks in reverse: the highest score of the candidates becomes the lowest. Of equal scores the order reverses too.

    By rank, so it holds for signed and for zero scores (1/score reverses neither).

    Reference: Frankle et al. 2021, arXiv:2009.08576, section 5.
    """
    values = torch.cat([scores[name][mask] for name, mask in candidates.items()])
    ranks = torch.empty(len(values), dtype=torch.float64, device=values.device)
    order = values.argsort(descending=True, stable=True)  # as they would be kept
    ranks[order] = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    inverted, start = {}, 0
    for name, mask in candidates.items():
        number = int(mask.sum())
        inverted[name] = torch.zeros_like(scores[name], dtype=torch.float64)
        inverted[name][mask] = ranks[start : start + number]
        start += number
    return inverted


def shuffle(mask: Mask, generator: Generator) -> Mask:
    """Permutes the mask within every layer: the layers' densities stay, the positions become random.

    Reference: Frankle et al. 2021, arXiv:2009.08576, section 5; Su et al. 2020, arXiv:2009.11094.
    """
    return {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator).to(tensor.device)].view(tensor.shape)
        for name, tensor in mask.items()
    }


def reinitialize(state: State, fresh: State, mask: Mask, generator: Generator) -> State:
    """Training starts from another draw of the initialization; the mask stays.

    Reference: Frankle and Carbin 2019, arXiv:1803.03635, section 2; Frankle et al. 2021, arXiv:2009.08576, section 5.
    """
    return fresh


def shuffle_weights(state: State, fresh: State, mask: Mask, generator: Generator) -> State:
    """Permutes the kept weights of every layer among their positions; the mask stays.

    Reference: Su et al. 2020, arXiv:2009.11094.
    """
    shuffled = dict(state)
    for name, kept in mask.items():
        values = state[name][kept]
        shuffled[name] = state[name].clone()
        shuffled[name][kept] = values[torch.randperm(len(values), generator=generator).to(values.device)]
    return shuffled
