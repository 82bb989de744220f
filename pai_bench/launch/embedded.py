"""Composing configs inside another program, which may use Hydra itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pai_bench.errors import ConfigError, UserError
from pai_bench.launch.terminal import one_line


@contextmanager
def embedded() -> Iterator[None]:
    """Runs a block as if nobody else used Hydra, and then gives Hydra back to the program that does.

    Raises:
        UserError: what the block raises, without the pages of Hydra's errors that led to it.
    """
    current, of_hydra = GlobalHydra.instance(), ConfigStore.instance().repo["hydra"]
    before, defaults = current.hydra, of_hydra["config.yaml"]  # which composition.register replaces
    current.hydra = None
    try:
        yield
    except UserError as error:
        error.__cause__, error.__suppress_context__ = None, True
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from None
    finally:
        GlobalHydra.instance().hydra, of_hydra["config.yaml"] = before, defaults
