"""One optimizer step: forward, loss, backward, update under the mask, sums."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench.system import devices, distributed, layout
from pai_bench.system.world import world
from pai_bench.training.optimizer import Optimizer
from pai_bench.training.recipe import Recipe


class Step:
    """The step of a network: a function of a batch that changes tensors in place and never waits for the device.

    So the same code runs by itself and captured in a CUDA graph.

    Args:
        parameters: what the optimizer moves, by name.
        decayed: names of the parameters that always get weight decay.
        sums: (2,), to which every step adds the sum of its losses and the number of its hits.
        scaler: scales the loss, where the precision asks for it.
        prepare: called before the backward pass.
    """

    def __init__(
        self,
        net: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        decayed: Collection[str],
        recipe: Recipe,
        device: torch.device,
        sums: Tensor,
        scaler: torch.amp.GradScaler,
        *,
        channels_last: bool,
        compile_model: bool,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.net, self.recipe, self.device, self.sums = net, recipe, device, sums
        self._scaler, self._prepare, self._num_processes = scaler, prepare, world().size
        self.layout = layout.suitable(net, device, channels_last)  # of images and weights
        layout.lay_out_(net, self.layout)
        self.infer: nn.Module = torch.compile(net) if compile_model else net  # type: ignore[assignment]
        self._forward = distributed.wrapped(self.infer, device)
        groups: list[dict[str, nn.Parameter]] = [{}, {}]
        for name, parameter in parameters.items():
            groups[name not in decayed][name] = parameter
        self.optimizer = Optimizer(
            recipe.optimizer,
            list(zip(groups, (recipe.weight_decay, recipe.weight_decay * recipe.decay_norm_and_bias), strict=True)),
            lr=recipe.lr,
            capturable=device.type == "cuda",
        )

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that a step reads or writes, the batch and gradients excepted."""
        return [*self.optimizer.tensors, *self.net.buffers(), self.sums]

    def __call__(self, images: Tensor, labels: Tensor, num_images: int) -> None:
        """Takes a step at the optimizer's learning rate.

        Args:
            images: (B, C, H, W), the share of this process.
            labels: (B,).
            num_images: in the batch of all processes.
        """
        recipe = self.recipe
        with devices.autocast(self.device, recipe.precision):
            logits = self._forward(layout.laid_out(images, self.layout))
            loss = F.cross_entropy(logits / recipe.temperature, labels, label_smoothing=recipe.label_smoothing)
        with torch.no_grad():
            self.sums += torch.stack([loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()])
        if self._num_processes > 1:
            # So that the average of the gradients over processes is that of the mean over all images.
            loss = loss * (len(labels) * self._num_processes / num_images)
        self.optimizer.zero_grad()
        self._prepare()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self.optimizer)  # type: ignore[arg-type]
        self._scaler.update()
