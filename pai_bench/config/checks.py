"""From composed settings to a checked config: rules that involve several settings, the target, and what files hold."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pai_bench.config import learned_checks, schema, transfer_checks
from pai_bench.config.rewiring import check_reach, check_rewire
from pai_bench.config.schema import GROUPS, OPTIONAL_GROUPS, FileSetting, Plain, RunConfig, with_checksum
from pai_bench.config.timing import check_conditions
from pai_bench.config.value_checks import check_name, check_values, none_is_null_, require
from pai_bench.config.what_is_pruned import check_allocation, check_layers, check_repair, check_target, has_one_number
from pai_bench.core import HOOKS, Round, TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.training.recipe import last_rate_epochs


def complete(settings: Plain) -> RunConfig:
    """Composed settings as one checked value, with the one sparsity that was asked for.

    Raises:
        ConfigError: a key is unknown or missing, a value has the wrong type or lies outside its range, or two settings
            exclude each other; or a file with a mask or weights cannot be used.
    """
    _normalise_(settings)
    schema.check(settings)
    _check_labels_(settings)
    run = schema.made(settings | {"sparsity": 0.0})
    check_values(run)
    asked = {key: settings[key] for key in schema.TARGETS if settings[key] is not None}
    start = run.rewire.start_sparsity
    rounds = rounds_of(run, (target(asked) if start is None else start) or 0.5)
    learned_checks.check_stands_alone(run)
    _check_mask_stands_alone(run, rounds)
    _check_rounds(run, rounds)
    _check_ablation(run)
    _check_rescaling(run, rounds)
    _check_regrowing(run, rounds)
    _check_looks(run)
    check_conditions(run, rounds)
    check_rewire(run, rounds)
    transfer_checks.check_transfer(run, rounds)
    check_layers(run)
    check_target(run, rounds)
    check_allocation(run)
    check_repair(run)
    run = replace(run, sparsity=_sparsity(run, asked)) if run.mask is None else _with_mask(run, asked)
    for key in WHOLE_FILES:
        run = run if _is_gone(run, key) else identified(run, key)
    check_reach(run)
    return run


# Single settings ------------------------------------------------------------------------------------------------------


def _normalise_(settings: Plain) -> None:
    """Brings what can be said in two ways into one: a home folder, a power, and a word that Hydra reads as false."""
    dataset, allocation, training = settings.get("dataset"), settings.get("allocation"), settings.get("training")
    transfer = settings.get("transfer")
    for key in ("device", "results_dir", "data_dir", "mask", "weights"):  # a folder may be called 2026
        if type(settings.get(key)) is int:
            settings[key] = str(settings[key])
    paths: list[tuple[Any, str]] = [(settings, key) for key in ("results_dir", "data_dir", "mask", "weights")]
    for part, key in [*paths, (dataset, "root"), (allocation, "mask"), (allocation, "file"), (transfer, "weights")]:
        path = part.get(key) if isinstance(part, dict) else None
        if isinstance(path, str) and path.startswith("~"):  # which shells leave as it is behind an =
            try:
                part[key] = str(Path(path).expanduser())
            except RuntimeError as error:
                raise ConfigError(f"{key}={path}: there is no such user; give a path") from error
    for key in schema.TARGETS:  # density=0.8**3: the levels of lottery tickets have many digits
        power = re.fullmatch(r"(\d*\.?\d+)\*\*(\d{1,3})", str(settings.get(key)))
        if power:
            settings[key] = float(power[1]) ** int(power[2])
    words = settings.get("prunable")
    if isinstance(words, list) and words and all(isinstance(word, str) for word in words):  # in one order, each once
        once = sorted(set(words))
        settings["prunable"] = once[0] if len(once) == 1 else once
    if isinstance(training, dict) and training.get("compact") is False:
        training["compact"] = "off"
    none_is_null_(settings, "search", "no mask is learned")
    none_is_null_(settings, "transfer", "nothing is transferred")


def _check_labels_(settings: Plain) -> None:
    """Checks the names of options, and fills in those that follow from other settings."""
    dataset = settings["dataset"]
    if dataset["name"] is None and dataset.get("root"):  # a folder of images is known by its own name
        dataset["name"] = Path(dataset["root"]).resolve().name
    for group in (*GROUPS, *OPTIONAL_GROUPS, "pruner", "search", "ablation", "rewire", "training"):
        if settings[group] is not None:
            check_name(f"{group}.name", settings[group]["name"])
    if settings["mask_name"] is not None:
        check_name("mask_name", settings["mask_name"])
    if settings["mask"] is not None:
        settings["pruner"]["name"], settings["pruner"]["label"] = settings["mask_name"] or "mask", None
    elif settings["search"] is not None and settings["pruner"]["score"] is None:
        settings["pruner"] |= {key: settings["search"][key] for key in ("name", "label")}


# Settings that exclude each other -------------------------------------------------------------------------------------


def rounds_of(run: RunConfig, sparsity: float) -> Sequence[Round]:
    """The rounds of the schedule, as far as they can be told without the data: how long an epoch is, nobody knows yet.

    Raises:
        ConfigError: the schedule takes no training of this length, however many steps an epoch has.
    """
    for steps_per_epoch in (1000, 1_000_000):
        length = TrainingLength(run.training.epochs, steps_per_epoch, last_rate_epochs(run.training))
        try:
            rounds = run.schedule(sparsity, length)
        except ConfigError:
            if steps_per_epoch == 1000:
                continue
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ConfigError(f"schedule={run.schedule.name}: its function fails ({said}); correct it") from error
        if not isinstance(rounds, Sequence) or not all(isinstance(one, Round) for one in rounds):
            raise ConfigError(f"schedule._target_={run.schedule.target}: it returns no list of rounds; give another")
        return rounds
    raise AssertionError


def trains_to_the_end(run: RunConfig) -> bool:
    """Whether the search trains whole networks, as for lottery tickets. Runs of one chain can share them."""
    rounds = rounds_of(run, run.start_sparsity)
    # A condition may end a training earlier.
    return any(one.until_epoch >= run.training.epochs for one in rounds) and all(one.when is None for one in rounds)


def _returns_weights(rounds: Sequence[Round]) -> bool:
    return any(one.rewind_epoch is not None and one.rewind_weights for one in rounds)


def _check_mask_stands_alone(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses what would compute another mask than the given one, and settings of a mask where none is given."""
    if run.weights is None:
        require(run.checksums.weights is None, "checksums.weights", run.checksums.weights, "add weights=PATH")
    if _file(run, "allocation")[1] is None:
        found = run.checksums.allocation
        require(found is None, "checksums.allocation", found, "give an allocation that has a file")
    mask, file = run.mask, run.mask_file
    if mask is None:
        for setting, value, no_effect in (
            ("mask_name", run.mask_name, None),
            ("mask_file.names", file.names, "exact"),
            ("mask_file.missing", file.missing, "refuse"),
            ("mask_file.zeros", file.zeros, False),
            ("checksums.mask", run.checksums.mask, None),
        ):
            require(value == no_effect, setting, value, "there is no mask for it; add mask=PATH")
        return
    require(run.mask_name != "dense", "mask_name", "dense", "that is the unpruned network; give another name")
    if run.pruner.score is not None:
        raise ConfigError(f"mask={mask}: a pruner would compute another mask; leave pruner= or mask= out")
    if rounds:
        raise ConfigError(
            f"mask={mask}: schedule={run.schedule.name} would compute another mask; leave schedule= or mask= out"
        )
    if any(hook is not None for hook in (run.ablation.batches, run.ablation.images, run.ablation.scores)):
        raise ConfigError(
            f"ablation={run.ablation.name}: mask={mask} comes without scores; "
            "choose an ablation of the mask or the weights"
        )
    if file.names == "order":
        require(file.missing == "refuse", "mask_file.missing", "keep", "by order every layer needs its mask")
        if mask.endswith(".safetensors"):
            raise ConfigError(f"mask={mask}: it is sorted by name; with mask_file.names=order give a .pt or .npz")


def _check_rounds(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses a schedule that does not go with the pruner or the allocation."""
    pruner, schedule = run.pruner, run.schedule.name
    if not rounds and pruner.score is not None:
        raise ConfigError(f"schedule={schedule}: it never prunes; use pruner=dense or another schedule")
    if rounds and pruner.score is None:
        raise ConfigError(
            f"schedule={schedule}: pruner={pruner.name} has no score to prune by; choose another pruner, "
            "or schedule=none"
        )
    if pruner.transfer is not None and _returns_weights(rounds):
        raise ConfigError(
            f"schedule={schedule}: rewinding the weights would undo what pruner={pruner.name} gives them; "
            "use schedule=constant"
        )
    if has_one_number(run) and len(rounds) > 1:
        raise ConfigError(
            f"schedule={schedule}: allocation={run.allocation.name} has one target; use schedule=one_shot"
        )


def _check_ablation(run: RunConfig) -> None:
    """Refuses an ablation that has nothing to break."""
    ablation = run.ablation
    broken = [hook for hook in HOOKS if getattr(ablation, hook) is not None]
    if broken and not run.prunes:
        raise ConfigError(f"ablation={ablation.name}: a dense network has nothing to break; choose a pruner")
    if {"scores", "mask"} & set(broken) and not run.starts_pruned:
        raise ConfigError(
            f"ablation={ablation.name}: rewire={run.rewire.name} starts from the dense network, without a mask to "
            "break; choose an ablation of the weights, or a rule that starts from a mask, such as rewire=rigl"
        )
    if {"batches", "images"} & set(broken) and run.pruner.scoring_data is None:
        raise ConfigError(f"ablation={ablation.name}: pruner={run.pruner.name} looks at no images; choose another")


def _check_rescaling(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses a rescaling of the kept weights that something else would undo."""
    pruner, ablation = run.pruner, run.ablation
    if not run.allocation.settings.get("rescale"):
        return
    if pruner.reduce is not None:
        raise ConfigError("allocation.rescale=true: filters are not rescaled; set it to false, or prune weights")
    if _returns_weights(rounds) or pruner.regrow or ablation.mask is not None or ablation.weights is not None:
        raise ConfigError(
            "allocation.rescale=true: rewinding, regrowing and ablations of the mask or the weights would undo it; "
            "set it to false"
        )


def _check_regrowing(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses a regrowing that cannot be."""
    if run.pruner.regrow_moved and not run.pruner.regrow:
        raise ConfigError("pruner.regrow_moved=true: no weight returns with pruner.regrow=false; set it to true")
    if run.pruner.reduce is not None and run.pruner.regrow:
        raise ConfigError("pruner.regrow=true: filters do not return, because their norms do not; set it to false")


def _check_looks(run: RunConfig) -> None:
    """Refuses looks at held-out images where none are held out."""
    if run.validate_every_steps is not None and not run.dataset.settings.get("validation"):
        raise ConfigError(
            f"validate_every_steps={run.validate_every_steps}: no images are held out; add dataset.validation=0.1"
        )


# The target -----------------------------------------------------------------------------------------------------------


def target(asked: dict[str, float]) -> float | None:
    """The one target given as sparsity, density or compression, as a sparsity of at most twelve digits.

    Raises:
        ConfigError: it is given twice, lies outside its range, or is a sparsity of 1 when it is rounded.
    """
    if len(asked) > 1:
        both = " and ".join(f"{key}={value:g}" for key, value in asked.items())
        raise ConfigError(f"{both}: they say the same thing; give one of them")
    for key, value in asked.items():
        found = _as_sparsity(key, value)
        require(found < 1, key, value, "to twelve digits this is a sparsity of 1; give sparsity=0.999999999999 or less")
        return found
    return None


def _as_sparsity(key: str, value: float) -> float:
    match key:
        case "density":
            require(0 < value <= 1, key, value, "give a fraction in (0, 1]")
            return round(1.0 - value, 12)
        case "compression":
            require(1 <= value < math.inf, key, value, "give a ratio of 1 or more")
            return round(1.0 - 1 / value, 12)
        case _:
            require(0 <= value < 1, key, value, "give a fraction in [0, 1)")
            return float(round(value, 12))


def _sparsity(run: RunConfig, asked: dict[str, float]) -> float:
    """The target of a run that finds its own mask."""
    found = target(asked)
    by = {"pruner": run.pruner.score, "search": run.search, "rewire": run.rewire.rule}
    group = next((name for name, found_by in by.items() if found_by is not None), None)
    if group is None:
        return 0.0  # a dense network is one and the same run at every sparsity of a sweep
    if found is None:
        said = f"{group}={getattr(run, group).name}"
        raise ConfigError(f"{said} needs a target: add sparsity=0.9 (or density=0.1, or compression=10)")
    return found


# Files ----------------------------------------------------------------------------------------------------------------


WHOLE_FILES: tuple[FileSetting, ...] = ("weights", "transfer", "allocation")  # all that they hold counts
_WANTED = {
    "weights": "a state dict",
    "transfer.weights": "the model.safetensors of a run, or a state dict",
    "allocation.mask": "a mask.safetensors",
    "allocation.file": "a CSV file",
}


def identified(run: RunConfig, key: FileSetting, checksum: str | None = None) -> RunConfig:
    """The config with the checksum of what a file holds; compared with the one that was noted before.

    Args:
        checksum: of what counts in the file. None: the whole file counts.

    Raises:
        ConfigError: they differ, or the file cannot be read.
    """
    setting, path = _file(run, key)
    if path is None:
        return run
    found = checksum or _digest_of_file(setting, path)
    noted = getattr(run.checksums, key)
    if noted is not None and noted != found:
        raise ConfigError(
            f"{setting}={path}: it has changed since the run was composed (checksum {noted[:8]}, now {found[:8]}); "
            f"put the earlier file back, or start a new run with {setting}={path}"
        )
    return with_checksum(run, key, found)


def _file(run: RunConfig, key: FileSetting) -> tuple[str, str | None]:
    """The setting that names a file, and the path of the file; None if none is given."""
    if key == "transfer":
        return "transfer.weights", transfer_checks.file_of(run)
    if key == "allocation":
        given = {f"allocation.{name}": run.allocation.settings.get(name) for name in ("mask", "file")}
        return next((pair for pair in given.items() if isinstance(pair[1], str)), ("allocation.mask", None))
    return key, getattr(run, key)


def _digest_of_file(setting: str, path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{setting}={path}: it cannot be read ({error.strerror}); give {_WANTED[setting]}") from error


def _is_gone(run: RunConfig, key: FileSetting) -> bool:
    """Whether a file is gone whose checksum the config has noted. The run has its name; to run, it needs the file."""
    return getattr(run.checksums, key) is not None and not Path(str(_file(run, key)[1])).is_file()


def _with_mask(run: RunConfig, asked: dict[str, float]) -> RunConfig:
    """The config with the sparsity and the checksum of the mask that is given."""
    from pai_bench.masks import mask_files

    path, file = str(run.mask), run.mask_file
    if _is_gone(run, "mask") and "sparsity" in asked:
        return replace(run, sparsity=float(asked["sparsity"]))
    masks = mask_files.read("mask", path, zeros=file.zeros)
    again = run.checksums.mask is not None  # the config of a run, which has its sparsity
    run = identified(run, "mask", mask_files.digest(masks, file.names))
    sparsity = mask_files.sparsity(masks)
    nominal = target(asked)
    if nominal is None or (again and nominal == sparsity):
        return replace(run, sparsity=sparsity)
    ((key, value),) = asked.items()
    if run.mask_name is None:
        raise ConfigError(
            f"{key}={value:g}: mask={path} has a sparsity of its own; leave it out, or name the masks that it is to "
            "hold for with mask_name=WORD"
        )
    if file.missing == "keep":
        raise ConfigError(
            f"{key}={value:g}: how sparse mask_file.missing=keep leaves a network is its mask's; leave it out"
        )
    if not mask_files.agree(nominal, masks):
        raise ConfigError(
            f"{key}={value:g}: mask={path} has sparsity {sparsity:g}, and its density is more than 0.1 % away; "
            "give a target that is nearer, or none"
        )
    return replace(run, sparsity=nominal)
