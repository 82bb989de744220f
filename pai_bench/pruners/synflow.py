"""SynFlow: synaptic flow, without data."""

import logging
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from pai_bench import masks
from pai_bench.core import Batches, Loss, Scores, Subnetwork, Weights
from pai_bench.errors import ConfigError, UserError
from pai_bench.structure import Channels, Slice

log = logging.getLogger(__name__)

_LARGE = 1_000_000  # prunable weights, from which on leaving channels out saves more than looking for them costs
_FIRST = 0.25  # of the weights that are kept when idle channels are looked for first; before there are hardly any
_AGAIN = 0.7  # of those that were kept then, to look again


def score(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, dtype: Literal["float32", "float64"]
) -> Scores:
    """|w| * dR/d|w|, where R is the sum of the outputs for an all-ones image when every parameter is replaced by |.|.

    Biases, norm parameters and running statistics enter R by their absolute value too. Pruned weights score exactly
    zero. Meant for eval mode (batch statistics of a constant image are meaningless) and many exponential rounds.

    In float64, channels of large networks that nothing reads any more are left out: no flow passes them. The next round
    may then write its scores over those of this one.

    Args:
        dtype: float64, or float32 to equal the authors' loop bit for bit. Masks from float32 depend on the
            convolution algorithm, and deep networks overflow.

    Raises:
        UserError: R overflows `dtype`.

    Reference: Tanaka et al. 2020, arXiv:2006.05467, eq. 1 and Algorithm 1.
    Deviates: float64 by default; the authors' code scores in float32.
    """
    if all(kept.all() for kept in net.mask.values()) and (odd := _without_conservation(net.model)):
        log.warning("SynFlow's conservation laws do not hold through %s; its scores are taken as they come", odd)
    precision = {"float32": torch.float32, "float64": torch.float64}[dtype]
    flow: _Flow = net.memory.setdefault("synflow", _Flow(net, precision))
    return flow.scores(net)


class _Flow:
    """What the rounds of a search share: memory for weights and scores, and which channels flow still passes."""

    def __init__(self, net: Subnetwork, precision: torch.dtype) -> None:
        self.precision = precision
        self.weights: Weights = {}  # |w| of what is left
        self.left: dict[str, Slice] = {}  # of parameters and buffers of which something is left out
        self.products: Scores = {}  # scores of those weights: zero, but for what is left
        self.channels: Channels | None = None
        grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in net.model.modules())
        small = precision == torch.float32 or grouped or masks.total(net.mask) < _LARGE
        self.next_look = 0.0 if small else _FIRST * masks.total(net.mask)  # when so few weights are kept

    def scores(self, net: Subnetwork) -> Scores:
        """The scores of all prunable weights."""
        if not net.held and (num_kept := masks.kept(net.mask)) <= self.next_look:
            self.next_look = _AGAIN * num_kept
            self._leave_out(net)
        flow = self._forward(net)
        if not flow.isfinite():
            name = str(self.precision).removeprefix("torch.")
            raise UserError(f"SynFlow overflows {name} on this model; set pruner.score.dtype=float64")
        gradients = torch.autograd.grad(flow, list(self.weights.values()))
        scores: Scores = {}
        for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
            scores[name] = gradient.mul_(weight.detach())
            if name in self.left:
                if name not in self.products:
                    self.products[name] = torch.zeros_like(net.mask[name], dtype=self.precision)
                self.left[name].put_(self.products[name], scores[name])
                scores[name] = self.products[name]
        return scores

    def _forward(self, net: Subnetwork) -> Tensor:
        """R, a scalar."""
        state = {}
        for name, tensor in [*net.model.named_parameters(), *net.model.named_buffers()]:
            part = self.left[name].of(tensor.detach()) if name in self.left else tensor.detach()
            if name not in net.mask:
                state[name] = part.to(self.precision).abs() if part.is_floating_point() else part.clone()
                continue
            weight = self.weights.get(name)
            if weight is None or weight.shape != part.shape:
                # Contiguous, so that a mask does not depend on the memory format in which the network will be trained.
                weight = torch.empty(part.shape, dtype=self.precision, device=part.device).requires_grad_()
                self.weights[name] = weight
            weight.detach().copy_(part).abs_()
        image = torch.ones((1, *net.input_shape), dtype=self.precision, device=part.device)
        flow: Tensor = torch.func.functional_call(net.model, state | self.weights, (image,)).sum()
        return flow

    def _leave_out(self, net: Subnetwork) -> None:
        """Finds the channels that nothing reads any more; those that were found before stay left out."""
        if self.channels is None and not masks.has_empty_slices(net.mask):
            return
        before = self.left
        try:
            self.channels = self.channels or Channels(net.model, net.input_shape)
            self.left = self.channels.left(net.mask)
            for product in self.products.values():
                product.zero_()
            if not before and self.left:
                less = self._forward(net).detach()
                self.left, left = {}, self.left
                if not torch.isclose(less, self._forward(net).detach(), rtol=1e-9):
                    raise ConfigError("the flow is another one without its idle channels")
                self.left = left
        except (ConfigError, RuntimeError) as error:
            log.debug("SynFlow keeps idle channels: %s", error)
            self.left, self.next_look = {}, 0.0


def _without_conservation(model: nn.Module) -> str:
    """The kinds of layers in a model through which flow is not conserved, as words; empty if there are none."""
    names = {type(module).__name__.lower() for module in model.modules()}
    signs = {"attention": "attention", "layernorm": "layer norm", "groupnorm": "group norm", "sigmoid": "sigmoid gates"}
    return ", ".join(kind for sign, kind in signs.items() if any(sign in name for name in names))
