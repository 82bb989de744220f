"""A network whose weights are frozen and whose mask is trained."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pai_bench.core import Mask, Scores, Selection, State, Weights
from pai_bench.errors import ConfigError
from pai_bench.learned.method import Method
from pai_bench.masks import masks
from pai_bench.masks.layers import turned
from pai_bench.masks.selection import chosen_on_device, keep_largest
from pai_bench.system import graphs


class LearnedNetwork(nn.Module):
    """Applies the frozen weights of a model times a mask, which its only parameters choose: one score for each weight.

    It stands where a model stands: a trainer trains it, saves it and evaluates it like any other. A layer that is not
    pruned keeps all its weights. They are frozen too, with the values that the method gives to a layer of density 1.

    Args:
        model: on the device. It is frozen in place, and its weights become what the method makes of them.
        counts: how many weights each layer keeps, or how many all layers keep together.
        generator: draws the first scores.
        affine: "none" gives the normalisation layers ones and zeros; "trained" trains their parameters too.
        prunable: which layers are pruned, as in masks.prunable.

    Raises:
        ConfigError: the method ranks the weights of all layers together, and there is a number for each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        counts: Mapping[str, int] | int,
        generator: Generator,
        *,
        affine: Literal["none", "trained"],
        prunable: masks.Which = "all",
    ) -> None:
        super().__init__()
        if method.threshold is not None and not isinstance(counts, int):
            raise ConfigError("it ranks the weights of all layers together; use allocation=global")
        self.model, self.method = model.requires_grad_(False), method
        self._prunable = prunable
        self.names = list(masks.prunable(model, prunable))
        groups = [(self.names, counts)] if isinstance(counts, int) else [([name], k) for name, k in counts.items()]
        self._groups = groups
        self.num_kept = sum(k for _, k in groups)
        self._set_norms(trained=affine == "trained")
        for name, values in self.frozen_values(self.weights).items():
            self.weights[name].copy_(values)
        self._freeze_whole_layers()
        device = next(model.parameters()).device
        fresh = {name: method.draw(weight, generator) for name, weight in turned(model, self.weights).items()}
        drawn = [scores.to(device) for scores in turned(model, fresh).values()]
        self.scores = nn.ParameterList([nn.Parameter(scores) for scores in drawn])
        for number, scores in enumerate(drawn):  # the weights that may be chosen
            self.register_buffer(f"candidates_{number}", torch.ones_like(scores, dtype=torch.bool))
        for number, (_, k) in enumerate(groups):  # on the device, where a captured step finds them
            self.register_buffer(f"keep_{number}", torch.tensor([k], device=device))
        self.num_events: Tensor  # how often the event of the method has happened
        self.register_buffer("num_events", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def weights(self) -> Weights:
        """The frozen weights of the layers that are pruned, all of them; not copies."""
        return {name: weight.detach() for name, weight in masks.prunable(self.model, self._prunable).items()}

    @property
    def candidates(self) -> Mask:
        """The weights that may be chosen; not copies."""
        return {name: self.get_buffer(f"candidates_{number}") for number, name in enumerate(self.names)}

    def frozen_values(self, drawn: Weights) -> Weights:
        """What the method makes of weights that were drawn."""
        sizes = {name: weight.numel() for name, weight in self.weights.items()}
        densities = {name: k / sum(sizes[each] for each in group) for group, k in self._groups for name in group}
        weights = turned(self.model, drawn).items()  # in a layer that is not pruned all are kept
        made = {name: self.method.weights(weight, densities.get(name, 1.0)) for name, weight in weights}
        return turned(self.model, made)

    @torch.no_grad()
    def strengths(self) -> Scores:
        """What is ranked: higher = keep. Scores that are not finite count as 0; they make the loss not finite, too."""
        scores = {name: self._limited(score) for name, score in zip(self.names, self.scores, strict=True)}
        return {name: self.method.strength(score).nan_to_num(0.0, 0.0, 0.0) for name, score in scores.items()}

    @torch.no_grad()
    def mask(self) -> Mask:
        """The mask that the scores choose now. On a GPU nothing is read from the device."""
        strengths, candidates = self.strengths(), self.candidates
        if (threshold := self.method.threshold) is not None:
            return {name: (strengths[name] > threshold) & candidates[name] for name in self.names}
        mask: Mask = {}
        for number, (names, k) in enumerate(self._groups):
            of_group = {name: strengths[name] for name in names}
            if not graphs.supported(strengths[names[0]].device):
                mask |= keep_largest(of_group, {name: candidates[name] for name in names}, k).mask
                continue
            values, allowed = (
                torch.cat([tensors[name].flatten() for name in names]) for tensors in (strengths, candidates)
            )
            chosen, _ = chosen_on_device(values, allowed, self.get_buffer(f"keep_{number}"))
            parts = torch.split(chosen, [strengths[name].numel() for name in names])
            mask |= {name: part.view(strengths[name].shape) for name, part in zip(names, parts, strict=True)}
        return mask

    def effective(self) -> Weights:
        """The weights that are applied. Scores get the gradient that weight times strength would give them."""
        mask, candidates, effective = self.mask(), self.candidates, {}
        for name, score in zip(self.names, self.scores, strict=True):
            weight = self.weights[name]
            effective[name] = self.method.values(weight, mask[name]) * mask[name]
            if torch.is_grad_enabled():
                relaxed = weight * self.method.strength(score) * candidates[name]
                effective[name] = effective[name] + (relaxed - relaxed.detach())
        return effective

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        if self.training and self.method.limits is not None:
            with torch.no_grad():
                for score in self.scores:
                    score.copy_(self._limited(score))
        logits: Tensor = torch.func.functional_call(self.model, self.effective(), (images,))
        return logits

    def final(self) -> Selection:
        """The mask with which the search ends. It keeps exactly as many weights as asked for."""
        strengths, full = self.strengths(), masks.full(self.model, self._prunable)
        if self.method.threshold is not None:  # weights that are frozen out come last
            strengths = {name: s - 2 * ~self.candidates[name] for name, s in strengths.items()}
        selections = [
            keep_largest({name: strengths[name] for name in names}, {name: full[name] for name in names}, k)
            for names, k in self._groups
        ]
        mask = {name: kept for one in selections for name, kept in one.mask.items()}
        return replace(selections[0], mask=mask, num_tied=sum(one.num_tied for one in selections))

    @torch.no_grad()
    def settle_(self, mask: Mask) -> bool:
        """Makes the network one with a given mask from now on. Says whether it was another one."""
        before = self.mask()
        for name, score in zip(self.names, self.scores, strict=True):
            self.candidates[name].copy_(mask[name])
            if (threshold := self.method.threshold) is not None:
                score[mask[name] & (score <= threshold)] = threshold + 0.5
        return any(not torch.equal(before[name], kept) for name, kept in mask.items())

    @torch.no_grad()
    def ticket(self, mask: Mask) -> State:
        """The state of the model as the search leaves it. Pruned weights have values too."""
        values = {name: self.method.values(weight, mask[name]) for name, weight in self.weights.items()}
        return {name: values.get(name, tensor).clone() for name, tensor in self.model.state_dict().items()}

    def _limited(self, scores: Tensor) -> Tensor:
        """Scores, those beyond the limits of the method put back to them."""
        return scores if self.method.limits is None else scores.clamp(*self.method.limits)

    @torch.no_grad()
    def _freeze_whole_layers(self) -> None:
        """Gives the layers that are not pruned the values of a layer that keeps all its weights."""
        whole = {name: weight for name, weight in masks.prunable(self.model).items() if name not in self.names}
        for name, values in self.frozen_values({**whole}).items():
            whole[name].copy_(self.method.values(values, torch.ones_like(values, dtype=torch.bool)))

    @torch.no_grad()
    def _set_norms(self, trained: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
                for name, parameter in module.named_parameters(recurse=False):
                    if trained:
                        parameter.requires_grad_(True)
                    else:
                        parameter.fill_(1.0 if name == "weight" else 0.0)
