"""What an epoch of a mixture takes: a fixed multiset, every record of a source equally often over the epochs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.datasets import build_dataset
from tests.kit.errors import message
from tests.kit.tokenizers import Letters
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data.dataset import Concatenation, Mixture
from titan_hd.data.order.mixture import MixtureOrder, Share, share_of
from titan_hd.data.order.sample_order import OrderSettings
from titan_hd.data.tokens.statistics import statistics_table

shares = st.lists(st.builds(Share, taken=st.integers(1, 40), records=st.integers(1, 15)), min_size=1, max_size=4)


def taken(order: MixtureOrder, shares: list[Share], epoch: int) -> list[Counter]:
    """How often an epoch takes each record, source by source."""
    counts = [Counter() for _ in shares]
    for place in range(order.size):
        index = order.index(epoch, place)
        for i, share in enumerate(shares):
            if index < share.records:
                counts[i][index] += 1
                break
            index -= share.records
        else:
            raise AssertionError("no source has this record")
    return counts


@settings(max_examples=60, deadline=None)
@given(shares, st.booleans(), st.integers(0, 2**32))
def test_epochs(shares: list[Share], shuffle: bool, seed: int):
    order = MixtureOrder(shares, shuffle, seed)
    assert order.size == sum(share.taken for share in shares)
    total = [Counter() for _ in shares]
    for epoch in range(5):
        counts = taken(order, shares, epoch)
        assert counts == taken(MixtureOrder(shares, shuffle, seed), shares, epoch), "a function of (seed, epoch)"
        for share, count, so_far in zip(shares, counts, total):
            assert count.total() == share.taken
            so_far.update(count)
            for seen in (count, so_far):
                often = [seen[record] for record in range(share.records)]
                assert max(often) - min(often) <= 1


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 5), st.integers(1, 1000))
def test_a_weight_is_a_share_of_the_records(weight: float, records: int):
    if weight * records >= 0.5:
        assert abs(share_of(DataSource("p", weight=weight), records, "n").taken - weight * records) <= 0.5
    assert share_of(DataSource("p"), records, "n").taken == records
    assert share_of(DataSource("p", samples=7), records, "n").taken == 7


def test_a_weight_that_comes_to_nothing():
    text = message(share_of, DataSource("p", weight=0.001), 100, "data.train[2]")
    assert text == "data.train[2].weight: 0.001 of 100 records is none; it must be at least 0.005"


def test_the_partial_pass_is_drawn_by_the_seed():
    first = [taken(MixtureOrder([Share(5, 50)], True, seed), [Share(5, 50)], 0) for seed in range(2)]
    assert first[0] != first[1]
    assert taken(MixtureOrder([Share(5, 50)], False, 0), [Share(5, 50)], 1)[0] == Counter(range(5, 10))


class TestBuilt:
    @pytest.fixture
    def sources(self, tmp_path: Path) -> list[DataSource]:
        rows = {
            "a.jsonl": [{"query": "a" * (i + 1), "response": "b"} for i in range(4)],
            "b.jsonl": [{"ask": "c", "say": "d" * (i + 1)} for i in range(6)],
        }
        for name, records in rows.items():
            (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
        b = DataSource(str(tmp_path / "b.jsonl"), weight=0.5, prompt_field="ask", response_field="say")
        return [DataSource(str(tmp_path / "a.jsonl"), samples=6), b]

    def test_a_mixture(self, sources: list[DataSource]):
        data = Data(train=sources, template="none")
        mixture = build_dataset(data, "train", 30, 16)
        assert isinstance(mixture, Mixture)
        mixed = MixtureOrder(mixture.shares, True, 3)
        assert (len(mixture), mixed.size) == (10, 9)
        assert mixture[2].input_ids == [1, 3, 3, 3, 4, 2]
        assert mixture[9].input_ids == [1, 5, *[6] * 6, 2]
        assert mixture.lengths().tolist() == [len(mixture[i].input_ids) for i in range(10)]
        order = mixture.order(OrderSettings(shuffle=True, seed=3))
        assert order.records_per_epoch == 9
        for epoch in range(3):
            places = range(epoch * 9, epoch * 9 + 9)
            assert sorted(order[p] for p in places) == sorted(mixed.index(epoch, i) for i in range(9))
        assert [order[p] for p in range(9)] != [mixed.index(0, i) for i in range(9)]
        with pytest.raises(IndexError):
            mixture[10]

    def test_the_table_has_a_row_for_each_source_and_all(self, sources: list[DataSource]):
        mixture = build_dataset(Data(train=sources, template="none"), "train", 30, 16, Letters)
        rows = [line.split() for line in statistics_table(mixture.rows).splitlines()[1:]]
        assert [row[:3] for row in rows] == [
            ["data.train[0]", "instruction", "4"],
            ["data.train[1]", "instruction", "6"],
            ["data.train", "all", "10"],
        ]
        assert int(rows[2][3]) == int(rows[0][3]) + int(rows[1][3])

    def test_faults_name_the_source(self, sources: list[DataSource]):
        sources[1].prompt_field = "no"
        text = message(build_dataset, Data(train=sources, template="none"), "train", 30, 16, Letters)
        assert text == f"{sources[1].path}:1: no: must be a string"
        sources[1].path = "nowhere.jsonl"
        text = message(build_dataset, Data(train=sources, template="none"), "train", 30, 16, Letters)
        assert text == "data.train[1]: cannot read nowhere.jsonl: No such file or directory"

    def test_validation_reads_every_record(self, sources: list[DataSource]):
        for source in sources:
            source.weight = source.samples = None
        tokenizer = Letters()
        tokenizer.stop_ids = frozenset({2})
        records = build_dataset(Data(validation=sources, template="none"), "validation", 30, 16, lambda: tokenizer)
        assert type(records) is Concatenation
        assert records.answerable
        assert len(records) == 10
        assert [records.response(i) for i in (0, 4, 9)] == ["b", "d", "dddddd"]
        assert records.prompt_ids(4) == [1, 5]
        assert records.stop_ids() == {2}
