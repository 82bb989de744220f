"""The README and the pages in docs/ tell the truth: their commands compose, tables are complete, examples run."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONF, ROOT, composed, options
from safetensors.torch import save_file
from test_architecture import ROOMS

from pai_bench import errors
from pai_bench.__main__ import main
from pai_bench.core import Call
from pai_bench.launch import compose
from pai_bench.launch.usage import COMMANDS
from pai_bench.published import numbers
from pai_bench.report.configurations import Configuration

README = (ROOT / "README.md").read_text()
PAGES = ROOT / "docs"
DOCS = {path.relative_to(PAGES).as_posix(): path.read_text() for path in sorted(PAGES.rglob("*.md"))}
TEXT = "\n".join([README, *DOCS.values()])
# Commands may have several lines. Those of adding.md choose its examples: test_adding.py runs them.
JOINED = "\n".join([README, *(text for name, text in DOCS.items() if name != "adding.md")]).replace("\\\n", "")
RUN = rf"(?:pai-bench|python run\.py|torchrun [-=\w]+ -m pai_bench)(?! (?:{'|'.join(COMMANDS)})\b)"
RUNS = sorted(
    set(re.findall(rf"^    (?:[A-Z_]+=\S+ )?{RUN}( .*|)$", JOINED, re.M))
    | set(re.findall(rf"`{RUN}( [^`]*|)`", JOINED))
)
COMPOSED = [command for command in RUNS if "-cp" not in command]  # the others name a folder that a run made
FLAGS = {"-m", "--help", "--cfg", "job", "--resolve"}


@pytest.fixture
def files_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands name: a run, a ticket, somebody's own yaml."""
    (tmp_path / "results" / "NAME").mkdir(parents=True)
    for name in ("mask", "model"):
        save_file({"weight": torch.ones(2, 2)}, tmp_path / "results" / "NAME" / f"{name}.safetensors")
    torch.save({"weight_orig": torch.ones(2, 2), "weight_mask": torch.ones(2, 2)}, tmp_path / "ticket.pt")
    (tmp_path / "conf" / "pruner").mkdir(parents=True)
    (tmp_path / "conf" / "pruner" / "snip_1000.yaml").write_text(example("configuration.md", "snip_1000"))
    (tmp_path / "conf" / "pruner" / "scaled_magnitude.yaml").write_text(example("tutorial.md", "scaled_magnitude"))
    (tmp_path / "my_pruners").mkdir()
    (code,) = re.findall(r"```python\n(.*?)```", DOCS["tutorial.md"], re.S)
    (tmp_path / "my_pruners" / "scaled_magnitude.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(page: str, word: str) -> str:
    """The yaml on a page that holds a word."""
    (found,) = (text for text in re.findall(r"```yaml\n(.*?)```", DOCS[page], re.S) if word in text)
    return str(found)


@pytest.mark.parametrize("command", COMPOSED)
def test_commands_compose(command: str, files_that_are_named: Path) -> None:
    command = command.replace("/home/me", str(files_that_are_named))
    command = re.sub(r"--config-dir (\S+)", r"'hydra.searchpath=[file://\1]'", command)
    overrides = [word for word in shlex.split(command, comments=True) if word not in FLAGS]
    if "hydra/sweeper=optuna" in overrides:  # which settings it tries shows in the search; here, the first values
        overrides = [re.sub(r"tag\(log,interval\((.*?),.*", r"\1", word) for word in overrides if "sweeper" not in word]
    # All runs of every experiment are composed in a test of their own.
    cfgs, _ = compose.expand(overrides, lambda jobs: [jobs[0], jobs[-1]])
    assert all(cfg.id for cfg in cfgs)


def test_there_are_commands() -> None:
    assert len(COMPOSED) >= 6


METHODS = ["pruner", "allocation", "schedule", "ablation"]
# Where the tables of a group are: the page, and how the titles of the sections begin.
TABLES = {
    "pruner": ("methods.md", "Scores"),
    "model": ("models.md", "Models"),
    "dataset": ("models.md", "Datasets"),
    "training": ("models.md", "Training recipes"),
}


@pytest.mark.parametrize("group", ["pruner", "model", "dataset", "training"])
def test_tables_list_every_option(group: str) -> None:
    page, section = TABLES[group]
    text = "\n".join(part for part in DOCS[page].split("\n## ") if part.startswith(section))
    words = set(re.findall(r"[\w.]+", " ".join(re.findall(r"`([^`]*)`", "\n".join(rows_of(text))))))
    assert set(options(group)) - {"none"} <= words


def rows_of(text: str) -> list[str]:
    """The first cells of the tables in a text."""
    return [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]


def given_to(command: str) -> list[str]:
    """What pages give to a command of pai-bench."""
    return sorted(set(re.findall(rf"pai-bench {command}(?![-\w])([^`\n#]*)", JOINED)))


@pytest.mark.parametrize("words", given_to("data"))
def test_datasets_to_prepare_exist(words: str) -> None:
    assert not shlex.split(words) or shlex.split(words)[0] in options("dataset")


@pytest.mark.parametrize("words", given_to("throughput"))
def test_runs_to_measure_compose(words: str) -> None:
    assert compose.compose(shlex.split(words))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_flags_that_pages_give_them(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert given_to(command), f"no page names pai-bench {command}"
    monkeypatch.setattr(sys, "argv", ["pai-bench", command, "-h"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert said.startswith(f"usage: pai-bench {command}")
    known = set(re.findall(r"(?<![-\w])--?[a-z][-\w]*", said))
    for arguments in given_to(command):
        given = set(re.findall(r"(?<!\S)--?[a-z][-\w]*", arguments))
        assert given <= known, given - known


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkout_has_a_door_to_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "-h"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / f"{command}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {command}.py")


# The pages in docs/ ---------------------------------------------------------------------------------------------------


def table(page: str) -> dict[str, list[str]]:
    """The rows of all tables on a page, by each of the words in their first cell; | within a cell is written \\|."""
    rows = {}
    for line in DOCS[page].splitlines():
        if line.startswith("| "):
            cells = [cell.strip().replace("\0", "|") for cell in line.strip("|").replace("\\|", "\0").split("|")]
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells)
    return rows


def test_the_page_of_rewires_has_every_option() -> None:
    assert set(options("rewire")) <= set(re.findall(r"\w+", " ".join(rows_of(DOCS["rewiring.md"]))))


def test_the_page_of_transfers_has_every_option() -> None:
    assert set(options("transfer")) <= set(table("transfer.md"))


@pytest.mark.parametrize("group", METHODS)
def test_the_page_of_methods_has_every_option(group: str) -> None:
    assert set(options(group)) <= set(re.findall(r"`(\w+)`", DOCS["methods.md"]))
    missing = set(options(group)) - set(table("methods.md"))
    assert not missing, f"no row in a table for {missing}"


def test_the_page_of_methods_gives_the_defaults_of_allocations_and_schedules() -> None:
    for group in ("allocation", "schedule"):
        for option in options(group):
            file = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
            given = {k: v for k, v in file.items() if k not in ("name", "_target_", "defaults") and v is not None}
            row = " ".join(table("methods.md")[option])
            for key, value in given.items():
                assert f"`{key}" in row or option == "lr_rewind" or key == "rewind_weights", (option, key)
                if f"`{key}=" in row:
                    shown = re.findall(rf"`{key}=([^`]+)`", row)
                    assert any(yaml.safe_load(text) == value for text in shown), (option, key, value, shown)


def leaves(node: Any, *path: str) -> dict[str, Any]:
    """The values of a config by their dotted keys."""
    if isinstance(node, dict) and node:
        return {name: value for key, item in node.items() for name, value in leaves(item, *path, key).items()}
    return {".".join(path): node}


def test_the_page_of_configuration_has_every_setting_with_its_default() -> None:
    page = table("configuration.md")
    file = yaml.safe_load((CONF / "config.yaml").read_text())
    settings = leaves({key: value for key, value in file.items() if key != "defaults"})
    for group, option in (
        ("training", "digits"),
        ("training/optimizer", "sgd"),
        ("training/optimizer", "sgd_nesterov"),
        ("training/optimizer", "adamw"),
        ("tracker", "wandb"),
    ):
        settings |= leaves(yaml.safe_load((CONF / group / f"{option}.yaml").read_text()), group.replace("/", "."))
    for name, value in settings.items():
        if name.endswith((".name", "._target_", ".defaults")):
            continue
        assert name in page, f"{name} is on no row"
        if name != "data_dir":
            assert yaml.safe_load(page[name][1]) == value, (name, value, page[name])


@pytest.mark.parametrize("option", options("tracker"))
def test_the_page_of_trackers_has_every_tracker(option: str) -> None:
    assert f"\n| `tracker={option}` |" in DOCS["tracking.md"]


def test_the_page_of_configuration_has_the_settings_of_a_search() -> None:
    page = table("configuration.md")
    for name, value in yaml.safe_load((CONF / "hydra" / "sweeper" / "optuna.yaml").read_text()).items():
        assert name == "_target_" or yaml.safe_load(page[f"hydra.sweeper.{name}"][1].strip("`")) == value, name


@pytest.mark.parametrize("option", options("training/optimizer"))
def test_the_page_of_configuration_has_the_settings_of_an_optimizer(option: str) -> None:
    page, target = table("configuration.md"), composed(f"training/optimizer={option}").training.optimizer
    assert isinstance(target, Call)
    assert f"`{option}`" in page["training/optimizer="][1]
    for name in target.settings:
        assert f"`{option}`" in page[f"training.optimizer.{name}"][2], name


@pytest.mark.parametrize("option", sorted(set(options("search")) - {"none"}))
def test_the_page_of_learned_masks_has_every_search_and_its_settings(option: str) -> None:
    page = table("learned.md")
    assert option in page
    for name, value in leaves(yaml.safe_load((CONF / "search" / f"{option}.yaml").read_text()), "search").items():
        if not name.endswith((".name", "._target_", ".defaults")):
            shown = f"{value:f}".rstrip("0") if isinstance(value, float) and value < 0.01 else str(value)
            row = " ".join(page[name][1:])
            assert (shown.lower() if isinstance(value, bool) else shown) in row or name == "search.label", (name, value)


@pytest.mark.parametrize("group", ["dataset", "model"])
def test_the_page_of_configuration_has_the_settings_of_a_group(group: str) -> None:
    named = set(table("configuration.md"))
    for option in options(group):
        for name in leaves(yaml.safe_load((CONF / group / f"{option}.yaml").read_text()), group):
            key = ".".join(name.split(".")[: 3 if ".init." in name else 2])
            assert key in named or key in (f"{group}.{word}" for word in ("name", "_target_", "defaults")), (
                option,
                name,
            )


def test_the_page_of_clusters_has_the_settings_of_slurm() -> None:
    page = table("cluster.md")
    for key, value in yaml.safe_load((CONF / "hydra" / "launcher" / "slurm.yaml").read_text()).items():
        if key not in ("_target_", "nodes", "tasks_per_node"):
            assert yaml.safe_load(page[key][1].strip("`")) == value, key
    assert {"nodes", "tasks_per_node"} <= set(page)


def test_the_page_of_clusters_has_every_exit_code() -> None:
    codes = set(map(int, re.findall(r"^\| (\d+) \|", DOCS["cluster.md"], re.M)))
    raised = {value.exit_code for value in vars(errors).values() if hasattr(value, "exit_code")}
    assert codes == raised | {0, 130}


def test_the_sweep_in_a_file_on_the_page_of_configuration_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(example("configuration.md", "MULTIRUN"))
    cfgs, _ = compose.expand([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert len({cfg.id for cfg in cfgs}) == (3 * 2 - 1) * 3
    assert {cfg.dataset.name for cfg in cfgs} == {"cifar10"}


def test_the_readme_counts_published_numbers_and_experiments() -> None:
    published = numbers.read(numbers.PAPERS)
    papers = {number.table.paper for number in published}
    said = re.search(
        r"([\d,]+) numbers of (\w+) papers; runs can be compared with ([\d,]+)", README.replace("\n  ", " ")
    )
    assert said
    assert said[1] == f"{len(published):,}" and said[2] == {16: "sixteen"}[len(papers)]
    assert said[3] == f"{sum(number.table.recipe is not None for number in published):,}"
    texts = [path.read_text() for path in (CONF / "experiment").glob("*.yaml")]
    of_papers = sum("# Reproduced  no paper" not in text for text in texts)
    assert f"{of_papers} of the {len(texts)} files" in README


def test_the_python_on_the_page_of_results_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS["results.md"], re.S)
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["configurations"](names["status"].read(Path("results")), "last") == []
    known = {*Configuration.__dataclass_fields__, *vars(Configuration)}
    shown = re.findall(r"found\.(\w+)", code)
    assert shown and set(shown) <= known


def test_pages_link_to_places_on_pages_that_exist() -> None:
    for target, place in re.findall(r"\]\((\w+\.md)#([-\w]+)\)", TEXT):
        headings = {
            re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", DOCS[target], re.M)
        }
        assert place in headings, (target, place)


# The page on the architecture -----------------------------------------------------------------------------------------

ARCHITECTURE = DOCS["architecture.md"]


def reachable(room: str) -> set[str]:
    """The rooms that a room may import, and those that these may, and so on."""
    return ROOMS[room].union(*(reachable(other) for other in ROOMS[room]))


def test_the_table_of_rooms_is_the_one_that_is_held() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.*)\|$", ARCHITECTURE, re.M)
    assert {room: set(re.findall(r"`(\w+)`", allowed)) for room, _, allowed in rows} == ROOMS
    assert len(rows) == len(ROOMS) and all(said.strip() for _, said, _ in rows)


def test_the_picture_of_the_rooms_has_every_arrow_that_does_not_follow_from_others() -> None:
    drawn = re.findall(r"^    (\w+) --> (\w+)$", ARCHITECTURE, re.M)
    needed = {
        (room, other)
        for room, allowed in ROOMS.items()
        for other in allowed
        if not any(other in reachable(third) for third in allowed - {other})
    }
    assert len(drawn) == len(set(drawn)) and set(drawn) == needed


def test_functions_and_types_of_the_architecture_exist() -> None:
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", ARCHITECTURE)
    assert len(named) > 25
    for file, name in named:
        defined: dict[str, ast.AST] = {}
        for node in ast.parse((ROOT / "pai_bench" / file).read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                defined[node.name] = node
                defined |= {f"{node.name}.{inner.name}": inner for inner in node.body if hasattr(inner, "name")}
            elif isinstance(node, ast.Assign):
                defined |= {ast.unparse(target): node for target in node.targets}
        assert name in defined, (file, name)


def test_the_architecture_is_short() -> None:
    assert len(ARCHITECTURE.splitlines()) <= 160


def test_paths_that_are_named_exist() -> None:
    """Pages may leave out pai_bench/ before the files there."""
    of_adding = set(re.findall(r"^`(\S+)`$", DOCS["adding.md"], re.M))
    named = set(re.findall(r"`((?:[\w.]+/)*\w+(?:\.(?:py|yaml|md)|/))(?:: [\w.]+)?`", TEXT))
    places = (ROOT, ROOT / "pai_bench", ROOT / "docs")
    missing = {path for path in named - of_adding if not any((place / path).exists() for place in places)}
    assert len(named) > 60 and missing <= NOT_OURS, missing - NOT_OURS


# What a run or a report makes, and what a user has.
NOT_OURS = {
    "my_pruners/scaled_magnitude.py",
    "conf/pruner/scaled_magnitude.yaml",
    "config.yaml",
    "data/",
    "results/",
    "tables/",
    "figures/",
    "wandb/",
    "tensorboard/",
    "results/NAME/tensorboard/",
    "val/",
    "pai_bench/published/papers/NAME.yaml",
}
