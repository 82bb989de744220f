"""Files that are whole or absent."""

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only asks for states imports no torch
    from torch import Tensor


def valid(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: valid(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [valid(item) for item in value]
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary name in the same directory, flushed to disk, then renamed."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def tensor_bytes(tensors: Mapping[str, "Tensor"], notes: str = "") -> bytes:
    """Tensors by name in the safetensors format, with a text kept beside them.

    Raises:
        MemoryError: there is too little of it.
    """
    from safetensors.torch import save

    there = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors ends the process where it gets no memory for its two copies; Python can be asked and says no.
    bytearray(2 * sum(tensor.nbytes for tensor in there.values()))
    return save(there, {"notes": notes} if notes else None)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_atomically(path, (json.dumps(valid(value), indent=2, allow_nan=False) + "\n").encode())
