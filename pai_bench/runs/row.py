"""What a result row and mask.json say: numbers from masks and curves, none of them measured anew.

A new column is one line in one of the functions below `row`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pai_bench.analysis import cost, paths
from pai_bench.analysis.signs import Agreement
from pai_bench.config.schema import RunConfig
from pai_bench.core import Data, Mask
from pai_bench.masks import masks
from pai_bench.pruning.pruned import Pruned
from pai_bench.runs.checkpoints import TrainingStart
from pai_bench.system import devices
from pai_bench.system.world import world
from pai_bench.training.moving_mask import MovingMask
from pai_bench.training.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """What a run has come to, from which its row is made."""

    run: RunConfig
    device: torch.device
    data: Data
    model: nn.Module
    trainer: Trainer
    pruned: Pruned
    effective: Mask | None  # the weights on a path; None where that cannot be told
    macs: dict[str, int]  # multiply-adds for one image, dense, by layer
    num_rounds: int
    target_sparsity: float
    cache_hit: str | None  # what of the search an earlier run had computed
    reused_examples: int  # images of trainings that earlier runs had done
    start: TrainingStart
    signs: Agreement
    stopped: bool  # the network was broken, and was not trained
    curve: list[dict[str, Any]]
    seconds: float  # of all attempts


def row(of: Outcome) -> dict[str, Any]:
    """The result row of a run."""
    return names(of) | sizes(of) | state(of) | results(of) | costs(of) | machine(of)


def names(of: Outcome) -> dict[str, Any]:
    """What the run is called and what it is made of."""
    run = of.run
    return {
        "id": run.id,
        "group": run.group,
        "task": run.task,
        "method": run.method,
        "protocol": run.protocol,
        "seed": run.seed,
        "input_shape": of.data.input_shape,
        "num_classes": of.data.num_classes,
        "regression": of.data.regression,
        "dataset": run.dataset.name,
        "model": run.model.name,
        "pruner": run.pruner.name,
        "allocation": run.allocation.name,
        "schedule": run.schedule.name,
        "ablation": run.ablation.name,
        "rewire": run.rewire.name,
        "transfer": run.transfer.name if run.transfer else "none",
        "prunable": run.prunable if isinstance(run.prunable, str) else ",".join(run.prunable),
        "repair": run.repair,
        "training": run.training.name,
        "diagnostics": run.diagnostics.name if run.diagnostics else None,
        "experiment": run.experiment,
        "mask": run.checksums.mask,
        "weights": run.checksums.weights,
        "transfer_weights": run.checksums.transfer,
    }


def sizes(of: Outcome) -> dict[str, Any]:
    """How much is kept, in all the field's units."""
    return {
        **kept(of.pruned.mask),
        "sparsity": masks.sparsity(of.pruned.mask),
        "target_sparsity": of.target_sparsity,
        "target": of.run.target,
        **of_filters(of.pruned, of.run.pruner.reduce is not None),
        **effective(of.model, of.effective),
        "num_parameters": sum(parameter.numel() for parameter in of.model.parameters()),
        "num_unprunable": masks.total(masks.unprunable(of.model, of.pruned.mask)),
        "num_tied": sum(of.pruned.num_tied),
        "num_rounds": of.num_rounds,
        "pruned_epoch": of.pruned.epoch,
        "condition_met": of.pruned.condition_met,
    }


def state(of: Outcome) -> dict[str, Any]:
    """Whether the pruned network is whole."""
    return {
        "collapsed_layers": masks.collapsed(of.pruned.mask),
        "output_depends_on_input": of.start.has_signal,
        "stopped": "collapse" if of.stopped else None,
        "ablation_overlap": of.start.overlap,
        "transfer_overlap": of.start.same_signs,
        "sign_agreement": of.signs.overall,
        **rewired(of.trainer.moving),
    }


def results(of: Outcome) -> dict[str, Any]:
    """Losses and accuracies of the last training, and of the ticket before it where a search has learned the mask.

    And what else its last evaluation has measured.
    """
    evaluated = [line for line in of.curve[of.start.num_lines :] if "test_top1" in line]
    found = [line for line in of.curve[: of.start.num_lines] if "test_top1" in line]
    strong = found[-1] if of.run.search is not None else {}
    return accuracies(evaluated, of.start.age_epochs) | {
        "strong_test_top1": strong.get("test_top1"),
        "strong_test_loss": strong.get("test_loss"),
        "strong_validation_top1": strong.get("validation_top1"),
        "measured": {name: value for name, value in evaluated[-1].items() if "/" in name},
    }


def costs(of: Outcome) -> dict[str, Any]:
    """What the run has cost: operations, images and seconds."""
    start, trainer, pruned, dense = of.start, of.trainer, of.pruned, sum(of.macs.values())
    train_examples = trainer.num_examples - start.search_examples
    # A training step costs three forward passes, of two operations for each multiply-add; zeros cost as other numbers.
    flops_per_example = 3 * 2 * dense
    return {
        "macs_dense": dense,
        "macs_masked": cost.masked_multiply_adds(of.macs, pruned.mask),
        "train_macs_per_image": train_macs(of),
        "macs_trained": sum(cost.multiply_adds(trainer.trained, of.data.input_shape).values()),
        "compact_speedup": trainer.compact_speedup,
        "epochs": of.run.training.epochs,
        "precision": of.run.training.precision,
        "score_examples": pruned.num_examples,
        "search_train_examples": start.search_examples,
        "train_examples": train_examples,
        "score_flops": pruned.flops + pruned.condition_flops,
        "search_train_flops": flops_per_example * start.search_examples,
        "train_flops": flops_per_example * train_examples,
        "prune_seconds": pruned.seconds,
        "cache_hit": of.cache_hit,
        "reused_examples": of.reused_examples,
        "train_seconds": trainer.seconds,
        "total_seconds": of.seconds,
        "images_per_second": trainer.num_examples / trainer.seconds if trainer.seconds else 0.0,
    }


def machine(of: Outcome) -> dict[str, Any]:
    """Where the run was done, and on what images."""
    return {
        "peak_memory_bytes": devices.peak_memory_bytes(of.device),
        "device": str(of.device),
        "num_processes": world().size,
        "hardware": devices.describe(of.device),
        "dataset_checksum": of.data.checksum,
    }


def rewired(moving: MovingMask | None) -> dict[str, Any]:
    """How far a mask has moved while the network trained, None where it could not."""
    if moving is None:
        return {"num_rewires": None, "explored": None, "mean_churn": None}
    way = moving.way
    return {
        "num_rewires": way.num_rewires,
        "explored": 1 - masks.sparsity(moving.explored),
        "mean_churn": way.churn / way.num_rewires if way.num_rewires else None,
    }


def train_macs(of: Outcome) -> int:
    """Multiply-adds of a training step for one image if zeros were free, as a mean over the last training."""
    moving = of.trainer.moving
    if moving is None:
        return 3 * cost.masked_multiply_adds(of.macs, of.pruned.mask)
    return round(moving.multiply_adds(of.macs, of.trainer.clock))


def layers(
    model: nn.Module, pruned: Pruned, reached: Mask | None, multiply_adds: dict[str, int]
) -> list[dict[str, Any]]:
    """Name, shape, size, kept, density and so on of each prunable tensor; multiply-adds are of the dense layer.

    Args:
        reached: the weights on a path, None where that cannot be told.
    """
    densities, dead = masks.densities(pruned.mask), paths.dead_units(model, reached or {})
    return [
        {
            "name": name,
            "shape": list(kept.shape),
            "size": kept.numel(),
            "kept": int(kept.sum()),
            "density": densities[name],
            "effective": int(reached[name].sum()) if reached else None,
            "dead_units": dead.get(name),
            "multiply_adds": multiply_adds.get(name, 0),
        }
        for name, kept in pruned.mask.items()
    ]


def mask_report(pruned: Pruned, layers: list[dict[str, Any]], signs: Agreement | None = None) -> dict[str, Any]:
    """What mask.json holds: exact counts and ties by round, and the layers.

    Args:
        layers: as `layers` makes them.
        signs: how many signs training has kept; None before it.
    """
    if signs is not None:
        layers = [layer | {"sign_agreement": signs.layers[layer["name"]]} for layer in layers]
    return {
        "num_prunable": masks.total(pruned.mask),
        "num_kept": masks.kept(pruned.mask),
        "sparsity": masks.sparsity(pruned.mask),
        "rounds": [
            {"sparsity": sparsity, "num_tied": tied}
            for sparsity, tied in zip(pruned.sparsities, pruned.num_tied, strict=True)
        ],
        "layers": layers,
    }


def accuracies(evaluated: list[dict[str, Any]], start: float) -> dict[str, Any]:
    """Accuracy (a fraction) after the last epoch, and in the epochs that the test or a validation split would choose.

    The latter are None without a validation split; of equal epochs the first counts. Epochs are the recipe's. Those
    with more weights than the last one cannot be chosen.

    Args:
        evaluated: lines of the curve, from the mask on.
        start: where the last training began; the network before it counts only if it was not trained.
    """
    trained = [line for line in evaluated if line["epoch"] > start] or evaluated
    untrained = next((line for line in evaluated if line["epoch"] <= start), {})
    last = trained[-1]
    small = [line for line in trained if line.get("rewire/density", 0) <= last.get("rewire/density", 0)]
    best = max(small, key=lambda line: line["test_top1"])
    selected = max(small, key=lambda line: line["validation_top1"]) if "validation_top1" in last else None
    stop: dict[str, Any] = {}
    if "early_stop_epoch" in last:  # the training looked within epochs, too
        stop = last
    elif "validation_loss" in last:
        lowest = min(small, key=lambda line: line["validation_loss"])
        stop = {
            "early_stop_epoch": int(lowest.get("recipe_epoch", 0)),
            "test_top1_at_early_stop": lowest["test_top1"],
        }
    return {
        "test_top1": last["test_top1"],
        "test_top5": last["test_top5"],
        "test_loss": last["test_loss"],
        "train_loss": last.get("train_loss"),
        "untrained_test_top1": untrained.get("test_top1"),
        "best_test_top1": best["test_top1"],
        "best_test_epoch": int(best.get("recipe_epoch", 0)),
        "test_top1_at_best_validation": selected and selected["test_top1"],
        "selected_epoch": selected and int(selected.get("recipe_epoch", 0)),
        "test_top1_at_early_stop": stop.get("test_top1_at_early_stop"),
        "early_stop_epoch": stop.get("early_stop_epoch"),
        "validation_top1": last.get("validation_top1"),
    }


def kept(mask: Mask) -> dict[str, Any]:
    """The size of a mask in all the field's units."""
    number, total = masks.kept(mask), masks.total(mask)
    return {"num_kept": number, "num_prunable": total, "density": number / total, "compression": total / number}


def effective(model: nn.Module, reached: Mask | None) -> dict[str, Any]:
    """How much of a mask lies on a path, None where that cannot be told."""
    if reached is None:
        return {"num_effective": None, "effective_sparsity": None, "dead_units": None}
    return {
        "num_effective": masks.kept(reached),
        "effective_sparsity": masks.sparsity(reached),
        "dead_units": sum(paths.dead_units(model, reached).values()),
    }


def of_filters(pruned: Pruned, whole_filters: bool) -> dict[str, Any]:
    """The same for filters, None where weights were pruned."""
    if not whole_filters:
        return {"filter_sparsity": None, "num_filters": None, "num_filters_kept": None}
    return {
        "filter_sparsity": masks.sparsity(pruned.units),
        "num_filters": masks.total(pruned.units),
        "num_filters_kept": masks.kept(pruned.units),
    }
