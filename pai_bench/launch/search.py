"""A search for the best settings with Optuna: which settings are tried, and what they were worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pai_bench.config.identity import NOT_IDENTITY
from pai_bench.errors import ConfigError, PreemptedError, UserError, check_installed
from pai_bench.launch import overrides as words
from pai_bench.launch import sweep_progress
from pai_bench.system import files, preemption, seeding

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

Launch = Callable[[Sequence[Sequence[str]], int], Sequence[Any]]
Space = dict[str, "BaseDistribution"]
Sampler = Literal["tpe", "random"]
Direction = Literal["maximize", "minimize"]

_SEARCH = "search"  # the attribute of a study that says what it searches
_HOPELESS = 3  # after so many failures and no success, the search ends


@dataclass(frozen=True)
class Settings:
    """hydra.sweeper: conf/hydra/sweeper/optuna.yaml says what each is."""

    n_trials: int
    n_jobs: int
    direction: Direction
    sampler: Sampler
    seed: int
    storage: str | None
    study_name: str
    output: str
    params: Mapping[str, Any] | None


def search(arguments: Sequence[str], launch: Launch, **given: Any) -> None:
    """Runs trials until there are enough, and writes what came out to a file.

    Args:
        arguments: the words of the command line.
        launch: runs several jobs at once, each given by its words, and returns what they returned.
        given: hydra.sweeper.

    Raises:
        ConfigError: a setting of the search is wrong, nothing is searched, or the place of its study or of its results
            is that of another search.
        UserError: no trial succeeds.
        PreemptedError: a signal came.
    """
    settings = _checked(given)
    check_installed("hydra/sweeper=optuna needs", "optuna", "optuna")
    given_words = [*(f"{key}={value}" for key, value in (settings.params or {}).items()), *arguments]
    space, fixed = space_of(given_words)
    searched = _searched(given_words, settings)
    _check_output(settings, searched)
    study = _study(settings)
    _check_study(study, settings, searched)
    _take_up(study)
    number, num_trials = 0, settings.n_trials - _num_finished(study)
    sweep_progress.expect(num_trials, searches=True)
    while number < num_trials:
        trials = [study.ask(space) for _ in range(min(settings.n_jobs, num_trials - number))]
        jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
        _tell(study, trials, [job.return_value for job in launch(jobs, number)])
        number += len(trials)
        if _num_finished(study) == 0 and number >= min(_HOPELESS, num_trials):
            raise UserError(f"hydra/sweeper=optuna: {number} of {number} trials failed; correct what they name")
    _conclude(study, settings, searched)


def _checked(given: Mapping[str, Any]) -> Settings:
    unknown = sorted(set(given) - set(Settings.__dataclass_fields__))
    if unknown:
        raise ConfigError(
            f"hydra.sweeper.{unknown[0]}: a search has no such setting; an experiment is a grid and goes without "
            "hydra/sweeper=optuna"
        )
    settings = Settings(**given)
    for key, value in (("n_trials", settings.n_trials), ("n_jobs", settings.n_jobs)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"hydra.sweeper.{key}={value}: give a whole number of at least 1")
    for key, kind in (("direction", Direction), ("sampler", Sampler)):
        if getattr(settings, key) not in get_args(kind):
            raise ConfigError(f"hydra.sweeper.{key}={getattr(settings, key)}: give {' or '.join(get_args(kind))}")
    return settings


def space_of(arguments: Sequence[str]) -> tuple[Space, list[str]]:
    """The settings that are searched, with their distributions; and the words that stay as they are.

    Raises:
        ConfigError: there is nothing to search, or an interval is empty.
    """
    space: Space = {}
    fixed: dict[str, str] = {}
    for override in words.parsed(arguments):
        key = override.get_key_element()
        if override.is_sweep_override():
            space[key] = _distribution(override)
            fixed.pop(key, None)
        else:  # the command line comes last and wins
            fixed[key] = override.get_value_element_as_str()
            space.pop(key, None)
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna: there is nothing to search; give a setting several values, as in "
            "'training.lr=tag(log,interval(0.01,1))' or training.lr=0.1,0.05"
        )
    return space, [f"{key}={value}" for key, value in fixed.items()]


def _distribution(override: Any) -> "BaseDistribution":
    """The distribution of a setting: interval(a,b), with tag(log,...) on a logarithmic scale; or its values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if override.is_discrete_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    value = override.value()
    low, high, scale = value.start, value.end, "log" in value.tags
    whole = isinstance(low, int) and isinstance(high, int)
    try:
        return IntDistribution(low, high, log=scale) if whole else FloatDistribution(low, high, log=scale)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{override.input_line}: {error}; give interval(LOW,HIGH)") from error


def _study(settings: Settings) -> "Study":
    """The study, with the trials of an earlier attempt where it is stored."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers: dict[str, Callable[[int], Any]] = {
        "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=settings.n_jobs > 1),
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    }
    try:
        if (file := (settings.storage or "").removeprefix("sqlite:///")) != (settings.storage or ""):
            Path(file).parent.mkdir(parents=True, exist_ok=True)  # the database makes its file alone
        study = optuna.create_study(
            storage=settings.storage,
            study_name=settings.study_name,
            direction=settings.direction,
            load_if_exists=True,
        )
        earlier = len(study.get_trials(deepcopy=False))
        # A sampler that began anew with the same seed would propose the first settings of the study again.
        seed = seeding.stream_seed(settings.seed, "search", earlier) % 2**32 if earlier else settings.seed
        study.sampler = samplers[settings.sampler](seed)
        return study
    except Exception as error:  # whatever a database says
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ConfigError(f"hydra.sweeper.storage={settings.storage}: it cannot be used ({reason})") from error


def _searched(arguments: Sequence[str], settings: Settings) -> dict[str, str]:
    """What makes two searches the same: every setting that can change a result, with its value or its values."""
    found = {override.get_key_element(): str(override.input_line) for override in words.parsed(arguments)}
    counted = [key for key in found if key.lstrip("+").partition(".")[0] not in NOT_IDENTITY]
    return {key: found[key].partition("=")[2] for key in counted} | {"hydra.sweeper.direction": settings.direction}


def _of_output(settings: Settings, searched: Mapping[str, str]) -> dict[str, Any]:
    """What makes two searches the same for the file of results: the study, or what decides its trials."""
    if settings.storage is not None:
        return {**searched, "hydra.sweeper.study_name": settings.study_name}
    return {**searched, "hydra.sweeper.sampler": settings.sampler, "hydra.sweeper.seed": settings.seed}


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting in which two searches differ."""
    key = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
    return f"{key} is {theirs.get(key, 'not given')} there and {ours.get(key, 'not given')} here"


def _check_output(settings: Settings, searched: Mapping[str, str]) -> None:
    """Refuses to write over the results of another search."""
    path = Path(settings.output)
    if not path.exists():
        return
    try:
        theirs = files.read_json(path, search=dict)["search"]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"hydra.sweeper.output={path}: it is no result of a search ({error}); give another"
        ) from error
    ours = _of_output(settings, searched)
    if theirs != ours:
        study = " and another hydra.sweeper.study_name" if settings.storage is not None else ""
        raise ConfigError(
            f"hydra.sweeper.output={path}: it has the results of another search ({_difference(theirs, ours)}); "
            f"give another file{study}"
        )


def _check_study(study: "Study", settings: Settings, searched: Mapping[str, str]) -> None:
    """Notes with a new study what it searches, and refuses a stored one of another search."""
    theirs = study.user_attrs.get(_SEARCH)
    if theirs is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_SEARCH, dict(searched))
    elif theirs != searched:
        raise ConfigError(
            f"hydra.sweeper.study_name={settings.study_name}: {settings.storage} has it for another search "
            f"({_difference(theirs or {}, searched)}); give another hydra.sweeper.study_name and hydra.sweeper.output"
        )


def _take_up(study: "Study") -> None:
    """Has the trials that were stopped proposed again, so that their runs go on from their checkpoints.

    Their records stay as they are: another process may be at work on the same study.
    """
    trials = study.get_trials(deepcopy=False)
    others = [trial.system_attrs.get("fixed_params", trial.params) for trial in trials if trial.state.name != "RUNNING"]
    for trial in trials:
        if trial.state.name == "RUNNING" and trial.params not in others:
            study.enqueue_trial(trial.params)


def _tell(study: "Study", trials: Sequence["Trial"], values: Sequence[Any]) -> None:
    """Tells what trials were worth. A run that failed has said so itself.

    Raises:
        PreemptedError: a signal came. Runs without a value were stopped then, which is no failure.
    """
    from optuna.trial import TrialState

    name = preemption.requested()
    for trial, value in zip(trials, values, strict=True):
        if value is not None:
            study.tell(trial, float(value))
        elif not name:
            study.tell(trial, state=TrialState.FAIL)
    if name:
        raise PreemptedError(f"{name} came when {_num_finished(study)} trials were done; the same command goes on")


def _num_finished(study: "Study") -> int:
    return sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))


def _conclude(study: "Study", settings: Settings, searched: Mapping[str, str]) -> None:
    """Says which settings were best, and writes all trials to a file."""
    trials = [
        {"number": trial.number, "state": trial.state.name.lower(), "value": trial.value, "params": trial.params}
        for trial in study.get_trials(deepcopy=False)
    ]
    best = {"best_value": study.best_value, "best_params": study.best_params}
    output = Path(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"search": _of_output(settings, searched), "direction": settings.direction}
    files.write_json(output, best | about | {"trials": trials})
    shown = " ".join(f"{key}={value}" for key, value in study.best_params.items())
    sweep_progress.conclude(
        f"best validation accuracy: {100 * study.best_value:.2f} % with {shown}; all trials are in {output}"
    )
