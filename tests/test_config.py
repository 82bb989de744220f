"""Configs: everything composes, everything wrong is refused in one line, and a run keeps its name."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF, ROOT, RunCli, composed, options
from hydra.errors import HydraException
from processes import HEAVY, imported
from whole_runs import TINY

from pai_bench.config import signatures
from pai_bench.config.schema import plain
from pai_bench.errors import ConfigError
from pai_bench.launch import compose

GROUPS = [
    "model", "dataset", "pruner", "schedule", "allocation", "search", "ablation", "rewire", "transfer", "training",
    "tracker", "diagnostics",
]  # fmt: skip
MANDATORY = {
    "timm": ["model.name=resnet18"],
    "image_folder": ["dataset.root=somewhere"],
    "densities_of_mask": ["allocation.mask=some.safetensors"],
    "densities_of_file": ["allocation.file=some.csv"],
    "fine_tune": ["training=cifar"],
    "imagenet_16": ["dataset=imagenet"],
    "signs": ["transfer.weights=null"],
    "magnitudes": ["transfer.weights=null"],
}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options(group)])
def test_every_option_composes_under_its_own_name(
    group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ["sparsity=0.5"]
    if group in ("schedule", "ablation", "rewire", "transfer") and option != "none":
        pruners = {("rewire", "gradual"): "dense", ("rewire", "acdc"): "dense", ("schedule", "early_bird"): "magnitude"}
        others.append(f"pruner={pruners.get((group, option), 'snip')}")
    monkeypatch.chdir(tmp_path)
    for name in ("some.safetensors", "some.csv"):
        (tmp_path / name).touch()
    cfg = composed(*others, *MANDATORY.get(option, []), f"{group}={option}")
    expected = {"timm": "resnet18", "image_folder": "somewhere"}.get(option, option)
    if group in ("search", "transfer") and option == "none":
        assert getattr(cfg, group) is None
        return
    assert getattr(cfg, group).name == expected


def test_every_option_says_what_it_is() -> None:
    for path in CONF.glob("*/*.yaml"):
        text = path.read_text()
        derived = text.startswith("defaults:")  # a variant of the option that it starts from
        trivial = path.parent.name in ("schedule", "allocation", "ablation")  # the function's docstring says it
        assert derived or trivial or text.startswith("# "), path


def test_a_pruner_brings_its_schedule_and_the_command_line_overrides_it() -> None:
    assert composed("pruner=synflow", "sparsity=0.5").schedule.name == "exponential"
    assert composed("pruner=synflow", "sparsity=0.5").schedule.settings["rounds"] == 100
    assert composed("pruner=synflow", "sparsity=0.5", "schedule=one_shot").schedule.name == "one_shot"


def test_pruners_carry_the_settings_of_their_papers() -> None:
    synflow, snip, grasp = (composed(f"pruner={name}", "sparsity=0.5").pruner for name in ("synflow", "snip", "grasp"))
    assert (synflow.mode, synflow.dtype, synflow.scoring_data) == ("eval", "float64", None)
    assert (snip.mode, snip.scoring_data.total) == ("eval", 100)
    assert (grasp.mode, grasp.scoring_data.per_class, grasp.score.settings["temperature"]) == ("train", 10, 200.0)
    assert not snip.scoring_data.augment and not grasp.scoring_data.augment


# The three ways to say how much ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sparsity"),
    [
        ("sparsity=0.98", 0.98),
        ("density=0.02", 0.98),
        ("compression=50", 0.98),
        ("compression=3", 2 / 3),
        ("compression=1e12", 0.999999999999),
        ("density=1", 0.0),
        ("density=0.8**3", 0.488),
        ("density=.5**2", 0.75),
    ],
)
def test_sparsity_density_and_compression_are_one_thing(override: str, sparsity: float) -> None:
    cfg = composed("pruner=magnitude", override)
    assert cfg.sparsity == round(sparsity, 12)
    assert cfg.id == composed("pruner=magnitude", f"sparsity={cfg.sparsity}").id


def test_dense_is_one_run_at_every_sparsity() -> None:
    assert {composed("pruner=dense", s).id for s in ("sparsity=0.9", "sparsity=0.5", "seed=0")} == {composed().id}


@pytest.mark.parametrize("override", ["allocation=uniform", "pruner.mode=train"])
def test_what_a_dense_run_does_not_use_is_no_part_of_its_name(override: str) -> None:
    assert composed("pruner=dense", override).id == composed("pruner=dense").id


@pytest.mark.parametrize("option", options("training/optimizer"))
def test_every_optimizer_composes_and_takes_the_place_of_the_one_before(option: str) -> None:
    path = CONF / "training" / "optimizer" / f"{option}.yaml"
    assert path.read_text().startswith("# ")
    one, other = (composed(f"training={name}", f"training/optimizer={option}") for name in ("cifar", "cifar_grasp"))
    assert one.training.optimizer == other.training.optimizer
    assert one.training.optimizer.target.endswith(f".{option.partition('_')[0]}")


def test_an_optimizer_can_be_chosen_with_a_dot() -> None:
    words = ["training.optimizer=adamw", "training.optimizer=sgd,adamw", "training.optimizer.beta2=0.98", "seed=1"]
    assert [compose.as_group(word) for word in words] == [
        "training/optimizer=adamw",
        "training/optimizer=sgd,adamw",
        "training.optimizer.beta2=0.98",
        "seed=1",
    ]
    assert compose.as_group("+experiment=prospr") == "experiment=prospr"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["training=cifar", "training/optimizer=sgd"], ["training=cifar", "training.optimizer.nesterov=false"]),
        (
            ["training=cifar_lottery"],
            ["training=cifar", "training.optimizer.nesterov=false", "training.lr_milestones=[80,120]"],
        ),
        (["training=digits"], ["training=digits", "training.lr_milestones=[5]", "training.lr_gamma=0.5"]),
        (["dataset.mean=[0]"], ["dataset.mean=[0.0]"]),
    ],
    ids=["an optimizer spelt out", "a recipe spelt out", "drops under cosine", "integers in a list"],
)
def test_settings_that_mean_the_same_have_one_name(one: list[str], other: list[str]) -> None:
    assert composed(*one).id == composed(*other).id


SWEEP = ["pruner=snip,synflow", "sparsity=0.9,0.98"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--hydra-help"],
        ["--cfg", "job"],
        ["--cfg", "job", "--resolve", "pruner=snip", "sparsity=0.9"],
        ["--info", "defaults"],
        ["pruner=nosuch"],
        ["nosuch=1"],
        ["pruner=snip", "sparsity=1.5"],
        ["pruner=snip", "sparsity=x"],
        ["pruner=snip"],
        ["-m", "pruner=snip,nosuch", "sparsity=0.5"],
        ["-m", "pruner=snip", "sparsity=1.5,2"],
        ["-m", *SWEEP, "hydra/launcher=slurm", "hydra.launcher.export=jobs"],
    ],
    ids=" ".join,
)
def test_what_runs_nothing_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    assert imported("run.py", arguments, HEAVY, tmp_path) == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], SWEEP, ["experiment=digits_baselines"], ["pruner=nosuch"]], ids=" ".join
)
def test_the_state_of_a_sweep_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    assert imported("scripts/status.py", arguments, HEAVY, tmp_path) == set()


@pytest.mark.parametrize("pruner", ["dense", "snip", "synflow"])
def test_a_run_imports_what_it_uses(pruner: str, tmp_path: Path) -> None:
    unused = {"torchvision", "timm", "wandb", "matplotlib", "sklearn", "pandas", "torch_pruning", "torch._dynamo"}
    arguments = [*TINY, f"pruner={pruner}", *([] if pruner == "dense" else ["sparsity=0.9"]), f"results_dir={tmp_path}"]
    assert imported("run.py", arguments, unused | {"torch"}, tmp_path) == {"torch"}
    assert len(list(tmp_path.glob("*/result.json"))) == 1
    assert imported("run.py", arguments, HEAVY, tmp_path) == set()  # it is finished


def test_the_package_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pai_bench", "pruner=snip", "sparsity=2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "config error: sparsity=2: give a fraction in [0, 1)\n")


def test_help_lists_the_groups_and_two_examples(run_cli: RunCli) -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    for group in GROUPS:
        assert re.search(rf"^{group}: .*{options(group)[0]}", done.stdout, re.M)
    assert done.stdout.count("pai-bench ") == 3


def test_no_setting_holds_a_secret() -> None:
    def keys(node: Any) -> list[str]:
        return [key for k, v in node.items() for key in (k, *(keys(v) if isinstance(v, dict) else []))]

    assert not [key for key in keys(plain(composed())) if re.search("key|token|password|secret", key)]


def test_unresolvable_configs_raise_what_the_command_line_reports() -> None:
    with pytest.raises((ConfigError, HydraException)):
        composed("pruner=snip", "sparsity=abc")


def test_a_function_may_lie_in_folders_without_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    code = "def linear(sparsity, length, *, rounds: int):\n    raise AssertionError\n"
    (tmp_path / "mine" / "deeper" / "schedules.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    assert list(signatures.settings_of("mine.deeper.schedules.linear")) == ["rounds"]
    assert not {"mine", "mine.deeper"} & (set(sys.modules) - before)
    for target in ("mine.nosuch.linear", "mine.deeper.nosuch.linear", "mine.deeper.linear"):
        with pytest.raises(ConfigError, match="there is no module"):
            signatures.settings_of(target)
