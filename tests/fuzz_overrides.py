"""Overrides that a user may type, most of them wrong, and what the command line answers.

Every key of every group and option meets values of every kind. Each must be taken, or be refused in one line that names
the setting, in words and not in Python's, with exit code 2. Nothing is trained. The suite takes a sample; all of them:

    python -m tests.fuzz_overrides             # every eighth, some thousands, in a few minutes; --every 1 takes all
    python -m tests.fuzz_overrides 'init' -v   # those whose words hold a text, with what is answered
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra

from pai_bench.config import composition
from pai_bench.config.schema import RunConfig, plain
from pai_bench.launch import overrides, sweeps, terminal

Words = tuple[str, ...]

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = ("model", "dataset", "pruner", "schedule", "allocation", "ablation", "rewire", "training", "tracker", "search")
# What an option cannot be composed without.
NEEDS = {
    "timm": ("model.name=resnet18",),
    "image_folder": ("dataset.root=somewhere",),
    "densities_of_mask": ("allocation.mask=some.safetensors",),
    "densities_of_file": ("allocation.file=some.csv",),
    "fine_tune": ("training=cifar",),
    "imagenet_16": ("dataset=imagenet",),
}
VALUES = (
    "null", "true", "-1", "0", "1.5", "1e300", "1" + 30 * "0", "inf", "-inf", "nan", "''", "abc", "'a b'", "'a\tb'",
    "[]", "[1]", "[0,0]", "[a]", "[null]", "[[1]]", "[nan]", "{}", "{a:1}", "{_target_:os.system}",
    "${seed}", "${model}", "${nothing}", "${oc.env:NOTHING}", "${oc.env}", "${nothing:1}", "${", "[", "a=b", "~/x",
)  # fmt: skip
OPTIONS = (
    "null", "true", "5", "1.5", "''", "nosuch", "[]", "[none]", "[none,none]", "{a:1}", "${seed}", "${nothing}", "../x",
    "none.yaml", "NONE", "config", "a/b", "/", ".",
)  # fmt: skip
TARGETS = (
    "null", "5", "true", "[]", "{}", "''", ".", "..", "a", "os", "os.system", "sys.exit", "builtins.exec", "time.sleep",
    "math.sqrt", "zipimport.zipimporter", "__main__.main", "_frozen_importlib.x", "nosuch.nosuch", "pai_bench",
    "pai_bench.nosuch.f", "pai_bench.pruning.schedules", "pai_bench.pruning.schedules.nosuch",
    "pai_bench.pruning.schedules._time",
    "pai_bench.core.Round", "pai_bench.launch.cli.main", "pai_bench.pruning.schedules.linear.x", "torch.nn.Linear",
    "torch._C.x",
    "'a b.c'", "'a\\tb.c'", "pai-bench.x", "1.2", "é.é", "numpy.core.multiarray.x", "hydra.utils.call", "${seed}",
)  # fmt: skip
NAMES = ("a/b", "../x", ".x", "-x", "'a\\b'", 250 * "a", "'a b'", "x", "null", "7", "''", "convnext_tiny")
MORE = (
    "", "=", "a", "a=", "=1", "+", "~", "++", "+=1", "++=1", "~nothing", "~seed=1", "~seed=0", "seed", "seed=1 2",
    "seed=[", "seed={", "seed=(", "seed='", "seed=\"", "seed=1,2", "seed=range(3)", "seed=choice(1,2)", "seed=glob(*)",
    "seed=interval(0,1)", "seed@a=1", "model@a=resnet20", "model@=resnet20", "a.b=1", ".seed=1", "seed.=1", "seed.a=1",
    "seed[0]=1", "model.widths[0]=1", "model.widths.0=1", "model.widths.zzz=1", "training.lr_milestones=[[1]]",
    "epochs=3", "lr=0.1", "batch_size=3", "mdoel=resnet20", "sparcity=0.9", "pruner=SNIP", "PRUNER=snip", "pruner=snp",
    "sparsity=0.9", "density=0.1", "compression=10", "rounds=3", "init=x", "widths=[1]", "mode=train", "name=x",
    "hydra=1", "hydra=null", "hydra.run.dir=x", "hydra.sweep.dir=x", "hydra.job.chdir=true", "hydra.zzz=1",
    "+hydra.zzz=1", "hydra.mode=x", "hydra.verbose=true", "hydra.output_subdir=x", "hydra/launcher=nosuch",
    "hydra/launcher=null", "hydra/launcher=5", "hydra/sweeper=nosuch", "hydra/zzz=1", "+hydra/zzz=1", "hydra/output=x",
    "hydra.searchpath=5", "hydra.searchpath=[5]", "hydra.searchpath=[file:///nowhere]", "hydra.callbacks=5",
    "scale=smoke", "scale=null", "experiment=nosuch", "experiment=null", "+experiment=nosuch", "experiment=5",
    "device=0", "device=cuda:99999999999", "device=cuda:-1", "device=cuda:x", "tracker.mode=onlien",
    "training.lr=1e300",
    "results_dir=''", "mask=x.pt", "weights=x.pt", "mask_name=x", "run_schema=x", "_self_=x", "config=x",
    "pruner.score={a:1}", "pruner.scoring_data={a:1}", "model={}", "model={name:x}", "pruner={}", "seed=\udcff",
    "model.name=vgg16", "dataset.name=cifar10", "pruner.name=snip", "+model.depth=3", "+training.x=1", "++seed.x=1",
)  # fmt: skip
PRUNERS = {  # of rewires that start from all weights, and of a schedule that looks at weights alone
    "rewire=gradual": "pruner=dense",
    "rewire=acdc": "pruner=dense",
    "schedule=early_bird": "pruner=magnitude",
}
BASES: dict[str, Words] = {  # one for each option whose keys are tried
    f"{group}={path.stem}": (
        *(
            (PRUNERS.get(f"{group}={path.stem}", "pruner=snip"),)
            if group in ("schedule", "ablation", "rewire") and path.stem != "none"
            else ()
        ),
        *(
            ()
            if path.stem in ("dense", "none") and group != "tracker"
            else ("sparsity=0.5",)
            if group in ("pruner", "search")
            else ()
        ),
        *(("sparsity=0.5",) if group in ("schedule", "ablation", "rewire") and path.stem != "none" else ()),
        *NEEDS.get(path.stem, ()),
        f"{group}={path.stem}",
    )
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
}


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The dotted keys of a config, of groups as well as of settings."""
    for key, value in node.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


@cache
def _composer() -> tuple[Any, sweeps.SweepLoader]:
    """The config of the defaults, and what composes other runs quickly."""
    composition.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        base = hydra.compose("config", [], return_hydra_config=True)
        return base, sweeps.SweepLoader(overrides.loader_here().get_search_path())


def completed(words: Words) -> RunConfig:
    """The completed config of a run with these words."""
    base, loader = _composer()
    overrides.check(words, loader)
    composed = loader.load_sweep_config(base, list(words))
    return overrides.complete(composed, composed.hydra)


def answer(words: Words) -> tuple[int, str]:
    """The exit code of these words, and what is said, where everything up to the start of the run goes well."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            cfg = completed(words)
            code = 0 if len(cfg.id) < 200 and cfg.group and json.dumps(plain(cfg)) else 1
        except Exception as error:
            code = terminal.report(error)
    return code, said.getvalue()


def keys(bases: Iterable[Words]) -> dict[str, Words]:
    """Every key once, with the words that make it appear: one for each function that has it."""
    found: dict[tuple[str, str], tuple[str, Words]] = {}
    for base in ((), *bases):
        composed = plain(completed(base))
        for key in leaves(composed):
            group, _, inner = key.partition(".")
            target = composed[group].get("_target_", "") if isinstance(composed[group], dict) else ""
            part = inner.partition(".")[0]
            if isinstance(composed[group], dict) and isinstance(composed[group].get(part), dict):
                target += composed[group][part].get("_target_", "")
            found.setdefault((key, target), (key, base))
    return {f"{key} {' '.join(base)}": base for key, base in found.values()}


def everything(bases: Iterable[Words] = BASES.values()) -> list[Words]:
    """All overrides, in an order that does not change.

    Args:
        bases: words of the runs whose keys are tried.
    """
    found: list[Words] = []
    for label, base in keys(bases).items():
        key = label.split(" ")[0]
        values = VALUES if not key.endswith("_target_") else TARGETS
        found += [(*base, f"{key}={value}") for value in values]
        found += [
            (*base, f"{sign}{key}{rest}") for sign, rest in (("~", ""), ("+", "=1"), ("++", ".x=1"), ("+", ".x=1"))
        ]
        found.append((*base, f"{key[:-1]}=1"))
        if key.endswith(".name"):
            found += [(*base, f"{key}={name}") for name in NAMES]
    groups = (*GROUPS, "experiment", "scale", "hydra/launcher", "hydra/sweeper", "hydra/help", "hydra/output")
    found += [(f"{sign}{group}={option}",) for group in groups for option in OPTIONS for sign in ("", "+")]
    found += [
        (word,) for group in groups for word in (f"~{group}", f"~{group}=x", f"++{group}=x", group, f"{group}.x=1")
    ]
    found += [(word,) for word in MORE] + [("pruner=snip", "seed=3", "sparsity=0.5", word) for word in MORE]
    for launcher in ("basic", "parallel", "slurm"):
        inner = ("n_jobs", "timeout_min", "zzz", "_target_", "wait", "export", "setup", "max_requeues")
        found += [
            (f"hydra/launcher={launcher}", f"{sign}hydra.launcher.{key}={value}")
            for key, value, sign in itertools.product(inner, ("1", "abc", "[1]", "null"), ("", "+"))
        ]
    rules = ("paired", "exclude", "drop", "scale", "params", "zzz", "max_batch_size")
    values = (
        "1",
        "abc",
        "[1]",
        "[[1]]",
        "{a:1}",
        "[{a:1}]",
        "[{a:[1,2],b:[1]}]",
        "{seed:'0,1'}",
        "[{where:1}]",
        "null",
    )
    found += [(f"{sign}hydra.sweeper.{rule}={value}",) for rule in rules for value in values for sign in ("", "+")]
    return list(dict.fromkeys(found))


PYTHON = re.compile(
    r"Traceback|object has no|NoneType|<class|DictConfig|ListConfig|\w+Error\b|\w+Exception\b|full_key|object_type"
    r"|\bNone\b|\bTrue\b|\bFalse\b|\bdict\[|\blist\[|\bLiteral\[|\bUnion|Unexpected type|\bint\b|\bfloat\b|\bstr\b"
)


def wrong(words: Words, code: int, said: str) -> str | None:
    """What is wrong with an answer."""
    if code == 0 and not said:
        return None
    if code != 2:
        return f"exit code {code}"
    if len(said.splitlines()) != 1:
        return f"{len(said.splitlines())} lines"
    if found := PYTHON.search(said.replace(words[-1], "").replace("=True", "")):  # a text may be anything
        return f"Python's words: {found[0]}"
    key = re.split("[=@.\\[]", words[-1].lstrip("+~"))[0]
    return None if key in said else "the setting is not named"


def main() -> None:
    """Tries all overrides, or those that hold a text, and exits with 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="", help="only overrides that hold it")
    parser.add_argument("--every", type=int, default=8, help="every so many of them; 1 takes all")
    parser.add_argument("-v", "--verbose", action="store_true", help="show every answer, not only wrong ones")
    arguments = parser.parse_args()
    chosen = [words for words in everything() if arguments.text in " ".join(words)][:: arguments.every]
    num_taken = num_wrong = 0
    for words in chosen:
        code, said = answer(words)
        reason = wrong(words, code, said)
        num_taken, num_wrong = num_taken + (code == 0), num_wrong + (reason is not None)
        if reason or arguments.verbose:
            print(ascii(f"{reason or 'right'}: {' '.join(words)}: {said.strip()}"))
    print(f"{len(chosen)} overrides: {num_taken} taken, {len(chosen) - num_taken} refused, {num_wrong} answers wrong")
    sys.exit(int(num_wrong > 0))


if __name__ == "__main__":
    main()
