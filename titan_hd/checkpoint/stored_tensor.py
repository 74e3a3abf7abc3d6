"""One tensor that torch.save wrote into the middle of a file: all of it, or a part without reading the rest.

torch.save writes a zip file without compression: a small pickle with the tensor's layout, and its memory as it is. No
code is run: the pickle is read by an unpickler that knows the words of a plain tensor, and anything else by torch with
weights_only.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, cast

import torch

# A tensor of so few bytes is read whole.
_SMALL_BYTES = 2**20
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip file: lengths of its name and of what else is before it


class _Layout(NamedTuple):
    """Of a contiguous tensor. start: where its memory begins, in bytes of the zip file."""

    start: int
    size: tuple[int, ...]
    dtype: torch.dtype


class StoredTensor:
    """A tensor in `file` from byte `start` on, which takes `length` bytes there."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length = file, start, length
        self._layout = _layout(cast(IO[bytes], _Section(file, start, length))) if length > _SMALL_BYTES else None

    def read(self, wanted: int) -> torch.Tensor | None:
        """All of it, if that is as good as reading the `wanted` elements that are needed; else None: `read_part`."""
        if self._layout is None:
            return torch.load(
                io.BytesIO(self._bytes(0, self._length)), map_location="cpu", mmap=False, weights_only=True
            )
        count = math.prod(self._layout.size)
        return self._values(0, count).view(self._layout.size) if 2 * wanted >= count else None

    def read_part(self, block: int | None, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """A box; of a stack, in this block. Reads the rows that it lies in."""
        assert self._layout is not None
        size = self._layout.size if block is None else self._layout.size[1:]
        row = math.prod(size[1:])
        first = (block or 0) * math.prod(size) + offsets[0] * row
        rows = self._values(first, lengths[0] * row).view(lengths[0], *size[1:])
        return narrowed(rows, (0, *offsets[1:]), lengths)

    def _values(self, first: int, count: int) -> torch.Tensor:
        assert self._layout is not None
        width = self._layout.dtype.itemsize
        return torch.frombuffer(
            self._bytes(self._layout.start + first * width, count * width), dtype=self._layout.dtype
        )

    def _bytes(self, start: int, count: int) -> bytearray:
        content = bytearray(count)
        self._file.seek(self._start + start)
        if self._file.readinto(content) != count:  # pyrefly: ignore[missing-attribute]: it is a buffered file
            raise EOFError(f"the file ends before byte {self._start + start + count}")
        return content


def narrowed(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """The view of a box."""
    for dim, (offset, length) in enumerate(zip(offsets, lengths)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def _layout(file: IO[bytes]) -> _Layout | None:
    """None if it is anything but a contiguous tensor alone in its memory, of this machine's byte order."""
    try:
        with zipfile.ZipFile(file) as archive:
            folder = archive.namelist()[0].partition("/")[0]
            (dtype, key, count), offset, size, stride = _TensorUnpickler(archive.open(f"{folder}/data.pkl")).load()
            memory = archive.getinfo(f"{folder}/data/{key}")
            order = archive.read(f"{folder}/byteorder").decode()
        file.seek(memory.header_offset)
        start = memory.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
        contiguous = tuple(stride) == torch.empty(size, device="meta").stride()
        whole = offset == 0 and count == math.prod(size) and memory.file_size == count * dtype.itemsize
        plain = contiguous and whole and memory.compress_type == zipfile.ZIP_STORED and order == sys.byteorder
        return _Layout(start, tuple(size), dtype) if plain else None
    except (zipfile.BadZipFile, KeyError, IndexError, TypeError, ValueError, pickle.UnpicklingError, EOFError):
        return None


class _TensorUnpickler(pickle.Unpickler):
    """Gives ((dtype, key of the memory, its elements), offset, size, stride) for a plain tensor."""

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        _, dtype, key, _, count = pid
        return dtype, key, count

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        dtype = getattr(getattr(torch, name, None), "dtype", None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):  # torch.FloatStorage and the like
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Section(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
