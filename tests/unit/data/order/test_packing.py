"""Packs by best-fit decreasing, against the algorithm in its plainest form; and the order of packs over epochs."""

from __future__ import annotations

import pickle
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_hd.data.order.packing import pack
from titan_hd.data.order.sample_order import OrderSettings, PackOrder, build_order

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Free tokens of every pack, ascending."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@st.composite
def lengths_and_capacity(draw) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 30))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


class TestPack:
    @PROPERTY
    @given(case=lengths_and_capacity())
    def test_it_is_best_fit_decreasing(self, case: tuple[list[int], int]):
        lengths, capacity = case
        packs = pack(np.array(lengths, dtype=np.int64), capacity)
        assert sorted(packs.records.tolist()) == list(range(len(lengths)))
        rooms = [capacity - sum(lengths[i] for i in packs[p]) for p in range(len(packs))]
        assert sorted(rooms) == plain_best_fit_decreasing(lengths, capacity)

    @PROPERTY
    @given(case=lengths_and_capacity())
    def test_records_and_packs_stand_in_the_order_of_the_records(self, case: tuple[list[int], int]):
        lengths, capacity = case
        packs = pack(np.array(lengths, dtype=np.int64), capacity)
        every = [packs[p].tolist() for p in range(len(packs))]
        assert all(records == sorted(records) for records in every)
        assert every == sorted(every)

    def test_by_hand(self):
        packs = pack(np.array([3, 6, 4, 7, 10]), 10)
        assert [packs[p].tolist() for p in range(len(packs))] == [[0, 3], [1, 2], [4]]

    def test_a_million_records_in_seconds(self):
        lengths = np.minimum(2048, np.random.default_rng(0).lognormal(5.3, 0.7, 1_000_000).astype(np.int64) + 1)
        start = time.process_time()
        packs = pack(lengths, 2048)
        assert time.process_time() - start < 5  # 0.3 s on an idle machine
        assert lengths.sum() / (len(packs) * 2048) > 0.999
        assert np.add.reduceat(lengths[packs.records], packs.starts[:-1]).max() <= 2048


LENGTHS = np.random.default_rng(1).integers(1, 11, 40)


def members(order: PackOrder, first: int, stop: int) -> list[int]:
    return [int(record) for position in range(first, stop) for record in order.sample(position)]


class GoesOn:
    """An epoch takes `size` of 40 records; the next goes on where it ended. Some epochs hold a record twice."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, epoch: int, place: int) -> int:
        return (epoch * self.size + place) % 40


class TestPackOrder:
    def test_every_epoch_has_every_record_in_another_order(self):
        order = PackOrder(LENGTHS, 16, True, 42, 40)
        size = order.positions(1)
        epochs = [members(order, epoch * size, (epoch + 1) * size) for epoch in range(4)]
        assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4

    def test_epochs_differ_in_the_order_of_the_same_packs(self):
        order = PackOrder(LENGTHS, 16, True, 42, 40)
        size = order.positions(1)
        first, second = ({tuple(order.sample(p)) for p in range(e * size, (e + 1) * size)} for e in range(2))
        assert first == second

    def test_not_shuffled_packs_follow_the_records(self):
        order = PackOrder(LENGTHS, 16, False, 42, 40)
        firsts = [int(order.sample(p)[0]) for p in range(order.positions(1))]
        assert firsts == sorted(firsts)

    @pytest.mark.parametrize("size", [40, 17, 63])
    def test_an_index_packs_every_epochs_own_records(self, size: int):
        order = PackOrder(LENGTHS, 16, True, 42, size, GoesOn(size))
        start = 0
        for epoch in range(4):
            stop = order.positions(epoch + 1)
            seen = [order.sample(position) for position in range(start, stop)]
            assert all(LENGTHS[records].sum() <= 16 for records in seen)
            wanted = Counter(GoesOn(size)(epoch, place) for place in range(size))
            assert Counter(int(record) for records in seen for record in records) == wanted
            start = stop

    def test_positions_can_be_asked_in_any_order_and_elsewhere(self):
        """A run that resumes reads from the middle on, in another process."""
        for index in (None, GoesOn(23)):
            size = 23 if index else 40
            order = PackOrder(LENGTHS, 16, True, 3, size, index)
            expected = [order.sample(p).tolist() for p in range(50)]
            fresh = pickle.loads(pickle.dumps(PackOrder(LENGTHS, 16, True, 3, size, index)))
            assert [fresh.sample(p).tolist() for p in reversed(range(50))] == expected[::-1]

    def test_part_of_an_epoch(self):
        order = PackOrder(LENGTHS, 16, True, 3, 40)
        assert order.positions(2.5) == int(2.5 * len(order.packs(0)))
        mixed = PackOrder(LENGTHS, 16, True, 3, 17, GoesOn(17))
        sizes = [len(mixed.packs(epoch)) for epoch in range(3)]
        assert len(set(sizes)) > 1
        assert mixed.positions(2.5) == sizes[0] + sizes[1] + sizes[2] // 2

    def test_the_log_says_how_full_the_packs_are(self, caplog):
        with caplog.at_level("INFO", "titan_hd"):
            order = build_order(lambda: np.array([4, 3, 2, 4]), 4, OrderSettings(True, 0, pack_to=8))
        assert order.positions(1) == 2
        assert "4 records into 2 packs of training.seq_len = 8 tokens, of which 81.25% are used" in caplog.text
