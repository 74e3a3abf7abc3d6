"""Records packed into rows of training.seq_len, by best-fit decreasing: a pure function of the records' lengths.

The longest record comes first, and each goes into the fullest pack that still has room for it. Records of one length
are placed together, a whole group of equally full packs at a time, so that a million records take about a second: the
packs are never searched one by one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Indices of the records of every pack, one pack behind the other; pack i has records[starts[i] : starts[i + 1]].

    Records stand in their order within a pack, and packs in the order of their first records.
    """

    records: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.records[self.starts[pack] : self.starts[pack + 1]]


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Packs of at most `capacity` tokens that hold every record once.

    lengths: [N] tokens of the records, each from 1 to `capacity`.
    """
    number = best_fit_decreasing(np.asarray(lengths, dtype=np.int64), capacity)
    _, first = np.unique(number, return_index=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    number = rank[number]
    starts = np.concatenate(([0], np.cumsum(np.bincount(number, minlength=len(first)))))
    return Packs(np.argsort(number, kind="stable"), starts)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The number of the pack of every record, [N]; numbers are 0 to packs - 1."""
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= capacity)
    descending = np.argsort(-lengths, kind="stable")
    number = np.empty(len(lengths), dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # free tokens -> the packs that have so many
    rooms: list[int] = []  # the keys of with_room, ascending
    opened = done = 0

    def leave(packs: list[int], free: int) -> None:
        if free and packs:
            if free not in with_room:
                insort(rooms, free)
            with_room.setdefault(free, []).extend(packs)

    values, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist()):
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                free = rooms[at]
                packs = with_room[free]
            else:  # no pack has room: as many new ones as this length needs
                new = -(-left // (capacity // length))  # rounded up
                free, packs = capacity, list(range(opened, opened + new))
                opened += new
            # The fullest pack stays the fullest while it is filled up, so each takes as many as it has room for.
            each = free // length
            whole, rest = divmod(min(left, each * len(packs)), each)
            used = packs[len(packs) - whole - (rest > 0) :]
            del packs[len(packs) - len(used) :]
            if not packs and with_room.get(free) is packs:
                del with_room[free], rooms[at]
            taken = whole * each + rest
            fill = np.full(len(used), each)
            fill[whole:] = rest
            number[descending[done : done + taken]] = np.repeat(used, fill)
            leave(used[:whole], free - each * length)
            leave(used[whole:], free - rest * length)
            done, left = done + taken, left - taken
    return number
