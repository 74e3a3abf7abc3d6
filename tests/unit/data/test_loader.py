"""The order of samples, batches, and validation: pure functions of the seed and the position."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_hd.config.manager import ConfigError, load
from titan_hd.data.example import IGNORE, Example
from titan_hd.data.loader import (
    GlobalBatches,
    TrainLoader,
    collate,
    collate_packs,
    length_buckets,
    validation_batches,
)
from titan_hd.data.order.sample_order import SampleOrder
from titan_hd.errors import UserError

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def examples(count: int) -> list[Example]:
    """Record i has 1 + i % 5 tokens, all of them i + 1, and trains on all but the first."""
    return [Example([i + 1] * (1 + i % 5), [IGNORE] + [i + 1] * (i % 5)) for i in range(count)]


class TestSampleOrder:
    @PROPERTY
    @given(size=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
    def test_an_epoch_is_a_permutation(self, size: int, seed: int, epoch: int):
        order = SampleOrder(size, True, seed)
        assert sorted(order[epoch * size + i] for i in range(size)) == list(range(size))

    def test_epochs_differ(self):
        order = SampleOrder(50, True, 42)
        epochs = [tuple(order[epoch * 50 + i] for i in range(50)) for epoch in range(20)]
        assert len(set(epochs)) == 20
        assert tuple(range(50)) not in epochs

    def test_seeds_differ(self):
        orders = [tuple(SampleOrder(50, True, seed)[i] for i in range(50)) for seed in range(20)]
        assert len(set(orders)) == 20

    def test_an_epoch_of_one_seed_is_no_epoch_of_the_next(self):
        """(seed, epoch) and (seed + 1, epoch - n) must not be seeded by the same number."""
        epochs = {
            (seed, epoch): tuple(SampleOrder(50, True, seed)[epoch * 50 + i] for i in range(50))
            for seed in range(5)
            for epoch in range(5)
        }
        assert len(set(epochs.values())) == 25

    def test_positions_can_be_asked_in_any_order(self):
        """A run that resumes reads from the middle on."""
        order, positions = SampleOrder(7, True, 3), [3, 20, 6, 7, 13, 0, 20, 41]
        expected = {p: SampleOrder(7, True, 3)[p] for p in positions}
        assert [order[p] for p in positions] == [expected[p] for p in positions]

    def test_not_shuffled_it_wraps_round(self):
        order = SampleOrder(3, False, 42)
        assert [order[i] for i in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]

    def test_the_process_generator_is_left_alone(self):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        SampleOrder(5, True, 1)[0]
        assert torch.equal(torch.rand(3), expected)

    def test_every_seed_that_the_configuration_takes(self):
        seed = 2**44
        argv = ["--data.train", "t", "--model.name", "llama3", "--model.flavor", "8B", "--training.steps", "1"]
        try:
            load([*argv, "--training.seed", str(seed)])
        except ConfigError:
            return
        SampleOrder(5, True, seed)[0]


class TestCollate:
    def test_by_hand(self):
        batch = collate([Example([5, 6, 7], [IGNORE, 6, 7]), Example([8], [8])], pad_to=(5,))
        assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]]
        # targets[t] is the label of the token after t; a label of the first token has nobody to predict it
        assert batch.targets.tolist() == [[6, 7] + [IGNORE] * 3, [IGNORE] * 5]
        assert (batch.tokens, batch.trained_tokens) == (4, 2)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.long

    @pytest.mark.parametrize(("length", "width"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16)])
    def test_padded_to_a_multiple_of_eight(self, length: int, width: int):
        batch = collate([Example([1] * length, [1] * length), Example([1], [1])])
        assert batch.input_ids.shape == batch.targets.shape == (2, width)
        assert batch.tokens == length + 1

    def test_label_minus_100_is_not_counted(self):
        batch = collate([Example([1, 2, 3, 4], [1, IGNORE, 3, IGNORE])])
        assert batch.trained_tokens == 1
        assert batch.targets[0, :4].tolist() == [IGNORE, 3, IGNORE, IGNORE]

    def test_a_token_is_never_its_own_target(self):
        batch = collate([Example(list(range(10, 20)), list(range(10, 20)))])
        assert batch.targets[0, :9].tolist() == batch.input_ids[0, 1:10].tolist()


class TestCollatePacks:
    def test_by_hand(self):
        first, second = Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [IGNORE, 9])
        batch = collate_packs([[first, second], [second]], pad_to=(8,))
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [8, 9] + [0] * 6]
        # 7 is not told to predict 8, although 8 stands behind it
        assert batch.targets.tolist() == [[6, 7, IGNORE, 9] + [IGNORE] * 4, [9] + [IGNORE] * 7]
        assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0] + [1] * 6]
        assert (batch.tokens, batch.sequences, batch.trained_tokens) == (7, 3, 4)

    def test_a_label_of_a_documents_first_token_is_nobodys_target(self):
        """Format tokens may label the first token; packed, the document before it must not learn to predict it."""
        batch = collate_packs([[Example([1, 2], [1, 2]), Example([3], [3]), Example([4, 5], [4, 5])]])
        assert batch.targets[0].tolist() == [2, IGNORE, IGNORE, 5, IGNORE, IGNORE, IGNORE, IGNORE]

    def test_without_padding_there_is_no_document_for_it(self):
        batch = collate_packs([[Example([1] * 5, [1] * 5), Example([2] * 3, [2] * 3)]], (8,))
        assert batch.documents.tolist() == [[0] * 5 + [1] * 3]

    def test_padded_as_far_as_needed(self):
        batch = collate_packs([[Example([1] * 5, [1] * 5), Example([2] * 6, [2] * 6)]])
        assert batch.input_ids.shape == batch.targets.shape == batch.documents.shape == (1, 16)


def batches(count: int, order: SampleOrder, batch_size: int) -> GlobalBatches:
    return GlobalBatches(examples(count), order, batch_size, (8,), packed=False)


class TestGlobalBatches:
    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_workers_together_read_what_one_would(self, workers: int):
        source = batches(13, SampleOrder(13, True, 7), 8)
        for step in range(5):
            whole = source[step, range(8)].input_ids
            share = 8 // workers
            parts = [source[step, range(w * share, (w + 1) * share)].input_ids for w in range(workers)]
            assert torch.equal(torch.cat(parts), whole)

    def test_steps_go_through_the_records_in_order(self):
        """With shuffle = false, step t reads records t * B to (t + 1) * B - 1, wrapping round."""
        source = batches(5, SampleOrder(5, False, 0), 4)
        firsts = [source[step, range(4)].input_ids[:, 0].tolist() for step in range(3)]
        assert firsts == [[1, 2, 3, 4], [5, 1, 2, 3], [4, 5, 1, 2]]

    def test_an_epoch_boundary_inside_a_batch(self):
        source = batches(5, SampleOrder(5, True, 0), 4)
        seen = torch.cat([source[step, range(4)].input_ids[:, 0] for step in range(5)]).tolist()
        for epoch in range(4):
            assert sorted(seen[epoch * 5 : epoch * 5 + 5]) == [1, 2, 3, 4, 5]


class Faulty:
    """Record 6 cannot be read."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Example:
        if index == 6:
            raise UserError("record 6 is torn")
        return Example([index + 1, 1], [index + 1, 1])


def data_workers() -> list[multiprocessing.Process]:
    """Other tests may have children of their own."""
    return [p for p in multiprocessing.active_children() if isinstance(p, multiprocessing.context.ForkServerProcess)]


class TestTrainLoader:
    MICRO_BATCHES = (range(0, 2), range(4, 6))

    def test_steps_in_any_order(self):
        source = batches(13, SampleOrder(13, True, 7), 8)
        loader = TrainLoader(source, self.MICRO_BATCHES)
        for step in (0, 1, 2, 7, 8, 3, 3):
            for batch, places in zip(loader.step(step), self.MICRO_BATCHES, strict=True):
                assert torch.equal(batch.input_ids, source[step, places].input_ids)

    def test_the_process_generator_is_left_alone(self):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        TrainLoader(batches(13, SampleOrder(13, True, 7), 8), self.MICRO_BATCHES).step(0)
        assert torch.equal(torch.rand(3), expected)

    def test_with_processes_it_gives_the_same_and_leaves_none(self):
        """One or two processes, from the start and from a cursor; packed batches travel with their documents."""
        source = GlobalBatches(examples(13), SampleOrder(13, True, 7), 8, (8,), packed=True)
        for num_workers, first in ((2, 0), (1, 5)):
            loader = TrainLoader(source, self.MICRO_BATCHES, num_workers)
            for step in range(first, first + 4):
                for batch, places in zip(loader.step(step), self.MICRO_BATCHES, strict=True):
                    expected = source[step, places]
                    assert torch.equal(batch.input_ids, expected.input_ids)
                    assert torch.equal(batch.targets, expected.targets)
                    assert torch.equal(batch.documents, expected.documents)
            assert len(data_workers()) == num_workers
            loader.close()
            assert not data_workers()

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_what_a_record_raises_is_raised(self, num_workers: int):
        source = GlobalBatches(Faulty(), SampleOrder(9, False, 0), 3, (), packed=False)
        loader = TrainLoader(source, [range(0, 3)], num_workers)
        assert len(loader.step(0) + loader.step(1)) == 2
        with pytest.raises(UserError, match=r"^record 6 is torn$"):  # one line, also from another process
            loader.step(2)
        loader.close()

    @pytest.mark.timeout(120)
    def test_a_killed_process_is_an_error_and_no_hang(self):
        loader = TrainLoader(batches(13, SampleOrder(13, True, 7), 8), self.MICRO_BATCHES, 1)
        loader.step(0)
        (child,) = data_workers()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"a data worker process failed or was killed .*data\.num_workers = 0"):
            [loader.step(step) for step in range(1, 100)]
        assert not data_workers()


class TestValidationBatches:
    @PROPERTY
    @given(count=st.integers(1, 40), workers=st.integers(1, 6), batch_size=st.integers(1, 4))
    def test_every_record_once_in_equal_numbers_of_batches(self, count: int, workers: int, batch_size: int):
        records = examples(count)
        dealt = [list(validation_batches(records, w, workers, batch_size, -1)) for w in range(workers)]
        assert len({len(batches) for batches in dealt}) == 1
        every = [batch for batches in dealt for batch in batches]
        assert all(len(batch.input_ids) == batch_size for batch in every)
        firsts = sorted(first for batch in every for first in batch.input_ids[:, 0].tolist() if first)
        assert firsts == list(range(1, count + 1))
        assert sum(batch.trained_tokens for batch in every) == sum(i % 5 for i in range(count))

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_fewer_records_than_workers(self, count: int):
        """0 < n < workers: everybody gets one batch, some of them nothing but a filler without labels."""
        dealt = [list(validation_batches(examples(count), w, 6, 1, -1)) for w in range(6)]
        assert [len(batches) for batches in dealt] == [1] * 6
        assert [d[0].input_ids[0, 0].item() for d in dealt] == [*range(1, count + 1), *[0] * (6 - count)]
        assert [d[0].trained_tokens for d in dealt] == [*range(count), *[0] * (6 - count)]

    def test_no_more_batches_than_needed(self):
        for count, batches in ((1, 1), (6, 1), (7, 2), (12, 2), (13, 3)):
            assert len(list(validation_batches(examples(count), 0, 3, 2, -1))) == batches

    @pytest.mark.parametrize(("limit", "batches"), [(-1, 4), (1, 1), (3, 3), (9, 4)])
    def test_a_limit(self, limit: int, batches: int):
        dealt = [list(validation_batches(examples(14), w, 2, 2, limit)) for w in range(2)]
        assert [len(d) for d in dealt] == [batches, batches]
        seen = sorted(f for d in dealt for b in d for f in b.input_ids[:, 0].tolist() if f)
        assert seen == list(range(1, min(14, 4 * batches) + 1))

    def test_rows_are_as_long_as_the_longest(self):
        assert next(validation_batches(examples(5), 0, 1, 5, -1)).input_ids.shape == (5, 8)


class TestPadding:
    def test_the_smallest_length_that_holds_all(self):
        two = [Example([1] * n, [1] * n) for n in (65, 64)]
        assert collate(two, (64, 128, 200)).input_ids.shape == (2, 128)


@pytest.mark.parametrize(("epochs", "size", "positions"), [(0.57, 100, 57), (0.1, 30, 3), (0.5, 3, 1), (2, 7, 14)])
def test_a_part_of_an_epoch_is_not_cut_by_binary_fractions(epochs: float, size: int, positions: int):
    assert SampleOrder(size, True, 0).positions(epochs) == positions


@pytest.mark.parametrize("seq_len", [1, 16, 64, 65, 100, 512, 513, 2048, 4096, 100_000])
def test_length_buckets(seq_len: int):
    """A handful, multiples of 64, and no row too long for the last."""
    lengths = length_buckets(seq_len)
    assert len(lengths) <= 8
    assert lengths[-1] == seq_len
    assert list(lengths) == sorted(set(lengths))
    assert all(length % 64 == 0 for length in lengths[:-1])
