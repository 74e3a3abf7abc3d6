"""The header of a safetensors file: its length in eight bytes, then JSON with dtype, shape and place of every tensor.

A file may come from anywhere. The safetensors library checks the header against itself and against the size of the
file; what it does not give are the places of the tensors in the file, which are read from the JSON here.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from titan_hd.errors import UserError
from titan_hd.files import shown

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: dtype by safetensors' name, shape, first byte counted from the start of the file, length."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def build_header(shapes: dict[str, torch.Size], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """Header of a file that holds these tensors one after another, and each one's first byte in the file."""
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of eight bytes
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + entries[name]["data_offsets"][0] for name in shapes}


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Raises:
        UserError: the file cannot be read, is truncated, or its header does not fit it.
    """
    try:
        return _read(path)
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:
        reason = f"{shown(str(error))} (it has {path.stat().st_size} bytes; is it complete?)"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path}: cannot be read as safetensors: {reason}")


def _read(path: Path) -> dict[str, Entry]:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError("it is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`")
        with safe_open(path, "pt"):  # checks everything but names that stand there twice
            pass
        length = int.from_bytes(start, "little")
        header = json.loads(file.read(length), object_pairs_hook=unique_keys)
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return entries


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError if a key stands there twice, of which json would take the last and others the first."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} stands there twice")
        found[name] = value
    return found
