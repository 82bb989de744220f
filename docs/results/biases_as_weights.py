"""LeNet-300-100 whose biases are weights: each layer has one more input, which is always 1. So biases are pruned.

With this folder on PYTHONPATH it takes the place of the network of a run:

    pai-bench ... model=lenet300 model._target_=biases_as_weights.lenet300 model.name=lenet300_biases
"""

from torch import nn

from pai_bench.core import Counts, Shape
from pai_bench.models.initialization import Init, initialize_


def lenet300(input_shape: Shape, num_classes: int, *, hidden: Counts, init: Init) -> nn.Module:
    """The network of `model=lenet300`. A bias is drawn and scored as the weights of its layer are."""
    channels, height, width = input_shape
    layers: list[nn.Module] = [nn.Flatten()]
    num_in = channels * height * width
    for num_out in (*hidden, num_classes):
        layers += [nn.ConstantPad1d((0, 1), 1.0), nn.Linear(num_in + 1, num_out, bias=False), nn.ReLU()]
        num_in = num_out
    return initialize_(nn.Sequential(*layers[:-1]), init)
