"""The header of a safetensors file: its length in eight bytes, then JSON with dtype, shape and place of every tensor.

A file may come from anywhere, so everything that the header says is checked against the size of the file before
anything is allocated for it.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path

import torch

from titan_hd.errors import UserError
from titan_hd.files import shown

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
_LARGEST_SIDE = 2**48  # of a shape; products of larger ones are no sizes of files


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: dtype by safetensors' name, shape, first byte counted from the start of the file, length."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def build_header(shapes: dict[str, torch.Size], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """Header of a file that holds these tensors one after another, and each one's first byte in the file."""
    end, entries = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of eight bytes
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + entries[name]["data_offsets"][0] for name in shapes}


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file.

    Raises:
        UserError: the file cannot be read, is truncated, or its header does not fit it; one line for each fault.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _fault(path, "it is no regular file")
        with open(path, "rb", buffering=0) as file:
            return _parse(path, file, status.st_size)
    except OSError as error:
        raise _fault(path, error.strerror or str(error)) from None


def _fault(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: cannot be read as safetensors: {reason}")


def _parse(path: Path, file, size: int) -> dict[str, Entry]:
    start = file.read(8)
    if start == b"version ":
        raise _fault(path, "it is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise _fault(path, f"it is truncated or something else: {size} bytes are too few for its header")
    if length > LARGEST_HEADER:
        raise _fault(path, f"its header of {length} bytes is longer than {LARGEST_HEADER}")
    try:
        raw = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _fault(path, f"its header is no valid JSON: {shown(str(error))}") from None
    if not isinstance(raw, dict):
        raise _fault(path, "its header is no JSON object")
    raw.pop("__metadata__", None)
    entries, errors = {}, []
    for name, said in raw.items():
        try:
            entries[name] = _entry(said, 8 + length)
        except ValueError as error:
            errors.append(f"{path}: {shown(name)}: {error}")
    if errors:
        raise UserError("\n".join(errors))
    _check_places(path, entries, 8 + length, size)
    return entries


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} stands there twice")
        found[name] = value
    return found


def _entry(said: object, data_start: int) -> Entry:
    """One entry of the header, of the right types and consistent in itself."""
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"has the unknown dtype {shown(str(dtype))}")
    if not _whole_numbers(shape) or len(shape) > 8:
        raise ValueError("its shape must be a list of at most eight sizes")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("its data_offsets must be a first byte and an end")
    bits, nbytes = math.prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise ValueError(f"has {nbytes} bytes, shape {shape} of {dtype} needs {-(-bits // 8)}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < _LARGEST_SIDE for v in values)


def _check_places(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> None:
    """The tensors must fill the file from the header to its end, without gaps and overlaps."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "a gap" if entry.offset > end else "an overlap"
            raise _fault(path, f"there is {what} before the data of {shown(name)}")
        end += entry.nbytes
    if end > size:
        raise _fault(path, f"it is truncated: it has {size} bytes, its header promises {end}")
    if end < size:
        raise _fault(path, f"it has {size - end} bytes more than its header says")
