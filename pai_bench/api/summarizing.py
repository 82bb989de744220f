"""What a mask leaves of each layer, as a table to read and as records."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pai_bench.analysis import cost
from pai_bench.api import networks
from pai_bench.api.isolation import untouched
from pai_bench.core import Mask
from pai_bench.masks import masks


@dataclass(frozen=True)
class Summary:
    """What a mask leaves of each layer. `print` shows it as a table.

    `records` has a dictionary for each prunable weight, and `total` one for all of them: name, shape, size (weights),
    kept, density, and, if the shape of an image was given, macs (multiply-adds for one image, dense) and macs_kept (if
    pruned weights cost nothing). The multiply-adds in `total` count products of activations too, as in attention.
    """

    records: list[dict[str, Any]]
    total: dict[str, Any]

    def __str__(self) -> str:
        columns = [key for key in self.total if key != "shape"]
        columns.insert(1, "shape")
        lines = [columns, *([_cell(record[key]) for key in columns] for record in [*self.records, self.total])]
        widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
        texts = []
        for line in lines:
            cells = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
            numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
            texts.append("  ".join([*cells, *numbers]))
        rule = "-" * len(texts[0])
        return "\n".join([texts[0], rule, *texts[1:-1], rule, texts[-1]])

    __repr__ = __str__


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, float):
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else str(value)


def summary(
    model: nn.Module,
    mask: Mask,
    input_shape: tuple[int, ...] | None = None,
    prunable: str | Sequence[str] = "all",
) -> Summary:
    """What a mask leaves of each layer of a model. The model and random states stay as they are.

    Args:
        model: the model, wrapped or not.
        mask: as `prune` returns it. A weight that it does not name is whole.
        input_shape: the shape of one image (C, H, W); None leaves multiply-adds out.
        prunable: which layers are counted, as in `prune`.

    Raises:
        ConfigError: the mask is of another model, or the model does not take such images.

    Example:
        >>> print(pai_bench.summary(model, mask, input_shape=(3, 32, 32)))
    """
    network = networks.check_model(model)
    networks.check_mask(network, mask)
    complete = networks.completed(network, mask, prunable)  # type: ignore[arg-type]  # the words are checked there
    macs = None
    if input_shape is not None:
        with untouched():  # a model may draw numbers and change its buffers
            shape = networks.checked_shape(input_shape)
            macs = cost.multiply_adds(networks.copied(network), shape)  # type: ignore[arg-type]
    records = []
    for name, kept in complete.items():
        number, size = masks.count(kept), kept.numel()
        record = {"name": name, "shape": tuple(kept.shape), "size": size, "kept": number, "density": number / size}
        if macs is not None:
            dense = macs.get(name, 0)
            record |= {"macs": dense, "macs_kept": round(dense * number / size)}
        records.append(record)
    size, number = masks.total(complete), masks.kept(complete)
    total: dict[str, Any] = {"name": "all", "shape": (), "size": size, "kept": number, "density": number / size}
    if macs is not None:
        total |= {"macs": sum(macs.values()), "macs_kept": cost.masked_multiply_adds(macs, complete)}
    return Summary(records, total)
