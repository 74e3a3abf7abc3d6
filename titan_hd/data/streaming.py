"""A dataset that is read while training, for what is too large to be tokenized ahead.

The stream is the records of all files in their order, again from the beginning at their end. Sample j of the run is a
record of the stream that depends on (seed, j) alone: window j // W of the stream is permuted by (seed, window). Every
worker reads through the files, holds the undecoded text of two windows at most, and decodes and encodes only the
records that its own samples need. So the global batches are the same for any number of workers, and a run that resumes
only passes over what lies before its window.

For that, every record keeps its place: a bad one that data.on_error = "skip" leaves out, and one without a label, is a
sample of one token without loss.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from titan_hd.data.dataset import Dataset
from titan_hd.data.example import NOTHING, Example
from titan_hd.data.fields import log_unused
from titan_hd.data.order.sample_order import Order, OrderSettings, WindowOrder
from titan_hd.data.sources import Faults, RawRecord, read_raw
from titan_hd.data.tokens.encoding import Encoder
from titan_hd.data.tokens.statistics import Statistics
from titan_hd.errors import UserError

logger = logging.getLogger("titan_hd")


@dataclass(frozen=True)
class StreamSource:
    """A path of data.train, and how its records are encoded. named: fields that the log has named as not used."""

    path: str
    encoder: Encoder
    named: frozenset[str] = frozenset()


class StreamedDataset(Dataset):
    """Records of the endless stream by their place in it. Quick where places are asked for in about their order: a
    place before the last two windows means reading from the start of the files.

    window: records of which two windows are held as text, and within which the order permutes.
    description: the sources and their settings in words, for `summary`.
    """

    def __init__(self, sources: list[StreamSource], window: int, faults: Faults, description: str):
        self._sources, self._window_size, self._faults, self._description = sources, window, faults, description
        self._bad: set[str] = set()  # where the bad records are: each counts once, however often it comes by
        # Of the records that were encoded here, but `unused` has what was named before, too.
        self._statistics = {source.encoder.name: Statistics(source.encoder.name, "streamed") for source in sources}
        for source in sources:
            self._statistics[source.encoder.name].unused += source.named
        self._noted: set[tuple[str, str]] = set()  # sources, and what was said about some of their records
        self._total = 0  # records of all files, once their end has been seen
        self._rewind()

    @property
    def rows(self) -> list[Statistics]:
        return []  # nothing is known ahead

    def order(self, settings: OrderSettings) -> Order:
        assert settings.pack_to is None, "config.checks refuses data.pack"
        return WindowOrder(self._window_size, settings.shuffle, settings.seed)

    def summary(self, pack_to: int | None = None) -> str:
        return self._description

    def _rewind(self) -> None:
        self._process = os.getpid()
        self._windows: dict[int, list[tuple[StreamSource, RawRecord]]] = {}
        self._reader: Iterator[tuple[StreamSource, RawRecord]] | None = None
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
        number, place = divmod(index, self._window_size)
        source, raw = self._window(number)[place]
        statistics = self._statistics[source.encoder.name]
        named = len(statistics.unused)
        try:
            encoded = source.encoder.example(raw, statistics)
        except UserError as error:
            if raw.where not in self._bad:
                self._faults.report(str(error))
                self._bad.add(raw.where)
                logger.warning("%s; it is left out", error)
            return NOTHING
        log_unused(statistics.name, statistics.unused[named:])
        self._log_notes(statistics)
        return encoded[0] if encoded else NOTHING

    def _log_notes(self, statistics: Statistics) -> None:
        """Say once what there is to say about some records; nobody knows how many they will be."""
        for note, (_, first) in statistics.notes.items():
            if (statistics.name, note) not in self._noted:
                self._noted.add((statistics.name, note))
                logger.warning("%s: records %s; the first: %s", statistics.name, note, first)

    def _window(self, number: int) -> list[tuple[StreamSource, RawRecord]]:
        if self._process != os.getpid():  # a forked process shares its parent's place in an open file
            self._rewind()
        if number in self._windows:
            return self._windows[number]
        if self._reader is None or number < self._next:
            self._reader, self._next = self._from(number * self._window_size), number
        for _ in range((number - self._next) * self._window_size):
            next(self._reader)
        self._windows[number] = [next(self._reader) for _ in range(self._window_size)]
        self._next = number + 1
        if len(self._windows) > 2:
            del self._windows[max(self._windows, key=lambda held: abs(held - number))]
        return self._windows[number]

    def _from(self, first: int) -> Iterator[tuple[StreamSource, RawRecord]]:
        """The endless stream from record `first` on."""
        while True:
            if self._total:
                first %= self._total
            passed = 0
            for source in self._sources:
                for raw in read_raw(source.path, source.encoder.name):
                    passed += 1
                    if passed > first:
                        yield source, raw
            self._total, first = passed, max(0, first - passed)
