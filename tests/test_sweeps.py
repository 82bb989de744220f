"""Which runs a sweep consists of, from the command line and from a file."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import CONF, ROOT, RunCli
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from processes import run_script
from whole_runs import TINY

from pai_bench.commands import status as status_command
from pai_bench.config import composition
from pai_bench.errors import ConfigError
from pai_bench.launch import compose, sweeps


def test_settings_are_combined_each_with_each() -> None:
    found = sweeps.jobs({"a": ["1", "2"], "b": ["x", "y"]})
    assert [tuple(job.values()) for job in found] == [("1", "x"), ("1", "y"), ("2", "x"), ("2", "y")]


def test_paired_settings_go_together() -> None:
    paired = [{"model": ["vgg16", "resnet18"], "training": ["cifar", "tiny"]}, {"lr": [0.1, 0.2], "bs": [64, None]}]
    found = sweeps.jobs({"seed": ["0", "1"]}, paired)
    assert len(found) == 2 * 2 * 2
    assert {(job["model"], job["training"]) for job in found} == {("vgg16", "cifar"), ("resnet18", "tiny")}
    assert {(job["lr"], job["bs"]) for job in found} == {("0.1", "64"), ("0.2", "null")}


def test_a_paired_setting_on_the_command_line_chooses_its_pairs() -> None:
    paired = [{"model": ["vgg16", "resnet18"], "sparsity": [0.9, 0.5]}]
    assert sweeps.jobs({"model": ["resnet18"]}, paired) == [{"model": "resnet18", "sparsity": "0.5"}]
    assert sweeps.jobs({"sparsity": ["0.90"]}, paired) == [{"model": "vgg16", "sparsity": "0.9"}]
    with pytest.raises(ConfigError, match="model=mobilenet: none of the pairs"):
        sweeps.jobs({"model": ["mobilenet"]}, paired)


@pytest.mark.parametrize(
    "paired", [{"pruner": ["snip", "grasp"], "x": [1, 2]}, [{"pruner": "snip"}, {"pruner": "grasp"}]]
)
def test_a_value_that_no_pair_has_is_refused_beside_others_that_have_one(paired: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^pruner=typo,nosuch: none of the pairs of .* has it; there are snip, grasp$"
    ):
        sweeps.jobs({"pruner": ["snip", "typo", "nosuch"]}, [paired])
    found = sweeps.jobs({"pruner": ["grasp", "snip"], "seed": ["0"]}, [paired])
    assert [job["pruner"] for job in found] == ["snip", "grasp"]


@pytest.mark.parametrize(
    ("values", "num"),
    [
        (["0.9", "0.90", "9.0e-1"], 1), (["1", "1.0"], 1), (["1", "true"], 2), (["0.001", "1e-3"], 1),
        (["[1, 2]", "[1,2]"], 1), (["9007199254740992", "9007199254740993"], 2), (["null", ""], 2), (["7", "'7'"], 2),
        (["a: b: c", "@x", "%s"], 3),
    ],
)  # fmt: skip
def test_values_that_mean_the_same_are_one_run(values: list[str], num: int) -> None:
    assert sweeps.jobs({"x": values}) == [{"x": value} for value in (values[:1] if num == 1 else values)]


def test_rules_tell_values_as_the_command_line_does() -> None:
    assert sweeps.jobs({"seed": ["0", "1"]}, exclude=[{"seed": True}]) == [{"seed": "0"}, {"seed": "1"}]
    assert sweeps.jobs({"lr": ["0.00001", "0.1"]}, exclude=[{"lr": 1e-05}]) == [{"lr": "0.1"}]
    odd = ["a: b: c", "@x", "%s", "${"]
    assert sweeps.jobs({"x": odd}, exclude=[{"x": ["@x", "b"]}]) == [{"x": x} for x in odd if x != "@x"]


def test_pairs_in_rows_need_not_name_the_same_settings() -> None:
    paired = [[{"pruner": "snip"}, {"pruner": "magnitude", "schedule": "rewind", "schedule.levels": 3}]]
    rewound = {"pruner": "magnitude", "schedule": "rewind", "schedule.levels": "3"}
    assert sweeps.jobs({}, paired) == [{"pruner": "snip"}, rewound]
    assert sweeps.jobs({"schedule": ["rewind"]}, paired) == [rewound]
    assert sweeps.jobs({"seed": ["0"]}, paired, [{"schedule": "rewind"}]) == [{"pruner": "snip", "seed": "0"}]
    with pytest.raises(ConfigError, match=r"schedule\.levels=4: none of the pairs"):
        sweeps.jobs({"schedule.levels": ["4"]}, paired)


SCALE = sweeps.Scale(
    replace={"model": "small", "training": "short"},
    keep={"model": ["tiny"]},
    at_most={"seed": 0, "schedule.levels": 2},
    points={"sparsity": [0.5, 0.9]},
)


def test_a_scale_makes_the_runs_of_an_experiment_smaller() -> None:
    swept = {"model": ["large", "tiny"], "training.lr": ["0.1"], "model.depth": ["9"], "seed": ["0", "1"]}
    assert sweeps.scaled(sweeps.jobs(swept), SCALE, ()) == [
        {"model": "small", "training": "short", "seed": "0"},
        {"training": "short", "model": "tiny", "model.depth": "9", "seed": "0"},
    ]
    swept = {"sparsity": ["0.2", "0.4", "0.6"], "schedule.levels": ["1", "5"]}
    found = [(job["sparsity"], job["schedule.levels"]) for job in sweeps.scaled(sweeps.jobs(swept), SCALE, ())]
    assert found == [("0.5", "1"), ("0.5", "2"), ("0.9", "1"), ("0.9", "2")]


def test_what_the_command_line_says_is_not_scaled() -> None:
    swept = {"model": ["large"], "model.depth": ["9"], "seed": ["7"], "sparsity": ["0.3"], "training.lr": ["0.2"]}
    found = sweeps.scaled(sweeps.jobs(swept), SCALE, {"model", "seed", "sparsity", "training.lr"})
    assert found == [
        {
            "training": "short",
            "model": "large",
            "model.depth": "9",
            "seed": "7",
            "sparsity": "0.3",
            "training.lr": "0.2",
        }
    ]


@pytest.mark.parametrize("words", [["sparsity=0.9", "pruner=snip"], ["-m", "sparsity=0.5,0.9", "pruner=snip"]])
def test_a_scale_without_an_experiment_is_refused(words: list[str], run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(*words, "scale=smoke")
    assert done.returncode == 2 and "scale=smoke: it makes an experiment smaller; add experiment=NAME" in done.stderr
    assert not (tmp_path / "results").exists()
    with pytest.raises(ConfigError, match=r"hydra.sweeper.scale.half: there is no such rule"):
        compose.expand(["experiment=digits_baselines", "scale=smoke", "+hydra.sweeper.scale.half=1"])
    for call in (compose.compose, compose.expand):
        with pytest.raises(ConfigError, match="scale=smoke"):
            call(["sparsity=0.9", "pruner=snip", "scale=smoke"])


def test_exclusions_leave_combinations_out() -> None:
    swept = {"pruner": ["snip", "grasp"], "sparsity": ["0.5", "0.90", "0.99"]}
    found = sweeps.jobs(swept, (), [{"pruner": "grasp", "sparsity": [0.9, 0.99]}])
    assert [(job["pruner"], job["sparsity"]) for job in found] == [
        ("snip", "0.5"),
        ("snip", "0.90"),
        ("snip", "0.99"),
        ("grasp", "0.5"),
    ]


def test_a_setting_that_plays_no_part_is_dropped_and_its_runs_are_one() -> None:
    swept = {"pruner": ["dense", "snip", "grasp"], "sparsity": ["0.5", "0.9"], "seed": ["0", "1"]}
    found = sweeps.jobs(swept, drop=[{"where": {"pruner": ["dense", "none"]}, "settings": ["sparsity"]}])
    assert len(found) == (1 + 2 * 2) * 2
    assert [job for job in found if job["pruner"] == "dense"] == [{"pruner": "dense", "seed": s} for s in "01"]
    for wrong, message in (
        ({"pruner": "dense"}, "give `where` and `settings`"),
        ({"where": {"x": 1}, "settings": []}, "x is not"),
        ({"where": {"pruner": "dense"}, "settings": ["sparsity", "sede"]}, "drop: sede is not in the sweep"),
        ({"where": {"pruner": "dense"}, "settings": "sparsty"}, "drop: sparsty is not in the sweep"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweeps.jobs(swept, drop=[wrong])


@pytest.mark.parametrize(
    ("paired", "exclude", "message"),
    [
        ([{"a": [1, 2], "b": [1]}], [], "a has 2, b has 1"),
        ([], [{"c": 1}], "c is not in the sweep"),
    ],
)
def test_what_makes_no_sense_is_refused(paired: list[dict], exclude: list[dict], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweeps.jobs({"x": ["1"]}, paired, exclude)


JOBS = [
    ["pruner=snip", "sparsity=0.5", "seed=1"],
    ["pruner=snip", "sparsity=0.8", "seed=2", "training.lr=0.2"],
    ["pruner=synflow", "training=cifar", "model=vgg16", "schedule.rounds=3", "sparsity=null", "density=0.1"],
    ["pruner=snip", "model.widths=[4,8]", "pruner.scoring_data={per_class: 3, total: null}", "+model.depth=3"],
    ["pruner=snip", "~model.blocks", "seed=3"],
    ["tracker.tags=[a,b]", "pruner=snip", "results_dir='a b'", "data_dir=${results_dir}/data"],
]


def test_a_run_of_a_sweep_is_composed_as_hydra_does() -> None:
    composition.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        base = hydra.compose("config", ["hydra.job.name=x"], return_hydra_config=True)
        theirs = GlobalHydra.instance().config_loader()
        ours = sweeps.SweepLoader(theirs.get_search_path())
        for job in [*JOBS, *JOBS]:
            found, expected = (loader.load_sweep_config(base, job) for loader in (ours, theirs))
            assert OmegaConf.is_struct(found)
            found.hydra.job.override_dirname = expected.hydra.job.override_dirname  # Hydra writes no directories here
            assert found == expected
        for wrong in (
            ["pruner=nosuch"],
            ["nosuch=1"],
            ["training.nosuch=1"],
        ):
            for loader, kind in ((ours, ConfigError), (theirs, HydraException)):
                with pytest.raises(kind):
                    loader.load_sweep_config(base, wrong)


def test_runs_that_differ_in_values_alone_are_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[list[str]] = []
    real = ConfigLoaderImpl.load_configuration

    def load(self: ConfigLoaderImpl, config_name: str, overrides: list[str], *more: Any, **settings: Any) -> DictConfig:
        composed.append(overrides)
        return real(self, config_name, overrides, *more, **settings)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", load)
    cfgs, _ = compose.expand(["pruner=snip,synflow", "sparsity=0.5,0.8", "training.lr=0.1,0.2", "seed=range(5)"])
    assert composed == [[], ["pruner=snip"], ["pruner=synflow"]]
    assert len({cfg.id for cfg in cfgs}) == len(cfgs) == 40


def test_an_experiment_is_a_sweep_that_the_command_line_can_narrow() -> None:
    whole, _ = compose.expand(["experiment=digits_baselines"])
    assert len(whole) == 5 * 4 * 5 + 5
    narrowed, _ = compose.expand(["experiment=digits_baselines", "pruner=snip,dense", "seed=0"])
    assert len(narrowed) == 4 + 1
    assert {cfg.seed for cfg in narrowed} == {0}


@pytest.mark.parametrize("spelled", ["experiment", "+experiment"])
def test_an_experiment_runs_without_m(spelled: str, run_cli: RunCli, tmp_path: Path) -> None:
    chosen = ["pruner=dense,magnitude", "compression=10,100", "seed=0"]
    done = run_cli(f"{spelled}=digits_baselines", *chosen, *TINY)
    assert done.returncode == 0 and "3 done, 0 skipped, 0 failed" in done.stdout, done.stderr
    overrides = ["experiment=digits_baselines", *chosen, *TINY, f"results_dir={tmp_path / 'results'}"]
    said = run_script("scripts/status.py", *overrides, cwd=tmp_path)
    assert (said.returncode, said.stdout) == (0, "3 runs: 3 finished\n")


def test_pairs_and_exclusions_on_the_command_line(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(
        "-m",
        *TINY,
        "pruner=snip,magnitude",
        "hydra.sweeper.paired=[{sparsity:[0.5,0.8],seed:[1,2]}]",
        "hydra.sweeper.exclude=[{pruner:snip,seed:2}]",
    )
    assert done.returncode == 0 and "3 done, 0 skipped, 0 failed" in done.stdout, done.stderr
    names = sorted(path.name.split("resnet20-w4.6-b1.1-")[1][:-9] for path in (tmp_path / "results").glob("[!.]*"))
    assert names == ["magnitude-s0.5-seed1", "magnitude-s0.8-seed2", "snip-s0.5-seed1"]


def test_the_state_of_a_sweep_and_what_is_run_again(run_cli: RunCli, tmp_path: Path) -> None:
    results = tmp_path / "results"
    sweep = [*TINY, "pruner=snip", "sparsity=0.5", "training.lr=0.1,1e30"]
    assert run_cli("-m", *sweep).returncode == 1

    def status(*arguments: str) -> tuple[int, list[str]]:
        done = run_script("scripts/status.py", *arguments, cwd=tmp_path)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    code, said = status(*sweep, "seed=0,1", f"results_dir={results}")
    assert (code, said[0]) == (1, "4 runs: 1 finished, 1 failed, 2 missing")
    assert said[1].startswith("failed") and "training diverged" in said[1]
    code, said = status(str(results))
    assert (code, said[0]) == (1, "2 runs: 1 finished, 1 failed")
    code, said = status(str(results), "pruner=snip", "--retry")
    assert code == 2 and len(said) == 1 and "pruner=snip: it has no effect beside a results folder" in said[0]
    words = ["hydra/launcher=slurm", "+hydra.launcher.account=me"]
    assert status_command.of_folder([results], words).launcher.account == "me"
    code, said = status(str(results), "--retry")
    assert code == 1 and any(line.startswith("error: training diverged") for line in said)
    code, said = status(*sweep, "seed=0,1", f"results_dir={results}", "--retry")
    assert code == 1 and "1 done, 0 skipped, 2 failed" in said
    code, said = status(str(tmp_path / "nowhere"))
    assert code == 4 and len(said) == 1
    code, said = status("sparsity=2")
    assert code == 2 and len(said) == 1


def test_a_preempted_sweep_of_several_processes_ends_every_run_in_order(tmp_path: Path) -> None:
    """The notice goes to the first process alone, as `kill` or `docker stop` sends it."""
    results = tmp_path / "results"
    long = [word for word in TINY if "epochs=2" not in word] + ["training.epochs=200"]
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "run.py"),
            "-m",
            "hydra/launcher=parallel",
            "hydra.launcher.n_jobs=2",
            *long,
            "pruner=snip",
            "sparsity=0.5",
            "seed=range(4)",
            f"results_dir={results}",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and len(list(results.glob("*/checkpoint.pt"))) < 2:
        time.sleep(0.05)
    process.terminate()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "0 done, 0 skipped, 0 failed, 4 preempted" in out
    states = [json.loads(path.read_text())["state"] for path in results.glob("*/status.json")]
    assert states == ["preempted", "preempted"]
    assert not list(results.glob("*/owner.json"))


def test_a_value_that_cannot_be_fails_its_own_run(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("-m", *TINY, "pruner.score={a:1},null", "seed=0")
    assert done.returncode == 2 and "1 done, 0 skipped, 1 failed" in done.stdout, done.stderr
    assert done.stderr == ("config error: pruner.score={a: 1}: it needs a _target_; choose an option of pruner=\n")
    assert len(list((tmp_path / "results").glob("*-dense-*/result.json"))) == 1


# A plugin of Hydra without settings: it asks for two learning rates, and says what each was worth.
SWEEPER = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Better(Sweeper):
    def setup(self, **given):
        self.launcher = Plugins.instance().instantiate_launcher(**given)

    def sweep(self, arguments):
        words = [[*arguments, f"training.lr={rate}"] for rate in (1e-6, 0.1)]
        jobs = [self.launcher.launch([job], initial_job_idx=0)[0] for job in words]
        print("WORTH", [job.return_value for job in jobs])

ConfigStore.instance().store(group="hydra/sweeper", name="better", node={"_target_": "hydra_plugins.better.Better"})
"""


@pytest.mark.parametrize("validation", ["0.2", "0"])
def test_a_sweeper_that_searches_is_given_the_validation_accuracy(
    validation: str, run_cli: RunCli, tmp_path: Path
) -> None:
    plugin = tmp_path / "plugins" / "hydra_plugins" / "better"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(SWEEPER)
    command = ["-m", "hydra/sweeper=better", *TINY, f"dataset.validation={validation}"]
    done = run_cli(*command, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'plugins'}"})
    rows = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/result.json")]
    if validation == "0":
        line = "hydra/sweeper=better: it searches by the validation accuracy, and dataset.validation is 0"
        assert done.returncode == 2 and not rows and done.stderr.count(line) == 2
        return
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("WORTH")]
    worth = sorted(json.loads(said.removeprefix("WORTH ")))
    assert len(rows) == 2 and worth == sorted(row["validation_top1"] for row in rows)
    assert worth != sorted(row["test_top1"] for row in rows)
