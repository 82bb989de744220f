"""ProsPr: prospect pruning, the effect of a weight through the first steps of training."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis.gradients import twice_differentiable
from pai_bench.core import Batches, Loss, Mask, NonNegativeInt, Positive, ProperFraction, Scores, Subnetwork, Weights
from pai_bench.errors import UserError


def score(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    generator: Generator,
    *,
    steps: NonNegativeInt,
    lr: Positive,
    momentum: ProperFraction,
    detach_momentum: bool,
    first_order: bool,
) -> Scores:
    """|dL(w_M)/dc| at c = 1, for a mask c that multiplies the weights once, before M steps of SGD on all parameters.

    The steps and then the outer loss take the batches in turn, and start over where these end. With M = 0 it is SNIP.

    Args:
        steps: M, the number of steps.
        lr: the learning rate of the steps.
        momentum: the momentum of the steps, which have neither Nesterov momentum nor weight decay.
        detach_momentum: whether the first momentum buffer is a constant, as in the authors' code. Then the first step
            adds no second-order term. Without momentum there is no buffer.
        first_order: whether only the outer loss is differentiated, as if the steps did not depend on the mask:
            |w0 g(w_M)|.

    Raises:
        UserError: there are no batches.

    Reference: Alizadeh et al. 2022, arXiv:2202.08132, Algorithm 1.
    Deviates: momentum is differentiated from the first step on. pruner=prospr_official sets detach_momentum, as in the
        authors' code.
    """
    if not batches:
        raise UserError(
            "pruner.scoring_data=null: this score looks at images; say how many, as in conf/pruner/prospr.yaml"
        )

    used = [batches[number] for number in range(min(len(batches), steps + 1))]
    start, others, fixed = net.weights, net.others(), net.mask | net.coupled
    take = partial(
        _derivative,
        net.model,
        (tuple(start), tuple(others), tuple(fixed)),
        loss,
        steps=steps,
        lr=lr,
        momentum=momentum,
        detach_momentum=detach_momentum,
        first_order=first_order,
    )
    values = list(start.values()), list(others.values()), list(fixed.values())
    gradients = net.repeat(take, 1, *values, *used)
    factor = start if first_order else {name: torch.ones_like(weight) for name, weight in start.items()}
    return {name: (factor[name] * gradient).abs() for name, gradient in zip(start, gradients, strict=True)}


def _derivative(
    model: nn.Module,
    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]],
    loss: Loss,
    weights: Sequence[Tensor],
    others: Sequence[Tensor],
    kept: Sequence[Tensor],
    *batches: Sequence[Tensor],
    steps: int,
    lr: float,
    momentum: float,
    detach_momentum: bool,
    first_order: bool,
) -> Sequence[Tensor]:
    """dL(w_M)/dc, or with first_order dL/dw_M: for each of the prunable weights.

    Args:
        names: of `weights`, of `others`, and of the masks in `kept`.
    """
    net, fixed = Subnetwork(model, {}, {}, (0, 0, 0)), dict(zip(names[2], kept, strict=True))

    def batch_loss(step: int, parameters: dict[str, Tensor]) -> Tensor:
        images, labels = batches[step % len(batches)]
        return loss(net(images, parameters), labels)

    start = dict(zip(names[0], weights, strict=True))
    mask = {name: torch.ones_like(weight).requires_grad_() for name, weight in start.items()}
    parameters = {name: start[name] * mask[name] for name in mask} | dict(zip(names[1], others, strict=True))
    if first_order:
        parameters = _leaves(parameters)
    velocity: dict[str, Tensor] = {}
    with twice_differentiable():
        for step in range(steps):
            gradients = torch.autograd.grad(
                batch_loss(step, parameters),
                list(parameters.values()),
                create_graph=not first_order,
                materialize_grads=True,  # of what the network does not use
            )
            _step_(parameters, velocity, gradients, fixed, lr, momentum, detach_momentum)
            if first_order:
                parameters = _leaves(parameters)
        at = [parameters[name] for name in mask] if first_order else list(mask.values())
        return torch.autograd.grad(batch_loss(steps, parameters), at, materialize_grads=True)


def _leaves(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters as leaves of a new graph, so that nothing before them is differentiated."""
    return {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}


def _step_(
    parameters: Weights,
    velocity: Weights,
    gradients: Sequence[Tensor],
    mask: Mask,
    lr: float,
    momentum: float,
    detach_momentum: bool,
) -> None:
    """Replaces parameters and velocities by those after a step of SGD, which autograd can differentiate."""
    for name, gradient in zip(list(parameters), gradients, strict=True):
        if name in velocity:
            velocity[name] = gradient + momentum * velocity[name]
        else:
            velocity[name] = gradient.detach() if detach_momentum and momentum > 0 else gradient
        # What an earlier round pruned takes no part in the steps, and the norms of pruned filters neither.
        moved = velocity[name] * mask[name] if name in mask else velocity[name]
        parameters[name] = parameters[name] - lr * moved
