"""Masks from files, of this runner or of others: read, checked, and fitted to a model.

torch is imported only for files that cannot be read without it, so that a config with a mask is checked quickly.
"""

import hashlib
import logging
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pai_bench.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pai_bench.core import Mask
    from pai_bench.masks.masks import Which

log = logging.getLogger(__name__)

Names = Literal["exact", "order"]
Missing = Literal["refuse", "keep"]
Arrays = dict[str, NDArray[Any]]

# CONV.parametrizations.weight.original, and CONV.parametrizations.weight.0.mask
_PARAMETRIZED = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\.(?:(original)|\d+\.mask)")
_OF_NUMPY = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64"}
_MOST_ENTRIES = 2**31  # of a file: more than any network here has; it bounds the memory for reading
_SAVE = "save {name: 0/1 tensor} with torch.save, numpy.savez or safetensors"


def read(setting: str, path: str, *, zeros: bool) -> Arrays:
    """The masks in a file, by parameter name in the order of the file: bool, True = kept.

    torch.nn.utils.prune names its buffers NAME_mask. Such an entry is the mask of NAME, and all other entries are
    ignored. Parametrizations with a buffer `mask` are read likewise. A file without such entries must hold nothing but
    masks. A network may have buffers of its own with such a name.

    Args:
        setting: the setting that names the file, for errors.
        zeros: whether the file holds weights, so that the zeros of its matrices and kernels are the mask.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    where = f"{setting}={path}"
    tensors = tensors_in(where, path)
    named = _named_masks(tensors)
    if zeros:  # integers are positions and counts, no weights
        plain = {name: array for name, array in tensors.items() if not name.endswith("_mask")}
        kernels = {name: array for name, array in plain.items() if array.ndim > 1 and array.dtype.kind not in "biu"}
        if any(_has_weight(name, tensors) for name in named) or (named and not kernels):
            raise ConfigError(f"{where}: it holds masks ({next(iter(named))}_mask); take mask_file.zeros=true out")
        tensors = kernels
        check_finite(where, tensors)
    else:
        tensors = named or tensors
        _check_binary(where, tensors)
    masks = {name: array != 0 for name, array in tensors.items()}
    masks = {
        name: mask for name, mask in masks.items() if mask.ndim > 1 or not mask.all()
    }  # the full mask of a norm says nothing
    weights = _of_weights(masks)
    if not any(mask.size for mask in weights):
        raise ConfigError(f"{where}: it holds no mask of a kernel or a matrix; {_SAVE}")
    if not any(mask.any() for mask in weights):
        raise ConfigError(f"{where}: it keeps nothing; give a mask that keeps some weights")
    return masks


def digest(masks: Mapping[str, NDArray[np.bool_]], names: Names) -> str:
    """A checksum of names, shapes and bits. If masks are matched by order, the order counts too."""
    found = hashlib.sha256()
    for name in masks if names == "order" else sorted(masks):
        found.update(f"{name} {masks[name].shape}\n".encode())
        found.update(np.packbits(masks[name]).tobytes())
    return found.hexdigest()


def sparsity(masks: Mapping[str, NDArray[np.bool_]]) -> float:
    """The fraction of the weights that masks prune: of the numbers that give as many weights, the shortest."""
    weights = _of_weights(masks)
    total, kept = sum(mask.size for mask in weights), sum(int(mask.sum()) for mask in weights)
    for digits in range(1, 13):  # 0.98, and not 0.979998, which a whole number of weights makes of it
        short = round(1 - kept / total, digits)
        if round(round(1 - short, 12) * total) == kept:
            return short
    return 1 - kept / total


def agree(nominal: float, masks: Mapping[str, NDArray[np.bool_]]) -> bool:
    """Whether a nominal sparsity may stand for that of masks: the numbers kept are equal, or a thousandth apart."""
    weights = _of_weights(masks)
    total, kept = sum(mask.size for mask in weights), sum(int(mask.sum()) for mask in weights)
    asked = (1 - nominal) * total
    return round(asked) == kept or abs(asked - kept) <= 1e-3 * kept


def _of_weights(masks: Mapping[str, NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """The masks of kernels and matrices. Names tell them from position embeddings and the like, where they can."""
    found = {name: mask for name, mask in masks.items() if mask.ndim > 1}
    called_weight = [mask for name, mask in found.items() if f".{name}".endswith(".weight")]
    return called_weight or list(found.values())


def _named_masks(tensors: Arrays) -> Arrays:
    """The masks among entries NAME_mask, by NAME. If some have weights beside them, the others are buffers."""
    ending = {name.removesuffix("_mask"): array for name, array in tensors.items() if name.endswith("_mask")}
    found = {name: array for name, array in ending.items() if f"{name}_orig" in tensors or _is_binary(array)}
    return {name: array for name, array in found.items() if _has_weight(name, tensors)} or found


def _has_weight(name: str, tensors: Arrays) -> bool:
    return f"{name}_orig" in tensors or name in tensors


def _is_binary(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "biuf" and bool(((array == 0) | (array == 1)).all())


def fitted(
    where: str,
    masks: Mapping[str, NDArray[np.bool_]],
    model: "nn.Module",
    *,
    names: Names,
    missing: Missing,
    prunable: "Which" = "all",
) -> "tuple[Mask, Mask]":
    """The masks of a file as masks of a model: of its prunable weights, and of other parameters with pruned entries.

    Args:
        where: the setting and the file, for errors.
        names: "exact": a mask belongs to the parameter of its name. "order": the n-th kernel or matrix of the file
            belongs to the n-th of the model, whatever their names.
        missing: "keep": prunable weights without a mask stay whole. "refuse": they are an error.
        prunable: which layers the mask is of, as in masks.prunable.

    Raises:
        ConfigError: names or shapes are not those of the model.
    """
    import torch

    from pai_bench.masks import masks as of_models

    weights = of_models.prunable(model, prunable)
    parameters = dict(model.named_parameters())
    whole_layers = [name for name in of_models.prunable(model) if name in masks and name not in weights]
    if names == "exact" and whole_layers:
        raise ConfigError(
            f"{where}: it has a mask of {first_names(whole_layers)}, which prunable={_said(prunable)} leaves whole; "
            "give prunable=all, or a mask without it"
        )
    if names == "order":
        masks = _in_order(where, masks, {name: tuple(weight.shape) for name, weight in weights.items()})
    unknown = [name for name in masks if name not in parameters]
    absent = [name for name in weights if name not in masks]
    if unknown or (absent and missing == "refuse"):
        wrong = [f"the model has no {first_names(unknown)}"] if unknown else []
        wrong += [f"there is no mask of {first_names(absent)}"] if absent else []
        remedy = "give a mask of this model, or match by order with mask_file.names=order"
        if not unknown:
            remedy = "mask_file.missing=keep keeps such layers whole"
        raise ConfigError(f"{where}: {', and '.join(wrong)}; {remedy}")
    for name, mask in masks.items():
        if mask.shape != parameters[name].shape:
            raise ConfigError(
                f"{where}: the mask of {name} is {mask.shape}, the weight {tuple(parameters[name].shape)}; "
                "give a mask of this model"
            )
    device = next(iter(weights.values())).device
    given = {name: torch.from_numpy(np.array(mask, order="C")).to(device) for name, mask in masks.items()}
    whole = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in absent}
    if absent:
        log.info("%s: %s stay whole", where, first_names(absent))
    others = {name: mask for name, mask in given.items() if name not in weights and not mask.all()}
    return {name: (given | whole)[name] for name in weights}, others


def _said(words: "Which") -> str:
    return words if isinstance(words, str) else f"[{','.join(words)}]"


def _in_order(
    where: str, masks: Mapping[str, NDArray[np.bool_]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, NDArray[np.bool_]]:
    """The masks of a file under the names of the model: the n-th gets the name of the n-th kernel or matrix."""
    others = [name for name, mask in masks.items() if mask.ndim < 2]
    if others:
        raise ConfigError(
            f"{where}: {first_names(others)} is pruned too, which fits by name only; set mask_file.names=exact"
        )
    if len(masks) != len(shapes):
        raise ConfigError(
            f"{where}: it holds masks of {len(masks)} kernels and matrices, and the model has {len(shapes)}; "
            "to match by order there must be as many"
        )
    matched = dict(zip(shapes, masks, strict=True))
    for name, theirs in matched.items():
        if masks[theirs].shape != shapes[name]:
            raise ConfigError(
                f"{where}: by order {theirs} {masks[theirs].shape} would be the mask of {name} {shapes[name]}; the "
                "layers come in another order or are others"
            )
    log.info("%s: %d masks are matched by their order and shape, not by name", where, len(matched))
    for name, theirs in matched.items():
        log.debug("the mask of %s is that of %s", name, theirs)
    return {name: masks[theirs] for name, theirs in matched.items()}


# Files ----------------------------------------------------------------------------------------------------------------


def tensors_in(where: str, path: str) -> Arrays:
    """Every tensor in a file by name, without the prefixes that wrappers put before names."""
    if not Path(path).is_file():
        raise ConfigError(f"{where}: there is no such file; give the path of a .safetensors, .npz or .pt file")
    suffix = Path(path).suffix
    try:
        read_file = {".safetensors": _safetensors, ".npz": _npz}.get(suffix, _pt)
        found = read_file(where, path)
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged file makes a reader raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        kind = {".safetensors": "safetensors", ".npz": "npz"}.get(suffix, "torch.save")
        raise ConfigError(f"{where}: it cannot be read as a {kind} file ({reason or type(error).__name__})") from error
    plain: Arrays = {}
    for name, array in _as_prune_names(where, found).items():
        short = name.replace("_orig_mod.", "")
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in plain:
            raise ConfigError(f"{where}: it holds {short} twice, once as {name}")
        plain[short] = array
    if not plain:
        raise ConfigError(f"{where}: it holds no tensors; {_SAVE}")
    return plain


def _as_prune_names(where: str, tensors: Arrays) -> Arrays:
    """Tensors of masks in parametrizations under the names of torch.nn.utils.prune: NAME_mask, and NAME_orig beside."""
    masked = {f"{part[1]}{part[2]}" for name in tensors if (part := _PARAMETRIZED.fullmatch(name)) and part[3] is None}
    plain: Arrays = {}
    for name, array in tensors.items():
        part = _PARAMETRIZED.fullmatch(name)
        weight = part and f"{part[1]}{part[2]}"
        if part and part[3] is None:
            name = f"{weight}_mask"
        elif part:
            name = f"{weight}_orig" if weight in masked else str(weight)
        if name in plain:
            raise ConfigError(f"{where}: it holds {name} twice; give a network with one mask for each weight")
        plain[name] = array
    return plain


def _safetensors(where: str, path: str) -> Arrays:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:  # type: ignore[no-untyped-call]
        names = list(file.keys())
        if all(file.get_slice(name).get_dtype() in _OF_NUMPY for name in names):
            return {name: file.get_tensor(name) for name in names}
    from safetensors.torch import load_file

    return {name: _array(where, name, tensor) for name, tensor in load_file(path).items()}


def _npz(where: str, path: str) -> Arrays:
    _check_entries(where, _num_in_npz(path))
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _num_in_npz(path: str) -> int:
    """The number of entries that the headers of the arrays in a file announce."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                total += math.prod(header(file)[0])
    return total


def _check_entries(where: str, total: int) -> None:
    """Refuses a small file that would fill the memory, because it is compressed or repeats one value."""
    if total > _MOST_ENTRIES:
        raise ConfigError(
            f"{where}: its tensors have {total:,} entries, and at most {_MOST_ENTRIES:,} are read; "
            "give those of one network"
        )


def _pt(where: str, path: str) -> Arrays:
    import pickle

    import torch

    if zipfile.is_zipfile(path):  # a compressed file may hold a thousand times its size
        with zipfile.ZipFile(path) as archive:
            _check_entries(where, sum(member.file_size for member in archive.infolist()) // 8)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{where}: it holds more than tensors by name (or none at all), such as pickled modules, which cannot be "
            f"read safely (the masks that GraSP's code keeps, by module, are of this kind); where it was made, {_SAVE}"
        ) from error

    def is_named(value: object) -> bool:
        return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())

    if isinstance(content, Mapping) and not is_named(content):  # a checkpoint, with the tensors inside
        inside = [str(key) for key, value in content.items() if is_named(value)]
        if len(inside) != 1:
            keys = first_names(inside or [str(key) for key in content])
            raise ConfigError(f"{where}: no single state dict can be told in it (there is {keys}); {_SAVE}")
        content = content[inside[0]]
        log.info("%s: its %s is read", where, inside[0])
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: it holds a {type(content).__name__} and not tensors by name; {_SAVE}")
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    _check_entries(where, sum(tensor.numel() for tensor in tensors.values()))
    return {name: _array(where, name, tensor) for name, tensor in tensors.items()}


def _array(where: str, name: str, tensor: Any) -> NDArray[Any]:
    """A tensor as an array, in float32 if numpy lacks its type."""
    import torch

    if tensor.is_quantized:
        raise ConfigError(f"{where}: {name} is quantized; give one that is not")
    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    array: NDArray[Any] = tensor.numpy()
    return array


def _check_binary(where: str, tensors: Arrays) -> None:
    for name, array in tensors.items():
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"{where}: {name} holds {array.dtype}, and a mask 0 and 1")
        other = array[(array != 0) & (array != 1)]
        if other.size:
            raise ConfigError(
                f"{where}: {name} holds {other[0]:.6g}, and a mask only 0 and 1; if these are weights whose zeros are "
                "the mask, say so with mask_file.zeros=true"
            )


def check_finite(where: str, tensors: Arrays) -> None:
    """Refuses tensors that are no finite real numbers."""
    for name, array in tensors.items():
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"{where}: {name} holds {array.dtype} and no real numbers")
        if not np.isfinite(array).all():
            raise ConfigError(f"{where}: {name} holds {array[~np.isfinite(array)][0]}; give finite weights")


def first_names(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
