"""Neural Tangent Transfer: a sparse network that starts with the outputs and the tangent kernel of the dense one."""

from typing import Any, Literal

import torch
from torch import Generator, Tensor

from pai_bench.analysis.gradients import twice_differentiable
from pai_bench.core import Batches, Loss, NonNegative, NonNegativeInt, Positive, Scores, Subnetwork, Weights, labels_of
from pai_bench.errors import UserError


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|w| of the student as the rounds so far have moved it, and of a pruned weight the value it would return with.

    Reference: Liu and Zenke 2020, arXiv:2006.08228, Algorithm 1.
    Deviates: a pruned weight counts with its initial value; with pruner.regrow_moved=true (pruner=ntt_official) it
        counts, as in the authors' code, with the value that it had when it was pruned.
    """
    back = net.initial if net.moved is None else net.moved
    return {name: torch.where(net.mask[name], w, back[name]).abs() for name, w in net.weights.items()}


def transfer(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    generator: Generator,
    *,
    steps: NonNegativeInt,
    lr: Positive,
    kernel: Literal["kept", "all"],
    kernel_weight: NonNegative,
    decay: NonNegative,
) -> Weights:
    """The student's parameters after some steps of Adam towards the dense network's outputs and tangent kernel.

    The loss is |f_S - f_T|^2 / size + kernel_weight |K_S - K_T|^2 / size + decay / density |w|^2, where K is the
    empirical tangent kernel between the two halves of a batch over all pairs of outputs. Labels play no part.

    Args:
        steps: of Adam, each on one batch in turn.
        lr: its learning rate.
        kernel: the student's kernel sums over the weights that are kept, and only those move; or over all positions, at
            pruned weights too, and over biases and norms, which then move with the weights.
        kernel_weight: of the kernel's part.
        decay: of the weights' part; biases and norms do not count.

    Raises:
        UserError: there are no batches.

    Reference: Liu and Zenke 2020, arXiv:2006.08228, eq. 6 and released code.
    Deviates: with kernel=kept the kernel is that of the weights alone, and the student's that of its kept weights; the
        authors' code has kernel=all. Adam starts anew in every round; in their code it goes on, and its momentum moves
        a weight for a while after it was pruned.
    """
    if not batches:
        raise UserError(
            "pruner.scoring_data=null: the tangent kernel needs images; say how many, as in conf/pruner/ntt.yaml"
        )
    if min(map(len, labels_of(batches))) < 2:
        raise UserError(
            "pruner.scoring_data: the tangent kernel is between two halves; let no batch be of a single image"
        )
    density = sum(float(kept.sum()) for kept in net.mask.values()) / sum(kept.numel() for kept in net.mask.values())
    student = {name: weight.clone().requires_grad_() for name, weight in net.weights.items()}
    if kernel == "all":
        student |= net.others()
    dense = {name: net.initial[name] for name in student}
    optimizer = torch.optim.Adam(student.values(), lr=lr)
    for step in range(steps):
        images, _ = batches[step % len(batches)]
        with torch.no_grad():
            outputs, of_dense = _outputs_and_kernel(net, images, dense)
        with twice_differentiable():
            masked = student | {name: student[name] * kept for name, kept in net.mask.items()}
            of_student, its_kernel = _outputs_and_kernel(net, images, masked, net.mask if kernel == "kept" else None)
            value = (of_student - outputs).square().mean() + kernel_weight * (its_kernel - of_dense).square().mean()
            value = value + decay / density * sum(masked[name].square().sum() for name in net.mask)
            gradients = torch.autograd.grad(value, list(student.values()))
        for weight, gradient in zip(student.values(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    return {name: weight.detach() for name, weight in student.items()}


def _outputs_and_kernel(
    net: Subnetwork, images: Tensor, weights: Weights, mask: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and the tangent kernel (B/2, K, B/2, K) between the halves of a batch."""

    def logits(weights: Weights, image: Tensor) -> Any:
        return net(image[None], weights)[0]

    half = len(images) // 2
    jacobian = torch.func.vmap(torch.func.jacrev(logits), in_dims=(None, 0))
    first, second = (jacobian(weights, part) for part in (images[:half], images[half : 2 * half]))
    kernel: Any = 0
    for name in weights:
        one, two = (part[name] if mask is None else part[name] * mask[name] for part in (first, second))
        kernel = kernel + torch.einsum("akp,blp->akbl", one.flatten(2), two.flatten(2))
    return net(images, weights), kernel
