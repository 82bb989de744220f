"""Runs and sweeps from Python, in this process."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pai_bench import experiment
from pai_bench.api.isolation import process_settings, untouched
from pai_bench.errors import ConfigError, PreemptedError, UserError
from pai_bench.launch import compose, overrides, terminal
from pai_bench.launch.embedded import embedded
from pai_bench.runs import status
from pai_bench.system import devices

log = logging.getLogger(__name__)

Overrides = str | Sequence[str]


def run(*settings: Overrides) -> dict[str, Any]:
    """Does one run, as the command line does with these words, and returns its row. It prints how far it is.

    A run that is finished is not done again: its row is returned. One that was interrupted goes on.

    Args:
        settings: words of the command line, such as "pruner=snip", one by one or as a list. Folders are as seen from
            the present one: results go to results/.

    Returns:
        The row, as in result.json (docs/results.md).

    Raises:
        ConfigError: a setting is wrong; nothing was written.
        UserError: and its kinds, for what you can mend. The run directory has the traceback.

    Example:
        >>> row = pai_bench.run("pruner=snip", "sparsity=0.9")
    """
    words = _words(settings)
    with embedded():
        swept = next((o.input_line for o in overrides.parsed(words) if o.is_sweep_override()), None)
    if swept or any(word.startswith("experiment=") for word in words):
        raise ConfigError(f"{swept or 'experiment='}: these are several runs; use pai_bench.sweep")
    with _in_process():
        with embedded():
            config = compose.compose(words)
        return experiment.run(config)


def sweep(*settings: Overrides) -> list[dict[str, Any]]:
    """Does every run of a sweep, one after another, and returns their rows. A run that fails does not end it.

    What failed is said at the end, and is done when the same sweep is called again.

    Args:
        settings: words of the command line, with several values as in "pruner=snip,synflow" or "seed=range(3)", or
            "experiment=NAME".

    Returns:
        The rows of the runs that are finished, now or before, in the order of the sweep, each once.

    Raises:
        ConfigError: a setting is wrong; no run was started.
        PreemptedError: Ctrl-C or another signal came; the same sweep goes on from the checkpoint.

    Example:
        >>> rows = pai_bench.sweep("pruner=snip,synflow", "sparsity=0.9,0.98")
    """
    words = _words(settings)
    with _in_process():
        with embedded():
            found, _ = compose.expand(words)
        configs = list({config.id: config for config in found}.values())
        rows, failed = [], []
        num_finished = 0
        for number, config in enumerate(configs, start=1):
            log.info("run %d of %d", number, len(configs))
            num_finished += status.finished_and_clean(config.directory) is not None
            try:
                rows.append(experiment.run(config))
            except PreemptedError:
                raise
            except Exception as error:
                reason = terminal.one_line(error)
                failed.append(f"{config.id}: {reason}")
                log.error("failed: %s", reason)
            gc.collect()  # a cycle of objects keeps the last run's tensors; the next run needs the memory
            devices.release()
        log.info("%d done, %d finished before, %d failed", len(rows) - num_finished, num_finished, len(failed))
        for line in failed:
            log.error("failed: %s", line)
        return rows


def _words(settings: Sequence[Overrides]) -> list[str]:
    """The words of a command line, out of words and lists of words.

    Raises:
        ConfigError: one is no text, is a flag, or chooses how the command line starts runs.
    """
    words: list[Any] = []
    for given in settings:
        words += given if isinstance(given, (list, tuple)) else [given]
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(f"{word!r}: give settings as on the command line, as in 'seed=1'")
        if word.startswith("-"):
            raise ConfigError(f"{word}: flags are for the command line; give settings, as in 'seed=1'")
        if word.startswith(("hydra/", "hydra.")) and not word.startswith("hydra.searchpath="):
            raise ConfigError(f"{word}: runs go one after another in this process; for others use the command line")
    return [compose.as_group(word) for word in words]


@contextmanager
def _in_process() -> Iterator[None]:
    """Shows what runs say, and leaves random states and the settings of torch and of the process as they were."""
    terminal.show_messages()
    try:
        with untouched(), process_settings():
            logging.raiseExceptions = False  # a line that cannot be written (full disk) must not hide the real failure
            yield
    except UserError as error:
        # The run directory has the traceback of what led to it.
        error.__cause__, error.__suppress_context__ = None, True
        raise
    finally:
        devices.release()
