"""Derivatives of the mean loss with respect to the weights of a subnetwork."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pai_bench.core import Batch, Batches, Loss, Subnetwork, Weights, labels_of
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


def _batch_loss(net: Subnetwork, weights: Weights, batch: Batch, loss: Loss, temperature: float) -> torch.Tensor:
    images, labels = batch
    return loss(net(images, weights) / temperature, labels)


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
    num_examples = sum(map(len, labels_of(batches)))
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for batch in batches:
        value = _batch_loss(net, weights, batch, loss, temperature)
        share = len(batch[1]) / num_examples
        for total, gradient in zip(sums, torch.autograd.grad(value, leaves, materialize_grads=True), strict=True):
            total.add_(gradient, alpha=share)
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
    num_examples = sum(map(len, labels_of(batches)))
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for images, labels in batches:
        size = 1 if per_example else len(labels)
        for batch in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            value = _batch_loss(net, weights, batch, loss, temperature)
            share = len(batch[1]) / num_examples
            for total, gradient in zip(sums, torch.autograd.grad(value, leaves, materialize_grads=True), strict=True):
                total.addcmul_(gradient, gradient, value=share)
    return {name: leaf.detach() for name, leaf in weights.items()}, dict(zip(weights, sums, strict=True))


def hessian_gradient(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    *,
    temperature: float = 1.0,
    at: Weights | None = None,
    along: Weights | None = None,
) -> tuple[Weights, Weights]:
    """The weights w, and Hg at w, both detached. g and H are the gradient and the Hessian of the mean loss.

    The result is (mean H)(mean g) over all batches, and not the mean of H_b g_b: one factor of g^T g is constant while
    the other is differentiated. g is zero for pruned weights, as in the gradient that training follows.

    Args:
        temperature: divides the logits.
        at: weights that take the place of the model's masked weights. It may name other parameters too.
        along: a vector that takes the place of g.

    Raises:
        UserError: there are no batches.
    """
    weights = _leaves(net, batches, at)
    leaves = list(weights.values())
    num_examples = sum(map(len, labels_of(batches)))
    single = len(batches) == 1 and along is None  # then one forward pass gives gradient and product
    if along is None and not single:
        along = net.free(mean_gradient(net, batches, loss, temperature=temperature, at=weights)[1])
    constant = [] if along is None else [along[name] for name in weights]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for images, labels in batches:
        # With channels last the second derivative of a norm takes twice the time.
        batch = (laid_out(images, torch.contiguous_format), labels)
        with twice_differentiable():
            value = _batch_loss(net, weights, batch, loss, temperature)
            gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        if single:
            constant = list(net.free({n: g.detach() for n, g in zip(weights, gradients, strict=True)}).values())
        inner = torch.stack([(g * c).sum() for g, c in zip(gradients, constant, strict=True)]).sum()
        share = len(labels) / num_examples
        products = torch.autograd.grad(inner, leaves, materialize_grads=True)
        for total, product in zip(sums, products, strict=True):
            total.add_(product, alpha=share)
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
