"""What a config may not say beside a search that learns its mask."""

from pai_bench.config.schema import RunConfig
from pai_bench.config.signatures import shown
from pai_bench.config.what_is_pruned import has_structure
from pai_bench.errors import ConfigError


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
    for key, usual in (("target", "sparsity"), ("repair", None)):
        if (value := getattr(run, key)) != usual:
            raise ConfigError(f"{key}={shown(value)}: {said} learns the mask as a whole; give {key}={shown(usual)}")
    if has_structure(run):
        raise ConfigError(
            f"allocation={run.allocation.name}: {said} chooses the weights of a layer by its scores alone, and would "
            "lose the structure; give another allocation"
        )
    if any(hook is not None for hook in (ablation.batches, ablation.images, ablation.scores)):
        raise ConfigError(
            f"ablation={ablation.name}: {said} takes no scores of images; choose an ablation of the mask or the weights"
        )
