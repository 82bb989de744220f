"""The house rules: who may import whom, and one door to each outside library."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "pai_bench"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Which rooms a room may import: a room is a folder of pai_bench or a file beside them. All may import core, batches and
# errors.
# Nobody imports pruners and models: a yaml's _target_ reaches them. Nobody imports api, either.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "batches": set(),
    "errors": set(),
    "system": set(),
    "masks": set(),
    "analysis": {"masks", "system"},
    "pruners": {"analysis", "masks", "system"},
    "models": set(),
    "data": {"system"},
    "pruning": {"analysis", "masks", "system"},
    "rewiring": {"analysis", "masks", "system"},
    "training": {"rewiring", "analysis", "masks", "system"},
    "learned": {"training", "masks", "system"},
    "config": {"learned", "training", "masks", "system"},
    "runs": {"training", "pruning", "analysis", "masks", "config", "system"},
    "assembly": {"runs", "training", "pruning", "analysis", "masks", "config", "system"},
    "learning": {"assembly", "runs", "training", "pruning", "learned", "masks", "system"},
    "search": {"learning", "assembly", "runs", "training", "pruning", "config", "system"},
    "experiment": {"search", "assembly", "runs", "training", "pruning", "analysis", "masks", "config", "system"},
    "launch": {"experiment", "assembly", "runs", "training", "config", "masks", "system"},
    "report": {"runs", "system"},
    "published": {"launch", "config", "system"},
    "studies": {"analysis", "masks", "system"},
    "commands": {"launch", "assembly", "data", "masks", "published", "report", "runs", "studies", "config", "system"},
    "api": {"launch", "experiment", "assembly", "runs", "pruning", "analysis", "masks", "config", "data", "system"},
    "__main__": {"commands", "launch"},
}

# The modules that may import an outside library.
_WORDS = ("compose", "embedded", "names", "overrides", "sweeps", "terminal", "usage")
DOORS = {
    "hydra": {"config.composition", *(f"launch.{file}" for file in ("cli", *_WORDS))},
    "omegaconf": {"config.composition", *(f"launch.{file}" for file in ("cli", *_WORDS))},
    "wandb": {"runs.wandb_run"},
    "timm": {"models.timm_zoo"},
    "torchvision": {"data.cifar", "data.mnist", "data.tiny_imagenet"},
    "torchcodec": {"data.decode"},
    "PIL": {"data.decode"},
    "filelock": {"data.locks", "system.devices"},
    "safetensors": {
        "runs.export",
        "runs.pictures",
        "system.files",
        "masks.mask_files",
        "report.evidence",
        "system.cache",
    },
    "torch_pruning": {"analysis.graph"},
    "tqdm": {"training.trainer"},
    "submitit": {"launch.slurm", "launch.slurm_scripts"},
    "optuna": {"launch.search"},
    "huggingface_hub": {"runs.hub"},
    "yaml": {"published.matching", "published.numbers", "report.names", "launch.sweeps"},
    "scipy": {"published.verdicts", "report.comparison"},
    "matplotlib": {"report.drawing", "studies.sketching_figure"},
    "jinja2": {"report.page"},
    "pandas": {"api.results"},
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


def of_ours(path: Path) -> set[str]:
    """The modules of the package that a file imports, by their names below it."""
    names = {name_of(module) for module in MODULES}
    found = set()
    for module in imports(path):
        name = module.removeprefix("pai_bench.")
        if module.startswith("pai_bench."):
            found.add(name if name in names else name.rpartition(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_import_what_the_table_says(path: Path) -> None:
    room = name_of(path).partition(".")[0]
    if path == PACKAGE / "__init__.py":  # shows the functions of api, and imports one when it is asked for
        assert set(imports(path, top_level_only=True)) == {"typing"}
        assert {name.partition(".")[0] for name in of_ours(path)} == {"api"}
        return
    if path.name == "__init__.py":
        assert path.read_text() == ""
        return
    allowed = ROOMS[room] | {room, "core", "batches", "errors"}
    others = {name for name in of_ours(path) if name.partition(".")[0] not in allowed}
    assert not others, f"{name_of(path)} imports {sorted(others)}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way through a graph that comes back to where it began; none if there is no such way."""
    done: set[str] = set()

    def walked(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        found = next((found for other in sorted(graph[node]) if (found := walked(other, [*way, node]))), [])
        done.add(node)
        return found

    return next((found for node in sorted(graph) if (found := walked(node, []))), [])


def test_neither_files_nor_rooms_import_each_other_in_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle(ROOMS) == []
    assert circle({name_of(path): of_ours(path) for path in MODULES}) == []


def test_every_room_has_its_line_in_the_table() -> None:
    assert {name_of(path).partition(".")[0] for path in MODULES} - {"__init__"} == set(ROOMS)


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
    heavy = {
        "torchvision",
        "timm",
        "wandb",
        "safetensors",
        "torch_pruning",
        "matplotlib",
        "scipy",
        "jinja2",
        "optuna",
        "huggingface_hub",
        "pandas",
    }
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
