"""A cache on disk for scores and masks. The key is a checksum of everything that determines them."""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis.cost import CountFlops
from pai_bench.core import Batches, Loss, Mask, Score, Scores, Subnetwork, Weights, labels_of
from pai_bench.masks import masks
from pai_bench.pruning.rounds import Pruned
from pai_bench.system import devices, files

T = TypeVar("T")
log = logging.getLogger(__name__)

_SECONDS = 1.0  # what takes less time is not worth caching
_COSTS = ("seconds", "num_examples", "flops", "sparsities", "num_tied")


def fingerprint(model: nn.Module) -> str:
    """A checksum of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def code(targets: Iterable[str]) -> str:
    """A checksum of this package's source, and of the source of the modules of other functions.

    Args:
        targets: dotted names of functions.
    """
    paths = set(Path(__file__).parents[1].rglob("*.py"))
    modules = [sys.modules.get(target.rpartition(".")[0]) for target in targets]
    paths |= {Path(module.__file__) for module in modules if module is not None and module.__file__}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class ScoreCache:
    """A folder of scores and masks. If it grows too large, the files that were used least recently are removed.

    Any number of processes may share it.

    Args:
        limit: the largest size of the folder, in bytes.
        determines: everything that determines the scores of a run, as JSON values.
    """

    def __init__(self, folder: Path, limit: int, determines: dict[str, Any]) -> None:
        self.folder, self.limit, self.determines = folder, limit, determines
        self.used: str | None = None  # what was found: "scores" or "mask"

    def _path(self, kind: str, more: dict[str, Any]) -> Path:
        text = json.dumps([kind, self.determines, more], sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def take(self, kind: str, more: dict[str, Any], use: Callable[[dict[str, Tensor], dict[str, Any]], T]) -> T | None:
        """What `use` makes of cached tensors (on the CPU) and of the notes beside them. None: they are not cached.

        Args:
            kind: "scores" or "mask".
            more: what determines them beside the settings of the cache.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(kind, more)
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                found = use(tensors, json.loads(file.metadata()["notes"]))
            path.touch()
        except FileNotFoundError:
            return None
        # The file may be damaged, or lack the notes.
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            log.warning("%s cannot be read and is computed again: %s: %s", path, type(error).__name__, error)
            return None
        self.used = kind
        log.info("the %s of an earlier run with the same network and settings are used: %s", kind, path)
        return found

    def put(self, kind: str, more: dict[str, Any], tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Caches tensors with notes. If the disk or the memory is full, it only warns."""
        path = self._path(kind, more)
        if sum(tensor.nbytes for tensor in tensors.values()) > self.limit:
            return
        try:
            content = files.tensor_bytes(tensors, json.dumps(notes))
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, content)
            self._make_room()
        except (OSError, MemoryError) as error:
            log.warning("%s cannot be kept for other runs: %s", path, error)

    def _make_room(self) -> None:
        for partial in self.folder.glob("*.tmp-*"):  # left by processes that died while they wrote
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime > 3600:
                    partial.unlink()
        found = []
        for path in self.folder.glob("*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            found.append((status.st_mtime, status.st_size, path))
        left = self.limit
        for _, size, path in sorted(found, reverse=True):
            left -= size
            if left < 0:
                path.unlink(missing_ok=True)


def scores(cache: ScoreCache, model: nn.Module) -> tuple[Scores, dict[str, Any]] | None:
    """The cached scores of a model for one-shot pruning at any sparsity, and their costs. None: they are not cached."""
    weights = masks.prunable(model)

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

    def __init__(self, score: Score, cache: ScoreCache) -> None:
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
        if seconds >= _SECONDS and not asked:
            num_examples = sum(map(len, labels_of(batches)))
            self.cache.put(
                "scores", {}, scores, {"seconds": seconds, "num_examples": num_examples, "flops": counter.flops}
            )
        return scores


def stored_mask(
    cache: ScoreCache,
    path: dict[str, Any],
    model: nn.Module,
    initial: Weights,
    record: Callable[[dict[str, float]], None],
    search: Callable[[Callable[[dict[str, float]], None]], Pruned],
) -> Pruned:
    """What a search of several rounds without training finds. It comes from the cache, or is searched and cached.

    Args:
        path: what leads from scores to the mask: the sparsities of the rounds and their rounding, and the allocation.
        model: is pruned, as by the search.
        initial: the initial values of its parameters.
        record: receives the metrics of each round.
        search: runs the search, and records to the function that it is given.
    """
    weights = masks.prunable(model)

    def use(tensors: dict[str, Tensor], notes: dict[str, Any]) -> tuple[Pruned, list[dict[str, float]]]:
        parts: dict[str, Mask] = {"mask": {}, "coupled": {}, "units": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor.to(next(model.parameters()).device)
        mask, coupled, units = ({name: parts[p][name] for name in notes["order"][p]} for p in parts)
        _check_shapes(mask, weights)
        return Pruned(mask, units or mask, coupled, **{key: notes[key] for key in _COSTS}), list(notes["lines"])

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
    if pruned.seconds >= _SECONDS and pruned.without_ablation is None and only_masked:
        filters = any(pruned.mask.get(name) is not tensor for name, tensor in pruned.units.items())
        groups = {"mask": pruned.mask, "coupled": pruned.coupled, "units": pruned.units if filters else {}}
        tensors = {f"{group}/{name}": tensor for group, mask in groups.items() for name, tensor in mask.items()}
        notes = {key: getattr(pruned, key) for key in _COSTS} | {
            "lines": lines,
            "order": {group: list(mask) for group, mask in groups.items()},
        }
        cache.put("mask", path, tensors, notes)
    return pruned
