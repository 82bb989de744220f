"""Prepares in one folder what a machine without a network needs: wheels, the code, datasets, and how to use them.

  python scripts/prepare_offline.py FOLDER
  python scripts/prepare_offline.py FOLDER dataset=cifar10 model=resnet20 training=cifar_lottery
  python scripts/prepare_offline.py FOLDER dataset=imagenet dataset.root=/data/imagenet dataset.store=256

Run it with the version of Python, and on the kind of system, of that machine. Torch and torchvision are left out unless
you say --with-torch: such a machine has them as its GPU needs them. Call it again for another dataset.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pai_bench.errors import ConfigError, UserError
from pai_bench.launch import compose, terminal

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("parts", "test")  # of pyproject.toml; torchcodec needs one version of torch, and PIL decodes without it
OF_TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.+")

README = """What is here: wheels/ for Python {python}, code/, and data/ where a dataset was asked for.

    python -m venv --system-site-packages env      # sees the torch of the machine
    env/bin/pip install --no-index --no-deps wheels/*.whl
    cd code
    PAI_DATA=$PWD/../data ../env/bin/python run.py {words}pruner=synflow sparsity=0.98 tracker=none
    ../env/bin/python -m pytest tests/test_captured*.py tests/test_gpu_*.py
    ../env/bin/python -m benchmarks --gpu --json ../gpu.json      # eight minutes; the file is written as it goes

The machine needs torch and torchvision: {torch}.
"""


def requirements(file: Path) -> list[str]:
    """What the package and its parts require, by its pyproject.toml."""
    project = tomllib.loads(file.read_text())["project"]
    extras, found = project["optional-dependencies"], list(project["dependencies"])
    waiting = list(PARTS)
    while waiting:
        for required in extras[waiting.pop()]:
            own = re.fullmatch(r"pai_bench\[(.*)\]", required)
            if own:
                waiting += own[1].split(",")
            else:
                found.append(required)
    return found


def resolved(required: Sequence[str], options: Sequence[str]) -> list[str]:
    """Every package that these need, with its version, what these need in turn included.

    Raises:
        UserError: pip finds no such packages.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip("install", "--dry-run", "--ignore-installed", "--report", str(report), *options, *required)
        found = json.loads(report.read_text())["install"]
    return [f"{one['metadata']['name']}=={one['metadata']['version']}" for one in found]


def wheels(required: Sequence[str], folder: Path, options: Sequence[str], with_torch: bool) -> list[str]:
    """Puts the wheels of these packages, and of all that they need, into a folder. Returns names and versions."""
    pinned = resolved(required, options)
    if not with_torch:
        pinned = [one for one in pinned if not OF_TORCH.fullmatch(one.partition("==")[0].lower())]
    folder.mkdir(parents=True, exist_ok=True)
    # "wheel" and not "download": of some packages there is no wheel, so one is built here.
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *options, *pinned)
    return pinned


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", words[0], "--quiet", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise UserError(f"pip {words[0]} failed: {lines[-1]}")


def copy_code(folder: Path) -> None:
    """Copies the files of this repository, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise UserError(f"{ROOT}: git cannot list its files; run this in a clone of the repository")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def prepare_data(words: Sequence[str], folder: Path) -> None:
    """Fetches a dataset into a folder, and checks it."""
    import torch

    from pai_bench import assembly

    run = compose.compose(["tracker=none", *words, "download=true", f"data_dir={folder}"])
    data = assembly.load_data(run, torch.device("cpu"))
    print(f"{run.dataset.name} is ready: checksum {data.checksum}")


def main() -> None:
    """Prepares the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to carry there")
    parser.add_argument("dataset", nargs="*", help="dataset=NAME, model=, training=, and their settings")
    parser.add_argument("--with-torch", action="store_true", help="wheels of torch, too: gigabytes")
    parser.add_argument("--find-links", metavar="DIR", help="take wheels from this folder and from no network")
    arguments = parser.parse_intermixed_args()
    terminal.start_process()
    with terminal.one_line_errors():
        words, folder = arguments.dataset, arguments.folder.expanduser().absolute()
        if wrong := [word for word in words if not re.match(r"(dataset|model|training)[.=]", word)]:
            raise ConfigError(f"{wrong[0]}: give dataset=, model=, training= or a setting of theirs")
        options = ["--no-index", "--find-links", arguments.find_links] if arguments.find_links else []
        pinned = wheels(requirements(ROOT / "pyproject.toml"), folder / "wheels", options, arguments.with_torch)
        print(f"{len(pinned)} wheels are in {folder / 'wheels'}")
        copy_code(folder / "code")
        if any(word.startswith("dataset") for word in words):
            prepare_data(words, folder / "data")
        text = README.format(
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            words="".join(f"{word} " for word in words),
            torch="their wheels are here" if arguments.with_torch else "their wheels are not here",
        )
        (folder / "README.txt").write_text(text)
        print(f"{folder / 'README.txt'} says how to use it")


if __name__ == "__main__":
    main()
