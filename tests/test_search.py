"""Sweepers of Hydra beside the grid: Optuna searches by the validation accuracy, and the basic one tries everything."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RunCli

from hydra_plugins.pai_bench_plugins.optuna import OptunaSweeper
from pai_bench.errors import ConfigError, PreemptedError, UserError
from pai_bench.launch import compose, search, sweep_progress
from pai_bench.system import preemption

pytest.importorskip("optuna")

TINY = [
    "model=lenet300", "model.hidden=[16]", "training=smoke", "training.epochs=1", "training.lr_milestones=[]",
    "tracker=none", "device=cpu",
]  # fmt: skip
PRUNED = ["pruner=magnitude", "sparsity=0.5", "dataset.validation=0.1"]
RATE = "training.lr=tag(log,interval(0.001,1))"


@pytest.fixture(autouse=True)
def no_part_of_a_sweep() -> Iterator[None]:
    yield
    sweep_progress.forget()


def settings(tmp_path: Path, **changed: Any) -> dict[str, Any]:
    """hydra.sweeper as its file has it, but for the place of its results."""
    import yaml
    from conftest import CONF

    of_file = yaml.safe_load((CONF / "hydra" / "sweeper" / "optuna.yaml").read_text())
    return {key: value for key, value in of_file.items() if key != "_target_"} | {
        "output": str(tmp_path / "optuna.json"),
        **changed,
    }


class Runs:
    """A launcher whose runs are worth most at a learning rate of 0.1."""

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self.jobs: list[list[str]] = []
        self.batches: list[int] = []
        self.fails = fails

    def __call__(self, jobs: Sequence[Sequence[str]], number: int) -> list[Any]:
        assert number == len(self.jobs)
        self.batches.append(len(jobs))
        self.jobs += map(list, jobs)
        return [SimpleNamespace(return_value=self.worth(number + n, job)) for n, job in enumerate(jobs)]

    def worth(self, number: int, job: Sequence[str]) -> float | None:
        values = dict(word.split("=") for word in job)
        return None if number in self.fails else 1 - abs(math.log10(float(values["training.lr"])) + 1) / 10


def test_a_search_finds_the_rate_that_is_worth_most(tmp_path: Path) -> None:
    runs = Runs()
    search.search(["pruner=snip", RATE, "training.batch_size=32,64"], runs, **settings(tmp_path, n_trials=30))
    found = json.loads((tmp_path / "optuna.json").read_text())
    assert len(runs.jobs) == len(found["trials"]) == 30 and found["direction"] == "maximize"
    assert found["best_value"] == max(trial["value"] for trial in found["trials"]) > 0.97
    assert abs(math.log10(found["best_params"]["training.lr"]) + 1) < 0.3
    assert {trial["params"]["training.batch_size"] for trial in found["trials"]} == {"32", "64"}
    assert all(job[0] == "pruner=snip" for job in runs.jobs)


def test_the_same_command_asks_for_the_same_runs(tmp_path: Path) -> None:
    first, again, other = Runs(), Runs(), Runs()
    for runs, seed in ((first, 0), (again, 0), (other, 1)):
        search.search([RATE], runs, **settings(tmp_path / str(seed), n_trials=12, seed=seed))
    assert first.jobs == again.jobs != other.jobs


def test_a_study_that_is_stored_goes_on(tmp_path: Path) -> None:
    stored = {"storage": f"sqlite:///{tmp_path / 'study.db'}"}
    search.search([RATE], Runs(), **settings(tmp_path, n_trials=4, **stored))
    more = Runs()
    search.search([RATE], more, **settings(tmp_path, n_trials=6, **stored))
    assert len(more.jobs) == 2 and len(json.loads((tmp_path / "optuna.json").read_text())["trials"]) == 6


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_that_goes_on_proposes_other_settings(sampler: str, tmp_path: Path) -> None:
    stored = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "sampler": sampler}
    first, more, again = Runs(), Runs(), Runs()
    search.search([RATE], first, **settings(tmp_path, n_trials=3, **stored))
    search.search([RATE], more, **settings(tmp_path, n_trials=6, **stored))
    search.search([RATE], again, **settings(tmp_path, n_trials=6, **stored))
    assert len({job[0] for job in first.jobs + more.jobs}) == 6 and not again.jobs


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["pruner=synflow", RATE], "pruner is snip there and synflow here"),
        (
            ["pruner=snip", "training.lr=interval(0.001,1)"],
            "training.lr is tag(log,interval(0.001,1)) there and interval(0.001,1) here",
        ),
        ([RATE], "pruner is snip there and not given here"),
        (["pruner=snip", "model=vgg16", RATE], "model is not given there and vgg16 here"),
    ],
)
def test_a_search_takes_over_neither_study_nor_results_of_another(
    words: list[str], difference: str, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path / 'new folder' / 'study.db'}"
    stored, in_memory = (
        settings(tmp_path / name, n_trials=2, storage=to) for name, to in (("a", storage), ("b", None))
    )
    for given in (stored, in_memory):
        search.search(["pruner=snip", RATE], Runs(), **given)
    more = Runs()
    with pytest.raises(ConfigError) as refused:
        search.search(words, more, **stored | {"output": str(tmp_path / "new.json")})
    assert str(refused.value) == (
        f"hydra.sweeper.study_name=pai_bench: {storage} has it for another search ({difference}); "
        "give another hydra.sweeper.study_name and hydra.sweeper.output"
    )
    with pytest.raises(ConfigError) as refused:
        search.search(words, more, **in_memory)
    output = in_memory["output"]
    assert str(refused.value) == (
        f"hydra.sweeper.output={output}: it has the results of another search ({difference}); give another file"
    )
    assert more.jobs == [] and not (tmp_path / "new.json").exists()
    search.search(words, more, **stored | {"output": str(tmp_path / "new.json"), "study_name": "other"})
    assert len(more.jobs) == len(json.loads((tmp_path / "new.json").read_text())["trials"]) == 2


def test_a_search_goes_on_on_another_device_and_elsewhere(tmp_path: Path) -> None:
    given = settings(tmp_path, n_trials=2, storage=f"sqlite:///{tmp_path / 'study.db'}")
    search.search(["device=cpu", RATE], Runs(), **given)
    more = Runs()
    search.search(["device=cuda", "data_dir=elsewhere", RATE], more, **given | {"n_trials": 3})
    assert len(more.jobs) == 1


def test_a_file_that_is_no_result_of_a_search_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "optuna.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"optuna.json: it is no result of a search .*; give another"):
        search.search([RATE], Runs(), **settings(tmp_path))
    assert (tmp_path / "optuna.json").read_text() == "[1]"


def test_several_trials_at_once_and_some_that_fail(tmp_path: Path) -> None:
    runs = Runs(fails=[0, 3])
    search.search([RATE], runs, **settings(tmp_path, n_trials=7, n_jobs=3))
    assert runs.batches == [3, 3, 1]
    states = [trial["state"] for trial in json.loads((tmp_path / "optuna.json").read_text())["trials"]]
    assert [n for n, state in enumerate(states) if state == "fail"] == [0, 3]


def test_a_signal_ends_a_search_and_counts_for_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    class Stopped(Runs):
        def __call__(self, jobs: Sequence[Sequence[str]], number: int) -> list[Any]:
            if number == 3:
                monkeypatch.setattr(preemption, "_received", ["SIGTERM"])
            return super().__call__(jobs, number)

    runs, storage = Stopped(fails=[0, 4, 5]), f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(PreemptedError, match=r"^SIGTERM came when 3 trials were done; the same command goes on$"):
        search.search([RATE], runs, **settings(tmp_path, n_trials=12, n_jobs=3, storage=storage))
    assert runs.batches == [3, 3] and not (tmp_path / "optuna.json").exists()
    trials = optuna.load_study(study_name="pai_bench", storage=storage).trials
    states = ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    assert [trial.state.name for trial in trials] == states
    monkeypatch.setattr(preemption, "_received", [])
    rest, more = Runs(), Runs()  # the two that were stopped are done first, and once
    search.search([RATE], rest, **settings(tmp_path, n_trials=6, storage=storage))
    search.search([RATE], more, **settings(tmp_path, n_trials=7, storage=storage))
    assert rest.jobs[:2] == runs.jobs[4:] and len(rest.jobs) == 3
    assert len(more.jobs) == 1 and more.jobs[0] not in runs.jobs + rest.jobs


def test_a_search_that_cannot_succeed_ends(tmp_path: Path) -> None:
    runs = Runs(fails=range(100))
    with pytest.raises(UserError, match="3 of 3 trials failed"):
        search.search([RATE], runs, **settings(tmp_path))
    assert len(runs.jobs) == 3 and not (tmp_path / "optuna.json").exists()


def test_the_search_space() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space, fixed = search.space_of(
        [RATE, "training.epochs=int(interval(1,9))", "seed=range(3)", "model=a,b", "sparsity=0.5", "x=1,2", "x=7"]
    )
    assert space == {
        "training.lr": FloatDistribution(0.001, 1, log=True),
        "training.epochs": IntDistribution(1, 9),
        "seed": CategoricalDistribution(["0", "1", "2"]),
        "model": CategoricalDistribution(["a", "b"]),
    }
    assert fixed == ["sparsity=0.5", "x=7"]


@pytest.mark.parametrize(
    ("words", "changed", "said"),
    [
        (["sparsity=0.5"], {}, "there is nothing to search; give a setting several values"),
        (["training.lr=interval(1,0.1)"], {}, "give interval"),
        ([RATE], {"n_trials": 0}, "hydra.sweeper.n_trials=0: give a whole number of at least 1"),
        ([RATE], {"direction": "up"}, "hydra.sweeper.direction=up: give maximize or minimize"),
        ([RATE], {"sampler": "grid"}, "hydra.sweeper.sampler=grid: give tpe or random"),
        ([RATE], {"storage": "nosuch://x"}, "hydra.sweeper.storage=nosuch://x: it cannot be used"),
        ([RATE], {"paired": []}, "hydra.sweeper.paired: a search has no such setting; an experiment is a grid"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    words: list[str], changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        search.search(words, Runs(), **settings(tmp_path, **changed))


def test_four_trials_on_digits_print_a_line_each_and_the_best_setting_at_the_end(
    run_cli: RunCli, tmp_path: Path
) -> None:
    done = run_cli("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", *TINY, *PRUNED, RATE)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *lines, nothing, counts, conclusion = done.stdout.splitlines()
    assert (head, nothing, counts) == ("4 runs", "", "4 done, 0 skipped, 0 failed")
    assert [line[:11] for line in lines] == [f"run {n} of 4 " for n in range(1, 5)]
    rows = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/result.json")]
    best = max(row["validation_top1"] for row in rows)
    found = json.loads((tmp_path / "results" / "optuna.json").read_text())
    assert len(rows) == 4 and found["best_value"] == best
    shown = [re.search(r"   (\d+\.\d\d) % validation accuracy   ", line) for line in lines]
    assert sorted(match[1] for match in shown if match) == sorted(f"{100 * row['validation_top1']:.2f}" for row in rows)
    (setting,) = (f"{key}={value}" for key, value in found["best_params"].items())
    assert conclusion.startswith(f"best validation accuracy: {100 * best:.2f} % with {setting}; all trials are in ")
    (of_best,) = [trial for trial in found["trials"] if trial["params"] == found["best_params"]]
    assert of_best["value"] == best


def test_the_basic_sweeper_of_hydra_tries_everything(run_cli: RunCli, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    words = ["-m", "hydra/sweeper=basic", *TINY, *PRUNED[:2], "training.lr=0.1,0.05"]
    done = run_cli(*words, env={"TMPDIR": str(scratch)})
    assert done.returncode == 0 and "2 done, 0 skipped, 0 failed" in done.stdout, done.stdout + done.stderr
    assert not list(scratch.iterdir())


def test_a_launcher_that_does_not_wait_is_refused() -> None:
    sweeper = OptunaSweeper()
    sweeper.launcher = SimpleNamespace(composes_all=True)
    with pytest.raises(ConfigError, match="it waits for the result of every run, and hydra/launcher=slurm does not"):
        sweeper.sweep([RATE])


def test_the_runs_of_a_search_cannot_be_listed() -> None:
    for sweeper, words in (("optuna", []), ("basic", ["seed=0,1"])):
        command = [f"hydra/sweeper={sweeper}", *TINY, *PRUNED, *words]
        if sweeper == "basic":
            assert len(compose.expand(command)[0]) == 2
        else:
            with pytest.raises(ConfigError, match="optuna: its runs are not known before it has searched"):
                compose.expand(command)
