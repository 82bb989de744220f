"""Rules of `prunable` and `target`: which layers are pruned, and what a sparsity counts."""

from pai_bench.config import identity
from pai_bench.config.schema import RunConfig
from pai_bench.config.signatures import shown
from pai_bench.errors import ConfigError


def check_layers(run: RunConfig) -> None:
    """Refuses words that do not go together, and layers that filters cannot spare.

    Raises:
        ConfigError: the words are such.
    """
    if not isinstance(run.prunable, str) and "all" in run.prunable:
        raise ConfigError(f"prunable={shown(run.prunable)}: all leaves nothing out; give all, or the other words alone")
    if run.pruner.reduce is not None and run.prunable != "all":
        raise ConfigError(
            f"prunable={shown(run.prunable)}: pruned filters take the weights that read them along, in every layer; "
            "give all"
        )


# Allocations that keep one number of weights, or whose densities depend on what is left.
_NOT_BY_PATHS = ("densities_of_mask", "n_m", "layer_rates")


def check_target(run: RunConfig) -> None:
    """Refuses an effective sparsity where none could be reached, or where it would not last.

    Raises:
        ConfigError: it is such.
    """
    if run.target == "sparsity" or not run.prunes:
        return

    def refuse(why: str) -> None:
        raise ConfigError(f"target=effective: {why}; give target=sparsity")

    if run.mask is not None:
        refuse(f"mask={run.mask} has a sparsity of its own")
    if run.pruner.reduce is not None:
        refuse(f"pruner={run.pruner.name} prunes filters, and paths are of weights")
    if run.ablation.mask is not None:
        refuse(f"ablation={run.ablation.name} changes the mask, and with it the paths")
    if run.allocation.settings.get("rescale"):
        refuse("allocation.rescale=true needs the number of weights to keep")
    if identity.function_name("allocation", run.allocation.target) in _NOT_BY_PATHS:
        refuse(f"allocation={run.allocation.name} cannot keep any number of weights")
