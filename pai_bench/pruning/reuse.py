"""Scores and masks that an earlier run has computed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis.cost import CountFlops
from pai_bench.batches import labels_of
from pai_bench.core import Batches, Loss, Mask, Score, Scores, Subnetwork, Weights
from pai_bench.masks import masks
from pai_bench.pruning.pruned import Pruned
from pai_bench.system import devices
from pai_bench.system.cache import Cache

_COSTS = ("seconds", "num_examples", "flops", "sparsities", "num_tied")


def scores(cache: Cache, model: nn.Module, prunable: masks.Which = "all") -> tuple[Scores, dict[str, Any]] | None:
    """The cached scores of a model for one-shot pruning at any sparsity, and their costs. None: they are not cached."""
    weights = masks.prunable(model, prunable)

    def use(tensors: dict[str, Tensor], notes: dict[str, Any]) -> tuple[Scores, dict[str, Any]]:
        _check_shapes(tensors, weights)
        costs = {"seconds": float(notes["seconds"])} | {key: int(notes[key]) for key in ("num_examples", "flops")}
        return {name: tensors[name].to(weight.device) for name, weight in weights.items()}, costs

    return cache.take("scores", {}, use)


def _check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses tensors of another network.

    Raises:
        ValueError: names or shapes differ.
    """
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in expected.items()}:
        raise ValueError("its tensors are not those of this network")


class CachedScore:
    """A score for one-shot pruning that caches what it computes, for runs with other sparsities."""

    def __init__(self, score: Score, cache: Cache) -> None:
        self.score, self.cache = score, cache

    def __call__(self, net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
        """The scores of the prunable weights."""
        asked = []

        def num_kept() -> int:
            asked.append(True)
            return net.num_kept()

        device = next(iter(net.weights.values())).device
        devices.wait(device)
        started, counter = time.perf_counter(), CountFlops()
        with counter:
            scores = self.score(replace(net, num_kept=num_kept), batches, loss, generator)
        devices.wait(device)  # else the clock is read before the work is done
        seconds = time.perf_counter() - started
        # Scores that depend on the number of weights to keep hold for one sparsity only.
        if self.cache.worth_keeping(seconds) and not asked:
            num_examples = sum(map(len, labels_of(batches)))
            self.cache.put(
                "scores", {}, scores, {"seconds": seconds, "num_examples": num_examples, "flops": counter.flops}
            )
        return scores


def stored_mask(
    cache: Cache,
    path: dict[str, Any],
    model: nn.Module,
    initial: Weights,
    record: Callable[[dict[str, float]], None],
    search: Callable[[Callable[[dict[str, float]], None]], Pruned],
    prunable: masks.Which = "all",
) -> Pruned:
    """What a search of several rounds without training finds. It comes from the cache, or is searched and cached.

    Args:
        path: what leads from scores to the mask: the sparsities of the rounds and their rounding, and the allocation.
        model: is pruned, as by the search.
        initial: the initial values of its parameters.
        record: receives the metrics of each round.
        search: runs the search, and records to the function that it is given.
        prunable: which layers are pruned.
    """
    weights = masks.prunable(model, prunable)

    def use(tensors: dict[str, Tensor], notes: dict[str, Any]) -> tuple[Pruned, list[dict[str, float]]]:
        parts: dict[str, Mask] = {"mask": {}, "coupled": {}, "units": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor.to(next(model.parameters()).device)
        mask, coupled, units = ({name: parts[p][name] for name in notes["order"][p]} for p in parts)
        _check_shapes(mask, weights)
        return Pruned(mask, units or mask, coupled, epoch=0.0, **{key: notes[key] for key in _COSTS}), list(
            notes["lines"]
        )

    if (found := cache.take("mask", path, use)) is not None:
        pruned, known = found
        masks.apply_(model, pruned.mask_with_coupled)
        for line in known:
            record(line)
        return pruned
    lines: list[dict[str, float]] = []

    def noted(metrics: dict[str, float]) -> None:
        lines.append(metrics)
        record(metrics)

    pruned = search(noted)
    # A search that rescales weights leaves more than a mask, so it is not cached.
    only_masked = all(torch.equal(weights[name], initial[name] * kept) for name, kept in pruned.mask.items())
    if cache.worth_keeping(pruned.seconds) and pruned.without_ablation is None and only_masked:
        filters = any(pruned.mask.get(name) is not tensor for name, tensor in pruned.units.items())
        groups = {"mask": pruned.mask, "coupled": pruned.coupled, "units": pruned.units if filters else {}}
        tensors = {f"{group}/{name}": tensor for group, mask in groups.items() for name, tensor in mask.items()}
        notes = {key: getattr(pruned, key) for key in _COSTS} | {
            "lines": lines,
            "order": {group: list(mask) for group, mask in groups.items()},
        }
        cache.put("mask", path, tensors, notes)
    return pruned
