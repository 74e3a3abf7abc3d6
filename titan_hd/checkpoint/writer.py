"""Writes the shards of a rank: torch.distributed.checkpoint's (DCP's) FileSystemWriter, with three things added.

* A checksum of every file, taken while it is written: a damaged checkpoint is found before a run resumes from it.
* Files of bounded size. DCP writes one file per rank (or per tensor), and keeps the host copies of all tensors of a
  file in memory until the file is closed.
* Errors of the disk as OSError, where DCP passes on what torch.save makes of them; too little space is noticed before
  anything is written.

`write_data` calls DCP's private `_write_data`, which fills a queue of files. A torch version that changes it fails in
tests/distributed/test_checkpoint.py.
"""

from __future__ import annotations

import errno
import io
import os
import queue
import shutil
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from titan_hd.checkpoint.folder import Files

_FILE_BYTES = 2**30
_FRAME_BYTES = 2048  # what torch.save adds to a tensor, about


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes the shards of this rank to `folder`. `checksums`: size and CRC-32 of each file of this rank, by name."""

    def __init__(self, folder: Path):
        # No copying ahead: DCP copies on the current CUDA stream, and in a new thread that is GPU 0's on every rank.
        super().__init__(str(folder), per_thread_copy_ahead=0)
        self._files = _ChecksumFiles()
        self.fs: FileSystem = self._files

    @property
    def checksums(self) -> Files:
        return self._files.entries

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Check, on rank 0, that what all ranks are about to write fits onto the disk.

        Raises:
            OSError: it does not fit onto the disk.
        """
        needed = sum(_bytes(item) + _FRAME_BYTES for plan in plans for item in plan.items)
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed, {free} are free")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[Any]]:
        """The items of the plan in files of at most _FILE_BYTES (or of one item)."""
        files: queue.Queue = queue.Queue()
        for number, items in enumerate(_bounded(plan.items)):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            files.put((self.fs.concat_path(self.path, name), name, items))
        try:
            return self._write_data(planner, files)
        except RuntimeError:  # what torch.save makes of an error of the file that it writes to
            raise self._files.error or RuntimeError("a tensor could not be written") from self._files.error


def _bounded(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    chunk: list[WriteItem] = []
    size = 0
    for item in items:
        if chunk and size + _bytes(item) > _FILE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += _bytes(item)
    if chunk:
        yield chunk


def _bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize if data else 0


class _ChecksumFiles(FileSystem):
    """Computes size and checksum from the bytes on their way to the disk, not from what the disk made of them."""

    def __init__(self) -> None:
        self.entries: Files = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            checked = _Checked(stream, self)
            yield cast(io.IOBase, checked)  # it has what DCP and torch.save use of one
        # The table of contents is written to `.metadata.tmp` and renamed.
        self.entries[Path(path).name.removesuffix(".tmp")] = {"size": checked.size, "crc32": checked.crc32}


class _Checked:
    """A stream, written from its start to its end, as DCP and torch.save need it; it keeps the first OSError."""

    def __init__(self, stream: io.IOBase, files: _ChecksumFiles):
        self._stream, self._files = stream, files
        self.size = self.crc32 = 0

    def write(self, data) -> int:
        try:
            written = self._stream.write(data)
        except OSError as error:
            self._files.error = error
            raise
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += memoryview(data).nbytes
        return written

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        """For fsync, before which DCP does not flush its table of contents."""
        self._stream.flush()
        return self._stream.fileno()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
