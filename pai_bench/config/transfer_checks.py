"""Rules of `transfer`: what does not go with other starting weights."""

from collections.abc import Sequence

from pai_bench.config.schema import RunConfig
from pai_bench.config.value_checks import require
from pai_bench.core import Round
from pai_bench.errors import ConfigError


def check_transfer(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses a transfer that has nothing to start from, or that something else would undo.

    Raises:
        ConfigError: it is such.
    """
    if run.transfer is None:
        require(run.checksums.transfer is None, "checksums.transfer", run.checksums.transfer, "add transfer=NAME")
        return

    def refuse(why: str) -> None:
        raise ConfigError(f"transfer={run.transfer and run.transfer.name}: {why}; give transfer=none")

    if not run.prunes:
        refuse("a dense network has no mask to start from other weights with")
    if run.search is not None:
        refuse(f"search={run.search.name} chooses the weights with the mask")
    if run.pruner.transfer is not None:
        refuse(f"pruner={run.pruner.name} gives the weights values of its own")
    if run.rewire.start_sparsity == 0:
        refuse(f"rewire={run.rewire.name} starts from the dense network")
    if run.ablation.weights is not None:
        refuse(f"ablation={run.ablation.name} changes the weights too")
    if run.allocation.settings.get("rescale"):
        refuse("it would undo allocation.rescale=true")


def file_of(run: RunConfig) -> str | None:
    """The file that a transfer takes weights from; None without one."""
    file = None if run.transfer is None else run.transfer.settings.get("weights")
    return None if file is None else str(file)
