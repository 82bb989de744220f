"""The documentation as a site: every page has its place, what is made from the code is whole, and it builds."""

import ast
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import CONF, ROOT, options
from test_readme import DOCS, README, example, table

from pai_bench import experiment
from pai_bench.errors import is_installed
from pai_bench.launch import compose

_SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "site" / "hooks.py")
assert _SPEC and _SPEC.loader
sys.path.append(str(ROOT / "docs" / "site"))  # as mkdocs does: graph.py lies beside the hooks
hooks: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hooks)
MADE: dict[str, str] = hooks.pages()
TUTORIAL = DOCS["tutorial.md"].replace("\\\n", "")  # a command is one line


def navigation() -> list[str]:
    """The pages in the navigation of the site."""
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/name:", "")
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, str):
            found.append(node)
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
            walk(inner)

    walk(yaml.safe_load(text)["nav"])
    return found


def test_every_page_has_its_place_in_the_navigation() -> None:
    pages = navigation()
    assert len(pages) == len(set(pages))
    assert set(pages) == set(DOCS) | {name for name in MADE if "/" not in name}


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    if not (is_installed("mkdocs") and is_installed("mkdocstrings")):
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pip install" in (tmp_path / "index.html").read_text()
    assert "PreemptedError" in (tmp_path / "api" / "errors.html").read_text()
    assert not list(tmp_path.rglob("*.py"))
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(pages) > 40
    for path, page in pages.items():  # it can be read and searched from disk, without a network
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=.?(?:https?:)?//|<link[^>]*stylesheet[^>]*//", page), (
            path
        )
    assert 'class="graph"' in pages[tmp_path / "architecture.html"] and "graph TD" not in "".join(pages.values())


def test_what_builds_the_site_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(re.fullmatch(r"[-\w\[\]]+>=[\d.]+,<\d+", line) for line in project["optional-dependencies"]["docs"])


# Pages that are made --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", "a whole number, 0 or more"),
        ("num_workers", "a whole number, 0 or more or null"),
        ("diagnostics", "`gradient_flow`, `planted`"),
        ("sparsity", "a number or null"),
        ("mask_file.names", "exact, order"),
        ("training.label_smoothing", "a number, in [0, 1)"),
        ("training.optimizer.beta1", "a number, in [0, 1)"),
        ("dataset.validation", "a number, in [0, 1)"),
        ("cache_gb", "a number, 0 or more"),
        ("no.such.setting", ""),
    ],
)
def test_the_values_that_a_setting_takes_are_those_of_the_code(key: str, values: str) -> None:
    assert hooks.takes(key) == values


def test_the_page_of_settings_has_every_setting_of_the_page_of_configuration_and_its_values() -> None:
    rows = [line for line in MADE["settings.md"].splitlines() if line.startswith("| `")]
    _, section, _ = hooks.parted(DOCS["configuration.md"], "Every setting")
    assert len(rows) == len(re.findall(r"^\| `", section, re.M)) > 60
    without = {re.findall(r"`([^`]+)`", row)[0] for row in rows if not re.split(r"(?<!\\)\|", row)[2].strip()}
    assert without <= {"dataset.name", "model.init.conv", "model.init.norm"}, without


def test_the_page_of_options_has_every_yaml() -> None:
    files = [path for path in CONF.rglob("*.yaml") if path.parent not in (CONF, CONF / "experiment")]
    assert len(files) > 90
    for path in files:
        assert path.read_text().rstrip() in MADE["options.md"], path
    headings = re.findall(r"^## (\S+)=$", MADE["options.md"], re.M)
    assert headings == hooks.groups() and headings[:3] == ["model", "dataset", "training"]


def test_sections_that_are_pages_leave_their_page() -> None:
    class Page:
        class file:  # noqa: N801
            src_uri = "results.md"

    assert "| `test_top1` |" in MADE["columns.md"]
    left = hooks.on_page_markdown(DOCS["results.md"], Page)
    assert "| `test_top1` |" not in left and "(columns.md)" in left and "## Making a report" in left


def test_a_graph_is_drawn_with_all_its_boxes_and_arrows() -> None:
    (text,) = re.findall(r"```mermaid\n(.*?)```", DOCS["architecture.md"], re.S)
    names, arrows = hooks.graph.read(text)
    assert len(arrows) == text.count("->") > 20
    picture = ElementTree.fromstring(hooks.graph.svg(text, "a graph"))
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    boxes = {}
    for box, label in zip(picture.iter("rect"), picture.iter("text"), strict=True):
        left, top, wide, high = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        boxes[label.text] = left, top, left + wide, top + high
        assert left >= 0 and top >= 0 and left + wide <= width and top + high <= height
    assert list(boxes) == names
    for a, b in itertools.combinations(boxes.values(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], "boxes lie on each other"
    paths = [path for path in picture if path.tag == "path"]
    for (first, second, label), path in zip(arrows, paths, strict=True):
        points = [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attrib["d"])]
        (x, y), (u, v) = points[0], points[-1]
        start, end = boxes[first], boxes[second]
        assert y == start[3] and start[0] < x < start[2], (first, second)
        assert v == end[1] and end[0] < u < end[2], (first, second)
        assert path.attrib["class"] == ("dotted" if label else "arrow")
        for name, (left, top, right, bottom) in boxes.items():
            inside = [(x, y) for x, y in points if left < x < right and top < y < bottom]
            assert not inside, (first, second, name)


@pytest.mark.parametrize("text", ["graph TD\n    a ==> b\n", "graph TD\n    a --> b\n    b --> a\n"])
def test_a_graph_that_cannot_be_drawn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="arrow"):
        hooks.graph.svg(text, "a graph")


# Pages that people write ----------------------------------------------------------------------------------------------


def messages() -> str:
    """Every text in the code, with a gap where a value stands."""
    found = []
    for path in (ROOT / "pai_bench").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("%s", "\0")


def test_the_messages_on_the_page_of_troubles_are_those_of_the_code() -> None:
    known = messages()
    blocks = re.findall(r"```text\n(.*?)```", DOCS["troubleshooting.md"], re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 15
    for line in lines:
        said = re.sub(r"^(config error|data error|error|owned|preempted): ", "", line)
        pieces = [
            piece.strip(" :")
            for piece in re.split(r"[A-Z]{3,}|\(did you mean|=?0\.9|=\w+|\?\)|\bcuda\b|\bwandb\b", said)
            if len(piece) > 7
        ]
        assert pieces, line
        for piece in pieces:
            assert piece in known, (line, piece)


def test_the_glossary_is_in_order() -> None:
    words = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", DOCS["glossary.md"], re.M)[2:]
    assert len(words) > 60 and all(said.strip().endswith((".", ")")) for _, said in words)
    names = [word.lower() for word, _ in words]
    assert names == sorted(set(names))


def test_the_tutorial_says_how_many_runs_its_sweep_has() -> None:
    (command,) = re.findall(r"^    pai-bench -m (.*dense,random.*)$", TUTORIAL, re.M)
    cfgs, _ = compose.expand(command.split())
    assert f"These are {len({cfg.id for cfg in cfgs})} runs" in DOCS["tutorial.md"]


def test_the_pruner_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS["tutorial.md"], re.S)
    for path, text in {
        "my_pruners/__init__.py": "",
        "my_pruners/scaled_magnitude.py": code,
        "conf/pruner/scaled_magnitude.yaml": example("tutorial.md", "scaled_magnitude"),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = re.findall(r"^    PYTHONPATH=\S+ pai-bench --config-dir \S+ (model.*)$", TUTORIAL, re.M)
    words = [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", *command.split(), "training.epochs=0", "device=cpu"]
    row = experiment.run(compose.compose([*words, "training.warmup_epochs=0", f"results_dir={tmp_path / 'results'}"]))
    assert row["pruner"] == "scaled_magnitude" and row["num_kept"] == round(row["num_prunable"] / 50)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 20
    for link in links:
        assert link.startswith(("https://img.shields.io/", "../../actions/")) or (ROOT / link).exists(), link


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    assert len(README.splitlines()) <= 130
    for picture in (ROOT / "docs" / "pictures").glob("how-sparse-*.png"):
        assert picture.stat().st_size < 100_000, picture


def test_the_numbers_of_the_readme_are_those_of_the_findings() -> None:
    _, _, section = README.partition("## Results so far")
    said = re.findall(r"([A-Za-z]+)(?: pruning| reaches)? (\d+\.\d) ± (\d+\.\d)", " ".join(section.split()))
    assert len(said) == 5
    lines = DOCS["findings.md"].partition("<!-- down to here -->")[0].splitlines()
    found = {cells[1].strip().lower(): cells[-2] for line in lines if len(cells := line.split("|")) > 5}
    for method, mean, deviation in said:
        numbers = re.findall(r"\d+\.\d+", found[method.lower()])
        assert [float(mean), float(deviation)] == pytest.approx([float(number) for number in numbers], abs=0.051)


def test_the_page_of_models_has_every_recipe_in_its_table() -> None:
    assert set(options("training")) <= set(table("models.md"))
