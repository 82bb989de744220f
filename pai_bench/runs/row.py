"""What a result row and mask.json say: numbers from masks and curves, none of them measured anew."""

from typing import Any

from pai_bench.analysis import paths
from pai_bench.core import Mask
from pai_bench.masks import masks
from pai_bench.pruning.rounds import Pruned


def layers(pruned: Pruned, reached: Mask | None, multiply_adds: dict[str, int]) -> list[dict[str, Any]]:
    """Name, shape, size, kept, density and so on of each prunable tensor; multiply-adds are of the dense layer.

    Args:
        reached: the weights on a path, None where that cannot be told.
    """
    densities, dead = masks.densities(pruned.mask), paths.dead_units(reached or {})
    return [
        {
            "name": name, "shape": list(kept.shape), "size": kept.numel(), "kept": int(kept.sum()),
            "density": densities[name], "effective": int(reached[name].sum()) if reached else None,
            "dead_units": dead.get(name),
            "multiply_adds": multiply_adds.get(name, 0),
        }
        for name, kept in pruned.mask.items()
    ]  # fmt: skip


def mask_report(pruned: Pruned, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What mask.json holds: exact counts and ties by round, and the layers."""
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
    """Accuracy (a fraction) after the last epoch, in the best test epoch, and in the epoch best on a validation split.

    The latter is None without a validation split; of equal epochs the first counts. Epochs are the recipe's.

    Args:
        evaluated: lines of the curve, from the mask on.
        start: where the last training began; the network before it counts only if it was not trained.
    """
    trained = [line for line in evaluated if line["epoch"] > start] or evaluated
    last, best = trained[-1], max(trained, key=lambda line: line["test/top1"])
    selected = max(trained, key=lambda line: line["validation/top1"]) if "validation/top1" in last else None
    return {
        "test_top1": last["test/top1"],
        "test_top5": last["test/top5"],
        "test_loss": last["test/loss"],
        "train_loss": last.get("train/loss"),
        "best_test_top1": best["test/top1"],
        "best_test_epoch": int(best.get("recipe_epoch", 0)),
        "test_top1_at_best_validation": selected and selected["test/top1"],
        "selected_epoch": selected and int(selected.get("recipe_epoch", 0)),
        "validation_top1": last.get("validation/top1"),
    }


def kept(mask: Mask) -> dict[str, Any]:
    """The size of a mask in all the field's units."""
    number, total = masks.kept(mask), masks.total(mask)
    return {"num_kept": number, "num_prunable": total, "density": number / total, "compression": total / number}


def effective(reached: Mask | None) -> dict[str, Any]:
    """How much of a mask lies on a path, None where that cannot be told."""
    if reached is None:
        return {"num_effective": None, "effective_sparsity": None, "dead_units": None}
    return {
        "num_effective": masks.kept(reached),
        "effective_sparsity": masks.sparsity(reached),
        "dead_units": sum(paths.dead_units(reached).values()),
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
