"""Tickets of a chain share their trainings: each has the result of a run that is alone, for one training a level."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli, composed
from omegaconf import OmegaConf
from safetensors.torch import load_file
from whole_runs import TINY

from pai_bench import experiment
from pai_bench.errors import PreemptedError
from pai_bench.launch import chains, slurm
from pai_bench.runs import status
from pai_bench.runs.summary import closing
from pai_bench.system import preemption

NET = ["model=lenet300", "model.hidden=[20,10]"]  # a step of it takes a fraction of a millisecond
RECIPE = [word for word in TINY if not word.startswith(("save_scores", "model."))]
CHAINS = {
    "to the start": ["schedule=rewind", "schedule.rewind_epoch=0"],
    "to a step": ["schedule=rewind", "schedule.rewind_epoch=null", "schedule.rewind_step=3"],
    "rates alone": ["schedule=lr_rewind"],
    "fine-tuned": [
        "schedule=fine_tune",
        "schedule.epochs=1",
        "training.lr_schedule=step",
        "training.lr_milestones=[1]",
    ],
    "compact": ["schedule=rewind", "schedule.rewind_epoch=0", "training.compact=auto", *TINY[:2], "model=resnet20"],
    "a fraction": ["schedule=rewind", "schedule.levels=null", "schedule.keep_per_level=0.5"],
    "adamw": ["schedule=rewind", "schedule.rewind_epoch=0", "training/optimizer=adamw", "training.lr=0.001"],
}


@pytest.fixture(autouse=True)
def however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings are kept and idle channels are looked for in these short runs, too."""
    monkeypatch.setattr("pai_bench.system.cache._SECONDS", 0.0)
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})


def ticket(results: Path, way: list[str], level: int, *more: str) -> dict[str, Any]:
    words = [*NET, *RECIPE] if "model=resnet20" not in way else RECIPE
    levels = [] if "schedule.levels=null" in way else [f"schedule.levels={level}"]
    words = [*words, "pruner=magnitude", *way, *levels, f"density={0.5**level}", *more]
    return experiment.run(composed(*words, f"results_dir={results}"))


def left(results: Path, row: dict[str, Any]) -> dict[str, Any]:
    """All that a run leaves, but for times and for what it took over."""
    directory = results / str(row["id"])
    timed = ("seconds", "images_per_second", "peak_memory", "speedup", "reused_examples", "cache_hit")
    lines = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
    return {
        "row": {key: value for key, value in row.items() if not any(part in key for part in timed)},
        "curve": [{key: value for key, value in line.items() if "per_second" not in key} for line in lines],
        "mask report": json.loads((directory / "mask.json").read_text()),
        "files": sorted(path.name for path in directory.iterdir()),
    }


def assert_as_alone(results: Path, alone: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert left(results, row) == left(alone, expected)
    for name in ("mask", "model"):
        found, wanted = (load_file(folder / str(row["id"]) / f"{name}.safetensors") for folder in (results, alone))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()), name


def trained(row: dict[str, Any]) -> int:
    """Images that a run has trained on itself."""
    return int(row["search_train_examples"] + row["train_examples"] - row["reused_examples"])


@pytest.mark.parametrize("way", CHAINS)
def test_a_chain_of_levels_costs_a_training_each_and_one_more(way: str, tmp_path: Path) -> None:
    check_chain(CHAINS[way], (1, 2), tmp_path)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)], ids=["rising", "deepest first"])
def test_the_order_of_a_chain_does_not_matter(order: tuple[int, ...], tmp_path: Path) -> None:
    check_chain(CHAINS["to the start"], order, tmp_path)


def check_chain(way: list[str], order: tuple[int, ...], folder: Path) -> None:
    chain, alone = folder / "chain", folder / "alone"
    rows = {level: ticket(chain, way, level) for level in order}
    expected = {level: ticket(alone, way, level, "cache_gb=0") for level in order}
    assert not (alone / ".cache").exists()
    for level in order:
        assert_as_alone(chain, alone, rows[level], expected[level])
        assert expected[level]["reused_examples"] == 0 and expected[level]["cache_hit"] is None
    # Alone, three levels would take 2 + 3 + 4 trainings. Together they take those of the deepest ticket.
    assert sum(map(trained, rows.values())) == trained(expected[max(order)]) < sum(map(trained, expected.values()))
    assert [rows[level]["cache_hit"] for level in order] == [None, *["training"] * (len(order) - 1)]


def test_the_summary_says_what_was_taken_over(tmp_path: Path) -> None:
    alone, deeper = (ticket(tmp_path, CHAINS["to the start"], level) for level in (1, 2))
    layers = [{"name": "fc", "kept": 1, "size": 2, "density": 0.5}]
    assert deeper["reused_examples"] == 5752 and alone["reused_examples"] == 0
    assert deeper["train_seconds"] > alone["train_seconds"], "the time of what was taken over counts"
    assert "of an earlier run" not in closing(alone, layers, tmp_path)
    assert "5.75 k images of all training were those of an earlier run" in closing(deeper, layers, tmp_path)


def test_controls_share_the_search_and_train_for_themselves(tmp_path: Path) -> None:
    chain, alone, way = tmp_path / "chain", tmp_path / "alone", CHAINS["to the start"]
    ticket(chain, way, 2)
    for ablation in ("reinit", "shuffle_mask"):
        row = ticket(chain, way, 2, f"ablation={ablation}")
        expected = ticket(alone, way, 2, f"ablation={ablation}", "cache_gb=0")
        assert_as_alone(chain, alone, row, expected)
        assert trained(row) == row["train_examples"] == row["search_train_examples"] / 2


def test_nothing_is_shared_between_other_settings(tmp_path: Path) -> None:
    way = CHAINS["to the start"]
    ticket(tmp_path, way, 1)
    for other in ("seed=1", "training.lr=0.05", "schedule.rewind_epoch=1", "model.init.norm=uniform"):
        assert ticket(tmp_path, way, 2, other)["reused_examples"] == 0, other


def test_no_other_schedule_fills_the_cache(tmp_path: Path) -> None:
    for words in (["pruner=dense"], ["pruner=snip", "sparsity=0.5"], ["pruner=magnitude", "schedule=gradual",
                  "schedule.end_epoch=1", "schedule.every_steps=2", "sparsity=0.5"]):  # fmt: skip
        experiment.run(composed(*NET, *RECIPE, *words, f"results_dir={tmp_path}"))
    assert not list(tmp_path.glob(".cache/training*"))


@pytest.mark.parametrize("stop", [2, 16, 30])
def test_a_chain_that_is_killed_goes_on(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it could be taken up: after trainings that it has taken over, and within its own."""
    chain, alone, way = tmp_path / "chain", tmp_path / "alone", CHAINS["to the start"]
    ticket(chain, way, 1)
    offers = itertools.count(1)
    with monkeypatch.context() as patched:
        patched.setattr(preemption, "requested", lambda: "SIGTERM" if next(offers) >= stop else None)
        with pytest.raises(PreemptedError):
            ticket(chain, way, 3)
    assert not list(chain.glob("*-s0.875-*/result.json"))
    row = ticket(chain, way, 3)
    assert_as_alone(chain, alone, row, ticket(alone, way, 3, "cache_gb=0"))
    assert trained(row) == 2 * row["train_examples"]
    again = ticket(chain, way, 2)
    assert trained(again) == 0
    assert_as_alone(chain, alone, again, ticket(alone, way, 2, "cache_gb=0"))


def test_a_damaged_training_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain, alone, way = tmp_path / "chain", tmp_path / "alone", CHAINS["to the start"]
    ticket(chain, way, 1)
    for path in (chain / ".cache").glob("training*"):
        path.write_bytes(path.read_bytes()[:1000])
    row = ticket(chain, way, 2)
    assert "cannot be read and is computed again" in caplog.text and row["cache_hit"] is None
    assert_as_alone(chain, alone, row, ticket(alone, way, 2, "cache_gb=0"))


def test_runs_of_a_chain_differ_in_depth_and_in_what_is_broken_at_the_end() -> None:
    def chain(*more: str) -> str:
        words = ["pruner=magnitude", "schedule=rewind", "schedule.levels=3", "density=0.5", *more]
        return composed(*words).chain

    for same in ("schedule.levels=5", "density=0.1", "ablation=reinit", "ablation=shuffle_mask", "results_dir=x"):
        assert chain(same) == chain(), same
    for other in ("seed=1", "training.lr=0.2", "schedule.rewind_epoch=1", "pruner=snip", "ablation=invert_scores"):
        assert chain(other) != chain(), other


def test_a_task_of_an_array_has_the_runs_of_a_chain() -> None:
    ways = ["pruner=magnitude", "schedule=rewind"]
    deep, flat = ([f"density={d}", f"schedule.levels={n}"] for d, n in ((0.25, 2), (0.5, 1)))
    cfgs = [composed(*ways, *depth, f"seed={seed}") for depth in (deep, flat) for seed in (0, 1)]
    cfgs += [composed("pruner=snip", "sparsity=0.5"), composed("pruner=snip", "sparsity=0.9")]
    tasks = chains.grouped(cfgs)
    assert [[(cfg.seed, cfg.sparsity) for cfg in task] for task in tasks] == [
        [(0, 0.5), (0, 0.75)], [(1, 0.5), (1, 0.75)], [(0, 0.5)], [(0, 0.9)]
    ]  # fmt: skip


def test_what_a_run_will_train_itself_is_known_before(tmp_path: Path) -> None:
    """For the order of runs in a given time, and for what is expected of it."""
    known: set[chains.Training] = set()
    for name in ("to the start", "fine-tuned", "a fraction"):
        way = CHAINS[name]
        control = () if name == "fine-tuned" else ((2, "ablation=reinit"),)  # there it trains longer than it says
        for level, *more in ((1,), (3,), (2,), *control, (3, "seed=1")):
            words = [*more, f"density={0.5**level}"] + ["schedule.levels=null"] * (name == "a fraction")
            words += [f"schedule.levels={level}"] * (name != "a fraction")
            run = composed(*NET, *RECIPE, "pruner=magnitude", *way, *words, f"results_dir={tmp_path}")
            row = experiment.run(run)
            takes = chains.trainings(run)
            expected = sum(epochs for training, epochs in takes.items() if training not in known)
            known |= takes.keys()
            assert trained(row) == expected * 1438, (name, level, more)


@pytest.mark.slow
def test_in_parallel_a_chain_costs_a_training_each_and_one_more(run_cli: RunCli, tmp_path: Path) -> None:
    """Each training is long enough to be kept."""
    words = [*NET, *RECIPE, *CHAINS["a fraction"], "pruner=magnitude", "training.epochs=25", "training.batch_size=4"]
    parallel = ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]
    done = run_cli("-m", *parallel, *words, "schedule.rewind_epoch=0", "density=0.25,0.5")
    assert done.returncode == 0 and "2 done, 0 skipped, 0 failed" in done.stdout, done.stderr
    rows = status.read(tmp_path / "results")
    assert sum(map(trained, rows)) == 3 * rows[0]["train_examples"]


def test_in_parallel_the_jobs_of_a_chain_are_one_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what they return is in the order of the jobs. One of which nothing is known is alone."""
    joblib = pytest.importorskip("hydra_plugins.hydra_joblib_launcher._core")
    from hydra_plugins.pai_bench_plugins import parallel

    jobs = [f"{level} {seed}" for level in (2, 1) for seed in (0, 1)] + ["wrong"]
    runs: list[Any] = [composed("pruner=magnitude", "schedule=rewind", f"schedule.levels={job[0]}",
                                f"density={0.5 ** int(job[0])}", f"seed={job[2]}") for job in jobs[:4]]  # fmt: skip
    known, done = dict(zip(jobs[:4], runs, strict=True)), list[tuple[int, str]]()
    monkeypatch.setattr(joblib, "execute_job", lambda number, job, *_: done.append((number, job)) or f"did {job}")
    monkeypatch.setattr(parallel, "configure_log", lambda *_: None)
    monkeypatch.setattr(parallel.ParallelLauncher, "_composed", lambda _, job: known.get(job))
    launcher = parallel.ParallelLauncher(n_jobs=1)
    config: Any = OmegaConf.create({"device": "cpu", "hydra": {"hydra_logging": {}, "verbose": False,
                                    "sweep": {"dir": str(tmp_path)}}})  # fmt: skip
    launcher.setup(hydra_context=None, task_function=None, config=config)  # type: ignore[arg-type]
    returned: Any = launcher.launch(jobs, 10)
    assert done == [(12, "1 0"), (10, "2 0"), (13, "1 1"), (11, "2 1"), (14, "wrong")]
    assert returned == [f"did {job}" for job in jobs]


def test_a_task_goes_on_after_a_failure_and_ends_with_a_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    cfgs = [composed("pruner=snip", f"sparsity=0.{n}") for n in range(1, 5)]
    done: list[float] = []
    codes = {0.2: 1}

    def attempt(cfg: Any) -> int:
        done.append(cfg.sparsity)
        return codes.get(cfg.sparsity, 0)

    monkeypatch.setattr("pai_bench.launch.attempt.attempt", attempt)
    monkeypatch.setattr("pai_bench.launch.terminal.start_process", lambda: None)
    with pytest.raises(SystemExit) as failed:
        slurm.Job(cfgs)()
    assert (failed.value.code, done) == (1, [0.1, 0.2, 0.3, 0.4])
    done.clear()
    codes[0.3] = PreemptedError.exit_code
    with pytest.raises(SystemExit) as ended:
        slurm.Job(cfgs)()
    assert (ended.value.code, done) == (PreemptedError.exit_code, [0.1, 0.2, 0.3])
