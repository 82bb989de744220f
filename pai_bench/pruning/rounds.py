"""The round loop: train if asked, score, allocate, mask, rewind if asked, until the schedule is done."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis import measures, structure
from pai_bench.core import (
    Ablation,
    Allocate,
    Batches,
    Loss,
    Mask,
    Pruner,
    Record,
    Round,
    Scores,
    Shape,
    Subnetwork,
    Training,
    Weights,
    labels_of,
)
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import allocation, masks
from pai_bench.pruning import scoring
from pai_bench.system import devices, layout, seeding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """A mask and how it came about."""

    mask: Mask  # of the prunable weights
    units: Mask  # what was ranked: the weights, or the filters of each layer (O,)
    coupled: Mask = field(default_factory=dict)  # norms and biases that went with their filters
    without_ablation: Mask | None = None  # the mask of the weights before an ablation of it
    scores: Scores | None = None  # of the units in the last round; None when there was no round
    seconds: float = 0.0  # spent on scores and masks, training excluded
    num_examples: int = 0  # images that passed through the network for scores, over all rounds
    flops: int = 0  # of the scores, over all rounds, two for a multiply-add
    sparsities: list[float] = field(default_factory=list)  # of the prunable weights, after each round
    num_tied: list[int] = field(default_factory=list)  # in each round, candidates among which order decided
    moved: Weights | None = None  # values that weights had when they were last kept, where a pruner asks for them

    @property
    def mask_with_coupled(self) -> Mask:
        """Everything that training has to hold at zero."""
        return self.mask | self.coupled


def prune(
    model: nn.Module,
    pruner: Pruner,
    allocate: Allocate,
    rounds: Sequence[Round],
    *,
    ablation: Ablation,
    initial: Weights,
    input_shape: Shape,
    draw: Callable[..., Batches],
    training: Training,
    loss: Loss,
    seed: int,
    record: Record,
    diagnose: Callable[[Mask], dict[str, float]] | None = None,
    resume_from: Pruned | None = None,
    checkpoint: Callable[[Pruned], None] = lambda pruned: None,
) -> Pruned:
    """Prunes a model in place, round by round; its pruned weights are zero afterwards.

    Every round draws its own scoring images. Unless the pruner regrows, a pruned unit does not return: masks nest.

    Args:
        initial: of every parameter, as the model was drawn.
        draw: training images for scoring, as core.Data draws them.
        diagnose: measurements to record before and after the mask of every round is applied.
        resume_from: what an earlier attempt had reached, to go on from; the model is as it was then.
        checkpoint: called at the start and after every round with what has been reached.

    Raises:
        ConfigError: a round leaves no weight, there are too few scoring images, or the mask is to be ablated after
            training that is not rewound.
        UserError: the scores of a round cannot rank the weights.
    """
    everything = masks.full(model)
    filters = structure.filters(model, input_shape) if pruner.reduce is not None else None
    if ablation.mask is not None and any(r.until_epoch > 0 and not _returns(r) for r in rounds):
        raise ConfigError(
            "ablation of the mask: weights that training has moved and pruned have no value to come back with; use a "
            "schedule before training, or one that rewinds the weights"
        )
    pruned = resume_from or Pruned(everything, everything if filters is None else filters.full(everything))
    checkpoint(pruned)
    left = list(enumerate(rounds, start=1))[len(pruned.sparsities) :]
    if not left:
        return pruned
    # Without training in between, weights lie in the order of their dimensions, as scores do: masks are found faster.
    trained_in, device = layout.layout_of(model), next(model.parameters()).device
    if all(this.until_epoch == 0 for this in rounds):
        layout.lay_out_(model, scoring.PLAIN)
    dtype = scoring.DTYPES[pruner.dtype]
    scored = scoring.copy_for_scores(model, dtype)
    drawn = scoring.cast_weights(initial, dtype)
    stale = False  # the copy, since weights have moved otherwise than by pruning
    cache: dict[str, Any] = {}
    for number, this in left:
        assert pruner.score is not None, "a schedule with rounds needs a score"
        if this.until_epoch > 0:
            training.until(pruned.mask_with_coupled, this.until_epoch)
            stale, cache = True, {}
        before = (
            {f"before/{key}": value for key, value in diagnose(pruned.mask_with_coupled).items()} if diagnose else {}
        )
        batches = _batches(pruner, ablation, draw, seed, number)
        started = time.perf_counter()
        if stale:
            scoring.update_(scored, model)
        candidates = pruned.units
        if pruner.regrow:
            candidates = {name: torch.ones_like(tensor) for name, tensor in candidates.items()}
        num_kept = masks.num_kept(this.sparsity, masks.total(candidates), this.rounding)
        moved = _moved(model, pruned, initial) if pruner.regrow_moved else None
        net = Subnetwork(
            scored, pruned.mask, drawn, input_shape, pruned.coupled, lambda n=num_kept: n,  # type: ignore[misc]
            cache=cache, moved=None if moved is None else scoring.cast_weights(moved, dtype),
        )  # fmt: skip

        def generator(name: str, number: int = number) -> Generator:
            return seeding.generator(seed, name, number)

        # Every round does the same arithmetic on the same shapes, so one is enough to count; what a score can leave out
        # later counts as done, so that costs can be compared.
        counter = measures.CountFlops() if number == 1 else None

        def conditions(stream: str, number: int = number, counter: measures.CountFlops | None = counter) -> ExitStack:
            stack = ExitStack()
            stack.enter_context(measures.mode(scored, pruner.mode == "train"))
            stack.enter_context(seeding.seeded(seed, stream, number))
            stack.enter_context(devices.reproducible(device))
            if counter is not None:
                stack.enter_context(counter)
            return stack

        try:
            with conditions("score"):
                scores = pruner.score(net, batches, loss, generator("noise"))
            if filters is not None and pruner.reduce is not None:
                scores = filters.reduce(scores, pruner.reduce)
            # Pruning what matters most first cuts all paths early, and the rounds after it have nothing to rank.
            allocation.check_scores(scores, candidates, zeros_allowed=ablation.scores is not None)
            if number == 1 and (silent := allocation.silent(scores, candidates)):
                log.warning(
                    "every score is zero in %d of %d layers, from %s on: no signal runs through them (a residual block "
                    "whose last norm starts at zero is one cause)", len(silent), len(candidates), silent[0],
                )  # fmt: skip
        except UserError as error:
            if type(error) is not UserError:  # of images that cannot be read, say, which has an exit code of its own
                raise
            raise UserError(f"round {number} of {len(rounds)}: {error}") from error
        if ablation.scores is not None:
            scores = ablation.scores(scores, candidates, generator("ablation"))
        chosen = allocate(scores, candidates, num_kept, generator("allocation"))
        units, without_ablation = chosen.mask, None
        if ablation.mask is not None and number == len(rounds):
            without_ablation = units if filters is None else filters.expand(model, units)
            units = ablation.mask(units, generator("ablation"))
        held = units if filters is None else filters.expand(model, units)
        mask = {name: held[name] for name in everything}
        if (
            pruner.regrow or without_ablation is not None
        ):  # what comes back does so with its initial value, or where it stood
            _restore_(
                model, initial | (moved or {}), {n: held[n] & ~kept for n, kept in pruned.mask_with_coupled.items()}
            )
        if chosen.scale is not None:
            _assign_(model, {name: weight * chosen.scale[name] for name, weight in net.weights.items()})
        masks.apply_narrower_(model, pruned.mask_with_coupled, held)
        if pruner.transfer is not None:
            scoring.update_(scored, model)
            net = Subnetwork(scored, mask, drawn, input_shape)
            with conditions("transfer"):
                _assign_(model, pruner.transfer(net, batches, loss, generator("transfer")))
            masks.apply_(model, held)
        stale = (
            pruner.regrow or pruner.transfer is not None or chosen.scale is not None or this.rewind_epoch is not None
        )
        if stale:
            cache = {}
        else:
            masks.apply_narrower_(scored, pruned.mask_with_coupled, held)
        devices.wait(device)
        took = time.perf_counter() - started
        densities = masks.densities(mask)
        pruned = Pruned(
            mask,
            units,
            {name: tensor for name, tensor in held.items() if name not in everything},
            without_ablation,
            scores,
            pruned.seconds + took,
            pruned.num_examples + sum(map(len, labels_of(batches))),
            counter.flops if counter is not None else pruned.flops // (number - 1) * number,
            [*pruned.sparsities, 1 - sum(densities[name] * mask[name].numel() for name in mask) / masks.total(mask)],
            [*pruned.num_tied, chosen.num_tied],
            moved,
        )
        after = {f"after/{key}": value for key, value in diagnose(pruned.mask_with_coupled).items()} if diagnose else {}
        layers = {f"layer/{name}/density": density for name, density in densities.items()}
        state = {"prune/round": number, "prune/sparsity": pruned.sparsities[-1]}
        record(state | before | after | layers, training.age_epochs)
        log.debug("round %d of %d: sparsity %.6f, %.2f s", number, len(rounds), pruned.sparsities[-1], took)
        if this.rewind_epoch is not None:
            training.rewind(pruned.mask_with_coupled, this.rewind_epoch, this.rewind_weights)
        checkpoint(pruned)
    layout.lay_out_(model, trained_in)
    return pruned


def apply_given_mask(
    model: nn.Module, mask: Mask, coupled: Mask, *, ablation: Ablation, seed: int, record: Record
) -> Pruned:
    """Prunes a model in place by a mask that is given: nothing is scored, and it costs nothing.

    Args:
        coupled: other parameters that are held at zero.

    Raises:
        ConfigError: the mask is to be ablated, and other parameters would not go with it.
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


def _batches(pruner: Pruner, ablation: Ablation, draw: Callable[..., Batches], seed: int, number: int) -> Batches:
    """The images and labels that the score of a round sees."""
    if pruner.scoring_data is None:
        return []
    noise, stored = seeding.generator(seed, "ablation", number), ablation.images
    change = () if stored is None else (lambda images, labels: stored(images, labels, noise),)
    batches = draw(
        pruner.scoring_data, seeding.generator(seed, "examples", number), scoring.DTYPES[pruner.dtype], *change
    )
    return batches if ablation.batches is None else ablation.batches(batches, noise)


def _moved(model: nn.Module, pruned: Pruned, initial: Weights) -> Weights:
    """The values of weights, and of those that are pruned the values that they had before."""
    weights, before = masks.prunable(model), pruned.moved or initial
    return {name: torch.where(kept, weights[name].detach(), before[name]) for name, kept in pruned.mask.items()}


def _returns(this: Round) -> bool:
    return this.rewind_epoch is not None and this.rewind_weights


@torch.no_grad()
def _restore_(model: nn.Module, initial: Weights, returned: Mask) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in returned.items():
        parameters[name][tensor] = initial[name][tensor]


@torch.no_grad()
def _assign_(model: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)
