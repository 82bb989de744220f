"""What a run costs besides its work: fresh processes, and the runs of a sweep that need not be run."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import in_turn
from benchmarks.subjects import Setting
from benchmarks.table import Row
from pai_bench.config import composition
from pai_bench.launch import compose

_RUN = composition.CONF.parent / "run.py"
# Each takes a good part of a second, or more, to import.
_HEAVY = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "torchcodec",
    "timm",
    "wandb",
    "sklearn",
    "scipy",
    "pandas",
    "matplotlib",
    "torch_pruning",
    "submitit",
    "sympy",
)
# Next to no work (convolutions, however few, would take longer than all else): what is left is what every run costs.
_TINY = ("model=lenet300", "training.epochs=1", "training.batch_size=720", "tracker=none", "device=cpu")
# Runs run.py and ends its output with the heavy modules that were imported.
_WATCHED = f"""
import runpy, sys
sys.argv = [sys.argv[1], *sys.argv[2:]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *[name for name in {_HEAVY!r} if name in sys.modules])
"""
# The same sweep with Hydra's own sweeper, of runs that do nothing.
_BARE = f"""
import hydra
from pai_bench.config import composition
composition.register()
hydra.main(version_base="1.3", config_path={str(composition.CONF)!r}, config_name="config")(lambda cfg: None)()
"""


def _python(*arguments: str) -> tuple[float, str]:
    """Seconds of a fresh process, and what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA"))}
    environment["PYTHONPATH"] = str(_RUN.parent)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    took = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[-3:])} ended with {done.returncode}: {done.stderr[-500:]}")
    return took, done.stdout


def _imported(printed: str) -> list[str]:
    return printed.rpartition("imported:")[2].split()


def processes(setting: Setting) -> Iterator[Row]:
    """Help, and the smallest run on digits, against the import of torch."""
    with tempfile.TemporaryDirectory() as folder:
        number = 0
        imported = {}

        def run() -> float:
            nonlocal number
            number += 1  # another run every time, or it would be over at once
            took, printed = _python("-c", _WATCHED, str(_RUN), *_TINY, f"seed={number}", f"results_dir={folder}")
            imported["run"] = _imported(printed)
            return took

        def help_() -> float:
            took, printed = _python("-c", _WATCHED, str(_RUN), "--help")
            imported["help"] = _imported(printed)
            return took

        times = in_turn(
            {
                "torch": lambda: _python("-c", "import torch")[0],
                "bare": lambda: _python("-c", "import hydra, omegaconf")[0],
                "help": help_,
                "run": run,
            },
            1 if setting.quick else 5,
            warm_up=0 if setting.quick else 1,
        )
    yield Row(
        "run.py --help",
        times.seconds("help"),
        "s",
        exact="torch" not in imported["help"],
        time=times.seconds("help"),
        lower_bound=times.seconds("bare"),
        note=f"imports {_listed(imported['help'])}; the lower bound is Python and Hydra",
    )
    pairs = zip(times.taken["run"], times.taken["torch"], strict=True)
    beyond = sorted(run - torch for run, torch in pairs)
    yield Row(
        "smallest run on digits, beyond import torch",
        beyond[len(beyond) // 2],
        "s",
        target=1.0,
        goal=0.4,
        at_most=True,
        time=times.seconds("run"),
        lower_bound=times.seconds("torch"),
        note=f"imports {_listed(imported['run'])}; the lower bound is import torch",
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "nothing heavy"


def sweep(setting: Setting) -> Iterator[Row]:
    """Runs of a sweep that are finished already, against what Hydra alone does."""
    number = 3 if setting.quick else 40
    with tempfile.TemporaryDirectory() as folder:
        settings = [*_TINY, f"results_dir={folder}/results"]
        _python(str(_RUN), *settings)
        finished = compose.compose(settings).directory
        for seed in range(1, number + 1):  # the row of a run is read, whatever seed it says
            directory = compose.compose([*settings, f"seed={seed}"]).directory
            directory.mkdir()
            shutil.copy(finished / "result.json", directory)
        bare = Path(folder) / "bare.py"
        bare.write_text(_BARE)

        # The sweeper of Hydra knows no scale of experiments.
        hydras_own = ["~scale", "hydra/sweeper=basic", f"hydra.sweep.dir={folder}/swept"]

        def jobs(seeds: int) -> str:
            return f"seed={','.join(map(str, range(1, seeds + 1)))}"

        def each(script: Path, *more: str) -> float:
            """Seconds of a run more."""
            long, _ = _python(str(script), "-m", *more, jobs(number))
            short, _ = _python(str(script), "-m", *more, jobs(1))
            return (long - short) / (number - 1)

        times = in_turn(
            {
                "ours": lambda: each(_RUN, *settings),
                "bare": lambda: each(bare, *hydras_own, *settings),
            },
            1 if setting.quick else 3,
            warm_up=0,
        )
    yield Row(
        "finished run of a sweep, over Hydra composing it",
        times.ratio("bare", "ours"),
        time=times.seconds("ours"),
        note=f"{number} runs of one sweep; the time is for one of them",
    )
