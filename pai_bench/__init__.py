"""Lottery tickets and pruning at initialization: `import pai_bench as pb`. docs/library.md shows how to use it.

Nothing is imported before it is asked for, so that the package and its command line start fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pai_bench.api.attaching import attach
    from pai_bench.api.pruning import prune
    from pai_bench.api.results import load
    from pai_bench.api.running import run, sweep
    from pai_bench.api.summarizing import summary

    __version__: str

__all__ = ["__version__", "attach", "load", "prune", "run", "summary", "sweep"]

_MODULES = {
    "attach": "attaching",
    "load": "results",
    "prune": "pruning",
    "run": "running",
    "summary": "summarizing",
    "sweep": "running",
    "__version__": "version",
}


def __getattr__(name: str) -> Any:
    """A public function, imported when it is asked for first."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    found = getattr(import_module(f"pai_bench.api.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
