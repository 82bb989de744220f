"""The small networks of the lottery-ticket papers: LeNet-300-100, LeNet-5, and Conv-2, -4 and -6."""

from collections.abc import Sequence

from torch import Tensor, nn

from pai_bench.core import Counts, Shape
from pai_bench.models.initialization import Init, initialize_


class Plain(nn.Module):
    """Convolutions with max-pooling (optional), hidden linear layers, and the classifier. No norms."""

    def __init__(self, convolutions: Sequence[nn.Module], num_features: int, hidden: list[int], num_classes: int):
        super().__init__()
        layers: list[nn.Module] = [*convolutions, nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(num_features, width), nn.ReLU(inplace=True)]
            num_features = width
        self.layers = nn.Sequential(*layers, nn.Linear(num_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.layers(x)  # type: ignore[no-any-return]


def lenet300(input_shape: Shape, num_classes: int, *, hidden: Counts, init: Init) -> nn.Module:
    """A perceptron. LeNet-300-100 has the hidden layers [300, 100].

    Reference: LeCun et al. 1998; as in Frankle and Carbin 2019, arXiv:1803.03635.
    Deviates: none.
    """
    channels, height, width = input_shape
    return initialize_(Plain([], channels * height * width, hidden, num_classes), init)


def lenet5(input_shape: Shape, num_classes: int, *, init: Init, conv_relu: bool = True) -> nn.Module:
    """LeNet-5 with the widths of Caffe's: 5x5 convolutions with 20 and 50 channels, one hidden layer with 500 units.

    Args:
        conv_relu: whether a ReLU follows each convolution. In Caffe's there is one after the hidden layer alone.

    Reference: LeCun et al. 1998; without conv_relu as in the code of Lee et al. 2019, arXiv:1810.02340.
    Deviates: none.
    """
    layers: list[nn.Module] = []
    (num_in, height, width) = input_shape
    for num_out in (20, 50):
        relu = [nn.ReLU(inplace=True)] if conv_relu else []
        layers += [nn.Conv2d(num_in, num_out, 5), *relu, nn.MaxPool2d(2)]
        num_in, height, width = num_out, (height - 4) // 2, (width - 4) // 2
    return initialize_(Plain(layers, num_in * height * width, [500], num_classes), init)


def conv(input_shape: Shape, num_classes: int, *, widths: Counts, init: Init) -> nn.Module:
    """Conv-2, -4 and -6: for each width two 3x3 convolutions and a max-pool; then linear layers 256-256-K.

    Reference: Frankle and Carbin 2019, arXiv:1803.03635, figure 2.
    Deviates: none.
    """
    layers: list[nn.Module] = []
    (num_in, height, width) = input_shape
    for num_out in widths:
        for _ in range(2):
            layers += [nn.Conv2d(num_in, num_out, 3, padding=1), nn.ReLU(inplace=True)]
            num_in = num_out
        layers.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    return initialize_(Plain(layers, num_in * height * width, [256, 256], num_classes), init)
