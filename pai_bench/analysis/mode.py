"""Train and eval mode of a network, for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Runs a block with the network in train or eval mode. Afterwards each module is in its own mode again.

    A network with a `train` of its own decides itself, as in training: some leave their norms in eval mode.
    """
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training
