"""Residual networks for small images: a 3x3 stem, two kinds of blocks, projection shortcuts, no max-pooling."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench.core import Counts, Shape
from pai_bench.errors import ConfigError
from pai_bench.models.initialization import Init, initialize_


def _shortcut(num_in: int, num_out: int, stride: int, project: bool) -> nn.Module:
    if stride == 1 and num_in == num_out and not project:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))


def _conv3x3(num_in: int, num_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. The shortcut is the identity; a 1x1 projection if the shape changes, or with `project`."""

    expansion = 1

    def __init__(self, num_in: int, num_out: int, stride: int, project: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(num_in, num_out, stride), nn.BatchNorm2d(num_out)
        self.conv2, self.bn2 = _conv3x3(num_out, num_out), nn.BatchNorm2d(num_out)
        self.shortcut = _shortcut(num_in, num_out, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, H, W) -> (B, num_out, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions. The 3x3 convolution has the stride, and a quarter of the output channels."""

    expansion = 4

    def __init__(self, num_in: int, num_out: int, stride: int, project: bool = False) -> None:
        super().__init__()
        width = num_out // self.expansion
        self.conv1, self.bn1 = nn.Conv2d(num_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, num_out, 1, bias=False), nn.BatchNorm2d(num_out)
        self.shortcut = _shortcut(num_in, num_out, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, H, W) -> (B, num_out, H / stride, W / stride)."""
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling, one linear layer."""

    def __init__(
        self,
        num_channels: int,
        num_classes: int,
        widths: list[int],
        blocks: list[int],
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        every_stage_projects: bool = False,
    ) -> None:
        super().__init__()
        self.conv, self.bn = _conv3x3(num_channels, widths[0]), nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        num_in = widths[0]
        for stage, (width, num_blocks) in enumerate(zip(widths, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (num_blocks - 1)
            num_out = width * block.expansion
            first = block(num_in, num_out, strides[0], every_stage_projects)
            stages.append(nn.Sequential(first, *(block(num_out, num_out, stride) for stride in strides[1:])))
            num_in = num_out
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(num_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet(
    input_shape: Shape,
    num_classes: int,
    *,
    widths: Counts,
    blocks: Counts,
    projections: Literal["every_stage"] | None,
    init: Init,
    block: Literal["basic", "bottleneck"] = "basic",
) -> nn.Module:
    """A residual network: stage i has `blocks[i]` blocks with `widths[i]` channels. Later stages halve the image.

    ResNet-20 has widths [16, 32, 64] and blocks [3, 3, 3]. ResNet-18 has widths [64, 128, 256, 512] and blocks
    [2, 2, 2, 2]. ResNet-50 has the widths of ResNet-18 and [3, 4, 6, 3] bottlenecks, with four times as many output
    channels.

    Args:
        projections: which shortcuts are projections: None, those that change the shape; every_stage, the first of each
            stage, too. It makes a difference for the first stage of basic blocks, which keeps the shape.

    Raises:
        ConfigError: `widths` and `blocks` differ in length.

    Reference: He et al. 2016, arXiv:1512.03385, sections 4.1 and 4.2.
    Deviates: shortcuts that change the shape are 1x1 projections with batch norm, as in the lottery-ticket literature.
        The CIFAR networks of the paper pad with zeros instead.
    """
    if len(widths) != len(blocks):
        raise ConfigError(f"model.widths={widths}: give one for each stage of model.blocks={blocks}")
    kind = Bottleneck if block == "bottleneck" else BasicBlock
    return initialize_(
        ResNet(input_shape[0], num_classes, widths, blocks, kind, every_stage_projects=projections is not None), init
    )
