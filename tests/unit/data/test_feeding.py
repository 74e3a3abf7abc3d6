"""What a run feeds to its adapters, whatever the workers, packs and interruptions: every sample once per epoch, in the
same global batch, to the same adapter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_hd.data.example import Example
from titan_hd.data.loader import Batch, GlobalBatches, TrainLoader
from titan_hd.data.order.sample_order import Order, OrderSettings, build_order
from titan_hd.distributed.parallel_dims import AdapterPlacement

Row = tuple[int, ...]  # the records of a row


@dataclass
class Case:
    """phases: the run is interrupted after each, and resumes on so many workers for so many steps."""

    lengths: list[int]
    seq_len: int
    num_adapters: int
    local_batch_size: int
    accumulation: int
    pack: bool
    shuffle: bool
    seed: int
    mixed_size: int  # 0: no index
    phases: list[tuple[int, int]]
    num_workers: int = 0

    @property
    def global_batch_size(self) -> int:
        widest = max(self.num_adapters, *(workers for workers, _ in self.phases))
        return self.local_batch_size * widest * self.accumulation

    @property
    def epoch(self) -> int:
        return self.mixed_size or len(self.lengths)

    def index(self, epoch: int, place: int) -> int:
        """As a mixture that goes on where the last epoch ended, and reads from the end."""
        return (-1 - epoch * self.mixed_size - place) % len(self.lengths)

    def order(self) -> Order:
        index = self.index if self.mixed_size else None
        lengths = np.array(self.lengths)
        settings = OrderSettings(self.shuffle, self.seed, self.seq_len if self.pack else None)
        return build_order(lambda: lengths, self.epoch, settings, index)


@st.composite
def cases(draw) -> Case:
    seq_len, powers = draw(st.integers(2, 24)), st.sampled_from([1, 2, 4])
    return Case(
        lengths=draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=40)),
        seq_len=seq_len,
        num_adapters=draw(powers),
        local_batch_size=draw(st.integers(1, 2)),
        accumulation=draw(st.integers(1, 2)),
        pack=draw(st.booleans()),
        shuffle=draw(st.booleans()),
        seed=draw(st.integers(0, 2**40)),
        mixed_size=draw(st.sampled_from([0, 0, 1, 7, 50])),
        phases=draw(st.lists(st.tuples(powers, st.integers(0, 4)), min_size=3, max_size=3)),
    )


def records(case: Case) -> list[Example]:
    """Record i consists of the token i + 1."""
    return [Example([i + 1] * length, [i + 1] * length) for i, length in enumerate(case.lengths)]


def rows(batch: Batch, case: Case) -> list[Row]:
    """The records of every row, after a look at whether each is there as a whole and none is told of its neighbour."""
    found = []
    for row, ids in enumerate(batch.input_ids):
        documents = batch.documents[row] if case.pack else (ids == 0)
        pieces = [ids[documents == number] for number in documents.unique().tolist()]
        pieces = [piece for piece in pieces if piece[0] > 0]
        members = tuple(int(piece[0]) - 1 for piece in pieces)
        for piece, record in zip(pieces, members):
            assert piece.tolist() == [record + 1] * case.lengths[record]
        trained = [t for t, target in enumerate(batch.targets[row].tolist()) if target > 0]
        assert len(trained) == sum(case.lengths[record] - 1 for record in members)
        assert all(batch.targets[row, t] == ids[t] for t in trained), "a token predicts the next of its own record"
        found.append(members)
    assert batch.sequences == sum(map(len, found))
    assert batch.tokens == sum(case.lengths[record] for members in found for record in members)
    return found


def fed(case: Case) -> list[dict[int, tuple[int, Row]]]:
    """For every step: place in the global batch -> (adapter, records), from all workers of all phases."""
    steps: list[dict[int, tuple[int, Row]]] = []
    for workers, count in case.phases:
        first = len(steps)
        steps += [{} for _ in range(count)]
        for rank in range(workers):
            placement = AdapterPlacement(
                case.num_adapters, workers, rank, case.global_batch_size, case.local_batch_size
            )
            micro_batches = [placement.samples(m) for m in range(placement.micro_batches)]
            source = GlobalBatches(records(case), case.order(), case.global_batch_size, (), case.pack)
            loader = TrainLoader(source, micro_batches, case.num_workers)
            for step in range(first, first + count):
                for m, batch in enumerate(loader.step(step)):
                    adapter = placement.first_adapter + placement.slot(m)
                    for place, members in zip(micro_batches[m], rows(batch, case), strict=True):
                        assert place not in steps[step], "two workers computed one sample"
                        steps[step][place] = adapter, members
            loader.close()
    return steps


def check(case: Case) -> None:
    steps, size = fed(case), case.global_batch_size
    for step in steps:
        assert sorted(step) == list(range(size))
        assert all(adapter == place * case.num_adapters // size for place, (adapter, _) in step.items())
    stream = [step[place][1] for step in steps for place in range(size)]
    order = case.order()
    assert stream == [tuple(int(i) for i in order.sample(position)) for position in range(len(stream))]
    epoch = start = 0
    while (stop := order.positions(epoch + 1)) <= len(stream):
        seen = Counter(record for members in stream[start:stop] for record in members)
        place_of = case.index if case.mixed_size else lambda _, place: place
        assert seen == Counter(place_of(epoch, place) for place in range(case.epoch))
        epoch, start = epoch + 1, stop


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_every_sample_once_per_epoch_in_its_batch_for_its_adapter(case: Case):
    check(case)


@pytest.mark.parametrize("pack", [False, True])
def test_with_data_worker_processes(pack: bool):
    lengths = [1 + i * 7 % 11 for i in range(23)]
    phases = [(1, 3), (2, 2), (1, 3)]
    check(Case(lengths, 16, 2, 1, 2, pack, True, 5, 31, phases, num_workers=1))
