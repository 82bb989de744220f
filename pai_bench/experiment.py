"""One run, from a checked config to its result row. Read it downwards."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Generator
from torch.nn import functional as F

from pai_bench.analysis import cost, operations, paths, signal
from pai_bench.analysis.mode import mode
from pai_bench.config import config
from pai_bench.core import (
    Ablation,
    Allocate,
    Batch,
    Data,
    DataSettings,
    Mask,
    Pruner,
    Record,
    Round,
    Scores,
    ScoringData,
    Selection,
    Shard,
    Subnetwork,
    Weights,
)
from pai_bench.errors import ConfigError, LostWorkerError, OwnedError, PreemptedError, UserError
from pai_bench.masks import mask_files, masks
from pai_bench.pruning import reuse, scoring
from pai_bench.pruning.given import apply_given_mask
from pai_bench.pruning.rounds import Pruned, prune
from pai_bench.runs import row as rows
from pai_bench.runs import status, store, tracking
from pai_bench.runs.checkpoints import Checkpoints
from pai_bench.runs.summary import already, closing
from pai_bench.system import devices, distributed, layout, preemption, seeding
from pai_bench.system.world import world
from pai_bench.training.recipe import Recipe, length
from pai_bench.training.trainer import Trainer

log = logging.getLogger(__name__)

Diagnose = Callable[[Mask], dict[str, float]]


def _function(call: dict[str, Any]) -> Any:
    """The function that a call in the config names, with the arguments that it gives."""
    settings = {key: value for key, value in call.items() if key != "name"}
    found = instantiate(settings, _partial_=True, _convert_="all", _recursive_=False)
    # Hydra has checked the function; its own partial looks through all of sys.modules at every call.
    return partial(found.func, *found.args, **found.keywords)


def load_data(cfg: dict[str, Any], device: torch.device) -> Data:
    """The dataset of a completed config, its images on the device or on their way there.

    Raises:
        DataError: it is missing, incomplete or damaged.
    """
    here = world()
    num_workers = devices.num_cores(device) if cfg["num_workers"] is None else cfg["num_workers"]
    place = DataSettings(
        Path(cfg["data_dir"]).expanduser(), cfg["download"], device, num_workers, Shard(here.rank, here.size)
    )
    data: Data = _function(cfg["dataset"])(place)
    return data


def run(cfg: dict[str, Any]) -> dict[str, Any]:
    """Runs what a completed config describes, unless it has been run already, and returns its result row.

    Args:
        cfg: what config.complete returned.

    Raises:
        UserError: and its kinds, for what a user can mend; the run directory holds the traceback.
    """
    directory = config.directory(cfg)
    here = world()
    device = devices.pick(cfg["device"], here)
    devices.check_precision(cfg["training"]["precision"], device)
    devices.prepare(device, cfg["training"]["precision"])
    distributed.start(device)
    claimed: list[store.RunDirectory] = []

    def claim() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The row if there is one, or what the run goes on from; in the first process, for all."""
        if (row := status.finished_and_clean(directory)) is not None:
            _check_same_images(cfg, row)
            return row, None
        claimed.append(store.RunDirectory(directory))
        return claimed[0].row, claimed[0].checkpoint

    row, checkpoint = distributed.agree(claim)
    files = claimed[0] if claimed else store.NullRunDirectory(directory, checkpoint)
    try:
        if row is not None:
            log.info("%s", already(row, directory, cfg["save_model"] is not False))
            return row
        return _attempt(cfg, device, files)
    finally:
        files.close()


def _attempt(
    cfg: dict[str, Any], device: torch.device, files: store.RunDirectory | store.NullRunDirectory
) -> dict[str, Any]:
    """One attempt at a run; whatever its end, the status says so."""
    handler = files.start_log()
    try:
        try:
            with preemption.last_words(partial(files.status, "preempted", exit_code=PreemptedError.exit_code)):
                return _run(cfg, device, files)
        except KeyboardInterrupt as error:  # in a process that does not note signals
            raise PreemptedError(f"{files.path.name} was interrupted; the same command goes on with it") from error
        except LostWorkerError as error:
            if preemption.requested():
                raise PreemptedError(f"{files.path.name} was preempted; the same command goes on with it") from error
            raise
    except ConfigError:
        if files.checkpoint is None:
            files.discard()
        raise
    except (PreemptedError, OwnedError) as error:
        log.info("%s", error)
        if isinstance(error, PreemptedError):
            files.status("preempted", exit_code=error.exit_code)
        raise
    except BaseException as failure:
        explained = _explained(failure, cfg, device)
        log.debug("%s", failure, exc_info=True)
        if not isinstance(explained, UserError):
            explained.add_note(f"the traceback is in {files.path / 'run.log'}")
        try:
            code = getattr(explained, "exit_code", 1)
            files.status("failed", exit_code=code, error=f"{type(explained).__name__}: {explained}")
        except OSError as unwritable:
            log.warning("%s: the status could not be written: %s", files.path, unwritable)
        if explained is failure:
            raise
        raise explained from failure
    finally:
        logging.getLogger("pai_bench").removeHandler(handler)
        handler.close()


def _explained(error: BaseException, cfg: dict[str, Any], device: torch.device) -> BaseException:
    """A failure in words that name a remedy, where there is one."""
    # What torch, the C++ library and safetensors say when they get no memory.
    unallocated = any(words in str(error) for words in ("allocate memory", "bad_alloc", "PyObject pointer is null"))
    if unallocated or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        sizes = f"training.batch_size={cfg['training']['batch_size']}"
        if cfg["pruner"]["scoring_data"]:
            sizes += f" or pruner.scoring_data.batch_size={cfg['pruner']['examples']['batch_size']}"
        return UserError(f"out of memory on {device}: lower {sizes}, or run fewer at once")
    return error


def _check_same_images(cfg: dict[str, Any], row: dict[str, Any]) -> None:
    """Refuses a finished row whose images are not those of the config, where a dataset's name does not decide them."""
    if not config.name_decides_images(cfg):
        checksum = load_data(cfg, torch.device("cpu")).checksum
        if checksum != row["dataset_checksum"]:
            raise ConfigError(
                f"dataset.name={cfg['dataset']['name']}: {row['id']} was run on other images of that name "
                f"(checksum {row['dataset_checksum'][:8]}, here {checksum[:8]}); give another dataset.name="
            )


def _pruner(cfg: dict[str, Any]) -> Pruner:
    """A pruner of the config; a dense run's is never asked for a score."""
    functions = {key: _function(cfg[key]) if cfg[key] is not None else None for key in ("score", "transfer")}
    scoring_data = ScoringData(**cfg["scoring_data"]) if cfg["scoring_data"] is not None else None
    if (transfer := functions["transfer"]) is not None:
        functions["transfer"] = lambda *arguments: distributed.from_first(transfer(*arguments))
    return Pruner(
        **functions, mode=cfg["mode"], scoring_data=scoring_data, dtype=scoring.DTYPES[cfg["dtype"]],
        reduce=cfg["reduce"],
        regrow=cfg["regrow"], regrow_moved=bool(cfg["regrow_moved"]),
    )  # fmt: skip


def _ablation(cfg: dict[str, Any]) -> Ablation:
    return Ablation(**{hook: _function(cfg[hook]) if cfg[hook] is not None else None for hook in config.HOOKS})


@dataclass(frozen=True)
class Parts:
    """What the stages of a run work with, all of it made from the config."""

    cfg: dict[str, Any]
    device: torch.device
    data: Data
    build: Callable[[str], torch.nn.Module]  # a model on the device, its weights drawn from the stream of a name
    pruner: Pruner
    allocate: Allocate
    ablation: Ablation
    rounds: Sequence[Round]
    recipe: Recipe


def assembled(cfg: dict[str, Any], device: torch.device) -> Parts:
    """The parts of the run that a completed config describes.

    Raises:
        DataError: the dataset is missing, incomplete or damaged.
        ConfigError: settings that only show themselves to be wrong once the data is there.
    """
    data = load_data(cfg, device)

    def build(stream: str) -> torch.nn.Module:
        # On the CPU, so that the weights are the same on every device.
        with seeding.seeded(cfg["seed"], stream):
            model: torch.nn.Module = _function(cfg["model"])(data.input_shape, data.num_classes)
        if cfg["weights"] is not None and stream == "init":
            config.identify(cfg, "weights", config.weights_digest(cfg))
            mask_files.load_weights_(model, cfg["weights"])
        return model.to(device)

    recipe = Recipe(**{key: value for key, value in cfg["training"].items() if key not in ("name", "compact")})
    rounds = _function(cfg["schedule"])(cfg["sparsity"], length(recipe, data))
    pruner, ablation, choose = _pruner(cfg["pruner"]), _ablation(cfg["ablation"]), _function(cfg["allocation"])

    def allocate(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        # Every process scores, and the mask of the first holds: two GPUs may round differently.
        chosen: Selection = distributed.from_first(choose(scores, candidates, keep, generator))
        return chosen

    return Parts(cfg, device, data, build, pruner, allocate, ablation, rounds, recipe)


def trainer_for(
    parts: Parts, model: torch.nn.Module, record: Record, diagnose: Diagnose | None = None, **settings: Any
) -> Trainer:
    """The trainer of a model on the data of a run."""
    cfg, data, rounds = parts.cfg, parts.data, parts.rounds
    return Trainer(
        model, data, parts.recipe, parts.device,
        seed=cfg["seed"], channels_last=cfg["channels_last"], compile_model=cfg["compile"], record=record,
        compact_training=cfg["training"]["compact"] == "auto"
        and (not parts.pruner.regrow or all(r.until_epoch == 0 for r in rounds)),
        keep_epochs=[r.rewind_epoch for r in rounds if r.rewind_epoch is not None and r.rewind_weights],
        diagnose=diagnose, **settings,
    )  # fmt: skip


def given_mask(cfg: dict[str, Any], model: torch.nn.Module) -> tuple[Mask, Mask]:
    """The mask of `mask=PATH` on a model: of its prunable weights, and of other parameters that are held at zero.

    Raises:
        ConfigError: it is of another model, or has changed since the config was completed.
    """
    settings = cfg["mask_file"]
    read = mask_files.read("mask", cfg["mask"], zeros=settings["zeros"])
    config.identify(cfg, "mask", mask_files.digest(read, settings["names"]))
    where = f"mask={cfg['mask']}"
    return mask_files.fitted(where, read, model, names=settings["names"], missing=settings["missing"])


def _target_sparsity(cfg: dict[str, Any], mask: Mask) -> float:
    """The sparsity of a given mask over all prunable weights, by the number that its name has if it is that one's."""
    found = mask_files.sparsity({name: tensor.cpu().numpy() for name, tensor in mask.items()})
    nominal = cfg["mask_name"] is not None and cfg["mask_file"]["missing"] == "refuse"
    return float(cfg["sparsity"]) if nominal and mask_files.agree(cfg["sparsity"], found) else found


def _shelf(parts: Parts, model: torch.nn.Module, ablation: Ablation) -> reuse.ScoreCache | None:
    """Where scores and masks of this network are kept; None if they are not a function of the network and settings."""
    cfg, pruner, device = parts.cfg, parts.pruner, parts.device
    trains = any(this.until_epoch > 0 for this in parts.rounds)
    if not cfg["cache_gb"] or world().size > 1 or pruner.score is None or pruner.transfer is not None or trains:
        return None
    # What comes after the score cannot change it, and masks are kept for searches of several rounds alone.
    after = ("reduce", "regrow") if len(parts.rounds) == 1 else ()
    before = ("images", "batches") if len(parts.rounds) == 1 else ("images", "batches", "scores", "mask")
    hooks = {hook: cfg["ablation"][hook] for hook in before if ablation is parts.ablation and cfg["ablation"][hook]}
    called = [cfg["pruner"]["score"], *hooks.values(), *([cfg["allocation"]] if len(parts.rounds) > 1 else [])]
    dataset = {key: value for key, value in cfg["dataset"].items() if key != "root"}
    determines = {
        "network": reuse.fingerprint(model),
        "input_shape": parts.data.input_shape,
        "seed": cfg["seed"],
        "pruner": {key: value for key, value in cfg["pruner"].items() if key not in ("name", *after)},
        "images": None if pruner.scoring_data is None else [parts.data.checksum, dataset],
        "ablation": hooks,
        "code": reuse.code(call["_target_"] for call in called),
        # Rounding is another on other machines.
        "machine": [torch.__version__, devices.describe(device)],
    }
    return reuse.ScoreCache(Path(cfg["results_dir"]) / ".cache", round(cfg["cache_gb"] * 1e9), determines)


def _search(
    parts: Parts,
    trainer: Trainer,
    initial: Weights,
    ablation: Ablation,
    record: Record,
    resume_from: Pruned | None,
    checkpoint: Callable[[Pruned], None],
    given: tuple[Mask, Mask] | None = None,
) -> tuple[Pruned, str | None]:
    """Finds the mask of the trainer's model; and what of it an earlier run had computed: "scores" or "mask"."""
    if given is not None:
        pruned = resume_from or apply_given_mask(
            trainer.model, *given, ablation=ablation, seed=parts.cfg["seed"], record=record
        )
        checkpoint(pruned)
        return pruned, None

    def search(pruner: Pruner, record: Record, **other: Any) -> Pruned:
        settings: dict[str, Any] = {
            "ablation": ablation, "draw": parts.data.draw, "checkpoint": checkpoint,
        }  # fmt: skip
        return prune(
            trainer.model, pruner, parts.allocate, parts.rounds, initial=initial, input_shape=parts.data.input_shape,
            training=trainer, loss=F.cross_entropy, seed=parts.cfg["seed"], record=record, diagnose=trainer.diagnose,
            resume_from=resume_from, **settings | other,
        )  # fmt: skip

    pruner, cfg = parts.pruner, parts.cfg
    shelf = _shelf(parts, trainer.model, ablation) if resume_from is None or not resume_from.sparsities else None
    if shelf is not None and pruner.score is not None and len(parts.rounds) == 1:
        if (found := reuse.scores(shelf, trainer.model)) is None:
            return search(replace(pruner, score=reuse.CachedScore(pruner.score, shelf)), record), None
        scores, costs = found
        pruned = search(
            replace(pruner, score=lambda *_: scores), record, ablation=replace(ablation, batches=None),
            draw=lambda *_: [],  # nothing looks at images
            checkpoint=lambda _: None,  # it would lack the costs
        )  # fmt: skip
        return replace(pruned, **costs | {"seconds": pruned.seconds + costs["seconds"]}), shelf.used
    if shelf is not None and trainer.diagnose is None and not cfg["save_scores"]:
        allocation = {key: value for key, value in cfg["allocation"].items() if key != "name"}
        path = {"rounds": [(this.sparsity, this.rounding) for this in parts.rounds], "allocation": allocation}
        pruned = reuse.stored_mask(
            shelf, path, trainer.model, initial,
            lambda metrics: record(metrics, trainer.age_epochs),
            lambda record: search(pruner, lambda metrics, _: record(metrics)),
        )  # fmt: skip
        return pruned, shelf.used
    return search(pruner, record), None


def _beside(
    parts: Parts, model: torch.nn.Module, initial: Weights, checkpoints: Checkpoints, resume_from: dict[str, Any] | None
) -> Mask:
    """The mask that a search without the ablation finds. It leaves no record, but can be taken up again."""
    trainer = trainer_for(parts, model, lambda *_: None, checkpoint=checkpoints.offer)
    so_far = None
    if resume_from and resume_from["beside"] is not None:
        so_far = Pruned.from_state(resume_from["beside"], parts.device)
        trainer.load_state(resume_from["trainer"], so_far.mask_with_coupled)
    checkpoints.trainer = trainer

    def checkpoint(pruned: Pruned) -> None:
        checkpoints.reached["beside"] = replace(pruned, scores=None).state()
        checkpoints.offer()

    found, _ = _search(parts, trainer, initial, Ablation(), lambda *_: None, so_far, checkpoint)
    return found.mask


def _overlap(parts: Parts, pruned: Pruned, without_ablation: Mask | None, trainer: Trainer) -> float | None:
    """Lets an ablation of the weights do its work, and returns the share of the kept weights that no ablation changed.

    For the weights' values where they are what is broken, for the mask otherwise. None without an ablation.

    Raises:
        UserError: the ablation changed nothing.
    """
    ablation, seed = parts.ablation, parts.cfg["seed"]
    without_ablation = pruned.without_ablation or without_ablation
    overlap = None
    if without_ablation is not None:
        common = masks.kept({name: kept & without_ablation[name] for name, kept in pruned.mask.items()})
        overlap = common / masks.kept(pruned.mask)
    if ablation.weights is not None:
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        fresh = parts.build("reinit").state_dict()
        changed = ablation.weights(state, fresh, pruned.mask, seeding.generator(seed, "ablation"))
        same = sum(int((state[name] == changed[name])[kept].sum()) for name, kept in pruned.mask.items())
        overlap = same / masks.kept(pruned.mask)
        # A fresh initialization is trained from the start; other weights go on where these would have.
        (trainer.restart if changed is fresh else trainer.replace)(pruned.mask_with_coupled, changed)
    if overlap == 1.0:
        raise UserError(
            f"ablation={parts.cfg['ablation']['name']}: it changed nothing for pruner={parts.cfg['pruner']['name']} at "
            f"sparsity={parts.cfg['sparsity']:g}, so the run would be a copy of the one without it; choose another"
        )
    return overlap


def _examples_at_random(data: Data, model: torch.nn.Module, seed: int, stream: str) -> Batch:
    """Training images, laid out as the network is."""
    size = min(128, data.num_examples["train"])
    examples = ScoringData(None, size, size, False)
    ((images, labels),) = data.draw(examples, seeding.generator(seed, stream), torch.float32)
    return layout.laid_out(images, layout.layout_of(model)), labels


def _carries_signal(model: torch.nn.Module, data: Data, seed: int, initial: Weights, effective: Mask | None) -> bool:
    """Whether the outputs depend on the image. Where not even the dense network's do, paths decide."""
    images, _ = _examples_at_random(data, model, seed, "signal")
    with seeding.seeded(seed, "signal"):
        if signal.output_depends_on_input(model, images):
            return True
        if signal.output_depends_on_input(model, images, initial):
            return False
    log.info("the dense network's output does not depend on the image either, as where a classifier starts at zero")
    return effective is None or masks.kept(effective) > 0


def _examined(parts: Parts, model: torch.nn.Module) -> operations.Operations:
    """What one image's way through the network shows, before anything is trained.

    Raises:
        ConfigError: the network does not take the images, or applies weights that a mask does not reach.
    """
    cfg, data = parts.cfg, parts.data
    name = f"model.name={cfg['model']['name']}"
    try:
        with mode(model, training=False):
            found = operations.watch(model, data.input_shape)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if tuple(found.output_shape) != (1, data.num_classes):
        raise ConfigError(
            f"{name}: for one image it gives outputs of shape {tuple(found.output_shape)}, and {data.num_classes} "
            "classes take (1, classes); give another model"
        )
    if parts.pruner.score is None and cfg["mask"] is None:
        return found
    if found.computed:
        layer = type(model.get_submodule(found.computed[0].rpartition(".")[0])).__name__
        raise ConfigError(
            f"{name}: {len(found.computed)} layers such as {found.computed[0]} ({layer}) compute what they apply from "
            "the weights that are pruned, so zeros would not stay zeros; give a model that applies weights as they are"
        )
    if others := masks.unprunable(model):
        names = list(others)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.warning(
            "%s parameters in %s%s are of no layer that is pruned, and stay dense",
            f"{masks.total(others):,}", ", ".join(names[:3]), more,
        )  # fmt: skip
    return found


def _diagnose(parts: Parts, model: torch.nn.Module) -> Diagnose:
    """Gradient-flow measurements on the same 128 training images every time, in eval mode."""
    batch = _examples_at_random(parts.data, model, parts.cfg["seed"], "diagnostics")

    def measure(held: Mask) -> dict[str, float]:
        mask = {name: held[name] for name in masks.prunable(model)}
        others = {name: tensor for name, tensor in held.items() if name not in mask}
        net = Subnetwork(model, mask, {}, parts.data.input_shape, others)
        with mode(model, training=False):
            return signal.gradient_flow(net, [batch], F.cross_entropy)

    return measure


def _run(
    cfg: dict[str, Any], device: torch.device, files: store.RunDirectory | store.NullRunDirectory
) -> dict[str, Any]:
    started = time.perf_counter()
    devices.start_memory(device)
    seed, sparsity = cfg["seed"], cfg["sparsity"]
    run_id = config.run_id(cfg)
    resume_from = files.checkpoint
    here = world()

    files.write_text("config.yaml", config.rerunnable(cfg))

    # Data and model.
    parts = assembled(cfg, device)
    data, recipe = parts.data, parts.recipe
    model = parts.build("init")
    multiply_adds = _examined(parts, model).multiply_adds
    given = given_mask(cfg, model) if cfg["mask"] is not None else None
    if given is not None:
        sparsity = masks.sparsity(given[0])  # whole layers that the file leaves out count too
    target = rows.kept(masks.full(model)) | {"rounds": len(parts.rounds)}
    if parts.pruner.reduce is None:
        num_kept = masks.num_kept(sparsity, target["num_prunable"])
        target |= {"num_kept": num_kept, "density": num_kept / target["num_prunable"]}
        target["compression"] = target["num_prunable"] / num_kept
    log.info("%s", run_id)
    log.info(
        "%s: %s images of %s in %d classes; %s: %s prunable weights, %s to keep, in %d rounds; %s",
        cfg["dataset"]["name"], ", ".join(f"{n:,} {split}" for split, n in data.num_examples.items() if n),
        "x".join(map(str, data.input_shape)), data.num_classes, cfg["model"]["name"], f"{target['num_prunable']:,}",
        f"{target['num_kept']:,}" if parts.pruner.reduce is None else f"{1 - sparsity:.4g} of the filters",
        len(parts.rounds), devices.describe(device),
    )  # fmt: skip

    # Records.
    names = [cfg[group]["name"] for group in ("dataset", "model", "pruner")]
    files.write_json("provenance.json", store.provenance() | {"dataset_checksum": data.checksum, "device": str(device)})
    tracker: tracking.Tracker = (_function(cfg["tracker"]) if here.rank == 0 else tracking.none)(
        tracking.Run(
            run_id, config.group_id(cfg), files.path, cfg | target, names,
            files.curve() if resume_from else None, files.num_repeated,
        )
    )  # fmt: skip

    def record(metrics: dict[str, float], epoch: float) -> None:
        files.record(metrics, epoch)
        tracker.record(metrics, epoch)

    row: dict[str, Any] = {}
    exit_code = 1
    checkpoints = Checkpoints(cfg, files, started - (resume_from["seconds"] if resume_from else 0.0))
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    diagnose = _diagnose(parts, model) if cfg["diagnostics"] else None
    trainer = trainer_for(parts, model, record, diagnose, checkpoint=checkpoints.offer)
    reached = checkpoints.reached = {
        "beside": None,
        "without_ablation": None,
        "pruned": None,
        "cache_hit": None,
        "last": None,
    }
    pruned = None
    if resume_from:
        reached |= {name: resume_from[name] for name in reached}
        if reached["without_ablation"] is not None:
            reached["without_ablation"] = {
                name: tensor.to(device) for name, tensor in reached["without_ablation"].items()
            }
        if reached["pruned"] is not None:
            pruned = Pruned.from_state(reached["pruned"], device)
            trainer.load_state(resume_from["trainer"], pruned.mask_with_coupled)
        log.info(
            "going on from a checkpoint: %d of %d rounds, epoch %.4g of %d of training",
            len(pruned.sparsities) if pruned else 0, len(parts.rounds), trainer.epoch, recipe.epochs,
        )  # fmt: skip
    try:
        # The mask. What an ablation of the scores changes is seen beside a search without it.
        before_the_mask = (parts.ablation.batches, parts.ablation.images, parts.ablation.scores)
        broken = any(hook is not None for hook in before_the_mask)
        if broken and reached["without_ablation"] is None:
            reached["without_ablation"] = _beside(parts, copy.deepcopy(model), initial, checkpoints, resume_from)
            reached["beside"] = None
        checkpoints.trainer = trainer

        def checkpoint(pruned: Pruned) -> None:
            reached["pruned"] = (pruned if cfg["save_scores"] else replace(pruned, scores=None)).state()
            checkpoints.offer()

        pruned, reused = _search(parts, trainer, initial, parts.ablation, record, pruned, checkpoint, given)
        reached["cache_hit"] = reached["cache_hit"] or reused
        checkpoint(pruned)
        effective = paths.effective(model, pruned.mask, data.input_shape)
        layers = rows.layers(pruned, effective, multiply_adds)
        files.write_tensors("mask.safetensors", pruned.mask_with_coupled)
        files.write_json("mask.json", rows.mask_report(pruned, layers))
        if cfg["save_scores"] and pruned.scores is not None:
            files.write_tensors("scores.safetensors", pruned.scores)
        tracker.mask(files.path / "mask.safetensors")
        pruned = replace(pruned, scores=None, moved=None)  # they would lie on the device all through training
        collapsed = masks.collapsed(pruned.mask)
        if collapsed:
            log.warning("layer collapse: nothing is kept in %s", ", ".join(collapsed))

        # Training. What is known only at its start is kept with the checkpoints.
        if reached["last"] is None:
            overlap = _overlap(parts, pruned, reached["without_ablation"], trainer)
            reached["pruned"] = pruned.state()
            reached["last"] = {
                "overlap": overlap,
                "signal": _carries_signal(model, data, seed, initial, effective),
                "search_examples": trainer.num_examples,
                "start": trainer.age_epochs,
                "num_lines": len(files.curve()),
            }
        last = reached["last"]
        if not last["signal"]:
            log.warning("the pruned network carries no signal: its output does not depend on the image")
        stop = cfg["on_collapse"] == "stop" and (collapsed or not last["signal"])
        if stop:
            log.warning("on_collapse=stop: it is not trained")
        trainer.finish(pruned.mask_with_coupled, trainer.epoch if stop else recipe.epochs)
        train_examples = trainer.num_examples - last["search_examples"]
        if cfg["save_model"] is not False:
            files.write_tensors(
                "model.safetensors", store.final_weights(model.state_dict(), cfg["save_model"] == "half")
            )
        if here.rank > 0:
            return {}

        # The result: one row, whose appearance on disk is what finishes the run.
        groups = ("dataset", "model", "pruner", "allocation", "schedule", "ablation", "training")
        evaluated = [line for line in files.curve()[last["num_lines"] :] if "test/top1" in line]
        flops_per_image = 2 * sum(multiply_adds.values())
        row = {
            "id": run_id,
            "group": config.group_id(cfg),
            "task": config.task_id(cfg),
            "method": config.method_id(cfg),
            "protocol": cfg["protocol"],
            "seed": seed,
            "input_shape": data.input_shape,
            "num_classes": data.num_classes,
            **{group: cfg[group]["name"] for group in groups},
            **cfg["checksums"],
            **rows.kept(pruned.mask),
            "sparsity": masks.sparsity(pruned.mask),
            "target_sparsity": cfg["sparsity"] if given is None else _target_sparsity(cfg, given[0]),
            **rows.of_filters(pruned, parts.pruner.reduce is not None),
            **rows.effective(effective),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_unprunable": masks.total(masks.unprunable(model)),
            "num_tied": sum(pruned.num_tied),
            "num_rounds": len(parts.rounds),
            "collapsed_layers": collapsed,
            "output_depends_on_input": last["signal"],
            "stopped": "collapse" if stop else None,
            "ablation_overlap": last["overlap"],
            **rows.accuracies(evaluated, last["start"]),
            "macs_dense": sum(multiply_adds.values()),
            "macs_masked": cost.masked_multiply_adds(multiply_adds, pruned.mask),
            "macs_trained": sum(cost.multiply_adds(trainer.trained, data.input_shape).values()),
            "compact_speedup": trainer.compact_speedup,
            "epochs": recipe.epochs,
            "precision": recipe.precision,
            "score_examples": pruned.num_examples,
            "search_train_examples": last["search_examples"],
            "train_examples": train_examples,
            "score_flops": pruned.flops,
            # Forward and backward cost three forward passes; zeros cost as much as other numbers.
            "search_train_flops": 3 * flops_per_image * last["search_examples"],
            "train_flops": 3 * flops_per_image * train_examples,
            "prune_seconds": pruned.seconds,
            "cache_hit": reached["cache_hit"],
            "train_seconds": trainer.seconds,
            "total_seconds": time.perf_counter() - checkpoints.started,
            "images_per_second": trainer.num_examples / trainer.seconds if trainer.seconds else 0.0,
            "peak_memory_bytes": devices.peak_memory_bytes(device),
            "device": str(device),
            "num_processes": here.size,
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
