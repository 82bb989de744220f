"""A mask that is given, from a file, takes the place of a search."""

from torch import nn

from pai_bench.core import Ablation, Mask, Record
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.pruning.pruned import Pruned
from pai_bench.system import seeding


def apply_given_mask(
    model: nn.Module, mask: Mask, coupled: Mask, *, ablation: Ablation, seed: int, record: Record
) -> Pruned:
    """Prunes a model in place by a given mask. Nothing is scored, and the record counts no costs.

    Args:
        coupled: masks of other parameters, which are kept at zero too.

    Raises:
        ConfigError: the mask is to be ablated, and other parameters are masked too, which the ablation cannot move.
    """
    chosen = mask
    if ablation.mask is not None:
        if coupled:
            raise ConfigError(
                f"ablation of the mask: {next(iter(coupled))} is held at zero too, which is no weight to move; give "
                "a mask of weights alone"
            )
        chosen = ablation.mask(mask, seeding.generator(seed, "ablation", 1))
    masks.apply_(model, chosen | coupled)
    layers = {f"layer/{name}/density": density for name, density in masks.densities(chosen).items()}
    record({"prune/round": 0, "prune/sparsity": masks.sparsity(chosen)} | layers, 0.0)
    return Pruned(chosen, chosen, coupled, mask if ablation.mask is not None else None)
