"""One optimizer step: forward, loss, backward, update under the mask, sums."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pai_bench.core import Weights
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.system import devices, distributed, graphs, layout
from pai_bench.system.world import world
from pai_bench.training import objectives
from pai_bench.training.compiled import Compiled
from pai_bench.training.norms import NormInterpolation
from pai_bench.training.optimizer import Optimizer
from pai_bench.training.recipe import Recipe


@dataclass(frozen=True)
class Execution:
    """Where and how steps are computed. It changes results by rounding only."""

    device: torch.device
    channels_last: bool  # lay images and weights out channels last, where that is safe
    compile_model: bool  # run forward and backward of whole batches through torch.compile
    capture: bool = True  # on a GPU, take steps as one CUDA graph where possible


class Step:
    """One optimizer step of a network. It changes tensors in place and never waits for the device.

    So the same code runs alone and captured in a CUDA graph.

    Args:
        net: on the device. Its memory layout may change.
        parameters: what the optimizer moves, by name. By default those of the network.
        decayed: names of the parameters that always get weight decay. By default the prunable weights.
        penalised: names of the parameters with an L1 penalty. By default the scales of batch norms.
        sums: (2,), to which every step adds the sum of its losses and the number of correct predictions.
        scaler: scales the loss. By default one as the precision needs it.
        prepare: called before every backward pass.

    Raises:
        ConfigError: the recipe penalises the scales of batch norms, and there are none.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        execution: Execution,
        *,
        parameters: Mapping[str, nn.Parameter] | None = None,
        decayed: Collection[str] | None = None,
        penalised: Collection[str] | None = None,
        sums: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        device = execution.device
        self.net, self.recipe, self.device = net, recipe, device
        self.sums = torch.zeros(2, device=device) if sums is None else sums
        self.averages: Weights = {}  # running means of gradients, pruned weights included; see `average_gradients`
        self._decay = 0.0
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.norms = NormInterpolation(net, device) if recipe.norm_interpolation else None
        self._prepare, self._num_processes = prepare, world().size
        self.layout = layout.suitable(net, device, execution.channels_last)  # of images and weights
        layout.lay_out_(net, self.layout)
        self._plain = distributed.wrapped(net, device)
        self._compiled = Compiled(net) if execution.compile_model else None
        always = masks.prunable(net) if decayed is None else decayed
        groups: list[dict[str, nn.Parameter]] = [{}, {}]
        for name, parameter in (dict(net.named_parameters()) if parameters is None else parameters).items():
            groups[name not in always][name] = parameter
        if penalised is None:
            penalised = batch_norm_scales(net)
            if recipe.batch_norm_l1 and not penalised:
                said = f"training.batch_norm_l1={recipe.batch_norm_l1:g}"
                raise ConfigError(f"{said}: the network has no batch norm with a scale; give 0")
        decays = (recipe.weight_decay, recipe.weight_decay * recipe.decay_norm_and_bias)
        self.optimizer = Optimizer(
            recipe.optimizer(),
            list(zip(groups, decays, strict=True)),
            lr=recipe.lr,
            capturable=graphs.supported(device),
            l1=recipe.batch_norm_l1,
            penalised=penalised,
        )

    def infer(self, images: Tensor, whole: bool) -> Tensor:
        """Logits of images that are laid out as the step does it, without a step.

        Args:
            whole: the batch has a size that comes again and again. Only then is it worth compiling for.
        """
        logits: Tensor = self._compiled(images) if self._compiled is not None and whole else self.net(images)
        return logits

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that a step reads or writes, except the batch and gradients."""
        norms = [] if self.norms is None else [self.norms.share]
        return [*self.optimizer.tensors, *self.net.buffers(), self.sums, *self.averages.values(), *norms]

    def average_gradients(self, names: Iterable[str], decay: float) -> None:
        """Keeps a running mean of the gradients of some parameters from now on, in `averages`.

        Args:
            decay: weight of the earlier mean at every step.
        """
        parameters = dict(self.net.named_parameters())
        self.averages = {name: torch.zeros_like(parameters[name], requires_grad=False) for name in names}
        self._decay = decay

    def move_norms(self, share: float) -> None:
        """Says how far norms are moved in the next step. The recipe has to ask for it."""
        assert self.norms is not None
        self.norms.share.fill_(share)

    def __call__(self, images: Tensor, labels: Tensor, num_images: int) -> None:
        """Takes a step at the optimizer's learning rate. The network must be in train mode.

        Args:
            images: (B, C, H, W), the part of this process.
            labels: classes (B,), or targets (B, K).
            num_images: size of the batch of all processes together.
        """
        self.backward(images, labels, num_images)
        self.update()

    def backward(self, images: Tensor, labels: Tensor, num_images: int) -> None:
        """Computes the gradients of a batch, those of pruned weights included.

        Args:
            images: (B, C, H, W), the part of this process.
            labels: (B,).
            num_images: size of the batch of all processes together.
        """
        with nullcontext() if self.norms is None else self.norms.during_pass():
            self._pass(images, labels, num_images)
        if self.averages:
            self._average()

    def _pass(self, images: Tensor, labels: Tensor, num_images: int) -> None:
        """Forward and backward, and the sums."""
        recipe = self.recipe
        with devices.autocast(self.device, recipe.precision):
            images = layout.laid_out(images, self.layout)
            if self._compiled is not None and len(labels) == recipe.batch_size:
                logits = self._compiled(images)
            else:
                logits = self._plain(images)
            loss = objectives.loss(logits / recipe.temperature, labels, label_smoothing=recipe.label_smoothing)
        with torch.no_grad():
            self.sums += torch.stack([loss.detach() * len(labels), objectives.correct(logits.detach(), labels).sum()])
        if self._num_processes > 1:
            # The gradients are averaged over processes. This makes the average that of the mean over all images.
            loss = loss * (len(labels) * self._num_processes / num_images)
        self.optimizer.zero_grad()
        self._prepare()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Moves the weights by the gradients, which are overwritten."""
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        self.scaler.update()

    @torch.no_grad()
    def _average(self) -> None:
        gradients = self.gradients(self.averages)
        means = [self.averages[name] for name in gradients]
        torch._foreach_lerp_(means, list(gradients.values()), 1 - self._decay)

    def gradients(self, names: Iterable[str]) -> Weights:
        """The gradients that `backward` left to some parameters. Tensors are those in use, not copies."""
        parameters = dict(self.net.named_parameters())
        return {name: gradient for name in names if (gradient := parameters[name].grad) is not None}


def batch_norm_scales(net: nn.Module) -> list[str]:
    """The names of the scales of all batch norms of a network."""
    norms = {name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm)}
    return [f"{name}.weight" for name, norm in norms.items() if norm.affine]
