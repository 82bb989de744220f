"""Loss and accuracies of a network over a split."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pai_bench.core import Batch
from pai_bench.system import devices, distributed


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and accuracies (fractions) over a split."""

    loss: float
    top1: float
    top5: float
    num_not_finite: int  # images some of whose logits are nan or infinite; they count as wrong


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    precision: str = "float32",
    temperature: float = 1.0,
) -> Evaluation:
    """Loss and accuracies of logits = forward(images) over every image of the batches, each counted once.

    Of several processes each brings its own batches.

    Args:
        temperature: divides the logits in the loss.
    """
    sums, number = torch.zeros(4, dtype=torch.float64, device=device), 0
    for images, labels in batches:
        with devices.autocast(device, precision):
            logits = forward(images)
        logits = logits.float()
        finite = logits.isfinite().all(1)
        best = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]) & finite[:, None]
        cross_entropy = F.cross_entropy(logits / temperature, labels, reduction="sum")
        sums += torch.stack(
            [value.to(sums) for value in (cross_entropy, best[:, 0].sum(), best.sum(), (~finite).sum())]
        )
        number += len(labels)
    loss, top1, top5, bad, number = distributed.total(torch.cat([sums, sums.new_tensor([number])])).tolist()
    return Evaluation(loss / number, top1 / number, top5 / number, round(bad))
