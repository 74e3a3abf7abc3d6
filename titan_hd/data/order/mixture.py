"""Several sources as one data set: which of their records an epoch takes.

An epoch takes m_i records of source i, which has n_i. Source i is walked through in one permutation of its own, seeded
by (seed, i), again and again; epoch e takes steps e * m_i to (e + 1) * m_i - 1 of that endless walk. So an epoch is a
fixed multiset that depends on (seed, epoch) alone, m_i is the same in every epoch, and at any time no record of a
source has been taken more than once more often than another.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch

from titan_hd.config.job_config import DataSource
from titan_hd.data.tokens.records import Example, Statistics, TokenizedRecords
from titan_hd.errors import UserError
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")


@dataclass(frozen=True)
class Share:
    """How many of its records a source gives to an epoch, and how many it has."""

    taken: int
    records: int


def share_of(source: DataSource, records: int, name: str) -> Share:
    """The share of a source with so many records.

    Raises:
        UserError: its weight comes to no record.
    """
    if source.samples is not None:
        return Share(source.samples, records)
    weight = 1.0 if source.weight is None else source.weight
    taken = math.floor(weight * records + 0.5)
    if not taken:
        raise UserError(
            f"{name}.weight: {weight} of {records} records is none; it must be at least {0.5 / records:.3g}"
        )
    return Share(taken, records)


class MixtureOrder:
    """Places of an epoch, source by source -> records of all sources, one source behind the other.

    Attributes:
        size: samples of an epoch.
    """

    def __init__(self, shares: list[Share], shuffle: bool, seed: int):
        """shuffle: without it every source is walked through in its own order."""
        self._shares = shares
        self._ends = np.cumsum([share.taken for share in shares])
        self._first = np.cumsum([0, *(share.records for share in shares)])[:-1]
        self.size = int(self._ends[-1])
        self._walks = [
            _permutation(share.records, stable_seed("mixture", seed, i)) if shuffle else None
            for i, share in enumerate(shares)
        ]

    def index(self, epoch: int, place: int) -> int:
        """The record, counted over all sources, at `place` (0 to size - 1) of an epoch.

        Raises:
            IndexError: the epoch has no such place.
        """
        if not 0 <= place < self.size:
            raise IndexError(place)
        i = int(np.searchsorted(self._ends, place, side="right"))
        share, walk = self._shares[i], self._walks[i]
        within = place - int(self._ends[i]) + share.taken
        step = (epoch * share.taken + within) % share.records
        return int(self._first[i]) + (step if walk is None else int(walk[step]))


def _permutation(size: int, seed: int) -> np.ndarray:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()


class Concatenation:
    """The records of several sources, one source behind the other.

    Attributes:
        statistics: of all of them.
        rows: the statistics of each source, and of all.
    """

    def __init__(self, name: str, records: list[TokenizedRecords]):
        self.records = records
        self._ends = np.cumsum([len(r) for r in records])
        self.statistics = Statistics(name, "all")
        for part in records:
            self.statistics.add(part.statistics)
        self.rows = [*(part.statistics for part in records), self.statistics]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        part, place = self._locate(index)
        return part[place]

    def _locate(self, index: int) -> tuple[TokenizedRecords, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        i = int(np.searchsorted(self._ends, index, side="right"))
        part = self.records[i]
        return part, index - int(self._ends[i]) + len(part)

    def lengths(self) -> np.ndarray:
        """Tokens of every record, int64 [len(self)]."""
        return np.concatenate([part.lengths() for part in self.records])

    @property
    def answerable(self) -> bool:
        """Whether answers to all records can be generated and compared; then the methods below are there."""
        return all(part.answerable for part in self.records)

    def prompt_ids(self, index: int) -> list[int]:
        part, place = self._locate(index)
        return part.prompt_ids(place)

    def response(self, index: int) -> str:
        part, place = self._locate(index)
        return part.response(place)

    def stop_ids(self) -> frozenset[int]:
        """What ends a response of any source."""
        return frozenset().union(*(part.stop_ids() for part in self.records))


class Mixture(Concatenation):
    """The records of several sources, with what an epoch takes of them.

    Attributes:
        size: samples of an epoch.
        index: (epoch, place) -> record, see `MixtureOrder`.
        shares: what an epoch takes of each source.
    """

    def __init__(self, name: str, sources: list[DataSource], records: list[TokenizedRecords], shuffle: bool, seed: int):
        super().__init__(name, records)
        self.shares = [share_of(s, len(r), f"{name}[{i}]") for i, (s, r) in enumerate(zip(sources, records))]
        for part, share in zip(records, self.shares):
            logger.info("%s: an epoch takes %d of %d records", part.statistics.name, share.taken, share.records)
        order = MixtureOrder(self.shares, shuffle, seed)
        self.size, self.index = order.size, order.index
