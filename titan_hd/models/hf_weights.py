"""Hugging Face weight files: which tensor lies where, rows read one slice at a time, files written in place by many.

Parameter names are HF's own, so there is no renaming in either direction. Nothing here knows of meshes: callers ask
for a range of rows and write a range of rows.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from titan_hd.config.errors import UserError

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_LOADABLE = set(_DTYPE_NAMES.values()) | {"F64"}
# Buffers that old Llama checkpoints carry and that the decoder computes by itself.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


class WeightFiles:
    """The safetensors files of a HF directory, checked against the shapes that a model expects.

    Raises:
        ValueError: with one line for every missing, unexpected or misshapen tensor, before anything is loaded.
    """

    def __init__(self, directory: str | Path, expected: dict[str, torch.Size], tied_head: bool):
        self.directory = Path(directory)
        self._handles: dict[str, safe_open] = {}
        self._file_of = self._locate()
        if tied_head:  # some exporters repeat the tied matrix
            self._file_of.pop("lm_head.weight", None)
        errors = self._check(expected)
        if errors:
            raise UserError("\n".join(errors))

    def read_rows(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Rows start..stop of a tensor (and of a matrix columns from..to) on the host, in the file's dtype; only these
        are read."""
        values = self._handle(self._file_of[name]).get_slice(name)
        return values[start:stop] if columns is None else values[start:stop, columns[0] : columns[1]]

    def _handle(self, file: str) -> safe_open:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.directory / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.directory / file}: cannot be read as safetensors: {error}") from None
        return self._handles[file]

    def _locate(self) -> dict[str, str]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            try:
                file_of = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{index}: must be a JSON object with a weight_map") from None
            if not isinstance(file_of, dict) or not all(isinstance(f, str) for f in file_of.values()):
                raise UserError(f"{index}: weight_map: must be an object of file names")
            outside = [f for f in set(file_of.values()) if Path(f).name != f]
            if outside:
                raise UserError(f"{index}: weight_map: {outside[0]!r} is not a file of the directory")
        elif (self.directory / "model.safetensors").exists():
            file_of = dict.fromkeys(self._handle("model.safetensors").keys(), "model.safetensors")
        else:
            raise UserError(f"model.hf_assets_path: {self.directory} holds no model.safetensors and no index of it")
        return {name: file for name, file in file_of.items() if not name.endswith(_IGNORED_SUFFIXES)}

    def _check(self, expected: dict[str, torch.Size]) -> list[str]:
        errors = [f"{self.directory}: {name}: is missing" for name in expected if name not in self._file_of]
        errors += [f"{self.directory}: {name}: is not part of the model" for name in self._file_of.keys() - expected]
        for name in expected.keys() & self._file_of.keys():
            where = self.directory / self._file_of[name]
            if name not in set(self._handle(self._file_of[name]).keys()):
                errors.append(f"{where}: {name}: the index names it, the file does not hold it")
                continue
            info = self._handle(self._file_of[name]).get_slice(name)
            if list(info.get_shape()) != list(expected[name]):
                errors.append(f"{where}: {name}: has shape {info.get_shape()}, must be {list(expected[name])}")
            if info.get_dtype() not in _LOADABLE:
                errors.append(f"{where}: {name}: has dtype {info.get_dtype()}, must be a floating-point type")
        return sorted(errors)


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies: file, byte offset of its first row, bytes per row."""

    file: Path
    offset: int
    row_bytes: int


def plan_files(
    directory: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, max_file_bytes: int = 5 * 2**30
) -> tuple[dict[str, TensorSlot], dict[Path, bytes]]:
    """Lay tensors out over safetensors files of bounded size.

    Returns:
        slots by tensor name, and for each file its header (length prefix included). A file is its header followed by
        its tensors, so any number of writers can fill it once the header is there.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * size
        if groups[-1] and filled + nbytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    slots, headers = {}, {}
    for i, names in enumerate(groups):
        file_name = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        path, end, entries = directory / file_name, 0, {"__metadata__": {"format": "pt"}}
        for name in names:
            begin, end = end, end + shapes[name].numel() * size
            entries[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shapes[name]),
                "data_offsets": [begin, end],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # data starts at a multiple of eight bytes
        headers[path] = len(text).to_bytes(8, "little") + text
        for name in names:
            offset = len(headers[path]) + entries[name]["data_offsets"][0]
            slots[name] = TensorSlot(path, offset, shapes[name].numel() * size // max(1, shapes[name][0]))
    return slots, headers


def write_headers(slots: dict[str, TensorSlot], headers: dict[Path, bytes]) -> None:
    """Create the files with their headers and, if there are several, the index. One process does this, first."""
    for path, header in headers.items():
        path.write_bytes(header)
    if len(headers) > 1:
        weight_map = {name: slot.file.name for name, slot in slots.items()}
        total = sum(sum(e["data_offsets"][1] - e["data_offsets"][0] for e in _entries(h)) for h in headers.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (next(iter(headers)).parent / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _entries(header: bytes) -> list[dict]:
    return [entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"]


def write_rows(slot: TensorSlot, start: int, rows: torch.Tensor, column: int = 0) -> None:
    """Write host rows, already in the file's dtype, as rows start.. of a tensor; rows narrower than the tensor's begin
    at `column`."""
    if rows.dim() == 2 and rows.shape[1] * rows.element_size() < slot.row_bytes:
        _write_columns(slot, start, rows, column)
        return
    data = rows.contiguous().view(torch.uint8).numpy() if rows.dim() else rows.reshape(1).view(torch.uint8).numpy()
    with open(slot.file, "r+b") as file:
        file.seek(slot.offset + start * slot.row_bytes)
        file.write(memoryview(data).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def _write_columns(slot: TensorSlot, start: int, rows: torch.Tensor, column: int) -> None:
    offset = slot.offset + start * slot.row_bytes
    file = np.memmap(slot.file, np.uint8, "r+", offset, (rows.shape[0], slot.row_bytes))
    data = rows.contiguous().view(torch.uint8).numpy()
    first = column * rows.element_size()
    file[:, first : first + data.shape[1]] = data
    file.flush()
