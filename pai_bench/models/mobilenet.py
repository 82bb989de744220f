"""MobileNet-V1 for small images."""

from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench.core import Shape
from pai_bench.models.initialization import Init, initialize_

# Width and stride of the thirteen depthwise-separable blocks.
_BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def _conv(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out), nn.ReLU(inplace=True))


class MobileNet(nn.Module):
    """A 3x3 stem of stride 1, thirteen blocks, global average pooling, one linear layer."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        layers = [_conv(num_channels, 32, 3)]
        num_in = 32
        for num_out, stride in _BLOCKS:
            layers += [_conv(num_in, num_in, 3, stride, groups=num_in), _conv(num_in, num_out, 1)]
            num_in = num_out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(num_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))  # type: ignore[no-any-return]


def mobilenet(input_shape: Shape, num_classes: int, *, init: Init) -> nn.Module:
    """MobileNet-V1 of width 1.

    Reference: Howard et al. 2017, arXiv:1704.04861; the stem's stride is 1, as for CIFAR in Lubana and Dick 2021,
        arXiv:2009.11839.
    Deviates: none.
    """
    return initialize_(MobileNet(input_shape[0], num_classes), init)
