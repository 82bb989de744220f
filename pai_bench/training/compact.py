"""Compact training: a smaller network is trained in place of a pruned one, and its weights are copied back."""

import copy
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from pai_bench.analysis import cost
from pai_bench.analysis.mode import mode
from pai_bench.core import Mask, Shape, Weights
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.system import devices, graphs, layout
from pai_bench.training import compact_model
from pai_bench.training.optimizer import OptimizerState

log = logging.getLogger(__name__)

# A smaller network is trained instead where at most this part of the multiply-adds is left,
_WORTH = 0.8
# and where training the whole takes at least so many floating-point operations, a minute of two cores or of a GPU: to
# look for it, and to measure the gain on a few steps, takes seconds.
LONG = {"cpu": 1e13, "cuda": 1e15}
# On a GPU fewer operations need not take less time, so there the steps that were measured decide.
FASTER = 1.1

_GONE = " (gone)"  # marks the name of a parameter's entries in channels that are gone


def original(name: str) -> str:
    """The parameter of the full network that an entry of `CompactNetwork.parameters` belongs to."""
    return name.removesuffix(_GONE)


class CompactNetwork:
    """A network without the dead channels of a mask, and the kept weights of those channels.

    No gradient reaches these weights. The optimizer's state and weight decay move them as in the full network. Running
    statistics of removed channels stay as they were, because nothing reads them.

    Args:
        model: the full network, which stays as it is.
        mask: everything that is held at zero.

    Raises:
        ConfigError: the network cannot be made smaller so that it trains in the same way; the message says why.
    """

    def __init__(self, model: nn.Module, mask: Mask, input_shape: Shape) -> None:
        for module in model.modules():
            if (isinstance(module, _DropoutNd) and module.p > 0) or getattr(module, "drop_prob", None):
                raise ConfigError("it drops units at random, other ones where there are fewer")
        on_gpu = next(model.parameters()).is_cuda  # whose matrix units take channels by eights
        self._compact = compact_model.compact(model, mask, input_shape, multiple=8 if on_gpu else 1)
        self.model = self._compact.model
        named = dict(model.named_parameters())
        kept = mask | {name: torch.ones_like(p, dtype=torch.bool) for name, p in named.items() if name not in mask}
        self._gone = {name: at for name, at in self._compact.gone(kept).items() if len(at)}
        self._left = {name + _GONE: nn.Parameter(named[name].detach().flatten()[at]) for name, at in self._gone.items()}
        self._check(model, input_shape)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What an optimizer has to move."""
        return dict(self.model.named_parameters()) | self._left

    def mask(self, mask: Mask) -> Mask:
        """A mask of the full network, as it holds here."""
        return {name: self._compact.gather(name, tensor) for name, tensor in mask.items()}

    @torch.no_grad()
    def load_from(self, model: nn.Module, state: OptimizerState) -> OptimizerState:
        """Copies the weights of the full network, and returns the state of its optimizer cut down in the same way."""
        full = model.state_dict()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(self._compact.gather(name, full[name]))
        for name, at in self._gone.items():
            self._left[name + _GONE].copy_(full[name].flatten()[at])
        return {key: self._cut(tensors, full) for key, tensors in state.items()}

    def _cut(self, tensors: Weights, full: Weights) -> Weights:
        """A state tensor of every parameter of the full network, as it is here."""
        here = {}
        for name in dict(self.model.named_parameters()):
            per_weight = tensors[name].shape == full[name].shape
            here[name] = self._compact.gather(name, tensors[name]) if per_weight else tensors[name]
            if name in self._gone:
                here[name + _GONE] = tensors[name].flatten()[self._gone[name]] if per_weight else tensors[name]
        return here

    @torch.no_grad()
    def store_to(self, model: nn.Module, state: OptimizerState) -> OptimizerState:
        """Copies the weights to the full network, and returns the state of its optimizer."""
        full, left = model.state_dict(), {original(name): parameter.data for name, parameter in self._left.items()}
        for name, tensor in self.model.state_dict().items():
            self._put(name, tensor, left.get(name), full[name])
        return {key: self._expanded(tensors, full) for key, tensors in state.items()}

    def _expanded(self, tensors: Weights, full: Weights) -> Weights:
        """A state tensor of every parameter here, as it is in the full network."""
        there = {}
        for name, parameter in self.model.named_parameters():
            there[name] = tensors[name]
            if tensors[name].shape == parameter.shape:
                there[name] = torch.zeros_like(full[name])
                self._put(name, tensors[name], tensors.get(name + _GONE), there[name])
        return there

    def zero_removed_grads(self) -> None:
        """Gives the kept weights of removed channels a gradient of zero."""
        for parameter in self._left.values():
            parameter.grad = torch.zeros_like(parameter)

    def _put(self, name: str, tensor: Tensor, left: Tensor | None, full: Tensor) -> None:
        self._compact.scatter_(name, tensor, full)
        if left is not None:
            compact_model.put_(full, self._gone[name], left)

    def _check(self, model: nn.Module, input_shape: Shape) -> None:
        """Refuses a network whose outputs have changed: its code looks at channels in a way that was not seen."""
        image = torch.randn((2, *input_shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        image = image.to(next(model.parameters()).device)
        outputs = []
        for network in (model, self.model):
            with mode(network, training=False), torch.no_grad():
                outputs.append(copy.deepcopy(network).double()(image))
        if not torch.allclose(outputs[0], outputs[1], rtol=1e-8, atol=1e-8 * float(outputs[0].abs().max())):
            raise ConfigError("without its dead channels it computes something else")


def is_long(model: nn.Module, input_shape: Shape, num_images: int, device: torch.device) -> bool:
    """Whether training on so many images takes so long that it is worth while to look for a smaller network."""
    multiply_adds = sum(cost.multiply_adds(model, input_shape).values())
    return 6 * multiply_adds * num_images >= LONG.get(device.type, 0)  # forward and backward: three times two for each


def find(model: nn.Module, mask: Mask, input_shape: Shape) -> CompactNetwork | None:
    """A smaller network to train under a mask; None where that saves too little, or is impossible."""
    if not masks.has_empty_slices(mask):
        return None
    try:
        found = CompactNetwork(model, mask, input_shape)
    except ConfigError as error:
        log.warning("training.compact=auto: the whole network is trained: %s", error)
        return None
    left, full = (sum(cost.multiply_adds(net, input_shape).values()) for net in (found.model, model))
    if left > _WORTH * full:
        return None
    log.debug("without dead channels, %.3g of the multiply-adds are left", left / full)
    return found


def _as_graphs(passes: Sequence[Callable[[], None]], device: torch.device) -> Sequence[Callable[[], None]]:
    """The passes as CUDA graphs; as they are if one cannot be captured."""
    try:
        # Threads of a loader of images may be at work.
        return [graphs.recorded(one, device, threads=True) for one in passes]
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.info("a compact network is timed kernel by kernel: the network cannot be captured (%s)", reason)
        return passes


def pass_seconds(
    nets: Sequence[nn.Module], batch_shape: Sequence[int], device: torch.device, precision: str, capture: bool = True
) -> list[float]:
    """Seconds of a forward and backward pass of each network, the median of a few taken in turn.

    The networks are as before afterwards, without gradients. They are not copied: memory may be short.

    Args:
        capture: on a GPU, take the passes as CUDA graphs, as the steps will be taken.
    """
    images = torch.randn(tuple(batch_shape), generator=torch.Generator().manual_seed(0)).to(next(nets[0].parameters()))
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    layouts = [layout.layout_of(net) for net in nets]
    before = [(buffer, buffer.clone()) for net in nets for buffer in net.buffers()]  # running statistics
    batches = {form: layout.laid_out(images, form) for form in layouts}

    def take(net: nn.Module, form: torch.memory_format) -> None:
        with mode(net, training=True), devices.autocast(device, precision):
            loss = F.cross_entropy(net(batches[form]), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        net.zero_grad()

    passes = [partial(take, net, form) for net, form in zip(nets, layouts, strict=True)]
    runs = _as_graphs(passes, device) if capture and graphs.supported(device) else passes
    seconds: list[list[float]] = [[] for _ in nets]
    for repeat in range(4):
        for run, taken in zip(runs, seconds, strict=True):
            devices.wait(device)
            started = time.perf_counter()
            run()
            devices.wait(device)
            if repeat:  # the first call chooses algorithms
                taken.append(time.perf_counter() - started)
    for buffer, value in before:
        buffer.copy_(value)
    return [statistics.median(taken) for taken in seconds]
