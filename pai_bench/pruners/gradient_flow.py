"""The gradient-flow framework: each measure preserves a derivative of the parameter norm.

Each is a score of weights. The pruner's `reduce` makes it a score of filters. Magnitude is in pruners/magnitude.py.
"""

import torch
from torch import Generator

from pai_bench.analysis.filters import find_filters
from pai_bench.analysis.gradients import hessian_gradient, mean_gradient, mean_square_gradient
from pai_bench.core import Batches, Loss, Positive, Scores, Subnetwork
from pai_bench.errors import UserError


def score(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, temperature: Positive, from_initial: bool
) -> Scores:
    """|w| |w g|: loss preservation times magnitude, the measure that the paper proposes.

    Args:
        temperature: divides the logits.
        from_initial: whether |w - w0|, the distance that training has moved the weight, takes the place of |w|. It is
            zero before training.

    Reference: Lubana and Dick 2021, arXiv:2009.11839; from_initial as in their released code.
    Deviates: none.
    """
    weights, gradients = mean_gradient(net, batches, loss, temperature=temperature)
    moved = {name: w - net.initial[name] * net.mask[name] if from_initial else w for name, w in weights.items()}
    return {name: moved[name].abs() * (w * gradients[name]).abs() for name, w in weights.items()}


def loss_preservation(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, temperature: Positive, signed: bool
) -> Scores:
    """|w g|: the first-order change of the loss without the weight; it preserves the norm's first derivative.

    Args:
        temperature: divides the logits.
        signed: whether the score is w g, for reduce=abs_sum, which makes the sum over a filter absolute (Molchanov et
            al. 2017, arXiv:1611.06440).

    Reference: Lubana and Dick 2021, arXiv:2009.11839.
    Deviates: none.
    """
    weights, gradients = mean_gradient(net, batches, loss, temperature=temperature)
    products = {name: weight * gradients[name] for name, weight in weights.items()}
    return products if signed else {name: values.abs() for name, values in products.items()}


def gradient_preservation(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, temperature: Positive, absolute: bool
) -> Scores:
    """w (Hg), with g and H over every parameter: norms, biases and frozen ones included.

    With its sign it is GraSP. Its absolute value preserves the gradient norm, the second derivative of the parameter
    norm. For filters reduce=abs_sum takes the absolute value of the sum.

    Args:
        temperature: divides the logits.
        absolute: whether the score is |w (Hg)|; for single weights.

    Reference: Lubana and Dick 2021, arXiv:2009.11839.
    Deviates: none.
    """
    at = net.masked() | net.others()
    weights, products = hessian_gradient(net, batches, loss, temperature=temperature, at=at)
    scores = {name: weights[name] * products[name] for name in net.mask}
    return {name: values.abs() for name, values in scores.items()} if absolute else scores


def batch_norm(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, taylor: bool, temperature: float
) -> Scores:
    """|scale| of the batch norm behind a filter, as the score of each of the filter's weights. For reduce=max.

    At initialization all scales are equal. A sum over a filter's weights would round, and so rank equal filters.

    Args:
        taylor: whether the score is (scale g_scale)^2 + (shift g_shift)^2, with the squared mean gradient of each
            batch. Batches count by their size.
        temperature: divides the logits, with taylor.

    Raises:
        UserError: there is no norm behind a filter.

    Reference: Liu et al. 2017, arXiv:1708.06519; taylor: Molchanov et al. 2019, arXiv:1906.10771; both are variants in
        the released code of Lubana and Dick 2021, arXiv:2009.11839.
    Deviates: none.
    """
    layers = find_filters(net.model, net.input_shape).layers
    parameters = dict(net.model.named_parameters())
    scores = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
    norms = {}
    for name, layer in layers.items():
        scales = (key for key in layer.slices if key.endswith(".weight") and parameters[key].ndim == 1)
        scale = next((key for key in scales if layer.slices[key].shape[1] == 1), None)
        if scale is None:
            raise UserError(f"pruner=filter_batch_norm: {name} runs into no batch norm; use another pruner")
        norms[name] = (scale, scale.removesuffix("weight") + "bias")
    values = {key: parameters[key].detach() for pair in norms.values() for key in pair}
    if taylor and not batches:
        raise UserError(
            "pruner.scoring_data=null: taylor looks at images; say how many, as in conf/pruner/filter_loss.yaml"
        )
    if taylor:
        at = net.masked() | values
        _, of_gradients = mean_square_gradient(net, batches, loss, temperature=temperature, at=at)
        squares = {key: value**2 * of_gradients[key] for key, value in values.items()}
    for name, (scale, shift) in norms.items():
        of_channel = squares[scale] + squares[shift] if taylor else values[scale].abs()
        weight = scores[name]
        # A norm behind a concatenation has channels of other layers too.
        own = layers[name].slices[scale].to(weight.device)
        weight += of_channel[own].view(-1, *[1] * (weight.ndim - 1))
    return scores
