"""One attempt at a run: its log, and the status that it leaves whatever its end."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from pai_bench.config.schema import RunConfig
from pai_bench.errors import ConfigError, LostWorkerError, OwnedError, PreemptedError, UserError
from pai_bench.runs.directory import NullRunDirectory, RunDirectory
from pai_bench.system import preemption

log = logging.getLogger(__name__)


@contextmanager
def attempt(config: RunConfig, device: torch.device, files: RunDirectory | NullRunDirectory) -> Iterator[None]:
    """One attempt at a run inside the block; whatever its end, the status says so."""
    handler = files.start_log()
    try:
        try:
            with preemption.last_words(partial(files.status, "preempted", exit_code=PreemptedError.exit_code)):
                yield
        except KeyboardInterrupt as error:  # in a process that does not note signals
            raise PreemptedError(f"{files.path.name} was interrupted; the same command goes on with it") from error
        except LostWorkerError as error:
            if preemption.requested():
                raise PreemptedError(f"{files.path.name} was preempted; the same command goes on with it") from error
            raise
    except ConfigError as refusal:
        if files.saved:  # a later round was refused: what was done before is kept
            _note_failure(files, refusal, refusal)
        else:
            _stop(handler)  # NFS keeps a folder with an open file
            files.discard()
        raise
    except (PreemptedError, OwnedError) as error:
        log.info("%s", error)
        if isinstance(error, PreemptedError):
            files.status("preempted", exit_code=error.exit_code)
        raise
    except BaseException as failure:
        explained = _explained(failure, config, device)
        _note_failure(files, failure, explained)
        if explained is failure:
            raise
        raise explained from failure
    finally:
        _stop(handler)


def _stop(handler: logging.Handler) -> None:
    """Closes a log. It may be closed already."""
    logging.getLogger("pai_bench").removeHandler(handler)
    handler.close()


def _note_failure(files: RunDirectory | NullRunDirectory, failure: BaseException, explained: BaseException) -> None:
    """Keeps the traceback in the log and the reason in the status."""
    log.debug("%s", failure, exc_info=True)
    if not isinstance(explained, UserError):
        explained.add_note(f"the traceback is in {files.path / 'run.log'}")
    try:
        code = getattr(explained, "exit_code", 1)
        files.status("failed", exit_code=code, error=f"{type(explained).__name__}: {explained}")
    except OSError as unwritable:
        log.warning("%s: the status could not be written: %s", files.path, unwritable)


def _explained(error: BaseException, config: RunConfig, device: torch.device) -> BaseException:
    """A failure in words that name a remedy, where there is one."""
    # What torch, the C++ library and safetensors say when they get no memory, and what oneDNN says.
    unallocated = any(words in str(error) for words in ("allocate memory", "bad_alloc", "PyObject pointer is null"))
    unallocated |= str(error) == "could not create a primitive"
    if unallocated or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        sizes = f"training.batch_size={config.training.batch_size}"
        if config.pruner.scoring_data:
            sizes += f" or pruner.scoring_data.batch_size={config.pruner.scoring_data.batch_size}"
        return UserError(f"out of memory on {device}: lower {sizes}, or run fewer at once")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"results_dir={config.results_dir}: {error.filename or 'a file'} could not be written ({error.strerror}); "
            "make room, or lift the limit; the same command goes on from the last checkpoint"
        )
    return error
