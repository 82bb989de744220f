"""The rounds of a search: train if asked, score, choose, apply, rewind if asked, until the schedule is done."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from pai_bench.analysis.cost import CountFlops
from pai_bench.analysis.filters import find_filters
from pai_bench.analysis.mode import mode
from pai_bench.batches import labels_of
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
    ScoringData,
    Selection,
    Shape,
    Subnetwork,
    Target,
    Training,
    Weights,
)
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import masks, reading
from pai_bench.pruning import checks, effective, scoring, values
from pai_bench.pruning.no_training import NoTraining
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.watch import timed, train_before
from pai_bench.system import devices, graphs, layout, seeding

log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    pruner: Pruner,
    allocate: Allocate,
    rounds: Sequence[Round],
    *,
    initial: Weights,
    input_shape: Shape,
    draw: Callable[..., Batches],
    loss: Loss,
    seed: int,
    prunable: masks.Which = "all",
    target: Target = "sparsity",
    ablation: Ablation = Ablation(),  # noqa: B008, as it is frozen
    training: Training = NoTraining(),  # noqa: B008, as it has no state
    record: Record = lambda metrics, epoch: None,
    diagnose: Callable[[Mask], dict[str, float]] | None = None,
    build: Callable[[], nn.Module] | None = None,
    resume_from: Pruned | None = None,
    checkpoint: Callable[[Pruned], None] = lambda pruned: None,
) -> Pruned:
    """Prunes a model in place, round by round. Afterwards its pruned weights are zero.

    Every round draws its own scoring images. A pruned unit does not return (masks nest), unless the pruner regrows.

    Args:
        initial: the initial values of every parameter.
        draw: draws training images for scoring, as core.Data does.
        prunable: which layers are pruned, as in masks.prunable.
        target: "effective": the sparsity of every round is that of the weights on a path, and it keeps as few weights
            as reach it.
        training: does what the rounds ask between them. The default is for rounds that lie before training.
        diagnose: measurements that are recorded before and after each round's mask is applied.
        build: makes a model anew, its weights drawn from torch's global generator; for pruners that redraw.
        resume_from: what an earlier attempt had reached. The model has to be as it was then.
        checkpoint: called with what has been reached, at the start and after every round.

    Raises:
        ConfigError: a round leaves no weight; there are too few scoring images; the mask is to be ablated after
            training that is not rewound.
        UserError: the scores of a round cannot rank the weights.
    """
    checks.check_ablation(ablation, rounds)
    search = _Search(
        model,
        pruner,
        allocate,
        ablation,
        initial,
        input_shape,
        draw,
        training,
        loss,
        seed,
        diagnose,
        build,
        len(rounds),
        prunable,
        target,
    )
    pruned = resume_from or search.start()
    checkpoint(pruned)
    remaining = list(enumerate(rounds, start=1))[len(pruned.sparsities) :]
    trained_in = layout.layout_of(model)
    # Without training in between, weights are laid out as scores are: masks are applied faster.
    if remaining and all(one.until_epoch == 0 for one in rounds):
        layout.lay_out_(model, scoring.PLAIN)
    for number, goal in remaining:
        pruned, metrics = search.round(number, goal, pruned)
        record(metrics, training.age_epochs)
        if goal.rewind_epoch is not None:
            training.rewind(pruned.mask_with_coupled, goal.rewind_epoch, goal.rewind_weights)
        checkpoint(pruned)
    if remaining:
        layout.lay_out_(model, trained_in)
    return pruned


@dataclass(frozen=True)
class _Prepared:
    """What one round works with."""

    number: int  # of the round, from 1
    goal: Round
    before: Pruned  # what the rounds so far have reached
    batches: Batches
    pass_batches: Batches  # of the pass that sets the statistics of norms
    candidates: Mask  # the units that the round may keep
    num_kept: int | None  # how many of them it keeps; None: as many as its effective sparsity takes
    moved: Weights | None
    net: Subnetwork
    counter: CountFlops | None
    started: float


@dataclass(frozen=True)
class _Choice:
    """The units that a round keeps, and what follows from them."""

    units: Mask
    held: Mask  # all that the units decide: the prunable weights, and norms and biases of pruned filters
    without_ablation: Mask | None  # the mask of the weights before an ablation changed it
    scale: Weights | None
    num_tied: int


@dataclass
class _Search:
    """What the rounds of a search share."""

    model: nn.Module
    pruner: Pruner
    allocate: Allocate
    ablation: Ablation
    initial: Weights
    input_shape: Shape
    draw: Callable[..., Batches]
    training: Training
    loss: Loss
    seed: int
    diagnose: Callable[[Mask], dict[str, float]] | None
    build: Callable[[], nn.Module] | None
    num_rounds: int
    prunable: masks.Which
    target: Target

    def __post_init__(self) -> None:
        reduces = self.pruner.reduce is not None
        self.filters = find_filters(self.model, self.input_shape) if reduces else None
        self.device = next(self.model.parameters()).device
        self.names = list(masks.prunable(self.model, self.prunable))
        self.dtype = scoring.DTYPES[self.pruner.dtype]
        self.scored = scoring.copy_for_scores(self.model, self.dtype)
        self.scored_initial = scoring.cast_weights(self.initial, self.dtype)
        if self.target == "effective":
            self.by_paths = effective.Target(self.model, masks.full(self.model, self.prunable), self.input_shape)
        self.passes = self.pruner.mode == "eval_after_pass"
        if self.passes:
            scoring.check_pass(self.pruner, self.scored)
        self.redraw = None
        if self.pruner.redraws and self.build is not None:
            self.redraw = scoring.Redraw(self.build, self.device, self.dtype)
        self.stale = False  # whether the model's weights have moved since the copy was made, other than by pruning
        self.cache: dict[str, Any] = {}
        self.repeater = graphs.Repeater(self.device, self.scored)

    def start(self) -> Pruned:
        """What has been reached before the first round: nothing is pruned."""
        everything = masks.full(self.model, self.prunable)
        return Pruned(everything, everything if self.filters is None else self.filters.full(everything))

    def round(self, number: int, goal: Round, before: Pruned) -> tuple[Pruned, dict[str, float]]:
        """Runs one round: what has been reached with it, and the metrics to record."""
        watch = None
        if goal.until_epoch > 0 or goal.when is not None:
            choose = partial(self._would_keep, number, goal, before)
            watch = train_before(number, goal, before, self.training, self._weights, choose)
            self.stale, self.cache = True, {}
        metrics_before = self._diagnosed("before", before)
        prepared = self._prepare(number, goal, before)
        scores = self._score(prepared)
        choice = self._choose(prepared, scores)
        self._apply(prepared, choice)
        densities = masks.densities({name: choice.held[name] for name in self.names})
        pruned = timed(self._reached(prepared, scores, choice, densities), before, watch, self.training.epoch)
        metrics_after = self._diagnosed("after", pruned)
        layers = {f"layer/{name}/density": density for name, density in densities.items()}
        state = {"prune/round": number, "prune/sparsity": pruned.sparsities[-1]}
        if self.target == "effective":
            state["prune/effective_sparsity"] = self.by_paths.sparsity(pruned.mask)
        return pruned, state | metrics_before | metrics_after | layers

    def _weights(self) -> Weights:
        return {name: weight.detach() for name, weight in masks.prunable(self.model, self.prunable).items()}

    def _would_keep(self, number: int, goal: Round, before: Pruned) -> Mask:
        """The units that a round would keep of the network as it is now."""
        self.stale, self.cache = True, {}
        prepared = self._prepare(number, goal, before)
        return self._selected(prepared, self._score(prepared)).mask

    def _prepare(self, number: int, goal: Round, before: Pruned) -> _Prepared:
        """Draws the images, brings the copy that is scored up to date, and says what the round has to keep."""
        batches = self._batches(number, "examples", self.pruner.scoring_data)
        pass_batches = self._batches(number, "pass", scoring.data_of_pass(self.pruner)) if self.passes else []
        started = time.perf_counter()
        if self.stale:
            scoring.update_(self.scored, self.model)
        candidates = before.units
        if self.pruner.regrow:
            candidates = {name: torch.ones_like(kept) for name, kept in candidates.items()}
        num_kept = None
        if self.target == "sparsity":
            num_kept = masks.num_kept_after(goal, masks.total(candidates))
        moved = self._moved(before) if self.pruner.regrow_moved else None
        net = Subnetwork(
            self.scored,
            before.mask,
            self.scored_initial,
            self.input_shape,
            before.coupled,
            num_kept=lambda: checks.known_number(num_kept, self.pruner),
            cache=self.cache,
            moved=None if moved is None else scoring.cast_weights(moved, self.dtype),
            redraw=self.redraw,
            repeat=self.repeater,
            required=None if reading.free(next(iter(candidates.values()))) else [],
        )
        # All rounds do the same arithmetic on the same shapes, so the first is counted for all. What a score can leave
        # out in later rounds counts as done, so that costs can be compared.
        counter = CountFlops() if number == 1 else None
        self.repeater.begin(self.num_rounds - number + 1)
        parts = batches, pass_batches, candidates, num_kept
        return _Prepared(number, goal, before, *parts, moved, net, counter, started)

    def _batches(self, number: int, stream: str, wanted: ScoringData | None) -> Batches:
        """The images and labels that the score of a round sees, or that pass before it."""
        if wanted is None:
            return []
        noise, change_stored = self._generator("ablation", number), self.ablation.images
        change = () if change_stored is None else (lambda images, labels: change_stored(images, labels, noise),)
        try:
            batches = self.draw(wanted, self._generator(stream, number), self.dtype, *change)
        except ConfigError as error:
            if stream != "pass":
                raise
            raise ConfigError(str(error).replace("pruner.scoring_data.total", "pruner.pass_images")) from error
        return batches if self.ablation.batches is None else self.ablation.batches(batches, noise)

    def _moved(self, before: Pruned) -> Weights:
        """The values of the kept weights; of the pruned weights, the values that they had when they were last kept."""
        weights, last = masks.prunable(self.model), before.moved or self.initial
        return {name: torch.where(kept, weights[name].detach(), last[name]) for name, kept in before.mask.items()}

    def _score(self, prepared: _Prepared) -> Scores:
        """The scores of the units, checked, and as an ablation leaves them."""
        number, candidates = prepared.number, prepared.candidates
        assert self.pruner.score is not None, "a schedule with rounds needs a score"
        try:
            with self._conditions("score", prepared):
                scores = self.pruner.score(prepared.net, prepared.batches, self.loss, self._generator("noise", number))
            if self.redraw is not None and not self.redraw.used:
                raise ConfigError(f"pruner.redraws=true: pruner={self.pruner.name} draws no new weights; give null")
            if self.filters is not None and self.pruner.reduce is not None:
                scores = self.filters.reduce(scores, self.pruner.reduce)
            # Inverted scores cut all paths in the first rounds. Then the others have nothing to rank.
            required = prepared.net.required
            checks.check_scores(scores, candidates, required, zeros_allowed=self.ablation.scores is not None)
        except UserError as error:
            if type(error) is not UserError:  # its kinds have exit codes of their own, as for unreadable images
                raise
            raise UserError(f"round {number} of {self.num_rounds}: {error}") from error
        except RuntimeError as error:
            if self.dtype == torch.float64 and scoring.is_about_types(error):
                raise UserError(
                    f"pruner.dtype=float64: {type(self.model).__name__} makes tensors of a type of its own "
                    f"({str(error).partition(chr(10))[0]}); set pruner.dtype=float32"
                ) from error
            raise
        if number == 1 and (silent := checks.silent(scores, candidates)):
            log.warning(
                "every score is zero in %d of %d layers, from %s on: no signal runs through them (a residual block "
                "whose last norm starts at zero is one cause)",
                *(len(silent), len(candidates), silent[0]),
            )
        if self.ablation.scores is not None:
            scores = self.ablation.scores(scores, candidates, self._generator("ablation", number))
        return scores

    @contextmanager
    def _conditions(self, stream: str, prepared: _Prepared) -> Iterator[None]:
        """The mode, the random state and the arithmetic under which the functions of a pruner run."""
        with (
            mode(self.scored, self.pruner.mode == "train"),
            seeding.seeded(self.seed, stream, prepared.number),
            devices.reproducible(self.device),
            prepared.counter or nullcontext(),
            scoring.after_pass(self.scored, prepared.pass_batches) if self.passes else nullcontext(),
        ):
            yield

    def _selected(self, prepared: _Prepared, scores: Scores) -> Selection:
        """What the allocation keeps."""
        candidates, keep = prepared.candidates, prepared.num_kept
        generator = partial(self._generator, "allocation", prepared.number)
        if keep is None:
            last, goal = prepared.number == self.num_rounds, prepared.goal.sparsity
            return self.by_paths.choose(self.allocate, scores, candidates, goal, generator, last=last)
        selection = self.allocate(scores, candidates, keep, generator())
        masks.note_counts(selection.mask)
        assert masks.kept(selection.mask) == keep, "the allocation did not keep the exact number"
        return selection

    def _choose(self, prepared: _Prepared, scores: Scores) -> _Choice:
        """The units that the allocation keeps, and in the last round what an ablation makes of them."""
        number, selection = prepared.number, self._selected(prepared, scores)
        units, without_ablation = selection.mask, None
        if self.ablation.mask is not None and number == self.num_rounds:
            without_ablation = self._expanded(units)
            units = self.ablation.mask(units, self._generator("ablation", number))
        return _Choice(units, self._expanded(units), without_ablation, selection.scale, selection.num_tied)

    def _expanded(self, units: Mask) -> Mask:
        """The mask of parameters that keeps these units."""
        return units if self.filters is None else self.filters.expand(self.model, units)

    def _apply(self, prepared: _Prepared, choice: _Choice) -> None:
        """Gives the model, and the copy that is scored, the weights with which the round ends."""
        pruner = self.pruner
        before = prepared.before.mask_with_coupled
        if pruner.regrow or choice.without_ablation is not None:
            returned = {name: choice.held[name] & ~kept for name, kept in before.items()}
            values.restore_(self.model, self.initial | (prepared.moved or {}), returned)
        if choice.scale is not None:
            weights = prepared.net.weights
            values.assign_(self.model, {name: weight * choice.scale[name] for name, weight in weights.items()})
        masks.apply_narrower_(self.model, before, choice.held)
        if pruner.transfer is not None:
            scoring.update_(self.scored, self.model)
            mask = {name: choice.held[name] for name in self.names}
            net = Subnetwork(self.scored, mask, self.scored_initial, self.input_shape)
            with self._conditions("transfer", prepared):
                generator = self._generator("transfer", prepared.number)
                values.assign_(self.model, pruner.transfer(net, prepared.batches, self.loss, generator))
            masks.apply_(self.model, choice.held)
        rewinds = prepared.goal.rewind_epoch is not None
        self.stale = pruner.regrow or pruner.transfer is not None or choice.scale is not None or rewinds
        if self.stale:
            self.cache = {}
        else:
            masks.apply_narrower_(self.scored, before, choice.held)

    def _reached(self, prepared: _Prepared, scores: Scores, choice: _Choice, densities: dict[str, float]) -> Pruned:
        """The record of what has been reached with a round."""
        devices.wait(self.device)
        seconds = time.perf_counter() - prepared.started
        number, before, counter = prepared.number, prepared.before, prepared.counter
        seen = [*labels_of(prepared.batches), *labels_of(prepared.pass_batches)]
        mask = {name: choice.held[name] for name in self.names}
        sparsity = 1 - sum(densities[name] * kept.numel() for name, kept in mask.items()) / masks.total(mask)
        log.debug("round %d of %d: sparsity %.6f, %.2f s", number, self.num_rounds, sparsity, seconds)
        return Pruned(
            mask=mask,
            units=choice.units,
            coupled={name: kept for name, kept in choice.held.items() if name not in mask},
            without_ablation=choice.without_ablation,
            scores=scores,
            seconds=before.seconds + seconds,
            num_examples=before.num_examples + sum(map(len, seen)),
            flops=counter.flops if counter is not None else before.flops // (number - 1) * number,
            sparsities=[*before.sparsities, sparsity],
            num_tied=[*before.num_tied, choice.num_tied],
            moved=prepared.moved,
        )

    def _diagnosed(self, when: str, pruned: Pruned) -> dict[str, float]:
        if self.diagnose is None:
            return {}
        return {f"{when}/{key}": value for key, value in self.diagnose(pruned.mask_with_coupled).items()}

    def _generator(self, stream: str, number: int) -> Generator:
        return seeding.generator(self.seed, stream, number)
