"""Which records make up a sample of the run, as a pure function of (seed, position).

Position p counts samples over the whole run, epoch behind epoch. Within an epoch the samples stand in a permutation
that is seeded by (seed, epoch). A sample is one record, or one pack of records (data.pack).
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from titan_hd.data.order.packing import Packs, pack
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")

Index = Callable[[int, int], int]
"""(epoch, place in the epoch) -> record, for data whose epochs differ (a mixture). Data workers get it pickled."""


def whole_part(number: float) -> int:
    """Without the rounding of binary fractions: 0.57 * 100 has 57."""
    return math.floor(number + 1e-6)


class Order(Protocol):
    """What the loader reads. Positions may be asked in any order, but are cheap when they ascend."""

    def sample(self, position: int) -> Sequence[int]:
        """Indices of the records at this position of the run."""
        ...

    def positions(self, epochs: float) -> int:
        """Number of samples in so many epochs."""
        ...


class _Permutations:
    """The permutation of an epoch; the latest one is kept."""

    def __init__(self, shuffle: bool, seed: int):
        self.shuffle, self.seed = shuffle, seed
        self._epoch, self._places = -1, np.empty(0, dtype=np.int64)

    def place(self, epoch: int, place: int, size: int) -> int:
        """What stands at `place` of the `size` places of an epoch."""
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stable_seed("order", self.seed, epoch))
            self._epoch, self._places = epoch, torch.randperm(size, generator=generator).numpy()
        return int(self._places[place])


class SampleOrder:
    """Every sample is one record. size: records of an epoch."""

    def __init__(self, size: int, shuffle: bool, seed: int, index: Index | None = None):
        self.size, self.index = size, index
        self._permutations = _Permutations(shuffle, seed)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        place = self._permutations.place(epoch, place, self.size)
        return place if self.index is None else self.index(epoch, place)

    def sample(self, position: int) -> list[int]:
        return [self[position]]

    def positions(self, epochs: float) -> int:
        return whole_part(epochs * self.size)


class PackOrder:
    """Every sample is a pack of records. The packs are made of the records' lengths alone, the same on every worker.

    Where an index is given, the records of an epoch are packed anew for each, and the numbers of packs may differ.

    lengths: [records] tokens of every record. capacity: tokens of a pack. size: records of an epoch.
    """

    def __init__(
        self, lengths: np.ndarray, capacity: int, shuffle: bool, seed: int, size: int, index: Index | None = None
    ):
        self.capacity, self.size, self.index = capacity, size, index
        self._permutations = _Permutations(shuffle, seed)
        self._lengths = lengths if index else None
        self._starts = [0]  # position at which each epoch begins, as far as was asked
        self._packed = 0  # the epoch that `_packs` are of
        self._packs = self._pack(0) if index else pack(lengths, capacity)

    def _pack(self, epoch: int) -> Packs:
        records = np.fromiter((self.index(epoch, place) for place in range(self.size)), dtype=np.int64, count=self.size)
        packs = pack(self._lengths[records], self.capacity)
        return Packs(records[packs.records], packs.starts)

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch, before they are permuted."""
        if self.index and epoch != self._packed:
            self._packed, self._packs = epoch, self._pack(epoch)
        return self._packs

    def _place(self, position: int) -> tuple[int, int]:
        """(epoch, place in it) of a position."""
        if not self.index:
            return divmod(position, len(self._packs))
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self.packs(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, position) - 1
        return epoch, position - self._starts[epoch]

    def sample(self, position: int) -> np.ndarray:
        epoch, place = self._place(position)
        packs = self.packs(epoch)
        return packs[self._permutations.place(epoch, place, len(packs))]

    def positions(self, epochs: float) -> int:
        if not self.index:
            return whole_part(epochs * len(self._packs))
        whole = int(epochs)
        before = sum(len(self.packs(epoch)) for epoch in range(whole))
        return before + (whole_part((epochs - whole) * len(self.packs(whole))) if epochs > whole else 0)

    def efficiency(self, lengths: np.ndarray) -> float:
        """Tokens of the first epoch / (packs * capacity)."""
        packs = self.packs(0)
        return lengths[packs.records].sum() / (len(packs) * self.capacity)


def build_order(
    lengths: Callable[[], np.ndarray],
    size: int,
    pack: bool,
    seq_len: int,
    shuffle: bool,
    seed: int,
    index: Index | None = None,
) -> Order:
    """The order of records, or of packs of seq_len tokens; says in the log how full the packs are.

    lengths: gives the tokens of every record; called only to pack. size: records of an epoch.
    """
    if not pack:
        return SampleOrder(size, shuffle, seed, index)
    tokens = lengths()
    order = PackOrder(tokens, seq_len, shuffle, seed, size, index)
    logger.info(
        "packed: %d records into %d packs of training.seq_len = %d tokens, of which %.2f%% are used",
        size,
        len(order.packs(0)),
        seq_len,
        100 * order.efficiency(tokens),
    )
    return order
