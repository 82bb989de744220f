"""GraSP: gradient signal preservation."""

import torch
from torch import Generator

from pai_bench.analysis.gradients import hessian_gradient
from pai_bench.core import Batches, Count, Loss, Positive, Scores, Subnetwork, Weights
from pai_bench.errors import ConfigError, UserError


def score(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    generator: Generator,
    *,
    temperature: Positive,
    absolute: bool,
    class_halves: bool,
    draws: Count,
    redraw_linear: bool,
) -> Scores:
    """w * (Hg), with its sign: removing a weight with a high score would shrink the squared gradient norm.

    The first-order change of g^T g when weight q is set to zero is -2 w_q (Hg)_q, so high = keep.

    Args:
        temperature: divides the logits while scoring. The authors use 200.
        absolute: whether the score is |w (Hg)|, which keeps the weights that change the gradient norm either way
            (Frankle et al. 2021, arXiv:2009.08576).
        class_halves: whether the images are sorted by class and cut in two halves, each with its own batch statistics,
            as in the authors' code.
        draws: with class_halves, the number of parts into which the images are cut first, each with equally many of
            every class. Each part is then cut in two halves. The authors use 2 for ResNet-32 on CIFAR-100, 10 on
            Tiny-ImageNet, and 1 elsewhere.
        redraw_linear: whether linear layers are scored at fresh Xavier-normal weights, which are never trained, as in
            the authors' code.

    Raises:
        UserError: there are too few images for the halves.
        ConfigError: draws without class_halves.

    Reference: Wang, Zhang and Grosse 2020, arXiv:2002.07376, eq. 8 (with the opposite sign: theirs is low = keep).
    Deviates: by default the network is scored as it will be trained, on shuffled batches. class_halves and
        redraw_linear do what the authors' code does beyond the paper.
    """
    if draws > 1 and not class_halves:
        raise ConfigError(f"pruner.score.draws={draws}: it parts class halves; add pruner.score.class_halves=true")
    at = net.masked()
    if redraw_linear:
        at = _redrawn(net, at, generator)
    weights, products = hessian_gradient(
        net, _class_halves(batches, draws) if class_halves else batches, loss, temperature=temperature, at=at
    )
    scores = {name: weight * products[name] for name, weight in weights.items()}
    return {name: values.abs() for name, values in scores.items()} if absolute else scores


def _class_halves(batches: Batches, draws: Count) -> Batches:
    """The images, cut in `draws` parts, each sorted by class and cut in two."""
    if not batches:
        return batches
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    of_class = labels[order]
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[of_class]  # within its class
    draw = place * draws // counts[of_class]
    halves = []
    for number in range(draws):
        part = order[draw == number]
        halves += [part[: len(part) // 2], part[len(part) // 2 :]]
    if not all(len(half) for half in halves):
        raise UserError(
            f"pruner.score.draws={draws}: of {len(order)} images a half is left without any; give fewer draws, or more "
            "images (pruner.scoring_data)"
        )
    return [(images[half], labels[half]) for half in halves]


def _redrawn(net: Subnetwork, weights: Weights, generator: Generator) -> Weights:
    """The weights, but those of linear layers are drawn anew from N(0, 2 / (fan_in + fan_out)), on the CPU."""
    redrawn = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            redrawn[name] = noise * (2 / sum(weight.shape)) ** 0.5 * net.mask[name]
    return redrawn
