"""One run, from a checked config to its result row. Read it downwards."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch.nn import functional as F

from pai_bench import config, devices, masks, measures, seeding, store, tracking
from pai_bench.core import Data, Examples, Place, Pruner
from pai_bench.errors import ConfigError, UserError
from pai_bench.prune import Pruned, prune
from pai_bench.summary import closing
from pai_bench.train import Recipe, Trainer

log = logging.getLogger(__name__)


def _function(call: dict[str, Any]) -> Any:
    """The function that a call in the config names, with the arguments that it gives."""
    return instantiate({key: value for key, value in call.items() if key != "name"}, _partial_=True, _convert_="all")


def _start_log(directory: Path) -> logging.Handler:
    handler = logging.FileHandler(directory / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("pai_bench").addHandler(handler)
    return handler


def load_data(cfg: dict[str, Any], device: torch.device) -> Data:
    """The dataset of a completed config, its images on the device or on their way there.

    Raises:
        DataError: it is missing, incomplete or damaged.
    """
    place = Place(Path(cfg["data_dir"]), cfg["download"], device, cfg["num_workers"])
    data: Data = _function(cfg["dataset"])(place)
    return data


def run(cfg: dict[str, Any]) -> dict[str, Any]:
    """Runs what a completed config describes, unless it has been run already, and returns its result row.

    Args:
        cfg: what config.complete returned.

    Raises:
        UserError: and its kinds, for what a user can mend; the run directory holds the traceback.
    """
    directory = Path(cfg["results_dir"]) / config.run_id(cfg)
    device = devices.pick(cfg["device"])
    devices.check_precision(cfg["training"]["precision"], device)
    if (row := store.finished(directory)) is not None:
        _check_same_images(cfg, row)
        accuracy = f"{100 * row['test_top1']:.2f} % test accuracy"
        log.info("%s is finished already: %s, sparsity %.6g", directory, accuracy, row["sparsity"])
        return row
    files = store.RunDirectory(directory)
    handler = _start_log(directory)
    try:
        row = _run(cfg, device, files)
    except ConfigError:
        files.discard()
        raise
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        log.debug("%s", error, exc_info=True)
        if not isinstance(error, UserError):
            error.add_note(f"the traceback is in {directory / 'run.log'}")
        try:
            files.status("failed", exit_code=code, error=f"{type(error).__name__}: {error}")
        except OSError as unwritable:
            log.warning("%s: the status could not be written: %s", directory, unwritable)
        raise
    finally:
        logging.getLogger("pai_bench").removeHandler(handler)
        handler.close()
    return row


def _check_same_images(cfg: dict[str, Any], row: dict[str, Any]) -> None:
    """Refuses a finished row whose images are not those of the config, where a dataset's name does not decide them."""
    dataset = cfg["dataset"]
    if dataset.get("root") or dataset.get("subset") or dataset.get("verify") is False:
        checksum = load_data(cfg, torch.device("cpu")).checksum
        if checksum != row["dataset_checksum"]:
            raise ConfigError(
                f"dataset.name={dataset['name']}: {row['id']} was run on other images of that name "
                f"(checksum {row['dataset_checksum'][:8]}, here {checksum[:8]}); give another dataset.name="
            )


def _carries_signal(model: torch.nn.Module, data: Data, seed: int) -> bool:
    size = min(128, data.num_examples["train"])
    (batch,) = data.draw(Examples(None, size, size, False), seeding.generator(seed, "signal"))
    with seeding.seeded(seed, "signal"):
        return measures.carries_signal(model, batch, F.cross_entropy)


def _pruner(cfg: dict[str, Any]) -> Pruner:
    """A pruner of the config; a dense run's is never asked for a score."""
    examples = Examples(**cfg["examples"]) if cfg["examples"] is not None else None
    return Pruner(_function(cfg["score"]) if cfg["score"] is not None else None, cfg["mode"], examples)


def _layers(pruned: Pruned, multiply_adds: dict[str, int]) -> list[dict[str, Any]]:
    """Name, shape, size, kept, density and dense multiply-adds of each prunable tensor."""
    densities = masks.densities(pruned.mask)
    return [
        {
            "name": name, "shape": list(kept.shape), "size": kept.numel(), "kept": int(kept.sum()),
            "density": densities[name], "multiply_adds": multiply_adds.get(name, 0),
        }
        for name, kept in pruned.mask.items()
    ]  # fmt: skip


def _mask_report(pruned: Pruned, layers: list[dict[str, Any]]) -> dict[str, Any]:
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


def _accuracies(curve: list[dict[str, Any]], epochs: int) -> dict[str, Any]:
    """Accuracy (a fraction) after the last epoch, in the best test epoch, and in the epoch best on a validation split.

    The latter is None without a validation split; of equal epochs the first counts.
    """
    evaluated = [line for line in curve if "test/top1" in line and (line["epoch"] > 0 or epochs == 0)]
    last, best = evaluated[-1], max(evaluated, key=lambda line: line["test/top1"])
    selected = max(evaluated, key=lambda line: line["validation/top1"]) if "validation/top1" in last else None
    return {
        "test_top1": last["test/top1"],
        "test_top5": last["test/top5"],
        "test_loss": last["test/loss"],
        "train_loss": last.get("train/loss"),
        "best_test_top1": best["test/top1"],
        "best_test_epoch": int(best["epoch"]),
        "selected_test_top1": selected and selected["test/top1"],
        "selected_epoch": selected and int(selected["epoch"]),
        "validation_top1": last.get("validation/top1"),
    }


def _run(cfg: dict[str, Any], device: torch.device, files: store.RunDirectory) -> dict[str, Any]:
    started = time.perf_counter()
    devices.start_memory(device)
    seed, sparsity = cfg["seed"], cfg["sparsity"]
    run_id = config.run_id(cfg)

    # Data and model. The model is built on the CPU, so that its initial weights are the same on every device.
    data = load_data(cfg, device)
    with seeding.seeded(seed, "init"):
        model: torch.nn.Module = _function(cfg["model"])(data.input_shape, data.num_classes)
    model = model.to(device)
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    num_prunable = masks.total(initial)
    num_kept = masks.num_kept(sparsity, num_prunable)
    pruner = _pruner(cfg["pruner"])
    rounds = _function(cfg["schedule"])(sparsity)
    log.info("%s", run_id)
    log.info(
        "%s: %s images of %s in %d classes; %s: %s prunable weights, %s to keep, in %d rounds; %s",
        cfg["dataset"]["name"], ", ".join(f"{n:,} {split}" for split, n in data.num_examples.items() if n),
        "x".join(map(str, data.input_shape)), data.num_classes, cfg["model"]["name"], f"{num_prunable:,}",
        f"{num_kept:,}", len(rounds), devices.describe(device),
    )  # fmt: skip

    # Records.
    density = num_kept / num_prunable
    derived = {"num_kept": num_kept, "num_prunable": num_prunable, "density": density, "compression": 1 / density}
    names = [cfg[group]["name"] for group in ("dataset", "model", "pruner")]
    files.write_text("config.yaml", config.rerunnable(cfg))
    files.write_json("provenance.json", store.provenance() | {"dataset_checksum": data.checksum, "device": str(device)})
    tracker: tracking.Tracker = _function(cfg["tracker"])(
        tracking.Run(run_id, config.group_id(cfg), files.path, cfg | derived, names)
    )

    def record(metrics: dict[str, float], epoch: float) -> None:
        files.record(metrics, epoch)
        tracker.record(metrics, epoch)

    row: dict[str, Any] = {}
    exit_code = 1
    try:
        # The mask.
        loss = F.cross_entropy
        pruned = prune(
            model, pruner, _function(cfg["allocation"]), rounds,
            initial=initial, input_shape=data.input_shape, draw=data.draw, loss=loss, seed=seed, record=record,
        )  # fmt: skip
        assert masks.kept(pruned.mask) == num_kept, "the allocation did not keep the exact number of weights"
        multiply_adds = measures.multiply_adds(model, data.input_shape)
        layers = _layers(pruned, multiply_adds)
        files.write_tensors("mask.safetensors", pruned.mask)
        files.write_json("mask.json", _mask_report(pruned, layers))
        if cfg["save_scores"] and pruned.scores is not None:
            files.write_tensors("scores.safetensors", pruned.scores)
        tracker.mask(files.path / "mask.safetensors")
        pruned = replace(pruned, scores=None)  # they would lie on the device all through training
        signal = _carries_signal(model, data, seed)
        collapsed = masks.collapsed(pruned.mask)
        if collapsed:
            log.warning("layer collapse: nothing is kept in %s", ", ".join(collapsed))
        if not signal:
            log.warning("the pruned network carries no signal: its output does not depend on the image")

        # Training.
        recipe = Recipe(**{key: value for key, value in cfg["training"].items() if key != "name"})
        trainer = Trainer(
            model, pruned.mask, data, recipe, device,
            seed=seed, channels_last=cfg["channels_last"], compile_model=cfg["compile"], record=record,
        )  # fmt: skip
        trainer.until(recipe.epochs)

        # The result: one row, whose appearance on disk is what finishes the run.
        groups = ("dataset", "model", "pruner", "allocation", "schedule", "training")
        row = {
            "id": run_id,
            "group": config.group_id(cfg),
            "protocol": cfg["protocol"],
            "seed": seed,
            **{group: cfg[group]["name"] for group in groups},
            **derived,
            "sparsity": masks.sparsity(pruned.mask),
            "target_sparsity": sparsity,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_tied": sum(pruned.num_tied),
            "num_rounds": len(rounds),
            "collapsed_layers": collapsed,
            "carries_signal": signal,
            **_accuracies(files.curve(), recipe.epochs),
            "multiply_adds_dense": sum(multiply_adds.values()),
            "multiply_adds_masked": measures.masked_multiply_adds(multiply_adds, pruned.mask),
            "epochs": recipe.epochs,
            "precision": recipe.precision,
            "score_examples": pruned.num_examples,
            "train_examples": trainer.num_examples,
            "prune_seconds": pruned.seconds,
            "train_seconds": trainer.seconds,
            "total_seconds": time.perf_counter() - started,
            "images_per_second": trainer.num_examples / trainer.seconds if trainer.seconds else 0.0,
            "peak_memory_bytes": devices.peak_memory_bytes(device),
            "device": str(device),
            "hardware": devices.describe(device),
            "dataset_checksum": data.checksum,
        }
        files.finish(row)
        exit_code = 0
    except UserError as error:
        exit_code = error.exit_code
        raise
    finally:
        tracker.finish(row, exit_code)
    log.info("%s", closing(row, layers, files.path))
    return row
