"""How a run learns its mask: scores are trained on frozen weights, and the network is left with what they choose."""

import logging
import time
from dataclasses import replace

import torch

from pai_bench.assembly import Parts
from pai_bench.core import Allocate, Mask, Record, TrainingLength, Weights
from pai_bench.errors import ConfigError
from pai_bench.learned.method import Occasion
from pai_bench.learned.network import LearnedNetwork
from pai_bench.learned.settings import recipe_of
from pai_bench.masks import masks
from pai_bench.masks.shared_weights import by_first_names
from pai_bench.pruning.given import apply_given_mask
from pai_bench.pruning.pruned import Pruned
from pai_bench.runs.checkpoints import Checkpoints
from pai_bench.system import distributed, seeding
from pai_bench.training.recipe import length
from pai_bench.training.recording import Observers
from pai_bench.training.step import Execution
from pai_bench.training.trainer import Trainer

log = logging.getLogger(__name__)


def learn_mask(parts: Parts, trainer: Trainer, record: Record, checkpoints: Checkpoints) -> Pruned:
    """Trains scores on frozen weights, and gives the trainer's model the ticket: mask, weights and statistics of norms.

    Raises:
        ConfigError: the allocation does not fit the method.
        UserError: the loss is no longer finite.
    """
    run, settings = parts.run, parts.run.search
    assert settings is not None
    net = learned_network(parts)
    if run.compile:  # the choice of a mask is no code that torch.compile takes as a whole
        log.info("compile=true: the search is not compiled, the training after it is")
    observers = Observers(record, checkpoint=checkpoints.offer, group="search")
    learner = Trainer(
        net,
        parts.data,
        recipe_of(settings, run.training),
        Execution(parts.device, channels_last=run.channels_last, compile_model=False),
        observers,
        seed=seeding.stream_seed(run.seed, "search"),
        compact_training=False,
    )
    if checkpoints.files.checkpoint is not None:
        learner.load_state(checkpoints.files.checkpoint["trainer"], {})
    checkpoints.trainer = learner
    _train_scores(parts, net, learner)
    started = time.perf_counter()
    found = net.final()
    seconds = time.perf_counter() - started
    mask: Mask = distributed.from_first(found.mask)
    if net.settle_(mask):  # else it has been evaluated
        learner.progress.evaluated = False
        learner.finish({}, settings.epochs)
    trainer.model.load_state_dict(by_first_names(trainer.model, net.ticket(mask)))
    trainer.progress.take_over(learner.progress)
    pruned = apply_given_mask(
        trainer.model,
        mask,
        {},
        ablation=run.ablation,
        seed=run.seed,
        record=lambda metrics, _: record(metrics, trainer.age_epochs),
    )
    checkpoints.trainer = trainer
    return replace(
        pruned,
        scores=net.strengths(),
        seconds=seconds,
        sparsities=[masks.sparsity(pruned.mask)],
        num_tied=[found.num_tied],
    )


def learned_network(parts: Parts) -> LearnedNetwork:
    """The network of a run with frozen weights and fresh scores.

    Raises:
        ConfigError: the allocation does not fit the method, or the search is too short for it.
    """
    run, settings = parts.run, parts.run.search
    assert settings is not None
    method = settings.method()
    if method.event is not None:
        method.event.steps(length(recipe_of(settings, run.training), parts.data))  # refuses where there are none
    model = parts.build("init")
    candidates = masks.full(model, run.prunable)
    keep = masks.num_kept(run.sparsity, masks.total(candidates))
    scores = seeding.generator(run.seed, "scores")
    try:
        counts = _counts(parts, parts.allocate(model), candidates, keep)
        return LearnedNetwork(model, method, counts, scores, affine=settings.affine, prunable=run.prunable)
    except ConfigError as error:
        raise ConfigError(f"allocation={run.allocation.name}: search={settings.name}: {error}") from error


def _counts(parts: Parts, allocate: Allocate, candidates: Mask, keep: int) -> dict[str, int] | int:
    """How many weights the allocation keeps in each layer; or in all together, where it ranks them together.

    Raises:
        ConfigError: it does neither.
    """

    def kept(factor: float) -> list[int]:
        """Kept weights of each layer if the scores of every layer are so many times those of the one before."""
        generator = seeding.generator(parts.run.seed, "counts")
        drawn = {name: torch.rand(full.shape, generator=generator) for name, full in candidates.items()}
        scores = {name: draw.to(candidates[name].device) * factor**n for n, (name, draw) in enumerate(drawn.items())}
        return masks.counts(allocate(scores, candidates, keep, seeding.generator(0, "counts")).mask)

    allocation = parts.run.allocation
    if allocation.target == "pai_bench.masks.allocation.global_topk" and allocation.settings["min_density"] == 0:
        return keep
    rising, falling = kept(1.5), kept(1 / 1.5)
    if rising != falling:
        raise ConfigError("how many weights a layer keeps must not depend on their scores; use uniform, erk or global")
    return dict(zip(candidates, rising, strict=True))


def _train_scores(parts: Parts, net: LearnedNetwork, learner: Trainer) -> None:
    """Trains to the end of the search's recipe, and lets happen what the method wants to happen on the way."""
    run, per_epoch = parts.run, learner.progress.steps_per_epoch
    event = net.method.event
    steps = [] if event is None else event.steps(TrainingLength(learner.num_epochs, per_epoch))
    for number, step in enumerate(steps, start=1):
        learner.until({}, step / per_epoch)
        if event is None or int(net.num_events) >= number:  # an earlier attempt came this far
            continue
        stream = "redraw", number

        def redraw(stream: tuple[str, int] = stream) -> Weights:
            drawn = masks.prunable(parts.build("/".join(map(str, stream))), run.prunable)
            return net.frozen_values({name: weight.detach() for name, weight in drawn.items()})

        with torch.no_grad():
            event.happen_(net, Occasion(number, len(steps), redraw, seeding.generator(run.seed, "event", number)))
        net.num_events.fill_(number)
    learner.finish({}, learner.num_epochs)
