"""NTK-SAP: how much the tangent kernel of networks with a mask depends on the mask, whatever their weights."""

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis.norm_statistics import statistics
from pai_bench.core import Batches, Count, Loss, Positive, Scores, State, Subnetwork, Weights
from pai_bench.errors import UserError


def score(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    generator: Generator,
    *,
    epsilon: Positive,
    repeats: Count,
    images_per_class: Count,
    batch_size: Count,
) -> Scores:
    """|dS/dm|, where S sums |f(x; m w) - f(x; m (w + epsilon z))|^2 over images x of noise, and m is the mask.

    Pixels x and the changes z of the prunable weights are standard normal. The weights w are drawn anew for every batch
    in every repeat, as those of the model were. So neither the weights of the network nor any data play a part, and S
    estimates epsilon^2 times the trace of the tangent kernel. Norms have the statistics of the unchanged network on the
    batch, in both networks, and no derivative goes through them. Pruned weights score exactly zero.

    Args:
        epsilon: the size of the changes. In a network of smooth activations it hardly changes the ranking. In a network
            of ReLUs a smaller one makes the scores noisier: some gates differ between the two networks.
        repeats: how often the images are drawn.
        images_per_class: images of noise for each output, in each repeat.
        batch_size: images that share their weights.

    Raises:
        UserError: train mode; nothing says how the weights of the network are drawn.

    Reference: Wang et al. 2023, arXiv:2304.02840, and the released code.
    Deviates: none. Their single-shot code goes on to train the last weights that it drew.
    """
    if net.redraw is None:
        raise UserError("pruner.redraws=null: this score draws new weights; set it to true")
    if net.model.training:
        raise UserError("pruner.mode=train: this score sets the statistics of norms itself; set pruner.mode=eval")
    like = next(iter(net.weights.values()))
    mask = {name: kept.to(like).requires_grad_() for name, kept in net.mask.items()}
    sums = [torch.zeros_like(factor) for factor in mask.values()]
    num_images = images_per_class * _num_outputs(net, like)
    for _ in range(repeats):
        for start in range(0, num_images, batch_size):
            shape = (min(batch_size, num_images - start), *net.input_shape)
            images = _normal(shape, like, generator)
            change = _change(net, images, mask, epsilon, generator)
            gradients = torch.autograd.grad(change, list(mask.values()), materialize_grads=True)
            for one, gradient in zip(sums, gradients, strict=True):
                one.add_(gradient)
    return {name: one.abs() * net.mask[name] for name, one in zip(mask, sums, strict=True)}


def _change(net: Subnetwork, images: Tensor, mask: Weights, epsilon: float, generator: Generator) -> Tensor:
    """The squared change of the outputs of one new network, summed over images and outputs."""
    assert net.redraw is not None
    drawn = net.free(net.redraw(generator))
    buffers = statistics(net.model, drawn, [images])
    moved = {name: drawn[name] + epsilon * _normal(drawn[name].shape, images, generator) for name in mask}
    outputs = [
        _outputs(net.model, drawn | {name: values[name] * mask[name] for name in mask}, buffers, images)
        for values in (drawn, moved)
    ]
    return ((outputs[0] - outputs[1]) ** 2).sum()


def _outputs(model: nn.Module, weights: Weights, buffers: State, images: Tensor) -> Tensor:
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    outputs: Tensor = torch.func.functional_call(model, (weights, copies), (images,))
    return outputs


def _normal(shape: torch.Size | tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that they are the same on every device."""
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)


@torch.no_grad()
def _num_outputs(net: Subnetwork, like: Tensor) -> int:
    return net(torch.zeros((1, *net.input_shape), dtype=like.dtype, device=like.device), net.weights).shape[-1]
