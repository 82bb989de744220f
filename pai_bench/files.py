"""Files that are whole or absent."""

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any


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


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_atomically(path, (json.dumps(valid(value), indent=2, allow_nan=False) + "\n").encode())
