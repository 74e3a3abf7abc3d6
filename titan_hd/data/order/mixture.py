"""Which records an epoch takes of several sources.

Source i has n_i records, and an epoch takes m_i of them (fewer, or more). Source i is walked through in one permutation
of its own, seeded by (seed, i), again and again; epoch e takes steps e * m_i to (e + 1) * m_i - 1 of that endless walk.
So an epoch is a fixed multiset that depends on (seed, epoch) alone, m_i is the same in every epoch, and the counts of
two records of a source never differ by more than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from titan_hd.config.job_config import DataSource
from titan_hd.errors import UserError
from titan_hd.seeding import stable_seed


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
