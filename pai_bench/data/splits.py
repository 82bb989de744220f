"""Which examples: those that are held out for validation, and those that a score uses."""

import torch
from torch import Generator, Tensor

from pai_bench.core import ScoringData
from pai_bench.errors import ConfigError


def hold_out(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Splits indices into (train, validation): the same fraction of every class, and the same split for every seed.

    The targets of a regression have no classes: it is a fraction of all.

    Raises:
        ConfigError: the fraction is not zero, and one of the two parts is empty.
    """
    if labels.is_floating_point():
        labels = torch.zeros(len(labels), dtype=torch.int64)
    generator = Generator().manual_seed(0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: round(fraction * len(members))]]] = True
    if chosen.all() or (fraction > 0 and not chosen.any()):
        part, other = ("training", "smaller") if chosen.all() else ("validation", "larger")
        raise ConfigError(
            f"dataset.validation={fraction}: of {len(labels)} images it leaves no {part} image; give a {other} fraction"
        )
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def require_two(num_train: int) -> None:
    """Refuses a training split with one image, because batch norm cannot be trained on it.

    Raises:
        ConfigError: there are fewer than two images.
    """
    if num_train < 2:
        raise ConfigError(f"dataset: {num_train} training image is too few to train on; give two or more")


def choose_examples(labels: Tensor, num_classes: int, examples: ScoringData, generator: Generator) -> Tensor:
    """The shuffled indices of the images that a score uses.

    The targets of a regression have no classes: `per_class` examples for each of the num_classes outputs are drawn
    at random.

    Raises:
        ConfigError: a class, or the whole split, has fewer images than wanted; or targets are to be balanced.
    """
    order = torch.randperm(len(labels), generator=generator)
    if examples.per_class is None:
        wanted = examples.total or 0
        setting, of_class = f"pruner.scoring_data.total={wanted}", wanted // num_classes
    else:
        of_class, wanted = examples.per_class, examples.per_class * num_classes
        setting = f"pruner.scoring_data.per_class={of_class}"
    balanced = examples.per_class is not None if examples.balanced is None else examples.balanced
    if labels.is_floating_point():
        if examples.balanced:
            raise ConfigError(
                "pruner.scoring_data.balanced=true: the data of a regression has no classes; give null or false"
            )
        balanced = False
    if not balanced:
        if len(labels) < wanted:
            raise ConfigError(f"{setting}: there are {len(labels)} training images; give fewer")
        return order[:wanted]
    if of_class == 0:
        raise ConfigError(
            f"{setting}: there are {num_classes} classes; give more, or pruner.scoring_data.balanced=false"
        )
    shuffled = labels[order]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        members = (shuffled == label).nonzero().squeeze(1)
        if len(members) < of_class:
            raise ConfigError(
                f"{setting}: class {label} has {len(members)} training images; give fewer, or images whatever their "
                "class (pruner.scoring_data.balanced=false)"
            )
        chosen[members[:of_class]] = True
    return order[chosen]
