"""The order of samples, batches, and validation: pure functions of the seed and the position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_hd.config.manager import ConfigError, load
from titan_hd.data.loader import SampleOrder, TrainLoader, collate, validation_batches
from titan_hd.data.records import IGNORE, Example

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
        batch = collate([Example([5, 6, 7], [IGNORE, 6, 7]), Example([8], [8])], pad_to=5)
        assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]]
        # targets[t] is the label of the token after t; a label of the first token has nobody to predict it
        assert batch.targets.tolist() == [[6, 7] + [IGNORE] * 3, [IGNORE] * 5]
        assert (batch.tokens, batch.trained_tokens) == (4, 2)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.long

    @pytest.mark.parametrize(("length", "width"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16)])
    def test_padded_to_a_multiple_of_eight(self, length: int, width: int):
        batch = collate([Example([1] * length, [1] * length), Example([1], [1])], None)
        assert batch.input_ids.shape == batch.targets.shape == (2, width)
        assert batch.tokens == length + 1

    def test_label_minus_100_is_not_counted(self):
        batch = collate([Example([1, 2, 3, 4], [1, IGNORE, 3, IGNORE])], None)
        assert batch.trained_tokens == 1
        assert batch.targets[0, :4].tolist() == [IGNORE, 3, IGNORE, IGNORE]

    def test_a_token_is_never_its_own_target(self):
        batch = collate([Example(list(range(10, 20)), list(range(10, 20)))], None)
        assert batch.targets[0, :9].tolist() == batch.input_ids[0, 1:10].tolist()


class TestTrainLoader:
    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_workers_together_read_what_one_would(self, workers: int):
        records, order, batch_size = examples(13), SampleOrder(13, True, 7), 8
        loader = TrainLoader(records, order, batch_size, pad_to=8)
        for step in range(5):
            whole = loader.batch(step, range(batch_size)).input_ids
            share = batch_size // workers
            parts = [loader.batch(step, range(w * share, (w + 1) * share)).input_ids for w in range(workers)]
            assert torch.equal(torch.cat(parts), whole)

    def test_steps_go_through_the_records_in_order(self):
        """With shuffle = false, step t reads records t * B to (t + 1) * B - 1, wrapping round."""
        loader = TrainLoader(examples(5), SampleOrder(5, False, 0), 4, pad_to=8)
        firsts = [loader.batch(step, range(4)).input_ids[:, 0].tolist() for step in range(3)]
        assert firsts == [[1, 2, 3, 4], [5, 1, 2, 3], [4, 5, 1, 2]]

    def test_an_epoch_boundary_inside_a_batch(self):
        loader = TrainLoader(examples(5), SampleOrder(5, True, 0), 4, pad_to=8)
        seen = torch.cat([loader.batch(step, range(4)).input_ids[:, 0] for step in range(5)]).tolist()
        for epoch in range(4):
            assert sorted(seen[epoch * 5 : epoch * 5 + 5]) == [1, 2, 3, 4, 5]


class TestValidationBatches:
    @PROPERTY
    @given(count=st.integers(1, 40), workers=st.integers(1, 6), batch_size=st.integers(1, 4))
    def test_every_record_once_in_equal_numbers_of_batches(self, count: int, workers: int, batch_size: int):
        records = examples(count)
        dealt = [list(validation_batches(records, w, workers, batch_size, None, -1)) for w in range(workers)]
        assert len({len(batches) for batches in dealt}) == 1
        every = [batch for batches in dealt for batch in batches]
        assert all(len(batch.input_ids) == batch_size for batch in every)
        firsts = sorted(first for batch in every for first in batch.input_ids[:, 0].tolist() if first)
        assert firsts == list(range(1, count + 1))
        assert sum(batch.trained_tokens for batch in every) == sum(i % 5 for i in range(count))

    def test_no_more_batches_than_needed(self):
        for count, batches in ((1, 1), (6, 1), (7, 2), (12, 2), (13, 3)):
            assert len(list(validation_batches(examples(count), 0, 3, 2, None, -1))) == batches

    @pytest.mark.parametrize(("limit", "batches"), [(-1, 4), (1, 1), (3, 3), (9, 4)])
    def test_a_limit(self, limit: int, batches: int):
        dealt = [list(validation_batches(examples(14), w, 2, 2, None, limit)) for w in range(2)]
        assert [len(d) for d in dealt] == [batches, batches]
        seen = sorted(f for d in dealt for b in d for f in b.input_ids[:, 0].tolist() if f)
        assert seen == list(range(1, min(14, 4 * batches) + 1))

    def test_pad_to(self):
        assert next(validation_batches(examples(3), 0, 1, 2, 32, -1)).input_ids.shape == (2, 32)
