"""The table of contents of a checkpoint, DCP's `.metadata`, from the lines that the ranks send of what they wrote.

Rank 0 makes it, perhaps while its main thread launches the kernels of the training: so it leaves most of the time to
that thread, and makes it again only when a line has changed, which between two saves of a run none does.
"""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO, TypeVar, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_hd.checkpoint.pieces import Stored
from titan_hd.checkpoint.writer import Entry

T = TypeVar("T")
_REST = 4  # times as long as the work
_AT_A_TIME = 64  # lines, a fraction of a millisecond, for which another thread may have to wait


class TableOfContents:
    """What the ranks have told so far. Lives as long as a run, on rank 0."""

    def __init__(self) -> None:
        self._entries: dict[int, list[Entry]] = {}
        self._content: tuple[list[Stored], bytes] | None = None

    def update(self, rank: int, entries: list[Entry] | None) -> None:
        """entries: None if they are those that the rank sent before."""
        if entries is not None:
            self._entries[rank] = entries
            self._content = None

    def content(self, stored: list[Stored]) -> bytes:
        """The file `.metadata`. stored: the tensors that it is about, all of them.

        Raises:
            RuntimeError: the ranks' pieces are not the whole of the tensors, each element once: a bug.
        """
        if self._content is None or self._content[0] != stored:
            entries = [entry for rank in sorted(self._entries) for entry in self._entries[rank]]
            pauses = _Pauses()
            file = _Pausing(pauses)
            pickle.dump(_metadata(stored, entries, pauses), cast(IO[bytes], file))
            self._content = stored, b"".join(file.parts)
        return self._content[1]


class _Pauses:
    """Pauses of a thread that computes in Python, in which the main thread gets Python's lock; without them it would
    wait for it at every kernel, 5 ms each time. The main thread itself makes none."""

    def __init__(self) -> None:
        self._beside = threading.current_thread() is not threading.main_thread()
        self._worked = time.thread_time()

    def rest(self) -> None:
        if self._beside:
            time.sleep(_REST * (time.thread_time() - self._worked))
            self._worked = time.thread_time()

    def after_some(self, lines: Iterable[T]) -> Iterator[T]:
        for number, line in enumerate(lines):
            if number % _AT_A_TIME == _AT_A_TIME - 1:
                self.rest()
            yield line


class _Pausing:
    """A file in memory. What pickles an object into it writes 64 kB at a time, and in between has Python's lock."""

    def __init__(self, pauses: _Pauses) -> None:
        self._pauses, self.parts = pauses, list[bytes]()

    def write(self, data: bytes) -> int:
        self._pauses.rest()
        self.parts.append(bytes(data))
        return len(data)


def _metadata(stored: list[Stored], entries: list[Entry], pauses: _Pauses) -> Metadata:
    chunks: dict[str, dict[tuple[int, ...], ChunkStorageMetadata]] = {tensor.name: {} for tensor in stored}
    places = {}
    for entry in pauses.after_some(entries):
        offsets = torch.Size(entry.offsets)
        of_tensor = chunks[entry.name]
        if entry.offsets in of_tensor:
            raise RuntimeError(f"{entry.name}: two ranks have written the piece at {list(entry.offsets)}")
        places[MetadataIndex(entry.name, offsets, len(of_tensor))] = _StorageInfo(entry.file, entry.start, entry.length)
        of_tensor[entry.offsets] = ChunkStorageMetadata(offsets, torch.Size(entry.sizes))
    tensors: dict[str, STORAGE_TYPES] = {}
    for tensor in stored:
        boxes = list(chunks[tensor.name].values())
        if sum(math.prod(box.sizes) for box in pauses.after_some(boxes)) != math.prod(tensor.size):
            raise RuntimeError(
                f"{tensor.name}: the ranks' pieces are not the whole of {list(tensor.size)}: {boxes[:9]}"
            )
        properties = TensorProperties(dtype=tensor.dtype)
        tensors[tensor.name] = TensorStorageMetadata(properties, torch.Size(tensor.size), boxes)
    # What DCP's own tools read: how deep in dictionaries a tensor lay.
    nesting = {tensor.name: (tensor.name,) for tensor in stored}
    return Metadata(tensors, nesting, places, StorageMeta())
