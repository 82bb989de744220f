"""How much of a planted ticket a mask keeps."""

import torch

from pai_bench.core import Batches, Loss, Subnetwork
from pai_bench.errors import ConfigError
from pai_bench.masks import masks


def planted(net: Subnetwork, batches: Batches, loss: Loss) -> dict[str, float]:
    """Recall, the share of the planted weights that are kept; and precision, the share of the kept that are planted.

    They are equal where a mask keeps as many weights as were planted. A random mask has its density as recall, and the
    density of the ticket as precision.

    Raises:
        ConfigError: the model has no planted ticket, or its weights come from a file that has another or none.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153.
    """
    ticket = getattr(net.model, "ticket", None)
    if ticket is None:
        raise ConfigError("diagnostics=planted: no ticket is planted in this model; give model=planted")
    num_planted = num_found = 0
    for name, values in ticket.items():
        values = values.to(net.initial[name])
        place = values != 0
        if not torch.equal(net.initial[name][place], values[place]):
            raise ConfigError(
                f"diagnostics=planted: the weights of weights=FILE are not those of the planted ticket in {name}; "
                "leave weights= out, or give the initial weights of the same seed"
            )
        num_planted += masks.count(place)
        num_found += masks.count(place & net.mask[name])
    return {"planted/recall": num_found / num_planted, "planted/precision": num_found / masks.kept(net.mask)}
