"""The channels of a network: which layers write them and which read them, traced by torch-pruning."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from pai_bench.analysis.mode import mode
from pai_bench.core import Shape
from pai_bench.errors import ConfigError

# How often a search may look at the dependencies of a node, on average. DenseNet-121 takes 3; ResNeSt-14 takes 6, and
# half a minute.
_LOOKS = 20


def _torch_pruning() -> ModuleType:
    """The library, imported without timm, which takes two seconds: the library only asks how timm counts some layers.

    Raises:
        ConfigError: it is not installed.
    """
    hidden = "torch_pruning" not in sys.modules and "timm" not in sys.modules
    if hidden:
        sys.modules["timm"] = None  # type: ignore[assignment]  # now its import fails, which the library expects
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        if error.name != "torch_pruning":
            raise
        raise ConfigError(
            "channels are followed by torch-pruning, which is not installed: pip install torch-pruning, or choose a "
            "pruner of single weights (PHEW and filters need it)"
        ) from error
    finally:
        if hidden:
            del sys.modules["timm"]


class _Bounded(list[Any]):
    """The dependencies of a node. It counts how often they are looked at, because some searches never end.

    Raises:
        _EndlessError: the search has looked too often.
    """

    def __init__(self, dependencies: list[Any], graph: "Graph") -> None:
        super().__init__(dependencies)
        self._graph = graph

    def __iter__(self) -> Iterator[Any]:
        self._graph.steps_left -= 1
        if self._graph.steps_left < 0:
            raise _EndlessError("the search for what goes with a channel does not come to an end")
        return super().__iter__()


class _EndlessError(Exception):
    """A search does not end, because channels are split and joined in rings."""


class Graph:
    """The channels of a network: which layers write them and which weights read them.

    Raises:
        ConfigError: they cannot be traced.
    """

    def __init__(self, model: nn.Module, input_shape: Shape) -> None:
        tp = _torch_pruning()
        self.model, self.steps_left = model, sys.maxsize
        self.names = {module: name for name, module in model.named_modules()}
        self._check_shared()
        parameter = next(model.parameters())
        image = torch.zeros((1, *input_shape), device=parameter.device, dtype=parameter.dtype)
        was_training = {module: module.training for module in model.modules()}
        wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            for parameter in filter(Tensor.is_floating_point, wanted):
                parameter.requires_grad_(True)  # channels are traced by gradients, which frozen layers have none of
            with _disable_current_modes():  # a counter of a score's work must not count the tracing
                self.graph = tp.DependencyGraph().build_dependency(model.eval(), example_inputs=image, verbose=False)
        except Exception as error:
            raise self._untraceable(error) from error
        finally:
            for module, training in was_training.items():
                module.training = training
            for parameter, wants in wanted.items():
                parameter.requires_grad_(wants)
        for node in self.graph.module2node.values():
            node.dependencies = _Bounded(node.dependencies, self)

    def _check_shared(self) -> None:
        """Refuses weights that two layers share: what one of them could spare, the other may need."""
        owners: dict[nn.Parameter, str] = {}
        for module, name in self.names.items():
            for parameter in module.parameters(recurse=False):
                if (owner := owners.setdefault(parameter, name)) != name:
                    raise ConfigError(
                        f"the channels of {type(self.model).__name__} cannot be traced ({owner} and {name} share a "
                        "weight); prune weights instead of filters"
                    )

    def _untraceable(self, error: Exception) -> ConfigError:
        reason = str(error) if isinstance(error, _EndlessError) else f"{type(error).__name__}: {error}"
        return ConfigError(
            f"the channels of {type(self.model).__name__} cannot be traced ({reason}); prune weights instead of filters"
        )

    def group(self, module: nn.Module, channels: list[int] | None = None) -> Any:
        """The group of layers that share the output channels of a module.

        Raises:
            ConfigError: the search for it does not end, or fails.
        """
        chosen = list(range(self.graph.get_out_channels(module))) if channels is None else channels
        handler = self.graph.get_pruner_of_module(module).prune_out_channels
        self.steps_left = _LOOKS * len(self.graph.module2node)
        try:
            return self.graph.get_pruning_group(module, handler, chosen)
        except Exception as error:
            raise self._untraceable(error) from error
        finally:
            self.steps_left = sys.maxsize

    def by_channel(self, module: nn.Module, indices: Sequence[int]) -> Tensor:
        """The entries that belong to each output channel of a module: (channels, entries of each).

        Raises:
            ConfigError: the channels are shared out among layers.
        """
        number = self.graph.get_out_channels(module)
        if len(indices) % number:
            raise ConfigError(
                f"{self.names[module]} of {type(self.model).__name__} shares its channels out among layers, which "
                "cannot be followed; prune weights instead of filters"
            )
        return torch.tensor(list(indices)).view(number, -1)

    @torch.no_grad()
    def check_flattening(self, writer: nn.Module, reader: nn.Module, columns: Tensor, input_shape: Shape) -> None:
        """Refuses a flattened map whose channels do not lie next to each other, as behind `permute(0, 2, 3, 1)`.

        Args:
            writer: a layer whose output channels run into the map.
            reader: the linear layer that reads the flattened map.
            columns: (channels, n), where the entries of each channel should lie among the features of the reader.

        Raises:
            ConfigError: the channels lie otherwise.
        """
        half, noise = len(columns) // 2, torch.Generator().manual_seed(0)
        if half == 0 or columns.shape[1] == 1:
            return
        seen: list[Tensor] = []

        def disturb(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            if seen:  # in the second pass
                output = output.clone()
                output[:, :half] += torch.randn(output[:, :half].shape, generator=noise).to(output)
            return output

        hooks = [
            writer.register_forward_hook(disturb),
            reader.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, -2))),
        ]
        parameter = next(self.model.parameters())
        image = torch.randn((1, *input_shape), generator=noise).to(parameter)
        try:
            with mode(self.model, training=False), _disable_current_modes():
                for _ in range(2):
                    self.model(image)
        finally:
            for hook in hooks:
                hook.remove()
        before, after = seen[0], seen[-1]
        inside = torch.zeros(before.shape[1], dtype=torch.bool, device=before.device)
        inside[columns[:half].flatten().to(before.device)] = True
        changed = before != after
        # Later layers and gates, as of squeeze and excitation, may change other channels, but then these change too.
        untouched = ~changed & (before != 0)
        if changed[:, ~inside].any() and untouched[:, inside].any():
            raise ConfigError(
                f"{type(self.model).__name__} flattens a map so that the channels of {self.names[writer]} do not lie "
                f"next to each other in {self.names[reader]}, which cannot be followed; prune weights by another pruner"
            )

    def following(self, module: nn.Module) -> Iterator[nn.Module]:
        """The norms and depthwise convolutions that only this module's output runs through, up to the next layer."""
        node, seen = self.graph.module2node[module], set()
        while node not in seen and len(node.outputs) == 1 and len(node.outputs[0].inputs) == 1:
            seen.add(node)
            node = node.outputs[0]
            if isinstance(node.module, _BatchNorm) or is_depthwise(node.module):
                yield node.module
            elif node.module in self.names:  # a layer that mixes channels
                return


def is_depthwise(module: object) -> bool:
    """Whether a module is a convolution in which every output channel reads its own input channel alone."""
    return isinstance(module, nn.Conv2d) and module.groups == module.out_channels == module.in_channels > 1


def has_norm_over_channels(group: Any) -> bool:
    """Whether a group runs into a norm that mixes channels: then a channel that is zero changes the others."""
    for dependency, _ in group:
        module = dependency.target.module
        known = not isinstance(module, nn.Module) or isinstance(module, (nn.Conv2d, nn.Linear, _BatchNorm))
        if not known and next(module.parameters(recurse=False), None) is not None:
            return True
    return False


def writers_and_readers(group: Any) -> tuple[list[nn.Module], list[tuple[nn.Module, list[int]]]]:
    """The layers that write the channels of a group, and the layers that read them, each with its input channels."""
    writers: list[nn.Module] = []
    readers: list[tuple[nn.Module, list[int]]] = []
    for dependency, indices in group:
        module = dependency.target.module
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not is_depthwise(module):
            if dependency.handler.__name__ == "prune_in_channels":
                readers.append((module, list(indices)))
            else:
                writers.append(module)
    return writers, readers
