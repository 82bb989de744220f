"""What a config may not say beside a search that learns its mask."""

from pai_bench.config.schema import Plain, RunConfig
from pai_bench.config.signatures import shown
from pai_bench.errors import ConfigError


def normalise_(settings: Plain) -> None:
    """Makes null of `search=none`, so that it is no part of a run's name.

    Raises:
        ConfigError: it has settings all the same.
    """
    search = settings.get("search")
    if not isinstance(search, dict) or search.get("name") != "none":
        return
    for key, value in search.items():
        if key != "name" and value is not None:
            raise ConfigError(f"search.{key}={shown(value)}: no mask is learned; add search=NAME")
    settings["search"] = None


def check_stands_alone(run: RunConfig) -> None:
    """Refuses what would find another mask than a search that learns it, or what such a search does not have.

    Raises:
        ConfigError: there is such a setting.
    """
    if run.search is None:
        return
    said, ablation = f"search={run.search.name}", run.ablation
    if run.pruner.score is not None:
        raise ConfigError(
            f"{said}: it learns its scores, and those of pruner={run.pruner.name} would be ignored; leave pruner= or "
            "search= out"
        )
    if run.mask is not None:
        raise ConfigError(f"{said}: mask={run.mask} would be ignored; leave mask= or search= out")
    if any(hook is not None for hook in (ablation.batches, ablation.images, ablation.scores)):
        raise ConfigError(
            f"ablation={ablation.name}: {said} takes no scores of images; choose an ablation of the mask or the weights"
        )
