"""What is minimised, and which predictions are right: for classes, and for the targets of a regression."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 0.05  # how far each output of a regression may lie from its target to count as right


def loss(
    outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """The loss of a batch, a scalar: the cross-entropy of classes, or the mean squared error of targets.

    Args:
        outputs: (B, K).
        labels: classes (B,) int64, or targets (B, K) float.
        label_smoothing: of classes alone.
        reduction: "sum" adds up over the examples. The squared error of an example is the mean over its outputs.
    """
    if not labels.is_floating_point():
        return F.cross_entropy(outputs, labels, label_smoothing=label_smoothing, reduction=reduction)
    dtype = torch.promote_types(outputs.dtype, labels.dtype)  # scores may compute in float64
    errors = F.mse_loss(outputs.to(dtype), labels.to(dtype), reduction="none").mean(1)
    return errors.mean() if reduction == "mean" else errors.sum()


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Which predictions are right, (B,) bool: the largest output is the class, or every output is near its target.

    Args:
        outputs: (B, K).
        labels: classes (B,) int64, or targets (B, K) float. Near is within 0.05.
    """
    if not labels.is_floating_point():
        return outputs.argmax(1) == labels
    return ((outputs - labels).abs() <= TOLERANCE).all(1)


def among_best(outputs: Tensor, labels: Tensor) -> Tensor:
    """(B, up to 5) bool: whether the class is that of the largest output, of the second, and so on to the fifth.

    A regression has no such order: (B, 1), whether every output is near its target.
    """
    if not labels.is_floating_point():
        return outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
    return correct(outputs, labels)[:, None]
