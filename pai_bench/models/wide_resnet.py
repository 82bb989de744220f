"""Wide residual networks with pre-activation blocks."""

from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench.core import Count, ProperFraction, Shape
from pai_bench.errors import ConfigError
from pai_bench.models.initialization import Init, initialize_


class PreActivationBlock(nn.Module):
    """norm, relu, conv, norm, relu, dropout, conv. If the width changes, the shortcut is a 1x1 convolution."""

    def __init__(self, num_in: int, num_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(num_in), nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(num_out), nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(num_in, num_out, 1, stride, bias=False) if num_in != num_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, H, W) -> (B, num_out, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(activated)
        out = self.dropout(F.relu(self.bn2(self.conv1(activated))))
        return self.conv2(out) + identity  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """Stem of 16 channels, three stages of 16k, 32k and 64k channels, norm, global average pooling, linear."""

    def __init__(self, num_channels: int, num_classes: int, num_blocks: int, width: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        num_in = 16
        for num_out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for i in range(num_blocks):
                blocks.append(PreActivationBlock(num_in, num_out, stride if i == 0 else 1, dropout))
                num_in = num_out
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(num_in)
        self.fc = nn.Linear(num_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def wide_resnet(
    input_shape: Shape, num_classes: int, *, depth: Count, width: Count, dropout: ProperFraction, init: Init
) -> nn.Module:
    """WRN-depth-width: (depth - 4) / 6 blocks in each of three stages, `width` times the channels of a ResNet.

    Raises:
        ConfigError: the depth is not 6n + 4, or the width is 1 (the first stage would then need no shortcut).

    Reference: Zagoruyko and Komodakis 2016, arXiv:1605.07146.
    Deviates: none.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ConfigError(f"model.depth={depth}: give 6n + 4, for example 16, 22, 28 or 40")
    if width < 2:
        raise ConfigError(f"model.width={width}: give 2 or more; the plain network is model=resnet20")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout={dropout}: give a fraction in [0, 1)")
    return initialize_(WideResNet(input_shape[0], num_classes, (depth - 4) // 6, width, dropout), init)
