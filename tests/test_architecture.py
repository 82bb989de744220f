"""The house rules: who may import whom, and one door to each outside library."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "pai_bench"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each module may import of ours. Nobody is listed for pruners, models and data: a yaml's _target_ reaches them.
LEAVES = {"core", "errors", "ranges"}
BASICS = LEAVES | {"masks", "gradients", "layout"}
LOOPS = BASICS | {"allocation", "devices", "distributed", "measures", "world", "seeding", "structure", "scoring"}
ALLOWED = {
    "errors": set(),
    "core": {"errors"},
    "ranges": set(),
    "signatures": {"errors"},
    "config": {"errors", "mask_files", "ranges", "signatures"},
    "overrides": {"config", "errors", "signatures"},
    "usage": {"config", "overrides"},
    "__main__": {"cli"},
    "mask_files": LEAVES | {"masks"},
    "masks": LEAVES,
    "layout": set(),
    "scoring": LEAVES | {"layout"},
    "gradients": LEAVES | {"layout"},
    "seeding": LEAVES,
    "devices": LEAVES | {"files", "world"},
    "schedules": LEAVES,
    "allocation": BASICS | {"mask_files"},
    "operations": LEAVES | {"masks"},
    "measures": BASICS | {"operations"},
    "paths": LEAVES | {"masks", "measures"},
    "ablations": LEAVES,
    "structure": LEAVES | {"masks"},
    "pruners": BASICS | {"structure"},
    "models": LEAVES | {"models.initialization"},
    "data": LEAVES
    | {
        "files",
        "layout",
        "preemption",
        "data.resident",
        "data.listing",
        "data.decode",
        "data.crops",
        "data.shrunk",
        "data.archives",
    },
    "prune": LOOPS,
    "training.recipe": LEAVES,
    "training.evaluation": LEAVES | {"devices", "distributed"},
    "training.sgd": LEAVES,
    "training.step": LEAVES | {"devices", "distributed", "layout", "world", "training.recipe", "training.sgd"},
    "training.captured": LEAVES | {"training.step"},
    "training.compact": LOOPS,
    "training.trainer": LOOPS
    | {f"training.{part}" for part in ("captured", "compact", "evaluation", "recipe", "step")},
    "reuse": LOOPS | {"files", "prune"},
    "files": {"errors"},
    "ownership": {"errors", "files"},
    "status": {"errors", "files", "ownership"},
    "store": LOOPS | {"files", "ownership", "status"},
    "sweeps": {"errors", "overrides"},
    "slurm": {"cli", "config", "errors", "ownership", "preemption", "status"},
    "preemption": {"errors", "second_signal"},
    "second_signal": set(),
    "tracking": LOOPS | {"files"},
    "summary": set(),
    "experiment": LOOPS
    | {
        "config",
        "mask_files",
        "operations",
        "paths",
        "prune",
        "reuse",
        "schedules",
        "store",
        "preemption",
        "status",
        "summary",
        "tracking",
        "training.recipe",
        "training.trainer",
        "checkpoints",
        "row",
    },
    "world": {"errors"},
    "replay": {"config", "errors", "status", "tracking"},
    "distributed": LEAVES | {"preemption", "world"},
    "checkpoints": LEAVES | {"world", "preemption", "prune", "store", "training.trainer"},
    "row": LOOPS | {"prune"},
    "report.cells": LEAVES,
    "report.comparison": {"report.cells"},
    "report.reading": {"errors", "status"},
    "report.evidence": {"report.cells"},
    "report.names": {"report.cells"},
    "report.plots": {"report.cells", "report.evidence", "report.names"},
    "report.svg": {"report.names", "report.plots"},
    "report.drawing": {"report.names", "report.plots"},
    "report.tables": {"files", "report.cells", "report.comparison", "report.names", "report.plots"},
    "report.page": {f"report.{part}" for part in ("cells", "comparison", "names", "plots", "svg", "tables")},
    "report.writing": {"errors", "files"}
    | {
        f"report.{part}"
        for part in ("cells", "comparison", "drawing", "evidence", "names", "page", "plots", "reading", "tables")
    },
    "export": LOOPS | {"signatures", "config", "files", "mask_files", "status", "summary"},
    "sketching": LEAVES | {"files"},
    "published.numbers": LEAVES,
    "published.verdicts": LEAVES,
    "published.matching": {"cli", "config", "errors", "published.numbers", "published.verdicts"},
    "published.pages": {"errors", "files", "published.matching", "published.numbers", "published.verdicts"},
    "throughput": LOOPS | {"experiment"},
    "cli": {
        "config",
        "overrides",
        "usage",
        "devices",
        "world",
        "errors",
        "experiment",
        "preemption",
        "slurm",
        "status",
        "summary",
        "sweeps",
    },
}

# The modules that may import an outside library.
DOORS = {
    "hydra": {"cli", "config", "experiment", "export", "sweeps", "overrides", "usage"},
    "omegaconf": {"cli", "config", "experiment", "export", "sweeps", "overrides", "usage"},
    "wandb": {"tracking"},
    "timm": {"models.timm_zoo"},
    "torchvision": {"data.cifar", "data.mnist", "data.tiny_imagenet"},
    "torchcodec": {"data.decode"},
    "PIL": {"data.decode"},
    "filelock": {"data.resident", "devices"},
    "safetensors": {"export", "files", "mask_files", "report.evidence", "reuse"},
    "torch_pruning": {"structure"},
    "tqdm": {"training.trainer"},
    "submitit": {"slurm"},
    "yaml": {"published.matching", "published.numbers", "report.names", "sweeps"},
    "scipy": {"published.verdicts", "report.comparison"},
    "matplotlib": {"report.drawing", "sketching"},
    "jinja2": {"report.page"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Dotted names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    found = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (ROOT / (node.module or "").replace(".", "/")).is_dir():  # a package of ours: its modules
                found += [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_flow_one_way(path: Path) -> None:
    name = name_of(path)
    if name.endswith("__init__"):
        assert path.read_text() == ""
        return
    allowed = ALLOWED[name if name in ALLOWED else name.split(".")[0]]
    ours = {module.removeprefix("pai_bench.") for module in imports(path) if module.startswith("pai_bench")}
    assert ours <= allowed, f"{name} imports {sorted(ours - allowed)}"


def test_the_package_does_without_its_benchmarks_and_tests() -> None:
    for path in MODULES:
        assert not {"benchmarks", "tests"} & {module.split(".")[0] for module in imports(path)}, path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_outside_libraries_have_one_door(path: Path) -> None:
    libraries = {module.split(".")[0] for module in imports(path)}
    for library, doors in DOORS.items():
        assert library not in libraries or name_of(path) in doors, f"{name_of(path)} imports {library}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    heavy = {"torchvision", "timm", "wandb", "safetensors", "torch_pruning", "matplotlib", "scipy", "jinja2"}
    assert not heavy & {module.split(".")[0] for module in imports(path, top_level_only=True)}


def test_every_module_has_a_purpose_in_its_docstring() -> None:
    for path in MODULES:
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_score_names_its_source() -> None:
    for path in (PACKAGE / "pruners").glob("[!_]*.py"):
        public = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
        assert public[0].name == "score"
        for function in public:
            text = ast.get_docstring(function) or ""
            assert "Reference: " in text and "arXiv:" in text and "Deviates: " in text, (path, function.name)


def test_no_file_is_called_something_or_other() -> None:
    vague = {"utils", "util", "helpers", "base", "common", "misc", "registry"}
    assert not [path for path in MODULES if path.stem in vague]
