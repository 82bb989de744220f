"""Neural Tangent Transfer: gives a sparse network the outputs and the tangent kernel of the dense one."""

from typing import Any, Literal

import torch
from torch import Generator, Tensor

from pai_bench.analysis.gradients import twice_differentiable
from pai_bench.analysis.norm_statistics import uses_batch_statistics
from pai_bench.batches import labels_of
from pai_bench.core import Batches, Loss, NonNegative, NonNegativeInt, Positive, Scores, Subnetwork, Weights
from pai_bench.errors import UserError


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|w| of the student as earlier rounds have moved it. A pruned weight counts with the value it would return with.

    Reference: Liu and Zenke 2020, arXiv:2006.08228, Algorithm 1.
    Deviates: a pruned weight counts with its initial value. In the authors' code it counts with the value that it had
        when it was pruned, as with pruner.regrow_moved=true (pruner=ntt_official).
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
    """The student's parameters after steps of Adam towards the outputs and the tangent kernel of the dense network.

    The loss is |f_S - f_T|^2 / size + kernel_weight |K_S - K_T|^2 / size + decay / density |w|^2. K is the empirical
    tangent kernel between the two halves of a batch, over all pairs of outputs. Labels play no part.

    Args:
        steps: the number of steps of Adam. Each takes one batch, in turn.
        lr: the learning rate of Adam.
        kernel: "kept": the student's kernel sums over the kept weights, and only these move. "all": it sums over all
            weights, biases and norms, and biases and norms move too.
        kernel_weight: the factor of the kernel's term.
        decay: the factor of the weights' term. Biases and norms do not count.

    Raises:
        UserError: there are no batches; train mode.

    Reference: Liu and Zenke 2020, arXiv:2006.08228, eq. 6 and released code.
    Deviates: with kernel=kept the kernel is that of the weights alone, and the student's that of its kept weights. The
        authors' code has kernel=all. Here Adam starts anew in every round. In their code it goes on, and its momentum
        moves a weight for a while after it was pruned.
    """
    _check_batches(batches)
    if uses_batch_statistics(net.model):
        raise UserError("pruner.mode=train: the tangent kernel is of single images; set pruner.mode=eval")
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
            gradients = torch.autograd.grad(value, list(student.values()), materialize_grads=True)
        for weight, gradient in zip(student.values(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    return {name: weight.detach() for name, weight in student.items()}


def _check_batches(batches: Batches) -> None:
    """Refuses batches that cannot be cut into two halves.

    Raises:
        UserError: there are no batches, or one has a single image.
    """
    if not batches:
        raise UserError(
            "pruner.scoring_data=null: the tangent kernel needs images; say how many, as in conf/pruner/ntt.yaml"
        )
    if min(map(len, labels_of(batches))) < 2:
        raise UserError(
            "pruner.scoring_data: the tangent kernel is between two halves; let no batch be of a single image"
        )


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
