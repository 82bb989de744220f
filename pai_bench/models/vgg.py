"""VGG with batch norm, in the forms that the pruning literature uses for small images."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench.core import Shape
from pai_bench.models.initialization import Init, initialize_

# Convolutions in each of the five stages; their widths are 64, 128, 256, 512, 512.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Stages of 3x3 convolutions with max-pooling, and a classifier of one or three linear layers."""

    def __init__(
        self,
        input_shape: Shape,
        num_classes: int,
        stages: tuple[int, ...],
        classifier: str,
        conv_bias: bool,
        norm_last: bool,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_in = input_shape[0]
        for stage, (num_convs, width) in enumerate(zip(stages, (64, 128, 256, 512, 512), strict=True)):
            for _ in range(num_convs):
                conv = nn.Conv2d(num_in, width, 3, padding=1, bias=conv_bias)
                norm, activation = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
                layers += [conv, activation, norm] if norm_last else [conv, norm, activation]
                num_in = width
            if stage < 4 or classifier != "linear":
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.flatten = classifier == "mlp"
        if self.flatten:
            num_features = 512 * (input_shape[1] // 32) * (input_shape[2] // 32)
            hidden = [
                nn.Linear(num_features, 1024),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(1024, 1024),
                nn.ReLU(inplace=True),
                nn.Dropout(),
            ]
            self.classifier: nn.Module = nn.Sequential(*hidden, nn.Linear(1024, num_classes))
        else:
            self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = self.features(x)
        x = x.flatten(1) if self.flatten else F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(x)  # type: ignore[no-any-return]


def vgg(
    input_shape: Shape,
    num_classes: int,
    *,
    depth: Literal[11, 13, 16, 19],
    classifier: Literal["linear", "pooled", "mlp"],
    conv_bias: bool,
    norm_last: bool,
    init: Init,
) -> nn.Module:
    """VGG-depth with batch norm after every convolution.

    Args:
        norm_last: the order is convolution, activation, norm.
        classifier: "linear" has four max-pools, an average pool over the rest (2x2 at 32 pixels, 4x4 at 64 pixels),
            and one linear layer. "pooled" has a fifth max-pool instead of the average pool. "mlp" has five max-pools
            and linear layers 1024-1024-K with dropout, as in Tanaka et al. on Tiny-ImageNet.

    Reference: Simonyan and Zisserman 2015, arXiv:1409.1556; for CIFAR as in Wang et al. 2020, arXiv:2002.07376 and
        Tanaka et al. 2020, arXiv:2006.05467; norm_last and "pooled" as in the released code of Lubana and Dick 2021,
        arXiv:2009.11839.
    Deviates: none from the latter three.
    """
    return initialize_(VGG(input_shape, num_classes, _STAGES[depth], classifier, conv_bias, norm_last), init)
