"""A network behind torch.compile."""

import torch
from torch import Tensor, nn

from pai_bench.errors import ConfigError

_LIMITS = ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit")
_MANY_GRAPHS = 4096


def _allow_many_graphs() -> None:
    """Lifts torch's limits on how often it compiles one function, which all networks of a family share in a process.

    Beyond a limit (8 by default) torch would go on without compiling.
    """
    from torch._dynamo import config

    for name in _LIMITS:  # the names have changed from version to version
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), _MANY_GRAPHS))


class Compiled:
    """The forward and backward pass of a network as torch.compile makes them, for batches of a few fixed shapes.

    Every new shape is compiled anew, which takes seconds. Call the network itself for a batch of a rare shape.
    """

    def __init__(self, net: nn.Module) -> None:
        _allow_many_graphs()
        # With dynamic shapes, the second shape would replace fast code for the first by slower code for any.
        self._function = torch.compile(net, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """The logits.

        Raises:
            ConfigError: torch cannot compile the network here.
        """
        from torch._dynamo.exc import TorchDynamoException  # imports torch._dynamo, which takes a second

        try:
            logits: Tensor = self._function(images)
        except TorchDynamoException as error:
            if images.is_cuda and torch.cuda.is_current_stream_capturing():
                raise  # the failure is that of the capture, and there is a way without
            reason = " ".join(str(error).split("\n")[:2]).strip()
            raise ConfigError(f"compile=true: torch.compile fails here ({reason}); use compile=false") from error
        return logits
