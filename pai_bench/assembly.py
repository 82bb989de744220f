"""From a checked config to the parts that a run works with: data, model, rounds, trainer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from pai_bench.analysis import operations
from pai_bench.analysis.mode import mode
from pai_bench.config.checks import identified
from pai_bench.config.schema import RunConfig
from pai_bench.config.signatures import shown
from pai_bench.core import (
    Allocate,
    Batch,
    Batches,
    Call,
    Data,
    DataSettings,
    Loss,
    Mask,
    Pruner,
    Record,
    Round,
    Scores,
    ScoringData,
    Selection,
    Shape,
    Shard,
    Subnetwork,
    Weights,
)
from pai_bench.errors import ConfigError
from pai_bench.masks import layers, mask_files, masks, weight_files
from pai_bench.system import devices, distributed, layout, seeding
from pai_bench.system.world import world
from pai_bench.training import objectives
from pai_bench.training.moving_mask import MovingMask
from pai_bench.training.recipe import length
from pai_bench.training.recording import Observers
from pai_bench.training.rewires import rewire_steps
from pai_bench.training.step import Execution
from pai_bench.training.trainer import Trainer

log = logging.getLogger(__name__)

Diagnose = Callable[[Mask], dict[str, float]]


@dataclass(frozen=True)
class Parts:
    """What the stages of a run work with, all of it made from the config."""

    run: RunConfig
    device: torch.device
    data: Data
    build: Callable[[str], nn.Module]  # a model on the device, its weights drawn from the stream of a name
    pruner: Pruner
    allocate: Callable[[nn.Module], Allocate]  # the allocation for a model
    rounds: Sequence[Round]


def load_data(run: RunConfig, device: torch.device) -> Data:
    """The dataset of a run, its images on the device or on their way there.

    Raises:
        DataError: it is missing, incomplete or damaged.
    """
    here = world()
    num_workers = devices.num_cores(device) if run.num_workers is None else run.num_workers
    folder = Path(run.data_dir).expanduser()
    data: Data = run.dataset(DataSettings(folder, run.download, device, num_workers, Shard(here.rank, here.size)))
    return data


def assembled(run: RunConfig, device: torch.device) -> Parts:
    """The parts of a run.

    Raises:
        DataError: the dataset is missing, incomplete or damaged.
        ConfigError: settings that only show themselves to be wrong once the data is there.
    """
    data = load_data(run, device)
    if data.regression:
        _check_regression(run)

    def build(stream: str) -> nn.Module:
        with seeding.seeded(run.seed, stream):  # on the CPU, so that the weights are the same on every device
            model: nn.Module = run.model(data.input_shape, data.num_classes)
        if run.weights is not None and stream == "init":
            identified(run, "weights")
            weight_files.load_(model, run.weights)
        return model.to(device)

    # Every process scores, and what the first finds holds: two GPUs may round differently.
    def allocate(model: nn.Module) -> Allocate:
        of_layers = layers.allocated(model, run.allocation, repair=run.repair == "flow")

        def agreed(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
            identified(run, "allocation")
            selection: Selection = distributed.from_first(of_layers(scores, candidates, keep, generator))
            return selection

        return agreed

    def transfer(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Weights:
        assert run.pruner.transfer is not None
        weights: Weights = distributed.from_first(run.pruner.transfer(net, batches, loss, generator))
        return weights

    pruner = run.pruner if run.pruner.transfer is None else replace(run.pruner, transfer=transfer)
    rounds = run.schedule(run.start_sparsity, length(run.training, data))
    if run.rewires:
        rewire_steps(run.rewire, length(run.training, data))  # refuses where there are none
    return Parts(run, device, data, build, pruner, allocate, rounds)


def _check_regression(run: RunConfig) -> None:
    """Refuses settings that change the logits or labels of classes.

    Raises:
        ConfigError: there is one.
    """
    for setting, value, neutral in (
        ("training.label_smoothing", run.training.label_smoothing, 0.0),
        ("training.temperature", run.training.temperature, 1.0),
        *of_classes(run.pruner),
    ):
        if value != neutral:
            raise ConfigError(
                f"{setting}={shown(value)}: dataset={run.dataset.name} is a regression, and this is for classes; give "
                f"{shown(neutral)}"
            )


def of_classes(pruner: Pruner) -> list[tuple[str, Any, Any]]:
    """The settings of a score that change logits or labels: name, value, and the value that changes nothing."""
    score: Mapping[str, Any] = pruner.score.settings if isinstance(pruner.score, Call) else {}
    neutral: dict[str, Any] = {"temperature": 1.0, "class_halves": False}
    return [(f"pruner.score.{key}", score.get(key, value), value) for key, value in neutral.items()]


def trainer_for(
    parts: Parts,
    model: nn.Module,
    record: Record,
    diagnose: Diagnose | None = None,
    checkpoint: Callable[[bool], None] = lambda epoch_ended: None,
) -> Trainer:
    """The trainer of a model on the data of a run."""
    run, rounds = parts.run, parts.rounds
    returns = parts.pruner.regrow and any(this.until_epoch > 0 for this in rounds)
    return Trainer(
        model,
        parts.data,
        run.training,
        Execution(parts.device, channels_last=run.channels_last, compile_model=run.compile),
        Observers(record, diagnose, checkpoint, validate_every=run.validate_every_steps),
        seed=run.seed,
        compact_training=run.training.compact == "auto" and not returns,
        keep_epochs=[this.rewind_epoch for this in rounds if this.rewind_epoch is not None and this.rewind_weights],
    )


def moving_mask(parts: Parts, trainer: Trainer, start: Mask, initial: Weights) -> MovingMask:
    """The mask of the last training, which moves while the trainer trains.

    Args:
        start: the mask that this training starts from.
        initial: of every parameter, as the model was drawn.
    """
    run = parts.run
    keep = masks.kept(start)
    if run.rewire.start_sparsity is not None:
        keep = masks.num_kept(run.sparsity, masks.total(start))
    timing = length(run.training, parts.data)
    unmasked = trainer.unmasked() or initial
    return MovingMask(
        run.rewire, start, keep=keep, length=timing, seed=run.seed, unmasked=unmasked, clock=trainer.clock
    )


def given_mask(run: RunConfig, model: nn.Module) -> tuple[Mask, Mask]:
    """The mask of `mask=PATH` on a model: of its prunable weights, and of parameters that are pruned with them.

    Raises:
        ConfigError: it is of another model, or has changed since the config was completed.
    """
    file, where = run.mask_file, f"mask={run.mask}"
    read = mask_files.read("mask", str(run.mask), zeros=file.zeros)
    identified(run, "mask", mask_files.digest(read, file.names))
    return mask_files.fitted(where, read, model, names=file.names, missing=file.missing, prunable=run.prunable)


def examined(parts: Parts, model: nn.Module) -> operations.Operations:
    """What one image's way through the network shows, before anything is trained.

    Raises:
        ConfigError: the network does not take the images, or applies weights that a mask does not reach.
    """
    run, shape, num_classes = parts.run, parts.data.input_shape, parts.data.num_classes
    name = f"model.name={run.model.name}"
    found = _watched(name, model, shape)
    for size in sorted(set(run.training.image_sizes or ()) - {shape[-1]}):  # training begins long after the search
        _watched(f"training.image_sizes={shown(run.training.image_sizes)}", model, (shape[0], size, size))
    if tuple(found.output_shape) != (1, num_classes):
        raise ConfigError(
            f"{name}: for one image it gives outputs of shape {tuple(found.output_shape)}, and {num_classes} "
            "classes take (1, classes); give another model"
        )
    if run.prunes:
        check_prunable(name, model, found, run.prunable)
    return found


def _watched(setting: str, model: nn.Module, shape: Shape) -> operations.Operations:
    """What an image's way through the network shows.

    Raises:
        ConfigError: the network does not take it; the setting is named.
    """
    try:
        with mode(model, training=False):
            return operations.watch(model, shape)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error


def check_prunable(name: str, model: nn.Module, found: operations.Operations, prunable: masks.Which = "all") -> None:
    """Refuses weights that zeros would not reach, and names once what stays dense.

    Args:
        name: what the error calls the model.
        found: what the model does with an image.
        prunable: which layers are pruned, as in masks.prunable.

    Raises:
        ConfigError: a layer computes what it applies from its weights; the model has no such layers as are asked for.
    """
    pruned = masks.prunable(model, prunable)
    if computed := [weight for weight in found.computed if weight in pruned]:
        layer = type(model.get_submodule(computed[0].rpartition(".")[0])).__name__
        raise ConfigError(
            f"{name}: {len(computed)} layers such as {computed[0]} ({layer}) compute what they apply from "
            "the weights that are pruned, so zeros would not stay zeros; give a model that applies weights as they are"
        )
    tell_of_dense(model)


def tell_of_dense(model: nn.Module) -> None:
    """Names in the log what no mask covers."""
    if others := masks.unprunable(model):
        names = list(others)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told = f"{masks.total(others):,}", ", ".join(names[:3]), more
        log.warning("%s parameters in %s%s are of no layer that is pruned, and stay dense", *told)


def random_batch(data: Data, model: nn.Module, seed: int, stream: str) -> Batch:
    """At most 128 training images, laid out as the network is, drawn from the stream of a name."""
    size = min(128, data.num_examples["train"])
    wanted = ScoringData(per_class=None, total=size, batch_size=size, augment=False)
    ((images, labels),) = data.draw(wanted, seeding.generator(seed, stream), torch.float32)
    return layout.laid_out(images, layout.layout_of(model)), labels


def diagnostics(parts: Parts, model: nn.Module, initial: Weights) -> Diagnose | None:
    """The measurements that the config asks for, on the same 128 training images every time, in eval mode.

    Args:
        initial: the initial values of every parameter.
    """
    measure = parts.run.diagnostics
    if measure is None:
        return None
    batch = random_batch(parts.data, model, parts.run.seed, "diagnostics")

    def diagnose(mask: Mask) -> dict[str, float]:
        weights = {name: mask[name] for name in masks.prunable(model) if name in mask}
        coupled = {name: tensor for name, tensor in mask.items() if name not in weights}
        net = Subnetwork(model, weights, initial, parts.data.input_shape, coupled)
        with mode(model, training=False):
            metrics: dict[str, float] = measure(net, [batch], objectives.loss)
        return metrics

    return diagnose
