"""The README and the pages in docs/ tell the truth: their commands compose, tables are complete, examples run."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import CONF, ROOT, options
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import save_file
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench import errors
from pai_bench.config import checks, composition
from pai_bench.core import Batches, Subnetwork
from pai_bench.launch import compose
from pai_bench.masks import masks

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXT = "\n".join([README, *DOCS.values()])
JOINED = TEXT.replace("\\\n", "")  # commands of several lines
COMMANDS = sorted(
    set(re.findall(r"^    (?:[A-Z_]+=\S+ )?(?:python|torchrun [-=\w]+) run\.py(.*)$", JOINED, re.M))
    | set(re.findall(r"`python run\.py([^`]*)`", TEXT))
)
# The others name a folder that a run made, or the example method, which is run below.
COMPOSED = [command for command in COMMANDS if "-cp" not in command and "gradient_power" not in command]
FLAGS = {"-m", "--help", "--cfg", "job", "--resolve"}


@pytest.fixture
def files_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands name: a run, a ticket, somebody's own yaml."""
    (tmp_path / "results" / "NAME").mkdir(parents=True)
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "results" / "NAME" / "mask.safetensors")
    torch.save({"weight_orig": torch.ones(2, 2), "weight_mask": torch.ones(2, 2)}, tmp_path / "ticket.pt")
    (tmp_path / "conf" / "pruner").mkdir(parents=True)
    (tmp_path / "conf" / "pruner" / "snip_1000.yaml").write_text(example("configuration.md", "snip_1000"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(page: str, word: str) -> str:
    """The yaml on a page that holds a word."""
    (found,) = (text for text in re.findall(r"```yaml\n(.*?)```", DOCS[page], re.S) if word in text)
    return str(found)


@pytest.mark.parametrize("command", COMPOSED)
def test_commands_compose(command: str, files_that_are_named: Path) -> None:
    command = command.replace("/home/me", str(files_that_are_named))
    overrides = [word for word in shlex.split(command, comments=True) if word not in FLAGS]
    # All runs of every experiment are composed in a test of their own.
    cfgs, _ = compose.expand(overrides, lambda jobs: [jobs[0], jobs[-1]])
    assert all(cfg.id for cfg in cfgs)


def test_there_are_commands() -> None:
    assert len(COMPOSED) >= 6


METHODS = ["pruner", "allocation", "schedule", "ablation"]


@pytest.mark.parametrize("group", ["pruner", "model", "dataset", "training"])
def test_tables_list_every_option(group: str) -> None:
    section = "Methods" if group == "pruner" else "Models and datasets"
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    words = set(re.findall(r"[\w.]+", " ".join(re.findall(r"`([^`]*)`", text))))
    assert set(options(group)) - {"none"} <= words


def test_the_example_method_runs_as_written(tmp_path: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    yaml = re.search(r"```yaml\n(.*?)```", README, re.S)
    assert code and yaml
    (tmp_path / "gradient_power.py").write_text(code[1])
    (tmp_path / "pruner").mkdir()
    # In its place the function would be pai_bench.pruners.gradient_power; here it lies in a folder of its own.
    text = yaml[1].replace("pai_bench.pruners.", "")
    (tmp_path / "pruner" / "gradient_power.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    composition.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"hydra.searchpath=[file://{tmp_path}]", "pruner=gradient_power", "sparsity=0.9"]
        cfg = checks.complete(composition.resolved(hydra_compose("config", words)))
    module: ModuleType = importlib.import_module("gradient_power")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    net = Subnetwork(model, masks.full(model), {}, (3, 8, 8))
    scores = module.score(net, batches, F.cross_entropy, Generator(), power=cfg.pruner.score["power"])
    F.cross_entropy(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])).backward()
    torch.testing.assert_close(scores["0.weight"], model[0].weight.grad.abs())
    sys.modules.pop("gradient_power")


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python scripts/prepare_data\.py ([^`\n]*)", TEXT))))
def test_datasets_to_prepare_exist(command: str) -> None:
    dataset, *_ = shlex.split(command)
    assert dataset in options("dataset")


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python scripts/throughput\.py ([^`\n]*)", TEXT))))
def test_runs_to_measure_compose(command: str) -> None:
    assert compose.compose(shlex.split(command))


def test_scripts_that_are_named_exist() -> None:
    named = set(re.findall(r"python (scripts/\w+\.py)", TEXT))
    assert named and not [script for script in named if not (ROOT / script).is_file()]


# The pages in docs/ ---------------------------------------------------------------------------------------------------


def table(page: str) -> dict[str, list[str]]:
    """The rows of all tables on a page, by each of the words in their first cell; | within a cell is written \\|."""
    rows = {}
    for line in DOCS[page].splitlines():
        if line.startswith("| "):
            cells = [cell.strip().replace("\0", "|") for cell in line.strip("|").replace("\\|", "\0").split("|")]
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells)
    return rows


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
    for group, option in (("training", "digits"), ("tracker", "wandb")):
        settings |= leaves(yaml.safe_load((CONF / group / f"{option}.yaml").read_text()), group)
    for name, value in settings.items():
        if name.endswith((".name", "._target_")):
            continue
        assert name in page, f"{name} is on no row"
        if name != "data_dir":
            assert yaml.safe_load(page[name][1]) == value, (name, value, page[name])


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


def test_pages_link_to_places_on_pages_that_exist() -> None:
    for target, place in re.findall(r"\]\((\w+\.md)#([-\w]+)\)", TEXT):
        headings = {
            re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", DOCS[target], re.M)
        }
        assert place in headings, (target, place)
