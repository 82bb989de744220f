"""What runs are called: what changes a name and what does not."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CONF, ROOT, composed
from omegaconf import OmegaConf

from pai_bench.config import checks, composition, identity, schema
from pai_bench.config.schema import plain
from pai_bench.core import Call
from pai_bench.launch.compose import compose as launch
from pai_bench.launch.compose import expand, stored


def test_a_run_keeps_its_name() -> None:
    """Changing these names orphans every stored result: raise `protocol` knowingly, and never by accident."""
    assert {arguments: composed(*arguments.split()).id for arguments in NAMES} == NAMES


CHANGED = {
    "model=resnet20 model.widths=[8,16,32]": "resnet20-w8.16.32",
    "model=resnet56 model.blocks=[2,2,2] model.widths=[8,16,32]": "resnet56-w8.16.32-b2.2.2",
    "model=lenet300 model.hidden=[100]": "lenet300-h100",
    "model=vgg16 model.classifier=mlp": "vgg16-classifier_mlp",
    "model=vgg16 model.norm_last=true model.depth=11": "vgg16-d11-norm_last_true",
    "model=wrn28_10 model.dropout=0.3": "wrn28_10-dr0.3",
    "model=resnet50 model.options.zero_init_last=true": "resnet50-zero_init_last_true",
    # These change no size, or the model has a name of its own.
    "model=resnet20 model.widths=[16,32,64]": "resnet20",
    "model=resnet20 model.init.norm=uniform": "resnet20",
    "model=resnet20 model.name=narrow model.widths=[8,16,32]": "narrow",
    "model=timm model.name=resnet18": "resnet18",
}


@pytest.mark.parametrize("words", CHANGED)
def test_a_changed_model_says_so_in_its_name(words: str) -> None:
    assert launch(words.split()).model.name == CHANGED[words]


def test_a_changed_model_keeps_its_name_when_it_runs_again(tmp_path: Path) -> None:
    run = launch(["model=resnet20", "model.widths=[8,16,32]"])
    (tmp_path / "config.yaml").write_text(composition.rerunnable(run))
    assert stored(tmp_path).id == run.id and "resnet20-w8.16.32" in run.id
    assert launch(["model=resnet20", "model.widths=[8,16,32]", "model.blocks=[3,3,3]"]).id == run.id


def test_a_function_of_ours_goes_by_its_name_wherever_it_lies() -> None:
    cfg = composed("pruner=snip", "sparsity=0.9")
    score, allocation = cfg.pruner.score, cfg.allocation
    moved = replace(
        cfg,
        allocation=replace(allocation, target=allocation.target.replace("allocation.", "elsewhere.allocations.")),
        pruner=replace(cfg.pruner, score=replace(score, target=score.target.replace("pruners.", "scores."))),
    )
    assert moved.allocation != allocation and moved.pruner != cfg.pruner and moved.id == cfg.id
    for other in ("theirs.masks.global_topk", "pai_bench.masks.allocation.uniform"):
        assert replace(moved, allocation=replace(allocation, target=other)).id != cfg.id


def test_no_two_functions_of_a_group_have_one_name() -> None:
    functions: dict[tuple[str, str], set[str]] = {}
    for path in CONF.rglob("*.yaml"):
        for target in re.findall(r"_target_: (\S+)", path.read_text()):
            functions.setdefault((path.parent.name, identity.function_name(path.parent.name, target)), set()).add(
                target
            )
    assert len(functions) > 40 and all(len(targets) == 1 for targets in functions.values()), functions


NAMES = {
    "": "digits-resnet20-dense-s0-seed0-f5f337b6",
    "pruner=synflow sparsity=0.98": "digits-resnet20-synflow-s0.98-seed0-8facd0dd",
    "dataset=cifar10 model=vgg16 training=cifar pruner=snip compression=100 seed=2": (
        "cifar10-vgg16-snip-s0.99-seed2-55714f22"
    ),
    "dataset=tiny_imagenet model=resnet18 training=tiny_imagenet pruner=grasp density=0.1": (
        "tiny_imagenet-resnet18-grasp-s0.9-seed0-8839d6c4"
    ),
    "dataset=imagenet model=resnet50 training=imagenet pruner=magnitude sparsity=0.8 allocation=uniform": (
        "imagenet-resnet50-magnitude-s0.8-seed0-debad1ee"
    ),
}


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu", "num_workers=0", "results_dir=elsewhere", "data_dir=elsewhere", "download=true", "tracker=none",
        "tracker.mode=online", "tracker.project=mine", "channels_last=false", "compile=true", "save_scores=true",
    ],
)  # fmt: skip
def test_what_cannot_change_a_result_is_no_part_of_the_name(override: str) -> None:
    base = ["pruner=snip", "sparsity=0.9"]
    assert composed(*base, override).id == composed(*base).id


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "sparsity=0.91", "protocol=99", "training.lr=0.2", "training/optimizer=sgd",
        "training/optimizer=adamw", "training.precision=bfloat16", "model=resnet32",
        "model.init.norm=uniform", "dataset.validation=0.1", "dataset.padding=3", "pruner=grasp", "pruner.mode=train",
        "pruner.scoring_data.total=50", "allocation=uniform", "schedule=linear",
    ],
)  # fmt: skip
def test_what_can_change_a_result_changes_the_name(override: str) -> None:
    base = ["pruner=snip", "sparsity=0.9"]
    assert composed(*base, override).id != composed(*base).id


def test_large_numbers_that_no_float_tells_apart_are_told_apart() -> None:
    first, second = (composed("dataset=planted_relu", f"dataset.seed={2**53 + more}") for more in (0, 1))
    assert first.id != second.id


def test_seeds_share_a_group() -> None:
    first, second = (composed("pruner=snip", "sparsity=0.9", f"seed={seed}") for seed in (0, 1))
    assert first.group == second.group
    assert first.id != second.id


@pytest.mark.parametrize(
    ("overrides", "different"),
    [
        (["seed=1", "device=cpu", "training.compact=off"], {}),
        (["training.epochs=2"], {"training.epochs": (10.0, 2.0)}),
        (["pruner=random"], {"pruner.name": ("synflow", "random")}),
        (["sparsity=0.8", "model.init.norm=uniform"], {"sparsity": (0.9, 0.8), "model.init.norm": ("ones", "uniform")}),
    ],
)
def test_runs_are_told_apart_by_their_settings(
    overrides: list[str], different: dict[str, tuple[object, object]]
) -> None:
    cfg, other = composed("pruner=synflow", "sparsity=0.9"), composed("pruner=synflow", "sparsity=0.9", *overrides)
    found = identity.differences(plain(cfg), plain(other))
    assert different.items() <= found.items()
    assert (cfg.group == other.group) == (found == {})
    assert "training.epochs" not in identity.differences(plain(cfg), plain(other), {"training"})


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (["seed=1"], {"task", "method"}),
        (["sparsity=0.95"], {"task", "method"}),
        (["training.lr=0.2"], {"method"}),
        (["model.init.norm=uniform"], {"method"}),
        (["protocol=99"], {"method"}),
        (["pruner.mode=train"], {"task"}),
        (["allocation=uniform"], {"task"}),
        (["schedule=linear"], {"task"}),
        (["ablation=shuffle_mask"], {"task"}),
        (["rewire=rigl"], {"task"}),
        (["pruner=dense"], {"task"}),
        (["training.lr=0.2", "ablation=reinit"], set()),
    ],
)
def test_a_run_has_a_task_and_a_method(overrides: list[str], same: set[str]) -> None:
    base = ["pruner=snip", "sparsity=0.9"]
    one, other = composed(*base), composed(*base, *overrides)
    assert {name for name in ("task", "method") if getattr(one, name) == getattr(other, name)} == same
    assert one.task.startswith("digits-resnet20-")
    assert one.method.startswith("snip-")


def test_a_dense_network_is_one_method_whatever_is_not_used() -> None:
    assert composed("allocation=uniform").method == composed("sparsity=0.5").method


def test_where_a_folder_of_images_lies_is_no_part_of_the_name(tmp_path: Path) -> None:
    here, there = (composed("dataset=image_folder", f"dataset.root={tmp_path / x / 'birds'}") for x in ("a", "b"))
    other = composed("dataset=image_folder", f"dataset.root={tmp_path / 'a' / 'fish'}")
    assert here.id == there.id != other.id


@pytest.mark.parametrize("name", ["results/a:b", "vit_small_patch16_224.augreg in21k", "a/b;c,d"])
def test_a_name_is_good_for_files_and_for_wandb(name: str) -> None:
    cfg = replace(composed("pruner=snip", "sparsity=0.9"), model=Call("pai_bench.models.vgg.vgg", {}, name))
    assert re.fullmatch(r"[\w.-]+", cfg.id) and len(cfg.id) < 128


def test_a_stored_config_is_the_same_run_again(tmp_path: Path) -> None:
    cfg = composed("pruner=synflow", "compression=50", "seed=3", "model=vgg16", "training.lr=0.05")
    (tmp_path / "config.yaml").write_text(composition.rerunnable(cfg))
    printed = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-cp", str(tmp_path), "-cn", "config", "--cfg", "job", "--resolve"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    again = checks.complete(composition.resolved(OmegaConf.create(printed)))
    assert again == cfg
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_printed_config_is_the_same_run_again(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "pruner=snip", "density=0.1", "--cfg", "job", "--resolve"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    again = checks.complete(composition.resolved(OmegaConf.create(printed)))
    assert again.id == composed("pruner=snip", "density=0.1").id


def test_the_experiment_of_a_run_is_noted_and_no_part_of_its_names() -> None:
    alone = composed("pruner=snip", "sparsity=0.9")
    runs, _ = expand(["experiment=digits_baselines", "pruner=snip", "compression=10", "seed=0"])
    (of_experiment,) = runs
    assert (alone.experiment, of_experiment.experiment) == (None, "digits_baselines")
    assert "digits_baselines" in of_experiment.tags and "digits_baselines" not in alone.tags
    for name in ("id", "group", "task", "method", "chain"):
        assert getattr(alone, name) == getattr(of_experiment, name)
    older = {key: value for key, value in plain(alone).items() if key != "experiment"}
    schema.check(older)
    assert schema.made(older | {"experiment": None}) == alone


def test_the_scale_of_a_run_is_a_tag_and_no_part_of_its_names() -> None:
    words = ["pruner=snip", "seed=0", "compression=10"]
    ((small,), _), ((full,), _) = (
        expand(["experiment=digits_baselines", f"scale={s}", *words]) for s in ("smoke", "full")
    )
    assert (small.scale, full.scale) == ("smoke", None)
    assert "scale=smoke" in small.tags and not [tag for tag in full.tags if tag.startswith("scale")]
    unmarked = schema.made({key: value for key, value in plain(small).items() if key != "scale"})
    assert unmarked.scale is None
    for name in ("id", "group", "task", "method", "chain"):
        assert getattr(small, name) == getattr(unmarked, name)
