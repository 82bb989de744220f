"""Configs that are refused, in one line and before anything is written."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import fuzz_overrides
import pytest
from conftest import ROOT, RunCli, composed

from pai_bench.commands import export, status, sync
from pai_bench.config import composition
from pai_bench.core import Call
from pai_bench.errors import ConfigError
from pai_bench.launch import cli, compose, terminal

# What is refused ------------------------------------------------------------------------------------------------------

# Each wrong command line, and what the one line must say.
REFUSED = {
    "unknown key": (["sparcity=0.9"], "sparcity: there is no such setting; see"),
    "added key": (["+foo=1"], "foo=1: there is no such setting"),
    "unknown option": (["pruner=synfow"], "synfow: there is no such option .did you mean synflow.*snip, "),
    "unknown option of Hydra's": (["hydra/launcher=slurn"], "slurn: there is no such option .did you mean slurm"),
    "unknown key of a group": (["training.epoch=3"], "training.epoch: there is no such setting"),
    "argument of no score": (["pruner.score.taylor=true"], "pruner.score.taylor=true: pruner.score is null for"),
    "a score of a dense network": (["pruner.score={a:1}"], r"a: 1.: it needs a _target_; choose an option"),
    "a score without a function": (
        ["pruner=snip", "sparsity=0.5", "pruner.score={a:1}"],
        "pruner.score=.a: 1.: give settings that it has: _target_",
    ),
    "argument of an argument of no score": (["pruner.score.a.b=1"], "pruner.score.a.b=1: pruner.score is null for"),
    "images of no score": (["pruner.scoring_data.total=8"], "scoring_data.total=8: .* choose one .*pruner=NAME"),
    "unknown argument": (["pruner=grasp", "sparsity=0.5", "+pruner.score.foo=1"], "score.foo=1: .*has: temperature"),
    "argument of another pruner": (["pruner=snip", "sparsity=0.5", "pruner.score.temperature=2"], "temperature"),
    "misspelt schedule": (["pruner=synflow", "sparsity=0.5", "schedule.ronds=3"], "ronds"),
    "several values": (["pruner=snip,synflow", "sparsity=0.5"], "pruner=snip,synflow: several values are a"),
    "no number": (["pruner=snip", "sparsity=abc"], "sparsity=abc: give a number or null"),
    "no integer": (["seed=1.5"], "seed=1.5: give a whole number"),
    "wrong type of an argument": (
        ["pruner=synflow", "sparsity=0.5", "schedule.rounds=many"],
        "schedule.rounds=many: give a whole number",
    ),
    "wrong type of a list": (["model.widths=[16,a]"], r"model.widths=\[16,a\]: give a whole number for each"),
    "a list for a number": (["pruner=synflow", "sparsity=0.5", "schedule.rounds=[1,100]"], "schedule.rounds"),
    "not a choice": (["model=vgg16", "model.depth=12"], "model.depth=12: give one of 11, 13, 16, 19"),
    "dtype": (["pruner=synflow", "sparsity=0.5", "pruner.dtype=float16"], "pruner.dtype=float16: give one of float64"),
    "rounding": (
        ["pruner=synflow", "sparsity=0.5", "schedule.rounding=even"],
        "schedule.rounding=even: give one of nearest, up, down",
    ),
    "draws": (["pruner=grasp", "sparsity=0.5", "pruner.score.draws=0"], "pruner.score.draws=0: give 1 or more"),
    "sparsity too high": (["pruner=snip", "sparsity=1.5"], r"sparsity=1.5: give a fraction in \[0, 1\)"),
    "sparsity one": (["pruner=snip", "sparsity=1"], r"sparsity=1: give a fraction in \[0, 1\)"),
    "sparsity negative": (["pruner=snip", "sparsity=-0.1"], "sparsity=-0.1"),
    "density zero": (["pruner=snip", "density=0"], "density=0"),
    "compression below one": (["pruner=snip", "compression=0.5"], "compression=0.5: give a ratio of 1 or more"),
    "compression that rounds to everything": (
        ["pruner=filter_magnitude", "compression=1e13"],
        "compression=10000000000000.0: to twelve digits this is a sparsity of 1; give sparsity=0.999999999999 or less",
    ),
    "density that rounds to nothing": (["pruner=snip", "density=1e-13"], "density=1e-13: to twelve digits"),
    "sparsity that rounds to one": (["pruner=snip", "sparsity=0.9999999999999"], "sparsity=0.9999999999999: to twelve"),
    "two targets": (["pruner=snip", "sparsity=0.9", "density=0.1"], "sparsity=0.9 and density=0.1: .*give one of them"),
    "no target": (["pruner=snip"], "pruner=snip needs a target: add sparsity=0.9"),
    "schedule without pruning": (["pruner=snip", "sparsity=0.5", "schedule=none"], "schedule=none: it never prunes"),
    "dense with rounds": (["pruner=dense", "schedule=one_shot"], "schedule=one_shot: pruner=dense has no score"),
    "no rounds": (["pruner=synflow", "sparsity=0.5", "schedule.rounds=0"], "schedule.rounds=0: give 1 or more"),
    "both kinds of examples": (
        ["pruner=snip", "sparsity=0.5", "pruner.scoring_data.per_class=5"],
        "pruner.scoring_data=.*give one",
    ),
    "reduction": (["pruner=filter_loss", "sparsity=0.5", "pruner.reduce=mean"], "reduce=mean: give one of sum, .*null"),
    "on_collapse": (["on_collapse=repair"], "on_collapse=repair: give one of record, stop"),
    "temperature": (["training.temperature=0"], "training.temperature=0: give a number above 0"),
    "nothing to break": (["ablation=reinit"], "ablation=reinit: a dense network has nothing to break"),
    "labels of no images": (
        ["pruner=synflow", "sparsity=0.5", "ablation=random_labels"],
        "ablation=random_labels: pruner=synflow looks at no images",
    ),
    "pixels of no images": (
        ["pruner=synflow", "sparsity=0.5", "ablation=random_pixels_official"],
        "ablation=random_pixels_official: pruner=synflow looks at no images",
    ),
    "values of no return": (
        ["pruner=snip", "sparsity=0.5", "pruner.regrow_moved=true"],
        "pruner.regrow_moved=true: no weight returns with pruner.regrow=false",
    ),
    "fine-tuning under cosine": (
        ["pruner=magnitude", "sparsity=0.5", "schedule=fine_tune"],
        "schedule=fine_tune: the learning rate of training.lr_schedule=cosine or linear ends at zero; set training",
    ),
    "fine-tuning over a drop": (
        ["pruner=magnitude", "sparsity=0.5", "training=cifar", "schedule=fine_tune", "schedule.epochs=41"],
        "schedule.epochs=41: the last learning rate holds for 40 epochs",
    ),
    "rescaled filters": (
        ["pruner=filter_magnitude", "sparsity=0.5", "allocation=sampled", "allocation.rescale=true"],
        "allocation.rescale=true: filters are not rescaled",
    ),
    "rescaled and rewound": (
        ["pruner=magnitude", "sparsity=0.5", "schedule=rewind", "allocation=sampled", "allocation.rescale=true"],
        "allocation.rescale=true: rewinding, regrowing",
    ),
    "transferred and rewound": (
        ["pruner=ntt", "sparsity=0.5", "schedule=rewind"],
        "schedule=rewind: rewinding the weights would undo what pruner=ntt gives them",
    ),
    "rounding of no number": (
        ["pruner=synflow", "sparsity=0.5", "target=effective", "schedule.rounding=up"],
        "schedule.rounding=up: target=effective searches for the number of weights and rounds none; give nearest",
    ),
    "probes of no Hessian": (
        ["pruner=fisher_taylor2", "sparsity=0.5", "pruner.score.probes=10"],
        "pruner.score.probes=10: pruner.score.curvature=fisher has no probes; give 1",
    ),
    "a constant momentum held constant": (
        ["pruner=prospr_official", "sparsity=0.5", "pruner.score.first_order=true"],
        "pruner.score.detach_momentum=true: with pruner.score.first_order=true every momentum is a constant; give",
    ),
    "an allocation of a given mask": (
        ["mask=x.pt", "allocation=erk"],
        "allocation=erk: mask=x.pt is taken as it is; leave allocation= out",
    ),
    "an allocation of a mask that falls from the dense network": (
        ["pruner=dense", "rewire=gradual", "sparsity=0.5", "allocation.min_density=0.1"],
        "allocation=global: rewire=gradual starts from the dense network and has a rule of its own; leave",
    ),
    "filters that return": (
        ["pruner=filter_magnitude", "sparsity=0.5", "pruner.regrow=true"],
        "pruner.regrow=true: filters do not return",
    ),
    "densities in rounds": (
        ["pruner=synflow", "sparsity=0.5", "allocation=densities_of_mask", "allocation.mask=x"],
        "schedule=exponential: allocation=densities_of_mask has one target; use schedule=one_shot",
    ),
    "temperature of a score": (
        ["pruner=grasp", "sparsity=0.5", "pruner.score.temperature=-1"],
        "pruner.score.temperature=-1: give a number above 0",
    ),
    "steps of a score": (["pruner=prospr", "sparsity=0.5", "pruner.score.steps=-1"], "pruner.score.steps=-1: give 0"),
    "walks": (["pruner=phew", "sparsity=0.5", "pruner.score.batch_size=0"], "pruner.score.batch_size=0: give 1"),
    "drops before training": (["training.lr_milestones=[-5]"], "training.lr_milestones=.*give 0 or more for each"),
    "levels": (["pruner=magnitude", "sparsity=0.5", "schedule=rewind", "schedule.levels=0"], "schedule.levels=0"),
    "no mask": (["pruner=random", "sparsity=0.5", "allocation=densities_of_mask"], "allocation.mask is missing"),
    "a mask that is not there": (
        ["pruner=random", "sparsity=0.5", "allocation=densities_of_mask", "allocation.mask=nowhere"],
        "allocation.mask=nowhere: it cannot be read",
    ),
    "floor": (["allocation.min_density=2"], "allocation.min_density=2: give one in"),
    "mode": (["pruner=snip", "sparsity=0.5", "pruner.mode=test"], "pruner.mode=test: give one of eval, train"),
    "compact": (["training.compact=on"], "training.compact=on: give one of auto, off"),
    "precision": (["training.precision=fp8"], "training.precision=fp8: give one of float32, tfloat32"),
    "learning rate": (["training.lr=0"], "training.lr=0"),
    "setting of another optimizer": (
        ["training/optimizer=adamw", "training.optimizer.momentum=0.9"],
        "training.optimizer.momentum: there is no such setting",
    ),
    "unknown optimizer": (
        ["training/optimizer=adam"],
        "training/optimizer=adam: there is no such option .did you mean adamw",
    ),
    "no optimizer": (["~training/optimizer"], "~training/optimizer: a run needs an option of training/optimizer"),
    "beta": (
        ["training/optimizer=adamw", "training.optimizer.beta2=1"],
        r"training.optimizer.beta2=1: give one in \[0, 1\)",
    ),
    "eps": (["training/optimizer=adamw", "training.optimizer.eps=0"], r"training.optimizer.eps=0: give one in \["),
    "momentum of one": (["training.optimizer.momentum=1"], r"training.optimizer.momentum=1: give one in \[0, 1\)"),
    "nesterov": (
        ["training.optimizer.momentum=0"],
        "training.optimizer.nesterov=true: it needs training.optimizer.momentum",
    ),
    "drops": (["training.lr_milestones=[80,40]"], "training.lr_milestones"),
    "validation": (["dataset.validation=1"], "dataset.validation=1"),
    "device": (["device=tpu"], "device=tpu: give auto, cpu"),
    "no model name": (["model.name=null"], "model.name=null: give a word"),
    "number for a name": (["dataset.name=2024"], "dataset.name=2024: give a word"),
    "resize": (["dataset=imagenet", "dataset.resize=200"], "dataset.resize=200: give dataset.size=224 or more"),
    "store": (["dataset=imagenet", "dataset.store=128"], "dataset.store=128: give dataset.resize=256 or more"),
    "workers": (["num_workers=-1"], "num_workers=-1: give 0 or more"),
    "padding": (["dataset.padding=-1"], r"dataset.padding=-1: give one in \[0, 7\]"),
    "seed": (["seed=-1"], "seed=-1: give 0 or more"),
    "missing root": (["dataset=image_folder"], "dataset.root"),
    "missing model name": (["model=timm"], "model.name"),
    "null for an option": (["model=null"], "model=null: there is no such option; give one of conv2"),
    "number for an option": (["pruner=5"], "pruner=5: there is no such option"),
    "capitals": (["pruner=SNIP"], r"pruner=SNIP: there is no such option \(did you mean snip\?\)"),
    "misspelt beside a setting without a value": (
        ["model=timm", "model.name=resnet18", "model.options.foo=1"],
        r"model.options.foo: there is no such setting",
    ),
    "all of Hydra": (["hydra=1"], "hydra=1: give a setting of Hydra, as hydra.KEY=VALUE"),
    "misspelt group": (["mdoel=resnet20"], r"mdoel: there is no such setting; .*did you mean model\?"),
    "without its group": (["epochs=3"], r"epochs: there is no such setting; .*did you mean training.epochs\?"),
    "deleted": (["~seed"], "seed is missing: .*add seed=VALUE"),
    "deleted group": (["~model"], "~model: a run needs an option of model"),
    "inside a list": (["model.widths.zzz=1"], "model.widths.zzz=1: model.widths has no settings of its own"),
    "a list in a list": (["training.lr_milestones=[[1]]"], r"lr_milestones=.*: give a whole number for each"),
    "a number for a group": (["mask_file=${seed}"], "mask_file=0: it has settings of its own: names"),
    "a setting that is not there": (["seed=${nothing}"], "seed: what it names in .* is not there"),
    "no key": (["results_dir=~/x"], "results_dir=~/x: it cannot be read; put the value in quotes"),
    "target that is no text": (["model._target_=5"], "model._target_=5: give the dotted path of a function"),
    "builtin target": (["model._target_=builtins.exec"], "model._target_=builtins.exec: there is no module 'builtins'"),
    "private target": (["schedule._target_=pai_bench.pruning.schedules._time"], "_time: give the dotted path of a"),
    "target that is a program": (["model._target_=os.system"], "model._target_=os.system: there is no module 'os'"),
    "no pruner": (["sparsity=0.9"], "sparsity=0.9 needs pruner=NAME"),
    "label of another option": (["model.name=vgg16"], "model.name=vgg16: that is another option of model; say model="),
    "nothing but a label": (["model.name=convnext_tiny"], "model.name=convnext_tiny: .*model=timm model.name=convnext"),
    "dataset under a label": (["dataset.name=cifar10"], "dataset.name=cifar10: that is another option of dataset"),
    "name with a slash": (["pruner.name=../x"], "pruner.name=../x: give a word without /"),
    "long name": (["training.name=" + 250 * "a"], "training.name=a+.*: give one of at most 100 letters"),
    "no std": (["dataset.std=[0]"], r"dataset.std=\[0\]: give a number above 0 for each"),
    "std that is no number": (["dataset.std=[nan]"], r"dataset.std=\[nan\]: give a number for each"),
    "too many channels": (["dataset.mean=[0,0]"], r"dataset.mean=\[0,0\]: give 1 value"),
    "infinite decay": (["training.weight_decay=inf"], "training.weight_decay=inf: give a number"),
    "no widths": (["model.widths=[]"], r"model.widths=\[\]: give at least 1 value"),
    "widths of zero": (["model.widths=[0,0]"], r"model.widths=\[0,0\]: give 1 or more for each"),
    "negative widths": (["model.widths=[-1,2]"], r"model.widths=\[-1,2\]: give 1 or more for each"),
    "device without a kind": (["device=0"], "device=0: give auto, cpu"),
    "device that nobody has": (["device=cuda:99999999999"], "device=cuda:99999999999: give auto, cpu"),
    "mode of a tracker": (["tracker.mode=onlien"], "tracker.mode=onlien: give one of online, offline, disabled"),
    "learning rate beyond float32": (["training.lr=1e300"], r"training.lr=1e\+300: give one in"),
    "no folder": (["results_dir=''"], "results_dir=: give a text"),
    "scheme": (["model.init.conv=he"], "model.init.conv=he: give one of kaiming_normal_fan_in"),
    "folder of Hydra's": (["hydra.run.dir=x"], "hydra.run.dir=x: it has no effect, .*give results_dir=PATH"),
    "launcher": (["-m", "+hydra.launcher.zzz=1"], "hydra.launcher.zzz=1: there is no such setting"),
    "sweep that is no text": (["-m", "hydra.sweeper.params={seed:'0,1'}"], "hydra.sweeper.params=.*: give a text"),
    "flag": (["--nosuch"], "--nosuch: unrecognized arguments"),
    "missing function": (
        ["pruner=snip", "sparsity=0.5", "pruner.score._target_=pai_bench.pruners.snip.scor"],
        "no function 'scor'",
    ),
    "missing module": (
        ["pruner=snip", "sparsity=0.5", "pruner.score._target_=pai_bench.pruners.snap.score"],
        "no module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_wrong_is_refused_in_one_line(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    from pai_bench.launch import cli

    GlobalHydra.instance().clear()
    overrides, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *overrides])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(f"config error: .*{message}.*\n", said.err), said.err
    assert list(tmp_path.iterdir()) == []


def test_overrides_of_every_kind_are_taken_or_refused_in_one_line() -> None:
    """A sample; tests/fuzz_overrides.py tries all of them."""
    some = list(fuzz_overrides.BASES.values())[::8]  # to compose a base takes longer than anything else here
    chosen = fuzz_overrides.everything(some)[::151]
    said = {words: fuzz_overrides.answer(words) for words in chosen}
    assert not {words: answer for words, answer in said.items() if fuzz_overrides.wrong(words, *answer)}
    assert {code for code, _ in said.values()} == {0, 2} and len(said) > 30


def test_a_home_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert composed("results_dir='~/x'").results_dir == "/home/me/x"


def test_a_dense_network_that_is_asked_for_has_no_sparsity() -> None:
    assert compose.compose(["pruner=dense", "sparsity=0.9"]).sparsity == 0
    dense, snip, other = compose.expand(["pruner=dense,snip", "sparsity=0.5,0.9"])[0][1:]
    assert (dense.sparsity, snip.sparsity, other.sparsity) == (0, 0.5, 0.9)
    with pytest.raises(ConfigError, match=r"sparsity=0\.9 needs pruner=NAME"):
        compose.expand(["sparsity=0.9,0.95"])


# Whom a config belongs to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_target_: pai_bench.models.resnet.resnet", "_target_: os.system"),
        ("seed: 0", "seed: 0\nhydra: {callbacks: {x: {_target_: os.system}}}"),
        ("seed: 0", "seed: 0\nhydra: {launcher: {_target_: os.system}}"),
        ("block: basic", "block: {_target_: os.system}"),
    ],
)
def test_a_config_from_elsewhere_names_our_functions_alone(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = composition.rerunnable(composed("+model.block=basic"))
    (tmp_path / "config.yaml").write_text(text)
    assert compose.stored(tmp_path) == composed("+model.block=basic")
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new))
    monkeypatch.setattr(sys, "argv", ["run.py", "-cp", str(tmp_path), "-cn", "config"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1 and "add --trust if it is yours" in said
    if "hydra" not in new:
        with pytest.raises(ConfigError, match=r"_target_=os.system|give one of"):
            compose.stored(tmp_path)


ATTACKS = {
    "nested": ("block: basic", "block: {_target_: os.mkdir, path: MARKER}"),
    "nested deeper": ("block: basic", "block: [{x: {_target_: os.mkdir, path: MARKER}}]"),
    "a library of ours": ("pai_bench.models.resnet.resnet", "pai_bench.launch.slurm.subprocess.call"),
    "the function itself": ("pai_bench.models.resnet.resnet", "os.mkdir"),
}


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_the_run_of_a_stranger_is_neither_exported_nor_run_again(
    attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "results" / "run"
    run.mkdir(parents=True)
    old, new = ATTACKS[attack]
    text = composition.rerunnable(composed("+model.block=basic"))
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new.replace("MARKER", str(tmp_path / "marker"))))
    refused = (
        r"_target_=(os.mkdir|pai_bench.launch.slurm.subprocess.call): (.* not ours; add --trust|there is no module)"
    )
    with pytest.raises(ConfigError, match=refused):
        compose.stored(run)
    (run / "status.json").write_text('{"state": "failed", "exit_code": 1}')
    monkeypatch.setattr(terminal, "start_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["status.py", str(tmp_path / "results"), "--retry"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "status.py"), run_name="__main__")
    assert stopped.value.code == 4 and re.search(f"run: .*{refused}", capsys.readouterr().out)
    row = {"id": "run", "test_top1": 0.5, "sparsity": 0.0, "input_shape": [1, 32, 32], "num_classes": 10}
    (run / "result.json").write_text(json.dumps(row))
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "-o", str(tmp_path / "mask.npz")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(f"config error: .*{refused}.*\n", said), said
    assert not (tmp_path / "marker").exists()


def test_a_function_in_an_argument_is_not_called() -> None:
    inner = {"_target_": "os.getpid"}
    assert Call("builtins.dict", {"value": inner})() == {"value": inner}


def test_a_wrong_sweep_value_is_refused_too(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("sparsity=0.9,0.95", "pruner=snip")
    assert done.returncode == 2
    assert "put -m in front" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (export, "RUN --hub me/net --weights final", "--weights final: only a .pt holds weights beside a mask"),
        (export, "RUN --hub me/net --repeats 3", "--repeats 3: only a .pt2 is measured; leave it out"),
        (export, "RUN -o mask.pt --batch-size 64", "--batch-size 64: only a .pt2 is measured; leave it out"),
        (export, "RUN -o small.pt2 --repeats 0", "--repeats 0: give 1 or more"),
        (export, "RUN -o mask.pt --private", "--private: a file is no repository; leave it out, or give --hub"),
        (export, "RUN -o mask.txt", "-o mask.txt: it must end in one of .pt2, .pt, .npz, .safetensors"),
        (sync, "results pruner=snip seed=5", "pruner=snip: it is no setting of the tracker"),
        (sync, "results tracker.project=mine seed=5", "seed=5: it is no setting of the tracker"),
        (status, "results --trust", "--trust: it is for --retry of a results folder"),
        (status, "pruner=snip --retry --trust", "--trust: it is for --retry of a results folder"),
        (status, "results hydra/launcher=slurm", "hydra/launcher=slurm: it plays no part without --retry"),
    ],
)
def test_what_plays_no_part_beside_a_command_is_refused(
    command: ModuleType,
    words: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(terminal, "start_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["pai-bench", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and f"error: {message}" in capsys.readouterr().err
