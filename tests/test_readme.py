"""The README tells the truth: its commands compose, its tables are complete, its example method passes as written."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import CONF, ROOT, options
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench import cli, config, masks
from pai_bench.core import Batches, Subnetwork

README = (ROOT / "README.md").read_text()
JOINED = README.replace("\\\n", "")  # commands of several lines
COMMANDS = sorted(
    set(re.findall(r"^    (?:python|torchrun [-=\w]+) run\.py(.*)$", JOINED, re.M))
    | set(re.findall(r"`python run\.py([^`]*)`", README))
)
# The others name a folder that a run made, or the example method, which is run below.
COMPOSED = [command for command in COMMANDS if "-cp" not in command and "gradient_power" not in command]
FLAGS = {"-m", "--help", "--cfg", "job", "--resolve"}


@pytest.mark.parametrize("command", COMPOSED)
def test_commands_compose(command: str) -> None:
    overrides = [word for word in shlex.split(command, comments=True) if word not in FLAGS]
    cfgs, _ = cli.expand(overrides)
    assert all(config.run_id(cfg) for cfg in cfgs)


def test_there_are_commands() -> None:
    assert len(COMPOSED) >= 6


METHODS = ["pruner", "allocation", "schedule", "ablation"]


@pytest.mark.parametrize("group", [*METHODS, "model", "dataset", "training"])
def test_tables_list_every_option(group: str) -> None:
    section = "Methods" if group in METHODS else "Models and datasets"
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
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = config.complete(
            compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "pruner=gradient_power", "sparsity=0.9"])
        )
    module: ModuleType = importlib.import_module("gradient_power")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    net = Subnetwork(model, masks.full(model), {}, (3, 8, 8))
    scores = module.score(net, batches, F.cross_entropy, Generator(), power=cfg["pruner"]["score"]["power"])
    F.cross_entropy(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])).backward()
    torch.testing.assert_close(scores["0.weight"], model[0].weight.grad.abs())
    sys.modules.pop("gradient_power")


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python scripts/prepare_data\.py ([^`\n]*)", README))))
def test_datasets_to_prepare_exist(command: str) -> None:
    dataset, *_ = shlex.split(command)
    assert dataset in options("dataset")


@pytest.mark.parametrize("command", re.findall(r"python scripts/throughput\.py ([^`\n]*)", README))
def test_runs_to_measure_compose(command: str) -> None:
    assert cli.compose(shlex.split(command))
