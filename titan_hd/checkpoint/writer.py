"""Writes a rank's pieces in the format of torch.distributed.checkpoint (DCP): tensors as torch.save writes them, one
behind the other, in files of bounded size.

A checksum of every file is taken while it is written: a damaged checkpoint is found before a run resumes from it.
Errors of the disk are OSErrors, not what torch.save makes of them.
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from titan_hd.checkpoint.folder import Files, durable
from titan_hd.checkpoint.pieces import Piece

_FILE_BYTES = 2**30
_FRAME_BYTES = 2048  # what torch.save adds to a tensor, about


class Entry(NamedTuple):
    """Where a piece lies: a line of the table of contents. start, length: bytes in the file."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def check_space(folder: Any, needed: int) -> None:
    """Make sure that so many bytes fit onto the disk; a store takes what it is given.

    Raises:
        OSError: they do not.
    """
    if not isinstance(folder, Path):
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed, {free} are free")


def bytes_of(pieces: list[Piece]) -> int:
    """What the pieces take on the disk, about."""
    return sum(piece.nbytes + _FRAME_BYTES for piece in pieces)


def write_pieces(folder: Any, rank: int, pieces: list[Piece]) -> tuple[list[Entry], Files]:
    """Write the files of a rank; on return they are on the disk. With each file's size and CRC-32.

    Raises:
        OSError: the disk is full or fails.
    """
    entries: list[Entry] = []
    files: Files = {}
    for number, group in enumerate(_bounded(pieces)):
        name = f"__{rank}_{number}.distcp"
        with durable(folder / name) as raw:
            file = _Checked(raw)
            for piece in group:
                start = file.size
                file.save(_values(piece))
                entries.append(Entry(piece.tensor.name, piece.offsets, piece.sizes, name, start, file.size - start))
        files[name] = {"size": file.size, "crc32": file.crc32}
    return entries, files


def _values(piece: Piece) -> torch.Tensor:
    """On the host, and alone in its memory: torch.save writes all of a tensor's memory."""
    if piece.values is not None:
        return piece.values
    part = piece.parts[0].detach()
    alone = part.untyped_storage().nbytes() == part.nbytes and part.shape == piece.sizes
    if alone and part.device.type == "cpu" and part.is_contiguous():
        return part
    values = piece.copied_to(torch.empty(piece.sizes, dtype=piece.tensor.dtype)).values
    if part.is_cuda:
        torch.cuda.synchronize(part.device)
    assert values is not None
    return values


def _bounded(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Groups of at most _FILE_BYTES, or of one piece."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.nbytes > _FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.nbytes
    if group:
        yield group


class _Checked:
    """A file that is written from its start to its end, with size and checksum of the bytes on their way to the disk,
    not of what the disk made of them."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._error: OSError | None = None
        self.size = self.crc32 = 0

    def save(self, values: torch.Tensor) -> None:
        try:
            torch.save(values, cast(Any, self))  # it has what torch.save uses of a file
        except RuntimeError:  # what torch.save makes of an error of the file
            raise self._error or RuntimeError("a tensor could not be written") from self._error

    def write(self, data) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self._error = error
            raise
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += memoryview(data).nbytes
        return written

    def flush(self) -> None:
        self._file.flush()
