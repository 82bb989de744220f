"""Files that are whole or absent."""

import csv
import io
import json
import math
import os
import secrets
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pai_bench.errors import UserError

if TYPE_CHECKING:  # programs that only read the states of runs must not import torch
    from torch import Tensor


def valid(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: valid(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [valid(item) for item in value]
    return value


def moment(seconds: float) -> str:
    """Seconds since 1970 as a local date and time; "?" if the number is no valid time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "?"


def csv_cell(value: Any) -> Any:
    """The value for a CSV file. A text that a spreadsheet would take for a formula gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table. A bar within a cell stays a bar."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as the text of a CSV file with a header. A value that is None or absent gives an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    writer.writerows([csv_cell(row.get(column)) for column in columns] for row in rows)
    return buffer.getvalue()


def private_folder(path: Path) -> Path:
    """A folder that only this user can enter, made if it is missing.

    Raises:
        UserError: the name belongs to something else, or others can write to the folder.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    entry = path.lstat()
    if not stat.S_ISDIR(entry.st_mode) or entry.st_uid != os.getuid() or entry.st_mode & 0o022:
        raise UserError(
            f"{path}: it is a link, or others can write to it; remove it, or set TMPDIR to a folder of yours"
        )
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary name in the same directory, flushed to disk, then renamed."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


def tensor_bytes(tensors: Mapping[str, "Tensor"], notes: str = "") -> bytes:
    """Tensors by name in the safetensors format, with a text beside them.

    Raises:
        MemoryError: there is too little memory.
    """
    from safetensors.torch import save

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors makes two copies, and kills the process if it gets no memory for them. Python raises MemoryError.
    bytearray(2 * sum(tensor.nbytes for tensor in on_cpu.values()))
    return save(on_cpu, {"notes": notes} if notes else None)


def read_json(path: Path, **needed: type | tuple[type, ...]) -> dict[str, Any]:
    """The dictionary in a JSON file. Every error names the file.

    Args:
        needed: keys that it must have, and the types of their values.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it is damaged ({error})") from error
    wrong = [key for key, kind in needed.items() if not isinstance(value, dict) or not isinstance(value.get(key), kind)]
    if not isinstance(value, dict) or wrong:
        raise ValueError(f"{path}: it is damaged (no {' and no '.join(wrong) or 'dictionary'} in it)")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_atomically(path, (json.dumps(valid(value), indent=2, allow_nan=False) + "\n").encode())
