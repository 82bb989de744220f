"""Published figures and tables by name: how many runs each has, what they are, and that docs/reproducing.md says so."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF, ROOT, RunCli, options

from pai_bench.core import ScoringData, TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.launch import compose
from pai_bench.runs import status
from pai_bench.training.rewires import rewire_steps

DOCS = (ROOT / "docs" / "reproducing.md").read_text()
HEADER = re.compile(
    r"# Runs        (?P<runs>\d+): .*?\n# GPU-hours   (?P<hours>[\d.]+).*?\n# Statistic   (?P<statistic>\w+).*?\n"
    r"# Reproduced  (?P<reproduced>.*?)\.?\n",
    re.S,
)


def source(name: str) -> str:
    """The text of an experiment."""
    return (CONF / "experiment" / f"{name}.yaml").read_text()


def header(name: str) -> dict[str, str]:
    """What the comment at the top of an experiment says."""
    found = HEADER.search(source(name))
    assert found, f"{name} has no header"
    return found.groupdict()


GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()}


def is_option(word: str) -> bool:
    return word.partition("=")[0] in GROUPS


def covering(jobs: list[list[str]]) -> list[list[str]]:
    """A few runs, which name every setting and every option but models and datasets, and what goes with those."""
    chosen: dict[tuple[str, ...], list[list[str]]] = {}
    settings_seen: set[str] = set()
    words_seen: set[str] = set()
    for job in jobs:
        names_no_option = [word for word in job if not is_option(word) or word.startswith(("model=", "dataset="))]
        settings = {word.partition("=")[0] if word in names_no_option else word for word in job}
        combination = tuple(word for word in job if is_option(word))
        if not settings <= settings_seen:
            settings_seen |= settings
            chosen.setdefault(combination, [])
        if combination in chosen and not words_seen.issuperset(job):
            words_seen.update(job)
            chosen[combination].append(job)
    return [job for some in chosen.values() for job in some]


def planned(name: str, *narrowed: str) -> list[dict[str, str]]:
    """The settings of every run of an experiment, uncomposed."""
    jobs: list[list[str]] = []
    compose.expand([f"experiment={name}", *narrowed], lambda found: jobs.extend(found) or [])
    return [dict(word.split("=", 1) for word in job) for job in jobs]


def runs(name: str, *narrowed: str) -> list[dict[str, Any]]:
    return compose.expand([f"experiment={name}", *narrowed])[0]


# Published numbers are of networks by their names, so no experiment changes the size of a model.
MODELS = {
    name for path in (CONF / "model").glob("*.yaml") for name in re.findall(r"(?m)^name: (.+)$", path.read_text())
}


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_composes_at_both_scales(name: str) -> None:
    full: list[list[str]] = []
    cfgs, _ = compose.expand([f"experiment={name}"], lambda jobs: full.extend(jobs) or covering(jobs))
    said = header(name)
    assert len(full) == int(said["runs"])
    assert len({cfg.id for cfg in cfgs}) == len(cfgs)
    assert {cfg.model.name for cfg in cfgs} <= MODELS
    for word in {word for job in full for word in job}:
        group, _, option = word.partition("=")
        assert not is_option(word) or (CONF / group / f"{option}.yaml").is_file(), word
    assert said["statistic"] in ("test_top1", "best_test_top1", "test_top1_at_best_validation")
    held_out = {cfg.dataset.settings["validation"] > 0 for cfg in cfgs}
    assert said["statistic"] != "test_top1_at_best_validation" or held_out == {True}

    smoke, kept = planned(name, "scale=smoke"), [dict(word.split("=", 1) for word in job) for job in full]
    assert len(smoke) <= 40
    for job in smoke:
        assert (job["training"], job["seed"]) == ("smoke", "0")
        planted = ("planted_circle", "planted_relu", "planted_helix")
        small = ("planted",) if job["dataset"] in planted else ("resnet8_thin", "lenet300", "lenet5", "lenet5_caffe")
        assert job["dataset"] in ("digits", *planted) and job["model"] in small
        if job.get("schedule.levels", "null") == "null":
            assert float(job.get("schedule.keep_per_level", 0)) <= 0.3
        else:
            assert int(job["schedule.levels"]) <= 2
    for group in ("pruner", "schedule", "allocation", "ablation", "pruner.score.temperature"):
        assert {job.get(group) for job in smoke} == {job.get(group) for job in kept}, group


@pytest.mark.parametrize("name", [name for name in options("experiment") if "rewire: " in source(name)])
def test_a_mask_moves_on_its_way_at_smoke_scale_too(name: str) -> None:
    every = runs(name, "scale=smoke")
    moving = [cfg for cfg in every if cfg.rewires]
    assert moving
    for cfg in moving:
        steps = rewire_steps(cfg.rewire, TrainingLength(cfg.training.epochs, 23))  # of digits
        assert 3 <= len(steps) <= 23, cfg.rewire.name
    assert all(cfg.search is None or cfg.search.epochs <= 2 for cfg in every)


def test_an_experiment_runs_at_smoke_scale(run_cli: RunCli, tmp_path: Path) -> None:
    words = ["+experiment=sketching", "scale=smoke", "tracker=none", "training.epochs=1", "pruner=dense,magnitude"]
    done = run_cli(*words, "compression=5")
    assert done.returncode == 0 and "4 done, 0 skipped, 0 failed" in done.stdout, done.stderr
    rows = status.read(tmp_path / "results")
    assert {(row["dataset"], row["model"], row["epochs"]) for row in rows} == {("digits", "resnet8_thin", 1)}
    assert sorted(round(row["sparsity"], 2) for row in rows) == [0.0, 0.8, 0.8, 0.8]
    published = {cfg.task for cfg in runs("sketching", "pruner=magnitude", "compression=5")}
    assert not published & {row["task"] for row in rows}


def test_a_run_of_an_exported_experiment_is_run_once(run_cli: RunCli, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    slurm = ["hydra/launcher=slurm_cpu", "hydra.launcher.timeout_min=5", f"hydra.launcher.export={sweep}"]
    words = ["experiment=lottery_lenet", "scale=smoke", "tracker=none", "training.epochs=1"]
    assert run_cli(*words, *slurm).returncode == 0
    assert len(list((sweep / "args").iterdir())) == 5
    (dense,) = (path for path in (sweep / "args").iterdir() if "pruner=dense\n" in path.read_text())
    done = run_cli(*dense.read_text().splitlines())
    assert done.returncode == 0, done.stderr
    (row,) = status.read(tmp_path / "results")
    assert (row["pruner"], row["dataset"]) == ("dense", "digits")


def test_scores_of_figure_6_see_what_those_of_the_paper_saw() -> None:
    cfgs = runs("synflow_fig6", "compression=100", "seed=0", "dataset=cifar100,tiny_imagenet", "model=resnet18")
    of = {(cfg.dataset.name, cfg.pruner.name): cfg for cfg in cfgs}
    assert len(of) == len(cfgs) == 12
    for method in ("snip", "grasp"):
        pruner = of["cifar100", method].pruner
        seen = ScoringData(per_class=10, total=None, balanced=False, batch_size=256, augment=True)
        assert (pruner.mode, pruner.scoring_data) == ("eval", seen)
    assert of["cifar100", "grasp"].pruner.score.settings["temperature"] == 200
    assert of["cifar100", "snip"].schedule.name == "one_shot"
    assert of["cifar100", "synflow"].schedule.settings["rounds"] == 100
    recipe = of["cifar100", "snip"].training
    assert (recipe.epochs, recipe.lr, recipe.lr_milestones, recipe.lr_gamma) == (
        160,
        0.01,
        [60, 120],
        0.2,
    )
    assert (recipe.weight_decay, recipe.batch_size, recipe.optimizer.settings["nesterov"]) == (0.0005, 128, True)
    tiny = of["tiny_imagenet", "snip"].training
    assert (tiny.epochs, tiny.lr, tiny.lr_milestones, tiny.lr_gamma) == (
        100,
        0.01,
        [30, 60, 80],
        0.2,
    )


def test_figure_1_shares_its_runs_with_figure_6() -> None:
    narrowed = ["pruner=dense,synflow", "compression=10,100", "seed=0"]
    one, six = (runs("synflow_fig1", *narrowed), runs("synflow_fig6", "dataset=cifar100", "model=vgg16", *narrowed))
    assert len(one) == 3 and [cfg.id for cfg in one] == [cfg.id for cfg in six]


def test_images_go_with_the_dataset_and_only_to_the_scores_that_look_at_them() -> None:
    cfgs = runs("force_curves", "model=vgg19", "sparsity=0.99", "seed=0")
    totals = {
        (cfg.dataset.name, cfg.pruner.name): cfg.pruner.scoring_data and cfg.pruner.scoring_data.total for cfg in cfgs
    }
    for dataset, total in (("cifar10", 128), ("cifar100", 1280), ("tiny_imagenet", 2560)):
        assert [totals[dataset, name] for name in ("snip", "iter_snip_official", "force_official")] == [total] * 3
        assert totals[dataset, "dense"] is None and totals[dataset, "grasp_official"] is None
    assert {cfg.schedule.settings["rounds"] for cfg in cfgs if cfg.pruner.name == "force_official"} == {60}


def test_rounds_of_papers_round_as_their_code() -> None:
    force = runs("force_curves", "model=vgg19", "dataset=cifar100", "sparsity=0.99", "seed=0")
    found = {cfg.pruner.name: cfg.schedule.settings.get("rounding") for cfg in force}
    assert (found["iter_snip_official"], found["force_official"], found["snip"]) == ("down", "down", None)
    assert {tuple(cfg.training.lr_milestones) for cfg in force} == {(149, 249)}
    (synflow,) = runs("synflow_fig6", "model=vgg16", "dataset=cifar10", "pruner=synflow", "compression=10", "seed=0")
    assert (synflow.schedule.settings["rounds"], synflow.schedule.settings["rounding"]) == (100, "up")


def test_grasp_draws_as_often_as_its_code() -> None:
    narrowed = ["pruner=grasp_official", "sparsity=0.95", "seed=0"]
    for name in ("grasp_table1", "grasp_table2", "grasp_tiny_imagenet"):
        for cfg in runs(name, *narrowed):
            dataset, model, score = cfg.dataset.name, cfg.model.name, cfg.pruner.score
            twice = 2 if (dataset, model) == ("cifar100", "resnet32_double") else 1
            assert score.settings["draws"] == (10 if dataset == "tiny_imagenet" else twice)


def test_sanity_checks_score_as_the_released_code() -> None:
    cfgs = runs("smart_ratio", "model=vgg19", "dataset=cifar10", "sparsity=0.98", "seed=0")
    scored = [cfg for cfg in cfgs if cfg.pruner.scoring_data is not None]
    assert len(scored) == 8
    for cfg in scored:
        assert cfg.pruner.mode == "train" and cfg.pruner.scoring_data.augment is True
        assert (cfg.pruner.scoring_data.per_class, cfg.pruner.scoring_data.total) == (10, None)
        settings = cfg.pruner.score.settings
        assert settings.get("class_halves", True) and settings.get("redraw_linear", True)
    pixels = [cfg for cfg in scored if "pixels" in cfg.ablation.name]
    assert [cfg.ablation.name for cfg in pixels] == ["random_pixels_official"] * 2
    (random,) = [cfg for cfg in cfgs if cfg.pruner.name == "random"]
    assert random.allocation.settings["surplus"] == "next"


def test_sanity_checks_score_snip_at_once() -> None:
    """Batch norm is in train mode, so the size of a batch counts. On Tiny-ImageNet there are ten batches."""
    sizes = {}
    for cfg in runs("smart_ratio", "model=vgg19", "sparsity=0.98", "seed=0", "pruner=snip"):
        assert cfg.pruner.scoring_data is not None
        sizes.setdefault(cfg.dataset.name, set()).add(cfg.pruner.scoring_data.batch_size)
    assert sizes == {"cifar10": {100}, "cifar100": {1000}, "tiny_imagenet": {200}}


def test_a_schedule_that_an_experiment_names_takes_the_place_of_the_pruners_own() -> None:
    cfgs = runs("missing_mark_early", "model=resnet20", "pruner=synflow", "seed=0", "density=0.107374")
    assert {(cfg.schedule.target.rpartition(".")[2], cfg.schedule.settings["rounds"]) for cfg in cfgs} == {
        ("early", 100)
    }
    assert sorted(cfg.schedule.settings["step"] for cfg in cfgs)[:2] == [0, 250]


@pytest.mark.parametrize(
    "name", ["lottery_lenet", "lottery_lenet_open_lth", "lottery_conv", "lottery_cifar", "rewinding_steps"]
)
def test_levels_prune_a_fifth_each(name: str) -> None:
    tickets = [job for job in planned(name) if job["pruner"] != "dense"]
    assert tickets
    for job in tickets:
        base, _, power = job["density"].partition("**")
        given = job.get("schedule.keep_per_level", "null")
        by_levels = given == "null"
        levels = math.log(float(base) ** int(power or 1)) / math.log(0.8)
        assert levels == pytest.approx(round(levels), abs=1e-4)
        assert int(job["schedule.levels"]) == round(levels) if by_levels else given == "0.8"


def test_a_setting_of_the_dataset_of_an_experiment_asks_for_the_dataset() -> None:
    words = ["experiment=rewinding_or_fine_tuning", "dataset.verify=false"]
    with pytest.raises(ConfigError, match=r"dataset\.verify: there is no such setting; give dataset=cifar10 too"):
        compose.expand(words)
    run, *_ = compose.expand([*words, "dataset=cifar10"], lambda jobs: jobs[:1])[0]
    assert run.dataset.settings["verify"] is False


# docs/reproducing.md --------------------------------------------------------------------------------------------------


def test_the_table_lists_every_experiment_with_its_numbers() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d,]+) \| ([\d,.]+) \| `(\w+)` \| ([^|]*?) \|$", DOCS, re.M)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows) == options("experiment")
    for name, num_runs, hours, statistic, reproduced in rows:
        said = header(name)
        assert (num_runs.replace(",", ""), hours.replace(",", "")) == (said["runs"], said["hours"])
        assert (statistic, reproduced) == (said["statistic"], said["reproduced"])


@pytest.mark.parametrize("command", re.findall(r"^    pai-bench (?:status )?(.*=.*)$", DOCS, re.M))
def test_commands_of_the_page_compose(command: str) -> None:
    import shlex

    words = [compose.as_group(word) for word in shlex.split(command, comments=True) if not word.startswith("-")]
    assert compose.expand(words, lambda jobs: jobs[:1])[0]
