"""The round loop: score, allocate, mask, until the schedule is done."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pai_bench import allocation, devices, masks, measures, seeding
from pai_bench.core import (
    Allocate,
    Batches,
    Examples,
    Loss,
    Mask,
    Pruner,
    Record,
    Round,
    Scores,
    Shape,
    Subnetwork,
    Weights,
)
from pai_bench.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """A mask and how it came about."""

    mask: Mask
    scores: Scores | None = None  # of the last round; None when there was no round
    seconds: float = 0.0
    num_examples: int = 0  # images that passed through the network while scoring, over all rounds
    sparsities: list[float] = field(default_factory=list)  # after each round
    num_tied: list[int] = field(default_factory=list)  # in each round, candidates among which order decided


def prune(
    model: nn.Module,
    pruner: Pruner,
    allocate: Allocate,
    rounds: Sequence[Round],
    *,
    initial: Weights,
    input_shape: Shape,
    draw: Callable[[Examples, torch.Generator], Batches],
    loss: Loss,
    seed: int,
    record: Record,
) -> Pruned:
    """Prunes a model in place, round by round; its pruned weights are zero afterwards, the others as before.

    Every round draws its own scoring images. Within a round a pruned weight cannot return: masks nest.

    Raises:
        ConfigError: a round leaves no weight, or there are too few scoring images.
        UserError: the scores of a round cannot rank the weights.
    """
    pruned = Pruned(masks.full(model))
    for number, this in enumerate(rounds, start=1):
        assert pruner.score is not None, "a schedule with rounds needs a score"
        batches: Batches = []
        if pruner.examples is not None:
            batches = draw(pruner.examples, seeding.generator(seed, "examples", number))
        started = time.perf_counter()
        net = Subnetwork(model, pruned.mask, initial, input_shape)
        with (
            measures.mode(model, pruner.mode == "train"),
            seeding.seeded(seed, "score", number),
            devices.reproducible(),
        ):
            try:
                scores = pruner.score(net, batches, loss, seeding.generator(seed, "noise", number))
                allocation.check_scores(scores, pruned.mask)
            except UserError as error:
                raise UserError(f"round {number} of {len(rounds)}: {error}") from error
        mask = allocate(scores, pruned.mask, this.sparsity, seeding.generator(seed, "allocation", number))
        masks.apply_(model, mask)
        took = time.perf_counter() - started
        num_images = sum(len(labels) for _, labels in batches)
        pruned = Pruned(
            mask,
            scores,
            pruned.seconds + took,
            pruned.num_examples + num_images,
            [*pruned.sparsities, masks.sparsity(mask)],
            [*pruned.num_tied, allocation.num_tied(scores, pruned.mask, mask)],
        )
        densities = {f"layer/{name}/density": density for name, density in masks.densities(mask).items()}
        record({"prune/round": number, "prune/sparsity": pruned.sparsities[-1], **densities}, 0.0)
        log.debug("round %d of %d: sparsity %.6f, %.2f s", number, len(rounds), pruned.sparsities[-1], took)
    return pruned
