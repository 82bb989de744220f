"""One run, from a checked config to its result row. Read it downwards; assembly.py and search.py have the parts."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pai_bench.analysis import paths, signal, signs
from pai_bench.assembly import (
    Parts,
    assembled,
    diagnostics,
    examined,
    given_mask,
    load_data,
    moving_mask,
    random_batch,
    trainer_for,
)
from pai_bench.config import checks, identity, transfer_checks
from pai_bench.config.composition import rerunnable
from pai_bench.config.schema import RunConfig
from pai_bench.core import Data, Mask, Record, Weights
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import mask_files, masks, weight_files
from pai_bench.masks.layers import is_transposed
from pai_bench.pruning import transfers
from pai_bench.pruning.pruned import Pruned
from pai_bench.runs import row as rows
from pai_bench.runs import status, tracking
from pai_bench.runs.attempt import attempt
from pai_bench.runs.checkpoints import Checkpoints, RunProgress, TrainingStart
from pai_bench.runs.directory import NullRunDirectory, RunDirectory, final_weights
from pai_bench.runs.provenance import provenance
from pai_bench.runs.summary import already, closing
from pai_bench.runs.tracker import Guarded, Tracker, described
from pai_bench.search import find_mask, find_mask_without_ablation, shared_training
from pai_bench.system import devices, distributed, seeding
from pai_bench.system.world import world
from pai_bench.training.trainer import Trainer

log = logging.getLogger(__name__)

Files = RunDirectory | NullRunDirectory


def run(config: RunConfig) -> dict[str, Any]:
    """Does what a config describes, unless it has been done already, and returns the result row.

    Raises:
        UserError: and its kinds, for what a user can mend; the run directory holds the traceback.
    """
    here = world()
    device = devices.pick(config.device, here)
    devices.check_precision(config.training.precision, device)
    devices.prepare(device, config.training.precision)
    distributed.start(device)
    distributed.check_same(config.id)
    claimed: list[RunDirectory] = []

    def claim() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The row if there is one, or what the run goes on from; in the first process, for all."""
        if (row := status.finished_and_clean(config.directory)) is not None:
            if not config.name_decides_images:
                found = load_data(config, torch.device("cpu"))
                _check_same_images(config, found, row["dataset_checksum"])
            return row, None
        claimed.append(RunDirectory(config.directory))
        return claimed[0].row, claimed[0].checkpoint

    row, checkpoint = distributed.agree(claim)
    files: Files = claimed[0] if claimed else NullRunDirectory(config.directory, checkpoint)
    try:
        if row is not None:
            log.info("%s", already(row, config))
            return row
        with attempt(config, device, files):
            return _run(config, device, files)
    finally:
        files.close()


def _run(config: RunConfig, device: torch.device, files: Files) -> dict[str, Any]:
    """The whole story of one run in its directory."""
    started = time.perf_counter()
    devices.start_memory(device)
    files.write_text("config.yaml", rerunnable(config))

    # Data and model.
    parts = assembled(config, device)
    if (earlier := files.checkpoint) is not None:
        distributed.agree(lambda: _check_same_images(config, parts.data, earlier["dataset_checksum"]))
    model = parts.build("init")
    macs = examined(parts, model).multiply_adds
    given = given_mask(config, model) if config.mask is not None else None
    _check_transfer(config, model)
    _announce(parts, model, given)
    origin = provenance() | {"dataset_checksum": parts.data.checksum, "device": str(device)}
    files.write_json("provenance.json", origin)

    with _tracked(config, files, origin) as tracker:
        record = _recorded(files, tracker)

        # The mask.
        initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer, checkpoints = _taken_up(parts, model, initial, record, files, started)
        if _ablates_scores(config) and checkpoints.progress.without_ablation is None:
            find_mask_without_ablation(parts, model, initial, checkpoints)
        checkpoints.trainer = trainer
        training = shared_training(parts, trainer, initial, record, checkpoints)
        pruned = find_mask(parts, training, initial, record, checkpoints, given)
        effective = paths.effective(model, pruned.mask, parts.data.input_shape)
        layers = rows.layers(model, pruned, effective, macs)
        _keep_scores(config, files, pruned)
        if not config.rewires:
            _keep_mask(files, tracker, pruned, layers)
        pruned = replace(pruned, scores=None, moved=None)  # they would lie on the device all through training

        # Training.
        start = _training_start(parts, trainer, checkpoints.progress, pruned, initial, effective, len(files.curve()))
        stopped = _stops(config, pruned, start)
        end = trainer.epoch if stopped else config.training.epochs
        if config.rewires:
            trainer.move_mask(moving_mask(parts, trainer, pruned.mask, initial))
        own = start.overlap is not None or start.same_signs is not None or config.rewires  # nobody else trains this
        (trainer if own else training).finish(pruned.mask_with_coupled, end)
        if trainer.moving is not None:
            pruned = replace(pruned, mask=trainer.moving.mask)
            effective = paths.effective(model, pruned.mask, parts.data.input_shape)
            layers = rows.layers(model, pruned, effective, macs)
            _keep_mask(files, tracker, pruned, layers)
        _keep_weights(config, files, model)
        agreement = signs.agreement(checkpoints.progress.signs or {}, model, pruned.mask)
        files.write_json("mask.json", rows.mask_report(pruned, layers, agreement))
        if world().rank > 0:
            return {}

        # The result: one row, whose appearance on disk is what finishes the run.
        outcome = rows.Outcome(
            run=config,
            device=device,
            data=parts.data,
            model=model,
            trainer=trainer,
            pruned=pruned,
            effective=effective,
            macs=macs,
            num_rounds=len(parts.rounds),
            target_sparsity=config.sparsity if given is None else _given_target(config, given[0]),
            cache_hit=checkpoints.progress.cache_hit,
            reused_examples=checkpoints.progress.reused_examples,
            start=start,
            signs=agreement,
            stopped=stopped,
            curve=files.curve(),
            seconds=time.perf_counter() - checkpoints.started,
        )
        row = rows.row(outcome)
        files.finish(row)
        tracker.finish(row, 0)
    log.info("%s", closing(row, layers, files.path))
    return row


def _check_same_images(config: RunConfig, data: Data, earlier: str) -> None:
    """Refuses images that are not those with which a run was finished or begun.

    Args:
        earlier: the checksum of those.
    """
    if data.checksum != earlier:
        raise ConfigError(
            f"dataset.name={config.dataset.name}: {config.id} was run on other images of that name "
            f"(checksum {earlier[:8]}, here {data.checksum[:8]}); give those, or another dataset.name="
        )


# Steps of the story ---------------------------------------------------------------------------------------------------


def _announce(parts: Parts, model: nn.Module, given: tuple[Mask, Mask] | None) -> None:
    """Says what the run works with, and how much it is to keep."""
    run, data = parts.run, parts.data
    sparsity = run.sparsity if given is None else masks.sparsity(given[0])  # whole layers that a file leaves out count
    num_prunable = masks.total(masks.prunable(model, run.prunable if run.prunes else "all"))
    to_keep = f"{1 - sparsity:.4g} of the filters"
    if parts.pruner.reduce is None:
        to_keep = f"{masks.num_kept(sparsity, num_prunable):,}{' effective ones' * (run.target == 'effective')}"
    how = f"in {len(parts.rounds)} round{'' if len(parts.rounds) == 1 else 's'}"
    if run.search is not None:
        how = f"learned in {run.search.epochs} epoch{'' if run.search.epochs == 1 else 's'}"
    log.info(
        "%s: %s images of %s in %d %s; %s: %s prunable weights, %s to keep, %s; %s",
        run.dataset.name,
        ", ".join(f"{number:,} {split}" for split, number in data.num_examples.items() if number),
        "x".join(map(str, data.input_shape)),
        data.num_classes,
        "targets" if data.regression else "classes",
        run.model.name,
        f"{num_prunable:,}",
        to_keep,
        how,
        devices.describe(parts.device),
    )


@contextmanager
def _tracked(run: RunConfig, files: Files, origin: dict[str, Any]) -> Iterator[Tracker]:
    """The tracker of the run inside the block, which ends it with its row; a failure ends it with its exit code."""
    start = tracking.none if world().rank > 0 else run.tracker
    curve = files.curve() if files.checkpoint else None
    tracker = Guarded(run.tracker.name, start, described(run, files.path, origin, curve, files.num_repeated))
    try:
        yield tracker
    except UserError as error:
        tracker.finish({}, error.exit_code)
        raise
    except BaseException:
        tracker.finish({}, 1)
        raise


def _recorded(files: Files, tracker: Tracker) -> Record:
    """The one way by which numbers leave the run: into its directory, and to its tracker."""

    def record(metrics: dict[str, float], epoch: float) -> None:
        files.record(metrics, epoch)
        tracker.record(metrics, epoch)

    return record


def _taken_up(
    parts: Parts, model: nn.Module, initial: Weights, record: Record, files: Files, started: float
) -> tuple[Trainer, Checkpoints]:
    """The trainer and the checkpoints of the run, as far as an earlier attempt has come."""
    run, earlier = parts.run, files.checkpoint
    checkpoints = Checkpoints(
        files,
        RunProgress() if earlier is None else RunProgress.restored(earlier, parts.device),
        every_epochs=run.checkpoint_epochs,
        every_minutes=run.checkpoint_minutes,
        dataset_checksum=parts.data.checksum,
        started=started - (earlier["seconds"] if earlier else 0.0),
    )
    trainer = trainer_for(parts, model, record, diagnostics(parts, model, initial), checkpoints.offer)
    if earlier is not None:
        pruned = checkpoints.progress.pruned
        if pruned is not None:
            trainer.load_state(earlier["trainer"], pruned.mask_with_coupled)
        log.info(
            "going on from a checkpoint: %d of %d rounds, epoch %.4g of %d of training",
            len(pruned.sparsities) if pruned else 0,
            len(parts.rounds),
            trainer.epoch,
            run.training.epochs,
        )
    return trainer, checkpoints


def _ablates_scores(run: RunConfig) -> bool:
    """Whether the scores are ablated. What that changes is seen beside a search without the ablation."""
    return any(hook is not None for hook in (run.ablation.batches, run.ablation.images, run.ablation.scores))


def _training_start(
    parts: Parts,
    trainer: Trainer,
    progress: RunProgress,
    pruned: Pruned,
    initial: Weights,
    effective: Mask | None,
    num_lines: int,
) -> TrainingStart:
    """What is known only now: noted with the first checkpoint of the last training, and found again there."""
    if progress.training is None:
        same_signs = _transfer_weights(parts, pruned, trainer)
        overlap = _ablate_weights(parts, pruned, progress.without_ablation, trainer)
        has_signal = _has_signal(trainer.model, parts.data, parts.run.seed, initial, effective)
        progress.pruned = pruned
        progress.training = TrainingStart(
            overlap, has_signal, trainer.num_examples, trainer.age_epochs, num_lines, same_signs
        )
        progress.signs = signs.of(trainer.model)
    return progress.training


def _keep_scores(run: RunConfig, files: Files, pruned: Pruned) -> None:
    """Writes the scores, if they are asked for."""
    if run.save_scores and pruned.scores is not None:
        files.write_tensors("scores.safetensors", pruned.scores)


def _keep_mask(files: Files, tracker: Tracker, pruned: Pruned, layers: list[dict[str, Any]]) -> None:
    """Writes what has been found: the mask, and what it leaves of each layer."""
    files.write_tensors("mask.safetensors", pruned.mask_with_coupled)
    files.write_json("mask.json", rows.mask_report(pruned, layers))
    tracker.mask(files.path / "mask.safetensors")


def _keep_weights(run: RunConfig, files: Files, model: nn.Module) -> None:
    """Writes the final weights, if they are asked for."""
    if run.keeps_weights:
        weights = final_weights(model.state_dict(), half=run.save_model == "half")
        files.write_tensors("model.safetensors", weights)


def _given_target(run: RunConfig, mask: Mask) -> float:
    """The sparsity of a given mask over all prunable weights, by the number that its name has if it is that one's."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in mask.items()}
    nominal = run.mask_name is not None and run.mask_file.missing == "refuse"
    return run.sparsity if nominal and mask_files.agree(run.sparsity, arrays) else mask_files.sparsity(arrays)


def _check_transfer(run: RunConfig, model: nn.Module) -> None:
    """Refuses a file of weights that is of another model, and layers that a transfer does not know, before any search.

    Raises:
        ConfigError: there is one, or the file has changed since the config was completed.
    """
    by_inputs = run.transfer is not None and identity.function_name("transfer", run.transfer.target) == "fan_in"
    other = next((name for name in masks.prunable(model) if is_transposed(model, name)), None)
    if by_inputs and other is not None:
        raise ConfigError(
            f"transfer=fan_in: {other} is of a transposed convolution, whose weight has its inputs first; choose "
            "another transfer, such as rescale"
        )
    if (path := transfer_checks.file_of(run)) is not None:
        checks.identified(run, "transfer")
        weight_files.read("transfer.weights", path, masks.prunable(model))


def _transfer_weights(parts: Parts, pruned: Pruned, trainer: Trainer) -> float | None:
    """Lets training begin anew from other weights, if the config says so; and returns the share of unchanged signs."""
    run = parts.run
    if run.transfer is None:
        return None
    _check_transfer(run, trainer.model)  # again: a search may take days
    own, fresh = (parts.build(stream).state_dict() for stream in ("init", "reinit"))
    mask = masks.full(trainer.model) | pruned.mask
    generator = seeding.generator(run.seed, "transfer")
    state, same_signs = transfers.transferred(run.transfer, own, fresh, mask, generator, run.transfer.name)
    trainer.restart(pruned.mask_with_coupled, state)
    return same_signs


def _ablate_weights(parts: Parts, pruned: Pruned, without_ablation: Mask | None, trainer: Trainer) -> float | None:
    """Lets an ablation of the weights do its work, and returns the share of the kept weights that no ablation changed.

    For the weights' values where they are what is broken, for the mask otherwise. None without an ablation.

    Raises:
        UserError: the ablation changed nothing.
    """
    run, ablation = parts.run, parts.run.ablation
    without_ablation = pruned.without_ablation or without_ablation
    overlap = None
    if without_ablation is not None:
        common = masks.kept({name: kept & without_ablation[name] for name, kept in pruned.mask.items()})
        overlap = common / masks.kept(pruned.mask)
    if ablation.weights is not None:
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        fresh = parts.build("reinit").state_dict()
        changed = ablation.weights(state, fresh, pruned.mask, seeding.generator(run.seed, "ablation"))
        same = sum(int((state[name] == changed[name])[kept].sum()) for name, kept in pruned.mask.items())
        overlap = same / masks.kept(pruned.mask)
        # A fresh initialization is trained from the start; other weights go on where these would have.
        (trainer.restart if changed is fresh else trainer.replace)(pruned.mask_with_coupled, changed)
    if overlap == 1.0:
        raise UserError(
            f"ablation={ablation.name}: it changed nothing for pruner={run.pruner.name} at sparsity={run.sparsity:g}, "
            "so the run would be a copy of the one without it; choose another"
        )
    return overlap


def _has_signal(model: nn.Module, data: Data, seed: int, initial: Weights, effective: Mask | None) -> bool:
    """Whether the outputs depend on the image. Where not even the dense network's do, paths decide."""
    images, _ = random_batch(data, model, seed, "signal")
    with seeding.seeded(seed, "signal"):
        if signal.output_depends_on_input(model, images):
            return True
        if signal.output_depends_on_input(model, images, initial):
            return False
    log.info("the dense network's output does not depend on the image either, as where a classifier starts at zero")
    return effective is None or masks.kept(effective) > 0


def _stops(run: RunConfig, pruned: Pruned, training: TrainingStart) -> bool:
    """Whether the network is not trained, because it is broken and that is what the config asks for; and says so."""
    collapsed = masks.collapsed(pruned.mask)
    if collapsed:
        log.warning("layer collapse: nothing is kept in %s", ", ".join(collapsed))
    if not training.has_signal:
        log.warning("the pruned network carries no signal: its output does not depend on the image")
    stops = run.on_collapse == "stop" and bool(collapsed or not training.has_signal)
    if stops:
        log.warning("on_collapse=stop: it is not trained")
    return stops
