"""What every optimizer has in common: parameters and their state, the learning rate, weights that stay pruned.

How an optimizer moves the weights is in `pai_bench/training/optimizers/`, one file for each.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pai_bench.core import Mask, Weights

OptimizerState = dict[str, Weights]  # name of a state tensor -> parameter -> tensor


class Update(Protocol):
    """Moves parameters by one step, in place."""

    def __call__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """Moves the parameters and their state.

        Where weight, gradient and state are zero they must stay zero: that is how pruned weights stay pruned.

        Args:
            parameters: those with a gradient.
            gradients: in the order of the parameters. They may be overwritten.
            state: by name, in the order of the parameters.
            lr: learning rate. A tensor on the device where the step is captured: then nothing may be read from the
                device, and all that changes from step to step must be in tensors.
            weight_decay: strength of the weight decay of these parameters.
        """


@dataclass(frozen=True)
class Method:
    """An optimization method: its update, and the state that it keeps. All state is zero before the first step."""

    update: Update
    per_weight: tuple[str, ...] = ()  # names of state tensors with one entry for each weight
    per_parameter: tuple[str, ...] = ()  # names of state tensors with one entry for each parameter


class Optimizer:
    """Moves parameters by a method and keeps pruned weights at zero.

    It is no subclass of torch.optim.Optimizer: that would import torch._dynamo, which takes as long as importing torch.
    It has what torch.amp.GradScaler needs.

    Args:
        method: how parameters move.
        groups: pairs of parameters by name and their weight decay. A parameter belongs to one group.
        lr: learning rate of the next step. It can be set at any time.
        capturable: keep the learning rate in a tensor on the device, where a captured step reads it.
        l1: strength of an L1 penalty, whose subgradient (l1 times the sign, 0 at 0) is added to gradients.
        penalised: names of the parameters that have this penalty.
    """

    def __init__(
        self,
        method: Method,
        groups: Sequence[tuple[Mapping[str, nn.Parameter], float]],
        *,
        lr: float,
        capturable: bool = False,
        l1: float = 0.0,
        penalised: Collection[str] = (),
    ) -> None:
        self._method, self._groups = method, groups
        self._l1, self._penalised = l1, penalised if l1 else ()
        self._parameters = {name: parameter for parameters, _ in groups for name, parameter in parameters.items()}
        device = next(iter(self._parameters.values())).device
        # State and factors change in place, because a captured step knows them by their address.
        self.state: OptimizerState = {
            key: {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
            for key in method.per_weight
        } | {key: {name: torch.zeros((), device=device) for name in self._parameters} for key in method.per_parameter}
        self._factors: Weights = {}  # 0 where a weight is pruned and 1 elsewhere
        self.lr_tensor = torch.tensor(lr, device=device) if capturable else None
        self.lr = lr

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr
        if self.lr_tensor is not None:
            self.lr_tensor.fill_(lr)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Where torch.amp.GradScaler finds the gradients that it unscales."""
        return [{"params": list(self._parameters.values())}]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that a step reads or writes, except gradients."""
        state = [tensor for tensors in self.state.values() for tensor in tensors.values()]
        kept = [*self._parameters.values(), *state, *self._factors.values()]
        return kept if self.lr_tensor is None else [*kept, self.lr_tensor]

    @torch.no_grad()
    def apply_mask(self, mask: Mask, *, moves: bool = False) -> None:
        """Sets pruned weights and their state to zero and keeps them there until the next mask.

        Kept weights move as if the mask were part of the forward pass.

        Args:
            moves: the mask will move while training goes on. Then tensors are ready for all that it may prune, so that
                a captured step sees the next mask.
        """
        pruned = mask if moves else {name: kept for name, kept in mask.items() if not kept.all()}
        if self._factors.keys() != pruned.keys():
            # Factors need the type and memory format of the weight. Otherwise the fused multiplication is done tensor
            # by tensor.
            self._factors = {name: torch.empty_like(self._parameters[name], requires_grad=False) for name in pruned}
        for name, kept in pruned.items():
            factor = self._factors[name].copy_(kept)
            self._parameters[name].mul_(factor)
            for key in self._method.per_weight:
                self.state[key][name].mul_(factor)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Moves every parameter that has a gradient. Overwrites the gradients."""
        # Not earlier: GradScaler must see a gradient that overflowed before it is multiplied by 0.
        masked = self._gradients(self._factors)
        if masked:
            torch._foreach_mul_(list(masked.values()), [self._factors[name] for name in masked])
        penalised = self._gradients(self._penalised)
        if penalised:
            signs = torch._foreach_sign([self._parameters[name] for name in penalised])
            torch._foreach_add_(list(penalised.values()), signs, alpha=self._l1)
        lr = self.lr if self.lr_tensor is None else self.lr_tensor
        for parameters, weight_decay in self._groups:
            gradients = self._gradients(parameters)
            if gradients:
                self._method.update(
                    [parameters[name] for name in gradients],
                    list(gradients.values()),
                    {key: [tensors[name] for name in gradients] for key, tensors in self.state.items()},
                    lr,
                    weight_decay,
                )

    def _gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: gradient for name in names if (gradient := self._parameters[name].grad) is not None}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copies a state. What is missing there becomes zero, so `load_state({})` forgets everything."""
        for key, tensors in self.state.items():
            given = state.get(key, {})
            for name, tensor in tensors.items():
                if name in given:
                    tensor.copy_(given[name])
                else:
                    tensor.zero_()
