"""Weights that layers share: a state dict has them under the name of each layer."""

from torch import nn

from pai_bench.core import State


def by_first_names(model: nn.Module, state: State) -> State:
    """The state with every shared tensor as it is under its first name, which is the one that masks go by.

    What replaces weights by name changes one entry alone, and a model that loads the state takes the last.
    """
    first: dict[int, str] = {}
    same = dict(state)
    for name, tensor in model.state_dict(keep_vars=True).items():
        same[name] = state[first.setdefault(id(tensor), name)]
    return same
