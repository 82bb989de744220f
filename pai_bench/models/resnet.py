"""Residual networks for small images: a 3x3 stem, basic blocks, projection shortcuts, no max-pooling."""

from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench.core import Shape
from pai_bench.errors import ConfigError
from pai_bench.models.initialization import initialize_


def _conv3x3(num_in: int, num_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity, or around a 1x1 projection where the shape changes."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(num_in, num_out, stride), nn.BatchNorm2d(num_out)
        self.conv2, self.bn2 = _conv3x3(num_out, num_out), nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            projection = nn.Conv2d(num_in, num_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, H, W) -> (B, num_out, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of basic blocks, global average pooling, one linear layer."""

    def __init__(self, num_channels: int, num_classes: int, widths: list[int], blocks: list[int]) -> None:
        super().__init__()
        self.conv, self.bn = _conv3x3(num_channels, widths[0]), nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        num_in = widths[0]
        for stage, (width, num_blocks) in enumerate(zip(widths, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (num_blocks - 1)
            stages.append(
                nn.Sequential(*(BasicBlock(num_in if i == 0 else width, width, s) for i, s in enumerate(strides)))
            )
            num_in = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(num_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet(
    input_shape: Shape, num_classes: int, *, widths: list[int], blocks: list[int], init: dict[str, str]
) -> nn.Module:
    """A residual network: `blocks[i]` basic blocks of `widths[i]` channels in stage i; later stages halve the image.

    ResNet-20 is widths [16, 32, 64] with blocks [3, 3, 3]; ResNet-18 is [64, 128, 256, 512] with [2, 2, 2, 2].

    Raises:
        ConfigError: there are not as many widths as blocks.

    Reference: He et al. 2016, arXiv:1512.03385, sections 4.1 and 4.2.
    Deviates: shortcuts that change shape are 1x1 projections with batch norm, as in the lottery-ticket literature;
        the CIFAR networks of the paper pad with zeros.
    """
    if len(widths) != len(blocks):
        raise ConfigError(f"model.widths={widths}: give one for each stage of model.blocks={blocks}")
    return initialize_(ResNet(input_shape[0], num_classes, widths, blocks), init)
