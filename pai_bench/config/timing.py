"""What does not go with rounds whose time a condition decides."""

from collections.abc import Sequence

from pai_bench.config.identity import function_name
from pai_bench.config.schema import RunConfig
from pai_bench.core import Call, Round
from pai_bench.errors import ConfigError


def check_conditions(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses a pruner whose masks cannot be compared from epoch to epoch, where a condition compares them.

    Raises:
        ConfigError: its scores do not follow from the weights alone.
    """
    pruner = run.pruner
    if not any(one.when is not None and one.when.chooses for one in rounds):
        return
    score = pruner.score
    why = None
    if pruner.scoring_data is not None:
        why = "looks at images"
    elif pruner.redraws or (isinstance(score, Call) and function_name("pruner", score.target) == "random.score"):
        why = "does not look at the weights"
    if why is not None:
        raise ConfigError(
            f"schedule={run.schedule.name}: it compares the masks of several epochs, and pruner={pruner.name} {why}; "
            "choose one that follows from the weights alone, such as filter_batch_norm or magnitude"
        )


def latest_clock(rounds: Sequence[Round]) -> float:
    """The recipe's clock after the last round, in epochs; with conditions the latest that it can be."""
    clock = 0.0
    for one in rounds:
        clock = max(clock, one.until_epoch) if one.rewind_epoch is None else one.rewind_epoch
    return clock
