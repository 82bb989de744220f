"""Rules of `prunable`, `target` and `repair`: which layers are pruned, what a sparsity counts, what is mended."""

from collections.abc import Sequence

from pai_bench.config import identity
from pai_bench.config.schema import RunConfig
from pai_bench.config.signatures import shown
from pai_bench.core import Round
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
    words = [run.prunable] if isinstance(run.prunable, str) else run.prunable
    spared = [word for word in words if word in _NEEDED_BY.get(_allocation(run), ())]
    if spared and (run.pruner.score is not None or run.search is not None):
        raise ConfigError(
            f"prunable={shown(run.prunable)}: allocation={run.allocation.name} would take another layer for the first "
            "or the last; give all, or another allocation"
        )


# Allocations with a density for the first or the last layer, and the words that may spare it.
_NEEDED_BY = {
    "uniform_plus": ("no_first", "no_last", "conv"),
    "erk_plus": ("no_last", "conv"),
    "layer_rates": ("no_last", "conv"),
}
_OF_ONE_NUMBER = ("n_m",)  # allocations that keep one number of weights, beside those with a mask
_STRUCTURED = ("n_m", "constant_fan_in")
_OF_A_NUMBER = ("npb.score", "phew.score")  # scores that differ with the number of weights to keep


def has_one_number(run: RunConfig) -> bool:
    """Whether the allocation keeps one number of weights and no other."""
    return "mask" in run.allocation.settings or _allocation(run) in _OF_ONE_NUMBER


def has_structure(run: RunConfig) -> bool:
    """Whether the allocation makes a structure, which lives by the place of every weight."""
    return _allocation(run) in _STRUCTURED


def _allocation(run: RunConfig) -> str:
    return identity.function_name("allocation", run.allocation.target)


def check_allocation(run: RunConfig) -> None:
    """Refuses an allocation that has nothing to allocate. A dense network may have one, for sweeps over pruners.

    Raises:
        ConfigError: it is such.
    """
    usual = _allocation(run) == "global_topk" and not run.allocation.settings.get("min_density")
    if usual or run.pruner.score is not None or run.search is not None:
        return
    if run.mask is not None:
        raise ConfigError(f"allocation={run.allocation.name}: mask={run.mask} is taken as it is; leave allocation= out")
    if run.rewires:
        raise ConfigError(
            f"allocation={run.allocation.name}: rewire={run.rewire.name} starts from the dense network and has a rule "
            "of its own; leave allocation= out"
        )


def check_target(run: RunConfig, rounds: Sequence[Round]) -> None:
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
    if identity.function_name("pruner", getattr(run.pruner.score, "target", "")) in _OF_A_NUMBER:
        refuse(f"pruner={run.pruner.name} needs the number of weights to keep before it scores")
    if run.rewires:
        refuse(f"rewire={run.rewire.name} moves the mask, and with it the paths")
    if (rounding := next((one.rounding for one in rounds if one.rounding != "nearest"), None)) is not None:
        raise ConfigError(
            f"schedule.rounding={rounding}: target=effective searches for the number of weights and rounds none; give "
            "nearest"
        )
    if run.ablation.mask is not None:
        refuse(f"ablation={run.ablation.name} changes the mask, and with it the paths")
    if run.allocation.settings.get("rescale"):
        refuse("allocation.rescale=true needs the number of weights to keep")
    if has_one_number(run):
        refuse(f"allocation={run.allocation.name} cannot keep any number of weights")
    if _allocation(run) == "layer_rates":
        refuse(
            f"the fractions of allocation={run.allocation.name} are of what is left, and it is asked again and again"
        )


def check_repair(run: RunConfig) -> None:
    """Refuses a repair of what is not chosen here, and one that something else would undo.

    Raises:
        ConfigError: it is such.
    """
    if run.repair is None or not run.prunes:
        return

    def refuse(why: str) -> None:
        raise ConfigError(f"repair={run.repair}: {why}; give repair=null")

    if run.mask is not None:
        refuse(f"mask={run.mask} is taken as it is")
    if run.pruner.reduce is not None:
        refuse(f"pruner={run.pruner.name} prunes filters, and their inputs with them")
    if run.rewires:
        refuse(f"rewire={run.rewire.name} would undo it")
    if run.ablation.mask is not None:
        refuse(f"ablation={run.ablation.name} would undo it")
    if run.allocation.settings.get("rescale"):
        refuse("allocation.rescale=true has no factor for the weights that are added")
    if has_structure(run):
        refuse(f"it would break the structure that allocation={run.allocation.name} makes")
