"""How a run finds its mask: by a search, from what earlier runs have computed, or from a file."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pai_bench.assembly import Parts, trainer_for
from pai_bench.config import identity
from pai_bench.config.checks import trains_to_the_end
from pai_bench.config.schema import Plain, plain
from pai_bench.core import Ablation, Call, Mask, Record, Weights
from pai_bench.learning import learn_mask
from pai_bench.pruning import reuse
from pai_bench.pruning.given import apply_given_mask
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.rounds import prune
from pai_bench.runs.checkpoints import Checkpoints
from pai_bench.system import devices
from pai_bench.system.cache import Cache, code, fingerprint
from pai_bench.system.world import world
from pai_bench.training import objectives
from pai_bench.training.reuse import SharedTraining
from pai_bench.training.trainer import Trainer


def find_mask(
    parts: Parts,
    training: SharedTraining,
    initial: Weights,
    record: Record,
    checkpoints: Checkpoints,
    given: tuple[Mask, Mask] | None,
) -> Pruned:
    """The mask of the trainer's model, pruned in place. What has been reached is noted in the run's progress.

    Args:
        training: as `shared_training` makes it.
        initial: of every parameter, as the model was drawn.
        given: a mask to use instead of a search, and that of parameters that are pruned with it.
    """
    progress, run = checkpoints.progress, parts.run

    def reached(pruned: Pruned) -> None:
        progress.pruned = pruned if run.save_scores else replace(pruned, scores=None)
        checkpoints.offer()

    if given is not None:
        pruned = progress.pruned or apply_given_mask(
            training.trainer.model, *given, ablation=run.ablation, seed=run.seed, record=record
        )
    elif run.search is not None:
        pruned = progress.pruned or learn_mask(parts, training.trainer, record, checkpoints)
    else:
        pruned, cache_hit = search(parts, training, initial, run.ablation, record, progress.pruned, reached)
        progress.cache_hit = progress.cache_hit or cache_hit
    reached(pruned)
    return pruned


def find_mask_without_ablation(parts: Parts, model: nn.Module, initial: Weights, checkpoints: Checkpoints) -> None:
    """Notes in the run's progress the mask that a search without the ablation finds.

    It leaves no record, but can be taken up again. The model is copied.
    """
    trainer = trainer_for(parts, copy.deepcopy(model), lambda *_: None, checkpoint=checkpoints.offer)
    progress = checkpoints.progress
    so_far = progress.search_without_ablation
    if so_far is not None and checkpoints.files.checkpoint is not None:
        trainer.load_state(checkpoints.files.checkpoint["trainer"], so_far.mask_with_coupled)
    checkpoints.trainer = trainer

    def reached(pruned: Pruned) -> None:
        progress.search_without_ablation = replace(pruned, scores=None)
        checkpoints.offer()

    found, _ = search(parts, SharedTraining(trainer), initial, Ablation(), lambda *_: None, so_far, reached)
    progress.without_ablation, progress.search_without_ablation = found.mask, None


def search(
    parts: Parts,
    training: SharedTraining,
    initial: Weights,
    ablation: Ablation,
    record: Record,
    resume_from: Pruned | None,
    checkpoint: Callable[[Pruned], None],
) -> tuple[Pruned, str | None]:
    """Finds a mask; and says what of it an earlier run had computed: "scores", "mask" or nothing."""
    run, pruner, trainer = parts.run, parts.pruner, training.trainer
    settings: dict[str, Any] = {
        "ablation": ablation,
        "initial": initial,
        "input_shape": parts.data.input_shape,
        "draw": parts.data.draw,
        "training": training,
        "loss": objectives.loss,
        "seed": run.seed,
        "prunable": run.prunable,
        "target": run.target,
        "diagnose": trainer.diagnose,
        "build": lambda: run.model(parts.data.input_shape, parts.data.num_classes),
        "resume_from": resume_from,
        "checkpoint": checkpoint,
    }

    def pruned_by(record: Record, **changed: Any) -> Pruned:
        return prune(
            trainer.model,
            changed.pop("pruner", pruner),
            parts.allocate(trainer.model),
            parts.rounds,
            record=record,
            **settings | changed,
        )

    cache = _cache(parts, trainer.model, ablation) if resume_from is None or not resume_from.sparsities else None
    if cache is None or pruner.score is None:
        return pruned_by(record), None
    if len(parts.rounds) == 1:
        found = reuse.scores(cache, trainer.model, run.prunable)
        if found is None:
            return pruned_by(record, pruner=replace(pruner, score=reuse.CachedScore(pruner.score, cache))), None
        # Nothing draws weights or looks at images, and a checkpoint would lack the costs.
        known = replace(pruner, score=lambda *_: found[0], redraws=None)
        changed = {"pruner": known, "ablation": replace(ablation, batches=None)}
        pruned = pruned_by(record, **changed, draw=lambda *_: [], checkpoint=lambda _: None)
        return replace(pruned, **found[1] | {"seconds": pruned.seconds + found[1]["seconds"]}), cache.used
    if trainer.diagnose is not None or run.save_scores:
        return pruned_by(record), None
    way = {
        "rounds": [(this.sparsity, this.rounding) for this in parts.rounds],
        "allocation": identity.chain_settings(plain(run))["allocation"],  # with what its file holds
        "target": run.target,
        "repair": run.repair,
    }
    pruned = reuse.stored_mask(
        cache,
        way,
        trainer.model,
        initial,
        lambda metrics: record(metrics, trainer.age_epochs),
        lambda note: pruned_by(lambda metrics, _: note(metrics)),
        run.prunable,
    )
    return pruned, cache.used


def shared_training(
    parts: Parts, trainer: Trainer, initial: Weights, record: Record, checkpoints: Checkpoints
) -> SharedTraining:
    """The trainer of a run, which takes over trainings that earlier runs have done on the way to their masks.

    Args:
        initial: of every parameter, as the model was drawn.
    """
    run, progress = parts.run, checkpoints.progress
    if not run.cache_gb or world().size > 1 or not trains_to_the_end(run):
        return SharedTraining(trainer)
    called = [run.pruner.score, run.pruner.transfer, run.allocation, run.schedule, run.training.optimizer]
    determines = {
        "network": fingerprint(initial),
        "settings": identity.chain_settings(plain(run)),
        "images": parts.data.checksum,
        # These change how numbers are rounded, and what is recorded.
        "computed": [run.compile, run.channels_last, run.training.compact, plain(run)["diagnostics"]],
        "code": code(call.target for call in called if isinstance(call, Call)),
        "machine": [torch.__version__, devices.describe(parts.device)],
    }

    def taken_over(num_examples: int) -> None:
        progress.reused_examples += num_examples
        progress.cache_hit = "training"

    return SharedTraining(
        trainer,
        _folder(parts, determines),
        rounds=lambda: progress.pruned.sparsities if progress.pruned else [],
        curve=checkpoints.files.curve,
        record=record,
        taken_over=taken_over,
        checkpoint=checkpoints.offer,
    )


def _folder(parts: Parts, determines: dict[str, Any]) -> Cache:
    return Cache(Path(parts.run.results_dir) / ".cache", round(parts.run.cache_gb * 1e9), determines)


def _cache(parts: Parts, model: nn.Module, ablation: Ablation) -> Cache | None:
    """Where scores and masks of this network are kept; None if they are not a function of the network and settings."""
    run, pruner, settings = parts.run, parts.pruner, plain(parts.run)
    trains = any(this.until_epoch > 0 for this in parts.rounds)
    if not run.cache_gb or world().size > 1 or pruner.score is None or pruner.transfer is not None or trains:
        return None
    # What comes after the score cannot change it, and masks are kept for searches of several rounds alone.
    single = len(parts.rounds) == 1
    if single and pruner.mode == "eval_after_pass":  # what is kept of a single score lacks the costs of the pass
        return None
    after = ("reduce", "regrow") if single else ()
    before = ("images", "batches") if single else ("images", "batches", "scores", "mask")
    broken = ablation is run.ablation
    hooks = {hook: settings["ablation"][hook] for hook in before if broken and settings["ablation"][hook]}
    called = [run.pruner.score, *(getattr(run.ablation, hook) for hook in hooks)]
    called += [] if single else [run.allocation]
    determines = {
        # Settings count beside the tensors: dropout, or a pooling, is in none of them.
        "network": [_without_name(settings["model"]), fingerprint(model.state_dict())],
        "input_shape": parts.data.input_shape,
        "seed": run.seed,
        "prunable": run.prunable,
        "pruner": {key: value for key, value in settings["pruner"].items() if key not in ("name", "label", *after)},
        "images": None if pruner.scoring_data is None else [parts.data.checksum, _without_root(settings["dataset"])],
        "ablation": hooks,
        "code": code(call.target for call in called if isinstance(call, Call)),
        # Rounding is another on other machines.
        "machine": [torch.__version__, devices.describe(parts.device)],
    }
    return _folder(parts, determines)


def _without_name(settings: Plain) -> Plain:
    return {key: value for key, value in settings.items() if key != "name"}


def _without_root(settings: Plain) -> Plain:
    return {key: value for key, value in settings.items() if key != "root"}
