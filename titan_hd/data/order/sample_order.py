"""Which records make up the sample at a position of the run, as a pure function of (seed, position).

Position p counts samples over the whole run, epoch behind epoch. Within an epoch the samples stand in a permutation
that is seeded by (seed, epoch). A sample is one record, or one pack of records (data.pack). A stream has no epochs:
there the permutations are those of windows of a fixed size.

Orders hold indices, not records; data workers get them pickled.
"""

from __future__ import annotations

import functools
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from titan_hd.data.order.packing import Packs, pack
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")

Index = Callable[[int, int], int]
"""(epoch, place in the epoch) -> record, for data whose epochs differ (a mixture)."""


def whole_part(number: float) -> int:
    """Without the rounding of binary fractions: 0.57 * 100 has 57."""
    return math.floor(number + 1e-6)


@dataclass(frozen=True)
class OrderSettings:
    """How the samples of a run are ordered: data.shuffle, training.seed, and for data.pack the tokens of a pack."""

    shuffle: bool
    seed: int
    pack_to: int | None = None


class Order(Protocol):
    """What the loader reads. Positions may be asked in any order, but are cheap when they ascend."""

    @property
    def records_per_epoch(self) -> int | None:
        """None where there are no epochs."""
        ...

    def sample(self, position: int) -> Sequence[int] | np.ndarray:
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
    """Every sample is one record."""

    def __init__(self, records_per_epoch: int, shuffle: bool, seed: int, index: Index | None = None):
        self.records_per_epoch, self.index = records_per_epoch, index
        self._permutations = _Permutations(shuffle, seed)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.records_per_epoch)
        place = self._permutations.place(epoch, place, self.records_per_epoch)
        return place if self.index is None else self.index(epoch, place)

    def sample(self, position: int) -> list[int]:
        return [self[position]]

    def positions(self, epochs: float) -> int:
        return whole_part(epochs * self.records_per_epoch)


class PackOrder:
    """Every sample is a pack of records. The packs are made of the records' lengths alone, the same on every worker.

    Where an index is given, the records of an epoch are packed anew for each, and the numbers of packs may differ.

    lengths: [records] tokens of every record. capacity: tokens of a pack.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        capacity: int,
        shuffle: bool,
        seed: int,
        records_per_epoch: int,
        index: Index | None = None,
    ):
        self.capacity, self.records_per_epoch, self.index = capacity, records_per_epoch, index
        self._permutations = _Permutations(shuffle, seed)
        self._lengths = lengths if index else None
        self._starts = [0]  # position at which each epoch begins, as far as was asked
        self._packed = 0  # the epoch that `_packs` are of
        self._packs = self._pack(0) if index else pack(lengths, capacity)

    def _pack(self, epoch: int) -> Packs:
        index, size = self.index, self.records_per_epoch
        assert index is not None
        assert self._lengths is not None
        records = np.fromiter((index(epoch, place) for place in range(size)), dtype=np.int64, count=size)
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


class WindowOrder:
    """Every sample is one record of an endless stream, permuted within windows of so many records."""

    records_per_epoch = None

    def __init__(self, window: int, shuffle: bool, seed: int):
        self.window, self._shuffle, self._seed = window, shuffle, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def __getitem__(self, position: int) -> int:
        window, place = divmod(position, self.window)
        return window * self.window + (self._permutation(window)[place] if self._shuffle else place)

    def sample(self, position: int) -> list[int]:
        return [self[position]]

    def positions(self, epochs: float) -> int:
        raise AssertionError("a stream has no epochs; config.checks refuses training.epochs")

    def _permute(self, window: int) -> list[int]:
        generator = torch.Generator().manual_seed(stable_seed("window", self._seed, window))
        return torch.randperm(self.window, generator=generator).tolist()

    def __reduce__(self):  # the cache of a method cannot be pickled
        return WindowOrder, (self.window, self._shuffle, self._seed)


def build_order(
    lengths: Callable[[], np.ndarray], records_per_epoch: int, settings: OrderSettings, index: Index | None = None
) -> Order:
    """The order of records, or of packs of records; says in the log how full the packs are.

    lengths: gives the tokens of every record; called only to pack.
    """
    s, size = settings, records_per_epoch
    if s.pack_to is None:
        return SampleOrder(size, s.shuffle, s.seed, index)
    tokens = lengths()
    order = PackOrder(tokens, s.pack_to, s.shuffle, s.seed, size, index)
    logger.info(
        "packed: %d records into %d packs of training.seq_len = %d tokens, of which %.2f%% are used",
        size,
        len(order.packs(0)),
        s.pack_to,
        100 * order.efficiency(tokens),
    )
    return order
