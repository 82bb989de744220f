"""SynFlow: synaptic flow, without data."""

import copy
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis import patches
from pai_bench.analysis.channels import Channels, Slice
from pai_bench.core import Batches, Loss, Mask, Scores, Shape, Subnetwork
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import masks, reading
from pai_bench.masks.clearing import clear_all_, clear_removed_
from pai_bench.system import counters, graphs

log = logging.getLogger(__name__)

_LARGE = 1_000_000  # with fewer prunable weights, the search for dead channels costs more than it saves
_FEW = 0.25  # density from which on dead channels are searched for; at higher densities there are hardly any


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|w| |dR/d|w||, where R is the sum of the outputs for an all-ones image, in the network of absolute values.

    Biases, norm parameters and running statistics have absolute values too. Pruned weights score exactly zero. It is
    meant for many exponential rounds, and for eval mode, because batch statistics of a constant image mean nothing.

    On a CPU and in float64, dead channels of large networks are left out, because no flow passes them. On a GPU,
    convolutions in float64 are matrix products, and rounds after the first are one CUDA graph each. In both cases the
    scores of the next round may overwrite those of this round.

    Raises:
        UserError: R overflows the precision of the network. Deep networks overflow float32.

    Reference: Tanaka et al. 2020, arXiv:2006.05467, eq. 1 and Algorithm 1.
    Deviates: the default is float64; the authors' code scores in float32 (pruner.dtype=float32). With the same
        precision and the same numbers of weights (schedule.rounding=up; their last round rounds up too) masks equal
        those of their loop, bit for bit. They drop all weights that equal the threshold.
    """
    if "synflow" not in net.cache:
        net.cache["synflow"] = Flow(net, "SynFlow")
    scores: Scores = net.cache["synflow"].scores(net)
    return scores


class Flow:
    """A copy of the network with absolute values, or squares, which the rounds of a search share.

    Args:
        name: what an error calls the score.
        squares: whether parameters have squares in place of absolute values.
        means: whether norms subtract their running means.
    """

    def __init__(self, net: Subnetwork, name: str, *, squares: bool = False, means: bool = True) -> None:
        if all(kept.all() for kept in net.mask.values()) and (odd := _without_conservation(net.model)):
            log.warning("%s's conservation laws do not hold through %s; its scores are taken as they come", name, odd)
        self.name, self.squares, self.means = name, squares, means
        self.outputs: Tensor | None = None  # by what each output counts in R; None: all alike
        self.precision = next(iter(net.weights.values())).dtype
        self.source = {name: tensor.detach() for name, tensor in _named(net.model)}
        own = {id(tensor): self._like(tensor) for _, tensor in _named(net.model)}
        self.model = copy.deepcopy(net.model, own)  # type: ignore[arg-type]  # deepcopy takes what this memo holds
        self.values = dict(_named(self.model))
        self.weights = {name: self.values[name].requires_grad_() for name in net.mask}
        self.applied: Mask = {}  # the masks of those weights whose values are up to date under them
        self.left: dict[str, Slice] = {}  # what is left of parameters and buffers that have lost channels
        self.products: Scores = {}  # their scores, in full size: zero outside of what is left
        self.channels: Channels | None = None
        self.device = next(iter(net.mask.values())).device
        if patches.pay(self.device, self.precision):
            patches.use_(self.model)
        self.flow = torch.empty(0)  # R of the last round
        self.last: list[Tensor] = []  # the scores of the last round, in the order of the weights
        self.replay: Callable[[], None] | None = None  # takes them anew, as one CUDA graph
        grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in net.model.modules())
        on_cpu = self.device.type == "cpu"  # only there was leaving out measured
        self.whole = self.precision == torch.float32 or grouped or not on_cpu or masks.total(net.mask) < _LARGE
        self.can_record = graphs.supported(self.device) and self.whole  # parts would change their shapes

    def scores(self, net: Subnetwork, outputs: Tensor | None = None) -> Scores:
        """w |dR/dw| of all prunable weights, for w as the copy has it.

        Args:
            outputs: by what each output counts in R, of shape (K,). None: all alike. A search has it always or never.
        """
        if outputs is not None:  # in the same memory, as a CUDA graph reads it there
            self.outputs = outputs.clone() if self.outputs is None else self.outputs.copy_(outputs)
        # In every round anew, so that a resumed search gives the same bits.
        if not self.whole and not net.coupled and masks.kept(net.mask) <= _FEW * masks.total(net.mask):
            self._leave_out(net)
        self._prepare(net)
        # Not where operations are counted, as in the first round.
        if self.last and self.replay is None and self.can_record and not counters.active:
            self._record(net.input_shape)
        if self.replay is not None:
            self.replay()
        else:
            self._take(net.input_shape)
        net.require(self.flow.isfinite(), self._overflow)
        scores: Scores = dict(zip(self.weights, self.last, strict=True))
        for name in scores:
            if name in self.left:
                if name not in self.products:
                    self.products[name] = torch.zeros_like(net.mask[name], dtype=self.precision)
                self.left[name].put_(self.products[name], scores[name])
                scores[name] = self.products[name]
        return scores

    def _like(self, tensor: Tensor) -> Tensor:
        """Memory for the absolute values of a parameter or buffer."""
        precision = self.precision if tensor.is_floating_point() else tensor.dtype
        # Contiguous, so that the mask does not depend on the memory format of training.
        values = torch.empty(tensor.shape, dtype=precision, device=tensor.device)
        return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values

    def _forward(self, net: Subnetwork) -> Tensor:
        """R, a scalar."""
        self._prepare(net)
        with torch.no_grad():
            self.flow = self._of_ones(net.input_shape)
        net.require(self.flow.isfinite(), self._overflow)
        return self.flow

    def _prepare(self, net: Subnetwork) -> None:
        """Brings the copy up to date with the network."""
        self._update(net.mask)
        if self.model.training != net.model.training:
            self.model.train(net.model.training)

    def _of_ones(self, input_shape: Shape) -> Tensor:
        image = torch.ones((1, *input_shape), dtype=self.precision, device=self.device)
        try:
            outputs: Tensor = self.model(image)
        except ValueError as error:  # batch statistics of one value
            if not self.model.training:
                raise
            raise UserError(
                f"pruner.mode=train: {self.name} passes one image ({error}); set pruner.mode=eval"
            ) from error
        return (outputs if self.outputs is None else outputs * self.outputs).sum()

    def _take(self, input_shape: Shape) -> None:
        """Takes R and the scores. Nothing is read from the device."""
        flow = self._of_ones(input_shape)
        gradients = torch.autograd.grad(flow, list(self.weights.values()), materialize_grads=True)
        # The gradient is negative where batch statistics, layer norm or attention follow the weight.
        pairs = zip(self.weights.values(), gradients, strict=True)
        self.flow = flow.detach()
        # Detached: in torch 2.4 the zeros of an unused weight ask for a gradient themselves.
        self.last = [gradient.detach().mul_(weight.detach()).abs_() for weight, gradient in pairs]

    def _record(self, input_shape: Shape) -> None:
        """Records what a round takes, so that later rounds are one launch each."""
        try:
            take = partial(self._take, input_shape)
            self.replay = graphs.recorded(take, self.device, changed=list(self.model.buffers()))
        except RuntimeError as error:
            self.can_record = False
            reason = str(error).partition("\n")[0]
            log.info("the kernels of SynFlow are launched one by one: its rounds cannot be captured (%s)", reason)

    def _overflow(self) -> UserError:
        name = str(self.precision).removeprefix("torch.")
        remedy = "set pruner.dtype=float64" if self.precision == torch.float32 else "lower the initial scale"
        return UserError(f"{self.name} overflows {name} on this model; {remedy}")

    @torch.no_grad()
    def _update(self, mask: Mask) -> None:
        """Brings the absolute values up to date."""
        if self.applied and not all(map(reading.free, self.applied.values())):
            clear_all_([self.values[name] for name in self.applied], [mask[name] for name in self.applied])
        else:
            for name, before in self.applied.items():
                clear_removed_(self.values[name], before, mask[name])
        given = {name: self.left[name].of(own) if name in self.left else own for name, own in self.source.items()}
        stale = [name for name in given if name not in self.applied]
        values = [self.values[name] for name in stale]
        if stale:  # not in a network of prunable weights alone
            torch._foreach_copy_(values, [given[name] for name in stale])
            torch._foreach_abs_([value for value in values if value.is_floating_point()])
            if self.squares:
                torch._foreach_pow_([value for value in values if isinstance(value, nn.Parameter)], 2)
            for name in stale:
                if not self.means and name.endswith("running_mean"):
                    self.values[name].zero_()
        self.applied = {name: kept for name, kept in mask.items() if name not in self.left}

    def _leave_out(self, net: Subnetwork) -> None:
        """Leaves out the channels that are dead under the mask."""
        try:
            if self.channels is None:
                if not masks.has_empty_slices(net.mask):
                    return
                self.channels = Channels(net.model, net.input_shape)
                whole = self._forward(net).detach()
                self._cut(self.channels.left(net.mask))
                if not torch.isclose(self._forward(net).detach(), whole, rtol=1e-9):
                    raise ConfigError("the flow is another one without its dead channels")
            else:
                self._cut(self.channels.left(net.mask))
        except (ConfigError, RuntimeError) as error:
            log.debug("%s keeps dead channels: %s", self.name, error)
            self._cut({})
            self.whole = True

    def _cut(self, left: dict[str, Slice]) -> None:
        """Computes with these parts of parameters and buffers from now on."""
        for name in self.left | left:
            before, now = self.left.get(name, Slice()), left.get(name, Slice())
            if name in self.products:
                now.clear_(self.products[name], before)
            shape = now.shape(self.source[name].shape)
            if shape != self.values[name].shape:
                self.applied.pop(name, None)
                self.values[name].data = torch.empty(shape, dtype=self.precision, device=self.source[name].device)
        self.left = left


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _without_conservation(model: nn.Module) -> str:
    """The kinds of layers in a model that do not conserve the flow, as words. Empty: there are none."""
    names = {type(module).__name__.lower() for module in model.modules()}
    signs = {
        "attention": "attention",
        "layernorm": "layer norm",
        "groupnorm": "group norm",
        "instancenorm": "instance norm",
        "rmsnorm": "RMS norm",
        "localresponsenorm": "local response norm",
        "sigmoid": "sigmoid gates",
    }
    return ", ".join(kind for sign, kind in signs.items() if any(sign in name for name in names))
