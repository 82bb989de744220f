"""The package as pip installs it: it runs from any folder, without the repository."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import CONF, ROOT
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the repository, because building leaves files behind."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the tests do not lie in a git repository")
    names = [name for name in listed.stdout.split("\n") if name and os.path.lexists(ROOT / name)]
    tar = subprocess.run(["tar", "-c", *names], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x"], cwd=copy, input=tar.stdout, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    built = subprocess.run([*command, str(copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def installed(site: Path, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """What the installed command does in a folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA"))}
    environment = kept | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(site / "bin" / "pai-bench"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_has_every_config_and_nothing_of_the_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"pai_bench/conf/{path.relative_to(CONF)}" for path in CONF.rglob("*.yaml")}
    assert len(configs) > 140 and configs <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pai_bench").rglob("*.py")}
    data = {f"pai_bench/{name}" for name in ("py.typed", "report/page.html", "report/page.css", "report/page.js")}
    papers = {str(path.relative_to(ROOT)) for path in (ROOT / "pai_bench" / "published" / "papers").iterdir()}
    assert modules | data | papers <= names
    assert {name.split("/")[0] for name in names} == {"pai_bench", "hydra_plugins", "pai_bench-0.1.0.dist-info"}


def test_an_installed_package_runs_in_any_folder(site: Path, tmp_path: Path) -> None:
    small = ["model=lenet300", "training.epochs=1", "tracker=none", "device=cpu"]
    done = installed(site, tmp_path, "pruner=snip", "sparsity=0.9", *small)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "results").glob("digits-lenet300-snip-*/result.json"))) == 1
    swept = installed(site, tmp_path, "-m", "pruner=magnitude,random", "sparsity=0.5", *small)
    assert swept.returncode == 0 and "2 done, 0 skipped, 0 failed" in swept.stdout
    counted = installed(site, tmp_path, "status", "results")
    assert counted.stdout == "3 runs: 3 finished\n"


def test_an_installed_package_finds_the_yaml_of_its_user(site: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "pruner").mkdir(parents=True)
    text = (CONF / "pruner" / "snip.yaml").read_text()
    (tmp_path / "conf" / "pruner" / "mine.yaml").write_text(text.replace("name: snip", "name: mine"))
    small = ["model=lenet300", "training.epochs=1", "tracker=none", "device=cpu"]
    done = installed(site, tmp_path, "--config-dir", "conf", "pruner=mine", "sparsity=0.9", *small)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "results").glob("digits-lenet300-mine-*/result.json"))) == 1


def test_a_word_that_is_no_command_is_one_line(site: Path, tmp_path: Path) -> None:
    done = installed(site, tmp_path, "raport", "results")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("config error: raport: there is no such command (did you mean report?); choose from ")
    assert done.stderr.count("\n") == 1


def pins(name: str) -> dict[str, str]:
    """The versions in a file of constraints."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def bounds() -> dict[str, tuple[str, str | None]]:
    """The lower and the upper bound of every library that a run or a test needs."""
    extras = PROJECT["optional-dependencies"]
    needed = [
        *PROJECT["dependencies"],
        *(line for name in extras if name not in ("dev", "docs") for line in extras[name]),
    ]
    found = {}
    for line in needed:
        if "[" in line:
            continue
        name, _, rest = line.partition(">=")
        low, _, high = rest.partition(",<")
        found[name] = (low, high or None)
    return found


def test_the_oldest_libraries_of_the_tests_are_the_lower_bounds() -> None:
    oldest = pins("constraints-oldest.txt")
    newer = {"torchcodec", *of_tests()}  # releases of torchcodec go with newer releases of torch
    for name, (low, _) in bounds().items():
        if name not in newer:
            number = [int(part) for part in low.split(".")]
            assert [int(part) for part in oldest[name].split(".")] == number + [0] * (3 - len(number)), name


def of_tests() -> set[str]:
    """The libraries that only the tests need."""
    return {line.partition(">=")[0] for line in PROJECT["optional-dependencies"]["test"]}


def plain(name: str) -> str:
    """The name of a library, as pip compares names."""
    return name.lower().replace("_", "-")


def test_the_pinned_environment_has_every_library_within_its_bounds() -> None:
    pinned = {plain(name): Version(version) for name, version in pins("constraints.txt").items()}
    for name, (low, high) in bounds().items():
        assert Version(low) <= pinned[plain(name)], name
        assert high is None or pinned[plain(name)] < Version(high), name


def test_every_library_of_a_run_has_an_upper_bound() -> None:
    without = {name for name, (_, high) in bounds().items() if high is None}
    assert without == {"torchcodec", *of_tests()}


def test_the_citation_has_the_version_and_the_licence_of_the_package() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in text and f"\nlicense: {PROJECT['license']}\n" in text
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
