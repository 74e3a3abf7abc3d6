"""Records that are read while training: a sample is a function of its position, whoever asks, and in whatever order."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest

from tests.kit.datasets import build_dataset
from tests.kit.errors import message
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data.example import NOTHING
from titan_hd.data.order.sample_order import OrderSettings, WindowOrder
from titan_hd.data.streaming import StreamedDataset

COUNT = 23  # records: two files of 10 and 13


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Record i has the prompt of the i-th letter; the second file is packed and has an empty line."""
    rows = [json.dumps({"prompt": chr(97 + i), "response": "zz"}) + "\n" for i in range(COUNT)]
    rows[15] += "\n"
    (tmp_path / "a.jsonl").write_text("".join(rows[:10]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[10:]).encode()))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


def stream(paths: list[str], window: int = 5, **settings) -> StreamedDataset:
    sources = [DataSource(path) for path in paths]
    data = Data(train=sources, template="none", streaming=True, shuffle_window=window, **settings)
    return build_dataset(data, "train", 30, 16)


SHUFFLED = OrderSettings(shuffle=True, seed=1)


def letters(records: StreamedDataset, positions, settings: OrderSettings = SHUFFLED) -> list[int]:
    """Which record each position of the run is."""
    order = records.order(settings)
    return [records[order.sample(p)[0]].input_ids[1] - 3 for p in positions]


@pytest.mark.parametrize("window", [1, 5, 7, 23, 50])
def test_every_pass_has_every_record_in_windows(paths, window: int):
    run = 6 * COUNT * window
    seen = letters(stream(paths, window), range(run))
    for start in range(0, run, window):
        expected = [p % COUNT for p in range(start, start + window)]
        assert sorted(seen[start : start + window]) == sorted(expected)
    assert letters(stream(paths, window), range(60), OrderSettings(shuffle=False, seed=1)) == [
        p % COUNT for p in range(60)
    ]
    if window == 7:
        assert seen[:7] != list(range(7))
        assert [s % 7 for s in seen[:7]] != [s % 7 for s in seen[7:14]]


@pytest.mark.parametrize("first", [0, 4, 22, 23, 24, 46, 1000])
def test_a_run_can_begin_anywhere(paths, first: int):
    whole = letters(stream(paths), range(first + 30))
    assert letters(stream(paths), range(first, first + 30)) == whole[first:]
    assert letters(stream(paths), range(first, first + 30, 3)) == whole[first::3]


def test_any_order_and_any_process(paths):
    expected = letters(stream(paths), range(40))
    records = stream(paths)
    places = [3, 30, 2, 39, 0, 11, 12, 11]
    assert letters(records, places) == [expected[p] for p in places]
    assert letters(pickle.loads(pickle.dumps(records)), places) == [expected[p] for p in places]
    read, write = os.pipe()
    letters(records, [12])  # a file is open now
    child = os.fork()
    if not child:
        os.write(write, json.dumps(letters(records, range(12, 40))).encode())
        os._exit(0)
    assert letters(records, range(12, 40)) == expected[12:]
    os.waitpid(child, 0)
    assert json.loads(os.read(read, 4096)) == expected[12:]


def test_only_what_is_asked_for_is_decoded(paths, monkeypatch):
    decoded = []
    records = stream(paths, window=10, shuffle=False)
    monkeypatch.setattr("titan_hd.data.tokens.encoding.parse", lambda raw, _: decoded.append(raw.where) or {}["stop"])
    with pytest.raises(KeyError):
        records[14]
    assert decoded == [f"{paths[1]}:5"]


def test_records_without_loss_keep_their_place(tmp_path: Path, caplog):
    path = tmp_path / "r.jsonl"
    good = [json.dumps({"prompt": c, "response": "z"}) for c in "abcd"]
    long = json.dumps({"prompt": "a" * 40, "response": "z"})
    path.write_text("\n".join([good[0], "{", long, good[1], "{}", good[2], good[3]]) + "\n")
    records = stream([str(path)], window=7, shuffle=False, on_error="skip", max_skipped=2)
    found = [records[i] for i in range(7)]
    assert [i for i, example in enumerate(found) if example == NOTHING] == [1, 2, 4]
    assert NOTHING.trained_tokens == 0
    assert f"{path}:2: not valid JSON" in caplog.text
    assert f"{path}:5: prompt: must be a string; it is left out" in caplog.text
    said = len(caplog.records)
    assert [records[i] == NOTHING for i in range(7, 21)] == [example == NOTHING for example in found] * 2
    assert len(caplog.records) == said, "a record that comes by again is neither said nor counted again"
    records = stream([str(path)], window=7, shuffle=False, on_error="skip", max_skipped=1)
    assert records[1] == NOTHING
    assert message(records.__getitem__, 4).startswith("data.max_skipped: more than 1 bad records; the first: ")
    records = stream([str(path)], window=7, shuffle=False)
    assert records[0].input_ids == [1, 3, 28, 2]
    assert message(records.__getitem__, 1).startswith(f"{path}:2: not valid JSON")


def test_two_windows_are_held(paths):
    records = stream(paths, window=3)
    for position in range(30):
        letters(records, [position])
        assert len(records._windows) <= 2


def test_sources_have_their_own_formats(paths, tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"input_ids": [7, 8, 9], "labels": [7, 8, 9]}\n')
    records = stream([*paths, str(tmp_path / "t.jsonl")], window=4, shuffle=False)
    assert records[23].input_ids == [7, 8, 9]
    assert records.order(OrderSettings(shuffle=False, seed=0)).sample(23) == [23]


def test_the_order_survives_pickling():
    order = WindowOrder(5, True, 3)
    assert [pickle.loads(pickle.dumps(order))[p] for p in range(20)] == [order[p] for p in range(20)]


def test_no_record(tmp_path: Path):
    (tmp_path / "e.jsonl").write_text("")
    assert "holds no record" in message(stream, [str(tmp_path / "e.jsonl")])


def test_what_tells_it_from_another(paths):
    def summary(seq_len: int = 16, **settings) -> str:
        data = Data(train=[DataSource(path) for path in paths], streaming=True, shuffle_window=5, **settings)
        return build_dataset(data, "train", 30, seq_len).summary()

    first, second = (f"1 file(s) of {os.path.getsize(path)} bytes" for path in paths)
    text = summary()
    assert text.startswith(f"a stream of {first} and {second}, format auto, template pissa, ")
    assert text.endswith(", permuted in windows of 5")
    assert summary(17) != text
    assert summary(template="none") != text
