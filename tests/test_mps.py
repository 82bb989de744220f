"""CUDA MPS around runs that share a GPU: a stand-in for its control program writes down what it is told."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pai_bench.system import mps

STAND_IN = """#!/bin/sh
echo "$* | $CUDA_MPS_PIPE_DIRECTORY | $CUDA_MPS_LOG_DIRECTORY | $(cat)" >> {told}
{more}
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a stand-in on the PATH; returns what makes it do more, and what it was told."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(mps, "_PROBE", "pass")
    program, told = tmp_path / "nvidia-cuda-mps-control", tmp_path / "told"

    def write(more: str = "") -> None:
        program.write_text(STAND_IN.format(told=told, more=more))
        program.chmod(0o755)

    write()
    return SimpleNamespace(
        write=write,
        remove=program.unlink,
        told=lambda: [[word.strip() for word in line.split("|")] for line in told.read_text().splitlines()],
    )


def test_the_daemon_lives_as_long_as_the_runs_in_folders_of_this_user(control: Any, tmp_path: Path) -> None:
    with mps.shared(8, 2) as started:
        assert started
        folders = [Path(os.environ[name]) for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")]
        assert control.told() == [["-d", *map(str, folders), ""]]
        assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
        assert folders[0].parent == folders[1].parent and tmp_path in folders[0].parents
    assert control.told()[1:] == [["", *map(str, folders), "quit -t 10"]]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ and "CUDA_MPS_LOG_DIRECTORY" not in os.environ
    assert not folders[0].parent.exists()


def test_the_daemon_ends_when_runs_fail(control: Any) -> None:
    with pytest.raises(KeyError), mps.shared(2, 1):
        raise KeyError
    assert control.told()[-1][-1] == "quit -t 10"
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


@pytest.mark.parametrize(("num_runs", "num_gpus"), [(4, 0), (1, 1), (4, 4)])
def test_runs_that_share_no_gpu_need_none(
    control: Any, num_runs: int, num_gpus: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with mps.shared(num_runs, num_gpus) as started:
        assert not started
    assert not (tmp_path / "told").exists() and not caplog.messages


def test_a_daemon_that_is_there_is_used(control: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/theirs")
    with mps.shared(4, 1) as started:
        assert not started and os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/theirs"
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/theirs" and not (tmp_path / "told").exists()


def test_where_there_is_none_one_line_says_why(
    control: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    control.write("echo 'no such device' >&2; exit 3")
    with mps.shared(4, 1) as started:
        assert not started and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    control.write()
    monkeypatch.setattr(mps, "_PROBE", "raise SystemExit(1)")
    with mps.shared(4, 1) as started:
        assert not started
    assert control.told()[-1][-1] == "quit -t 10"  # a daemon that nobody can use is ended
    control.remove()
    with mps.shared(4, 1) as started:
        assert not started
    beginning = "4 runs on 1 GPU(s) take turns, without CUDA MPS: "
    assert caplog.messages == [
        f"{beginning}nvidia-cuda-mps-control ended with 3 (no such device)",
        f"{beginning}a process that tried it could not use the GPU",
        f"{beginning}there is no nvidia-cuda-mps-control on the PATH",
    ]


@pytest.mark.parametrize(
    ("device", "n_jobs", "num_started"), [("auto", 3, 1), ("cuda", -1, 1), ("cpu", 3, 0), ("auto", 1, 0)]
)
def test_the_launcher_starts_it(
    control: Any, device: str, n_jobs: int, num_started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher._core")
    from hydra_plugins.pai_bench_plugins import parallel

    seen = []

    def launch(launcher: Any, tasks: Any, jobs: Any, index: int) -> list[str]:
        seen.append((launcher.joblib, tasks, jobs, index, "CUDA_MPS_PIPE_DIRECTORY" in os.environ))
        return ["done"]

    ended: list[bool] = []
    monkeypatch.setattr(parallel.ParallelLauncher, "_launch", launch)
    monkeypatch.setattr(parallel.ParallelLauncher, "_composed", lambda *_: None)
    monkeypatch.setattr(parallel, "_end_workers", lambda: ended.append(True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launcher = parallel.ParallelLauncher(n_jobs=n_jobs)
    launcher.setup(hydra_context=None, task_function=None, config=SimpleNamespace(device=device))  # type: ignore[arg-type]
    jobs = [["seed=0"], ["seed=1"]]
    assert launcher.launch(jobs, 5) == ["done"]
    assert seen == [({"n_jobs": n_jobs}, [[0], [1]], jobs, 5, num_started == 1)]
    assert len(ended) == num_started and (tmp_path / "told").exists() == bool(num_started)
