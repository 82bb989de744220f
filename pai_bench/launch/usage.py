"""The text of `pai-bench --help`: the groups with their options, and every setting."""

from pathlib import Path
from string import Template
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from pai_bench.config import schema
from pai_bench.config.composition import CONF
from pai_bench.launch import overrides

# What can be done besides runs: pai-bench COMMAND.
COMMANDS = sorted(path.stem for path in (Path(__file__).parents[1] / "commands").glob("[a-z]*.py"))

_HELP = """\
pai_bench: pruning at initialization and lottery tickets, one run or a sweep of them.

  pai-bench pruner=synflow sparsity=0.98
  pai-bench -m dataset=cifar10 model=vgg16 training=cifar pruner=snip,synflow compression=10,100 'seed=range(3)'

Other commands: $COMMANDS. See pai-bench COMMAND -h.

Choose one option of each group (group=option):

$GROUPS
Set any value (key=value); sparsity=, density= and compression= are three ways to say one thing:

$CONFIG
Show the config of a run and exit: --cfg job --resolve     Hydra's own flags: --hydra-help
"""


def text(words: list[str], loader: ConfigLoaderImpl, resolve: bool) -> str:
    """The help of a command line.

    Args:
        words: the overrides of the command line.
        loader: knows the folders of configs.
        resolve: whether settings that refer to other settings show the resolved values.

    Raises:
        ConfigError: a word is wrong.
    """
    with overrides.explained(words, loader):
        composed = loader.load_configuration("config", words, RunMode.RUN)
    with open_dict(composed):
        del composed["hydra"]
    # Hydra's own list of groups is slower: it reads every file twice.
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    lines = "".join(f"{group}: {', '.join(loader.get_group_options(group))}\n" for group in groups)
    settings: Any = OmegaConf.to_container(composed, resolve=resolve)
    config = OmegaConf.to_yaml(OmegaConf.create(schema.ordered(settings)))
    return Template(_HELP).substitute(COMMANDS=", ".join(COMMANDS), GROUPS=lines, CONFIG=config)
