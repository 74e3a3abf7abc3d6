"""Training records that are read while training, for what is too large to be tokenized ahead.

The stream is the records of all files in their order, again from the beginning at their end. Sample j of the run is a
record of the stream that depends on (seed, j) alone: window j // W of the stream is permuted by (seed, window). Every
worker reads through the files, holds the undecoded text of two windows at most, and decodes and encodes only the
records that its own samples need. So the global batches are the same for any number of workers, and a run that resumes
only passes over what lies before its window.

For that, every record keeps its place: a bad one that data.on_error = "skip" leaves out, and one without a label, is a
sample of one token without loss.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from titan_hd.data.sources import Faults, Raw, read_raw
from titan_hd.data.tokens.encoding import Encoder
from titan_hd.data.tokens.records import IGNORE, Example, Statistics
from titan_hd.errors import UserError
from titan_hd.seeding import stable_seed

EMPTY = Example([0], [IGNORE])
logger = logging.getLogger("titan_hd")


class WindowOrder:
    """Maps a position of the run to a record of the endless stream, permuted within windows."""

    def __init__(self, window: int, shuffle: bool, seed: int):
        self.window, self._shuffle, self._seed = window, shuffle, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def __getitem__(self, position: int) -> int:
        window, place = divmod(position, self.window)
        return window * self.window + (self._permutation(window)[place] if self._shuffle else place)

    def sample(self, position: int) -> list[int]:
        return [self[position]]

    def _permute(self, window: int) -> list[int]:
        generator = torch.Generator().manual_seed(stable_seed("window", self._seed, window))
        return torch.randperm(self.window, generator=generator).tolist()

    def __reduce__(self):  # the cache of a method cannot be pickled
        return WindowOrder, (self.window, self._shuffle, self._seed)


@dataclass(frozen=True)
class StreamSource:
    """A path of data.train, what messages call it, and how its records are encoded."""

    path: str
    name: str
    encoder: Encoder


class StreamedRecords:
    """Records of the endless stream by their place in it. Quick where places are asked for in about their order: a
    place before the last two windows means reading from the start of the files.

    Attributes:
        order: position of the run -> place in the stream.
        statistics: of the records that were encoded here.
        extent: how much the sources hold, in words.
    """

    answerable = False

    def __init__(self, sources: list[StreamSource], order: WindowOrder, faults: Faults, extent: str):
        self._sources, self.order, self._faults, self.extent = sources, order, faults, extent
        self._bad: set[str] = set()  # where the bad records are: each counts once, however often it comes by
        self.statistics = Statistics("data.train", "streamed")
        self.rows: list[Statistics] = []  # nothing is known ahead
        self._total = 0  # records of all files, once their end has been seen
        self._rewind()

    def _rewind(self) -> None:
        self._process = os.getpid()
        self._windows: dict[int, list[tuple[StreamSource, Raw]]] = {}
        self._reader: Iterator[tuple[StreamSource, Raw]] | None = None
        self._next = 0  # the window that the reader stands before

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_windows": {}, "_reader": None, "_next": 0}

    def __getitem__(self, index: int) -> Example:
        """The record at a place of the stream, cut at seq_len.

        Raises:
            UserError: it is a bad one and ends the run, or a file cannot be read.
        """
        if index < 0:
            raise IndexError(index)
        number, place = divmod(index, self.order.window)
        source, raw = self._window(number)[place]
        try:
            taken = source.encoder.example(raw, self.statistics)
        except UserError as error:
            if raw.where not in self._bad:
                self._faults.report(str(error))
                self._bad.add(raw.where)
                logger.warning("%s; it is left out", error)
            return EMPTY
        return taken[0] if taken else EMPTY

    def _window(self, number: int) -> list[tuple[StreamSource, Raw]]:
        if self._process != os.getpid():  # a forked process shares its parent's place in an open file
            self._rewind()
        if number in self._windows:
            return self._windows[number]
        if self._reader is None or number < self._next:
            self._reader, self._next = self._from(number * self.order.window), number
        for _ in range((number - self._next) * self.order.window):
            next(self._reader)
        self._windows[number] = [next(self._reader) for _ in range(self.order.window)]
        self._next = number + 1
        if len(self._windows) > 2:
            del self._windows[max(self._windows, key=lambda held: abs(held - number))]
        return self._windows[number]

    def _from(self, first: int) -> Iterator[tuple[StreamSource, Raw]]:
        """The endless stream from record `first` on."""
        while True:
            if self._total:
                first %= self._total
            passed = 0
            for source in self._sources:
                for raw in read_raw(source.path, source.name):
                    passed += 1
                    if passed > first:
                        yield source, raw
            self._total, first = passed, max(0, first - passed)
