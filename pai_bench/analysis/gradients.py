"""Derivatives of the mean loss with respect to the weights of a subnetwork."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pai_bench.batches import labels_of
from pai_bench.core import Batch, Batches, Loss, Subnetwork, Weights
from pai_bench.errors import UserError
from pai_bench.system.layout import laid_out


class _PlainHardsigmoid(TorchFunctionMode):
    """Replaces hardsigmoid by its formula, because torch's own function has no second derivative."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return function(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Runs a block in which all operations of common networks have second derivatives. Values differ by rounding."""
    with sdpa_kernel(SDPBackend.MATH), _PlainHardsigmoid():  # fused attention has none either
        yield


# What is recorded on a GPU: functions of tensors. They are told the names of the weights, and the model. --------------


def _gradient(
    model: nn.Module, names: tuple[str, ...], loss: Loss, temperature: float, leaves: Sequence[Tensor], batch: Batch
) -> Sequence[Tensor]:
    """The gradient of the loss of a batch with respect to the leaves."""
    return torch.autograd.grad(_loss(model, names, loss, temperature, leaves, batch), leaves, materialize_grads=True)


def _product(
    model: nn.Module,
    names: tuple[str, ...],
    fixed_names: tuple[str, ...],
    loss: Loss,
    temperature: float,
    leaves: Sequence[Tensor],
    fixed: Sequence[Tensor],
    along: Sequence[Tensor],
    batch: Batch,
) -> Sequence[Tensor]:
    """The Hessian of the loss of a batch, times a vector. Without a vector, times the gradient under the masks."""
    with twice_differentiable():
        value = _loss(model, names, loss, temperature, leaves, batch)
        gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    if not along:
        free = replace(_bare(model), mask=dict(zip(fixed_names, fixed, strict=True))).free
        along = list(free({n: g.detach() for n, g in zip(names, gradients, strict=True)}).values())
    inner = torch.stack([(g * c).sum() for g, c in zip(gradients, along, strict=True)]).sum()
    return torch.autograd.grad(inner, leaves, materialize_grads=True)


def _loss(
    model: nn.Module, names: tuple[str, ...], loss: Loss, temperature: float, leaves: Sequence[Tensor], batch: Batch
) -> Tensor:
    images, labels = batch
    return loss(_bare(model)(images, dict(zip(names, leaves, strict=True))) / temperature, labels)


def _bare(model: nn.Module) -> Subnetwork:
    """The network without what changes from round to round."""
    return Subnetwork(model, {}, {}, (0, 0, 0))


# Over all batches -----------------------------------------------------------------------------------------------------


def _leaves(net: Subnetwork, batches: Batches, at: Weights | None) -> Weights:
    if not batches:
        raise UserError(
            "pruner.scoring_data=null: this score looks at images; say how many, as in conf/pruner/snip.yaml"
        )
    return net.masked() if at is None else {name: leaf.detach().requires_grad_() for name, leaf in at.items()}


def mean_gradient(
    net: Subnetwork, batches: Batches, loss: Loss, *, temperature: float = 1.0, at: Weights | None = None
) -> tuple[Weights, Weights]:
    """The weights w, and the gradient at w of the mean loss over all examples, both detached.

    Pruned weights have a gradient too. Batches count by their size, so a short last batch does not count too much.

    Args:
        temperature: divides the logits.
        at: weights that take the place of the model's masked weights. It may name other parameters too.

    Raises:
        UserError: there are no batches.
    """
    weights = _leaves(net, batches, at)
    leaves = list(weights.values())
    sizes = Counter(map(len, labels_of(batches)))
    num_examples = sum(sizes.elements())
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    take = partial(_gradient, net.model, tuple(weights), loss, temperature)
    for batch in batches:
        size = len(batch[1])
        torch._foreach_add_(sums, list(net.repeat(take, sizes[size], leaves, batch)), alpha=size / num_examples)
    return {name: leaf.detach() for name, leaf in weights.items()}, dict(zip(weights, sums, strict=True))


def mean_square_gradient(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    *,
    temperature: float = 1.0,
    at: Weights | None = None,
    per_example: bool = False,
) -> tuple[Weights, Weights]:
    """The weights w, and the mean over batches of the squared gradient of each batch's loss at w, both detached.

    Batches count by their size.

    Args:
        per_example: whether every image is a batch of its own.
        temperature: divides the logits.
        at: weights that take the place of the model's masked weights. It may name other parameters too.

    Raises:
        UserError: there are no batches.
    """
    weights = _leaves(net, batches, at)
    leaves = list(weights.values())
    sizes = Counter(map(len, labels_of(batches)))
    num_examples = sum(sizes.elements())
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    take = partial(_gradient, net.model, tuple(weights), loss, temperature)
    for images, labels in batches:
        size, per_round = (1, num_examples) if per_example else (len(labels), sizes[len(labels)])
        for batch in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            gradients = list(net.repeat(take, per_round, leaves, batch))
            torch._foreach_addcmul_(sums, gradients, gradients, value=size / num_examples)
            del gradients  # their memory is for the next
    return {name: leaf.detach() for name, leaf in weights.items()}, dict(zip(weights, sums, strict=True))


def hessian_gradient(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    *,
    temperature: float = 1.0,
    at: Weights | None = None,
    along: Weights | None = None,
    repeats: int = 1,
) -> tuple[Weights, Weights]:
    """The weights w, and Hg at w, both detached. g and H are the gradient and the Hessian of the mean loss.

    The result is (mean H)(mean g) over all batches, and not the mean of H_b g_b: one factor of g^T g is constant while
    the other is differentiated. g is zero for pruned weights, as in the gradient that training follows.

    Args:
        temperature: divides the logits.
        at: weights that take the place of the model's masked weights. It may name other parameters too.
        along: a vector that takes the place of g.
        repeats: how often a score asks for such a product, with one vector after another.

    Raises:
        UserError: there are no batches.
    """
    weights = _leaves(net, batches, at)
    leaves = list(weights.values())
    sizes = Counter(map(len, labels_of(batches)))
    num_examples = sum(sizes.elements())
    if along is None and len(batches) > 1:  # of one batch, one forward pass gives gradient and product
        along = net.free(mean_gradient(net, batches, loss, temperature=temperature, at=weights)[1])
    fixed = {name: kept for name, kept in (net.mask | net.coupled).items() if name in weights}
    vector = [] if along is None else [along[name] for name in weights]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    take = partial(_product, net.model, tuple(weights), tuple(fixed), loss, temperature)
    for images, labels in batches:
        # With channels last the second derivative of a norm takes twice the time.
        batch = (laid_out(images, torch.contiguous_format), labels)
        number = repeats * sizes[len(labels)]
        products = list(net.repeat(take, number, leaves, list(fixed.values()), vector, batch))
        torch._foreach_add_(sums, products, alpha=len(labels) / num_examples)
        del products
    return {name: leaf.detach() for name, leaf in weights.items()}, dict(zip(weights, sums, strict=True))


def minus_true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the mean logit of the true class: what F.nll_loss makes of raw logits (B, K) and labels (B,).

    Raises:
        UserError: the labels are the targets of a regression.
    """
    if labels.is_floating_point():
        raise UserError(
            "pruner: the loss of this score is minus the logit of the true class, and the data is a regression; give "
            "pruner=force or pruner=iter_snip"
        )
    return -logits.gather(1, labels[:, None]).mean()
