"""CUDA MPS: lets processes that share a GPU compute at the same time. Without it they take turns."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pai_bench.system import files

log = logging.getLogger(__name__)

_CONTROL = "nvidia-cuda-mps-control"
_PIPE, _LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_PATIENCE = 60  # seconds that a program may take
_PROBE = "import torch; torch.zeros(1, device='cuda').sum().item()"


@contextmanager
def shared(num_runs: int, num_gpus: int) -> Iterator[bool]:
    """Inside the block, processes that are started share the GPUs by MPS, where several runs share a GPU.

    The daemon is of this block alone: its pipes lie in a folder that only this user can enter. A daemon that the
    environment names already is used as it is. One log line says where there is no daemon to be had.

    Yields:
        Whether a daemon was started.
    """
    if num_gpus == 0 or num_runs <= num_gpus or _PIPE in os.environ:
        yield False
        return
    ours = files.private_folder(Path(tempfile.gettempdir()) / f"pai_bench-{os.getuid()}")
    folder = Path(tempfile.mkdtemp(prefix="mps-", dir=ours))
    names = {_PIPE: str(folder / "pipe"), _LOG: str(folder / "log")}
    try:
        for name in names.values():
            Path(name).mkdir(mode=0o700)
        problem = _started(names)
        if problem is not None:
            log.info("%d runs on %d GPU(s) take turns, without CUDA MPS: %s", num_runs, num_gpus, problem)
            yield False
            return
        os.environ |= names
        try:
            yield True
        finally:
            for name in names:
                os.environ.pop(name, None)
            if (problem := _ended(names)) is not None:
                log.info("the CUDA MPS daemon of %s was not ended: %s", folder, problem)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _started(names: dict[str, str]) -> str | None:
    """Starts the daemon. Returns why no process can use it; None if one can."""
    program = shutil.which(_CONTROL)
    if program is None:
        return f"there is no {_CONTROL} on the PATH"
    problem = _told([program, "-d"], "", names)
    if problem is None and _told([sys.executable, "-c", _PROBE], "", names) is not None:
        _ended(names)
        return "a process that tried it could not use the GPU"
    return problem


def _ended(names: dict[str, str]) -> str | None:
    """Ends the daemon. Returns why that failed; None if it did not."""
    return _told([_CONTROL], f"quit -t {_PATIENCE // 6}\n", names)


def _told(words: list[str], spoken: str, names: dict[str, str]) -> str | None:
    """Calls a program. Returns why it failed; None if it did not."""
    program = Path(words[0]).name
    try:
        with tempfile.TemporaryFile() as said:  # no pipe: the daemon would keep it open
            done = subprocess.run(
                words,
                input=spoken.encode(),
                stdout=said,
                stderr=said,
                env=os.environ | names,
                timeout=_PATIENCE,
                check=False,
            )
            said.seek(0)
            text = said.read().decode(errors="replace").strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}: {error}"
    return None if done.returncode == 0 else f"{program} ended with {done.returncode} ({text})"
