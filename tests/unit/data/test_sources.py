"""Where records come from: every kind of file, in a fixed order, and every fault with its file and its line."""

from __future__ import annotations

import builtins
import functools
import gzip
import json
import random
import re
import sys
import tracemalloc
from pathlib import Path

import pytest

from titan_hd.data import json_text
from titan_hd.data.sources import MAX_RECORD, Faults, check_files, find_files, read_raw, read_records

TOO_LONG = f"is longer than {MAX_RECORD} bytes, the most that a record may have"
ROWS = [{"a": 1}, {"a": "ü"}, {"a": None, "b": [1, {"c": "x"}]}]


def lines(*rows) -> bytes:
    """Records, text or bytes as the lines of a file."""
    written = [row if isinstance(row, (bytes, str)) else json.dumps(row) for row in rows]
    return b"".join((w if isinstance(w, bytes) else w.encode()) + b"\n" for w in written)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def read(path: str | Path, key: str = "data.train", faults: Faults | None = None) -> list[dict]:
    return list(read_records(str(path), key, faults))


def message(path: str | Path, key: str = "data.train") -> str:
    with pytest.raises(ValueError) as caught:
        read(path, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return gzip.compress(content) if suffix == ".gz" else content


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in (
            "b.jsonl",
            "a.jsonl.gz",
            "c.json",
            "README.md",
            ".hidden.jsonl",
            "part-10.ndjson",
            "part-2.ndjson",
        ):
            (tmp_path / name).write_bytes(packed(lines({"name": name}), Path(name).suffix))
        (tmp_path / "deeper").mkdir()
        (tmp_path / "deeper" / "d.jsonl").write_bytes(lines({"name": "d"}))
        return tmp_path

    def test_a_directory_is_its_record_files_by_name(self, folder: Path):
        names = ["a.jsonl.gz", "b.jsonl", "c.json", "part-10.ndjson", "part-2.ndjson"]
        assert [r["name"] for r in read(folder)] == names

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("*.json*", ["a.jsonl.gz", "b.jsonl", "c.json"]),
            ("part-[0-9].ndjson", ["part-2.ndjson"]),
            ("**/*.jsonl", ["b.jsonl", "d"]),
            ("d*/*", ["d"]),
        ],
    )
    def test_globs(self, folder: Path, pattern: str, names: list[str]):
        assert [r["name"] for r in read(folder / pattern)] == names

    def test_the_order_is_not_the_file_systems(self, folder: Path, monkeypatch):
        expected, listed = find_files(str(folder), "k"), list(folder.iterdir())
        for seed in range(5):
            random.Random(seed).shuffle(listed)
            monkeypatch.setattr(Path, "iterdir", lambda self, listed=listed: iter(listed))
            assert find_files(str(folder), "k") == expected

    def test_a_name_with_the_signs_of_a_glob(self, tmp_path: Path):
        assert read(write(tmp_path / "a[1]*.jsonl", lines({"a": 1}))) == [{"a": 1}]

    def test_an_unknown_name_is_read_if_it_is_given(self, tmp_path: Path):
        assert read(write(tmp_path / "records.txt", lines({"a": 1}))) == [{"a": 1}]

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("no.jsonl", "data.validation: cannot read {path}: No such file or directory"),
            ("*.jsonl", "data.validation: no file matches {path}"),
            (
                "",
                "data.validation: {path} holds no records (.jsonl, .json, .ndjson, .parquet, .tsv, perhaps with .gz or "
                ".zst)",
            ),
        ],
    )
    def test_nothing_is_there(self, tmp_path: Path, name: str, says: str):
        path = tmp_path / name
        assert message(path, "data.validation") == says.format(path=path)


class TestLines:
    def test_records_in_order_with_their_places(self, tmp_path: Path):
        path = write(tmp_path / "r.jsonl", lines(ROWS[0], "", *ROWS[1:]))
        assert read(path) == ROWS
        assert [r.where for r in read(path)] == [f"{path}:{n}" for n in (1, 3, 4)]

    def test_empty_lines_are_passed_over_and_counted(self, tmp_path: Path):
        path = write(tmp_path / "r.jsonl", lines({"a": 1}, "", "   ", "{"))
        assert message(path).startswith(f"{path}:4: not valid JSON")

    def test_line_ends_and_a_byte_order_mark(self, tmp_path: Path):
        path = write(tmp_path / "r.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}')
        assert read(path) == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize(
        "line", ["{", '{"a": 1}}', "{'a': 1}", '{"a": }', "words", '{"a": NaN}', '{"a": -Infinity}']
    )
    def test_bad_json(self, tmp_path: Path, line: str):
        path = write(tmp_path / "r.jsonl", lines({"a": 1}, line))
        assert message(path).startswith(f"{path}:2: not valid JSON: ")

    @pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"a"', "str"), ("3", "int"), ("null", "NoneType")])
    def test_not_an_object(self, tmp_path: Path, line: str, kind: str):
        path = write(tmp_path / "r.jsonl", lines({"a": 1}, {"a": 2}, line))
        assert message(path) == f"{path}:3: must be a JSON object, not {kind}"

    @pytest.mark.parametrize(("line", "key"), [('{"a": 1, "b": 2, "a": 1}', "a"), ('{"a": [{"b": 1, "b": 2}]}', "b")])
    @pytest.mark.parametrize("form", ["lines", "array"])
    def test_a_key_twice(self, tmp_path: Path, line: str, key: str, form: str):
        """Python would keep the last value without a word."""
        content = lines({"a": 1}, line) if form == "lines" else f'[{{"a": 1}},\n{line}]'.encode()
        path = write(tmp_path / "r.jsonl", content)
        text = message(path)
        assert text.startswith(f"{path}:2: ")
        assert text.endswith(f"not valid JSON: the key {key!r} stands in one object twice")

    def test_invalid_utf8(self, tmp_path: Path):
        path = write(tmp_path / "r.jsonl", lines({"a": 1}, b'{"a": "\xff\xfe"}'))
        assert message(path) == f"{path}:2: not valid UTF-8"

    @pytest.mark.parametrize("content", [b"", b"\n  \n"])
    def test_no_record(self, tmp_path: Path, content: bytes):
        path = write(tmp_path / "r.jsonl", content)
        assert message(path) == f"data.train: {path} holds no record"

    def test_deep_nesting(self, tmp_path: Path):
        path = write(tmp_path / "r.jsonl", lines({"a": 1}, "[" * 100_000))
        assert message(path).startswith(f"{path}:2: ")

    def test_a_line_of_ten_megabytes(self, tmp_path: Path):
        path = write(tmp_path / "r.jsonl", lines({"a": 1}, {"a": "x" * 10_000_000}, {"a": 2}))
        expected = f"{path}:2: is longer than {MAX_RECORD} bytes, the most that a record may have"
        assert message(path) == expected
        faults = Faults(skip=True, limit=1)
        assert [r["a"] for r in read(path, faults=faults)] == [1, 2]
        assert (faults.count, faults.first) == (1, expected)

    def test_a_long_line_within_the_bound(self, tmp_path: Path):
        text = "x" * (MAX_RECORD - len('{"a": ""}'))
        assert read(write(tmp_path / "r.jsonl", lines({"a": text})[:-1])) == [{"a": text}]

    def test_a_folder_in_place_of_a_file_that_cannot_be_read(self, tmp_path: Path, monkeypatch):
        path = write(tmp_path / "r.jsonl", lines({"a": 1}))

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(builtins, "open", refuse)
        assert message(path) == f"data.train: cannot read {path}: Permission denied"


class TestArrays:
    def test_as_alpaca_is_published(self, tmp_path: Path):
        path = write(tmp_path / "r.json", json.dumps(ROWS, indent=2).encode())
        assert read(path) == ROWS
        assert [r.where for r in read(path)] == [f"{path}:2: record 1", f"{path}:5: record 2", f"{path}:8: record 3"]

    @pytest.mark.parametrize("text", ["[%s]", " \n[%s]\n ", "\ufeff[ %s ]", "[\n%s\r\n]"])
    def test_white_space(self, tmp_path: Path, text: str):
        content = text % " ,\n".join(map(json.dumps, ROWS))
        assert read(write(tmp_path / "r.json", content.encode())) == ROWS

    @pytest.mark.parametrize("piece", [1, 7, 2**20])
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ('[{"a": 1},\n{"a" 2}]', ":2: record 2: not valid JSON: Expecting ':' delimiter"),
            ('[{"a": 1},\n\n', ":3: record 2: not valid JSON: Expecting value"),
            ('[{"a": 1}\n{"a": 2}]', ":2: record 1: not valid JSON: no comma and record, or ], behind it"),
            ('[{"a": 1},\n]', ":2: record 1: not valid JSON: no comma and record, or ], behind it"),
            ('[{"a": 1}', ":1: record 1: not valid JSON: no comma and record, or ], behind it"),
            ('[{"a": 1}]\n]', ":2: not valid JSON: something stands behind the array"),
            ("[", ":1: record 1: not valid JSON: Expecting value"),
            ('[{"a": 1},\n{"a": NaN}]', ":2: record 2: not valid JSON: NaN is no number"),
            ('[{"a": 1},\n3]', ":2: record 2: must be a JSON object, not int"),
            ("[" * 100_000, ":1: record 1: not valid JSON: nested too deeply"),
            ('[{"a": 1},\n{"a": "\\xff"}]', ":2: not valid UTF-8"),
        ],
    )
    def test_faults(self, tmp_path: Path, monkeypatch, text: str, says: str, piece: int):
        monkeypatch.setattr(json_text, "PIECE", piece)
        path = write(tmp_path / "r.json", text.replace("\\xff", "\xff").encode("latin-1"))
        assert message(path) == path + says

    @pytest.mark.parametrize("piece", [1, 2, 3, 10, 1000])
    def test_read_in_pieces(self, tmp_path: Path, monkeypatch, piece: int):
        """Whatever a piece ends in: a space, a sign of several bytes, an escape, a number."""
        rows = [{"a": 'é\U0001f680 \\ " [,]' * i, "b": [{"c": i}, -1.5e3]} for i in range(9)]
        text = json.dumps(rows, indent=3, ensure_ascii=False)
        path = write(tmp_path / "r.json", b"\xef\xbb\xbf" + text.encode() + b" \n")
        whole = read(path)
        assert whole == rows
        monkeypatch.setattr(json_text, "PIECE", piece)
        assert read(path) == rows
        assert [r.where for r in read(path)] == [r.where for r in whole]
        numbers = write(tmp_path / "n.json", b"[{}, 1234]")
        assert message(numbers) == f"{numbers}:1: record 2: must be a JSON object, not int"

    def test_little_is_held_of_a_large_one(self, tmp_path: Path):
        """Every worker looks at the first record, and must not read the whole file for it."""
        row = json.dumps({"a": "x" * 1000}).encode()
        path = tmp_path / "r.json"
        path.write_bytes(b"[" + b",\n".join([row] * 20_000) + b"]")
        tracemalloc.start()
        first = next(read_records(str(path), "data.train"))
        assert len(first["a"]) == 1000
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        assert sum(1 for _ in read_raw(str(path), "data.train")) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        tracemalloc.stop()

    @pytest.mark.parametrize(
        ("start", "says"),
        [(b'{"a" 1}', "not valid JSON: Expecting ':' delimiter"), (b'{"a": "', TOO_LONG)],
    )
    def test_little_is_held_of_a_bad_one(self, tmp_path: Path, start: bytes, says: str):
        path = tmp_path / "r.json"
        path.write_bytes(b"[{},\n" + start + b"x" * 6 * MAX_RECORD)
        tracemalloc.start()
        assert message(path) == f"{path}:2: record 2: {says}"
        assert tracemalloc.get_traced_memory()[1] < (2 if says != TOO_LONG else 6) * MAX_RECORD
        tracemalloc.stop()

    def test_a_long_record(self, tmp_path: Path):
        """As everywhere: one of just the bound is read, one above it is bad, and what follows is read again."""
        fits = {"a": "x" * (MAX_RECORD - len('{"a": ""}'))}
        path = write(tmp_path / "r.json", json.dumps([fits, {"a": fits["a"] + "x"}, {}]).encode())
        faults = Faults(skip=True, limit=1)
        assert read(path, faults=faults) == [fits, {}]
        assert faults.first == f"{path}:1: record 2: {TOO_LONG}"

    def test_an_empty_one(self, tmp_path: Path):
        path = write(tmp_path / "r.json", b"[ ]")
        assert message(path) == f"data.train: {path} holds no record"


class TestCompressed:
    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    @pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
    def test_the_same_records(self, tmp_path: Path, suffix: str, name: str):
        rows = [{"a": i, "text": f"{i * 7919}" * 20} for i in range(3000)]
        content = lines(*rows) if name == "r.jsonl" else json.dumps(rows).encode()
        path = write(tmp_path / (name + suffix), packed(content, suffix))
        assert read(path) == rows

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_several_parts_behind_each_other(self, tmp_path: Path, suffix: str):
        content = packed(lines({"a": 1}), suffix) + packed(lines({"a": 2}), suffix)
        assert read(write(tmp_path / f"r.jsonl{suffix}", content)) == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_torn(self, tmp_path: Path, suffix: str):
        whole = packed(lines(*({"a": random.Random(i).random()} for i in range(5000))), suffix)
        path = write(tmp_path / f"r.jsonl{suffix}", whole[: len(whole) // 2])
        assert message(path).startswith(f"data.train: cannot read {path}: ")

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_not_compressed(self, tmp_path: Path, suffix: str):
        pytest.importorskip("zstandard")
        path = write(tmp_path / f"r.jsonl{suffix}", lines({"a": 1}))
        assert message(path).startswith(f"data.train: cannot read {path}: ")

    def test_without_its_library(self, tmp_path: Path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
        path = write(tmp_path / "r.jsonl.zst", b"x")
        assert message(path) == f"{path}: needs the package zstandard: pip install zstandard, or titan_hd[hub]"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


class TestByContent:
    """What is in a file says more than its name."""

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_compressed_under_another_name(self, tmp_path: Path, suffix: str):
        assert read(write(tmp_path / "r.jsonl", packed(lines(*ROWS), suffix))) == ROWS
        assert read(write(tmp_path / "r.json", packed(json.dumps(ROWS).encode(), suffix))) == ROWS

    def test_parquet_under_another_name(self, tmp_path: Path):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist([{"a": 1}]), tmp_path / "r.jsonl")
        assert read(tmp_path / "r.jsonl") == [{"a": 1}]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (LFS, "it is a pointer of git-lfs, not the file itself; fetch that with git lfs pull"),
            (b"\n<!DOCTYPE html>\n<p>", "it is a web page, not the data; a download has failed"),
            (b"<HTML><p>", "it is a web page, not the data; a download has failed"),
            ("\ufeff{}".encode("utf-16-le"), "it is UTF-16; write it as UTF-8"),
            (b"PK\x03\x04...", "it is a zip archive or a workbook; unpack it, or write it as JSONL"),
            (b"ARROW1\x00\x00", "it is an Arrow file; write it as Parquet"),
            (b"prompt,response\na,b\n", "its first line is the heading of a CSV table; write that as JSONL or Parquet"),
            (b'\xef\xbb\xbf"a b", "c"\r\n1,2', "its first line is the heading of a CSV table; write that as JSONL or"),
            (
                b"prompt\tresponse\na\tb\n",
                "its first line is the heading of a TSV table; write that as JSONL",
            ),
        ],
    )
    @pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet", "r.jsonl.gz"])
    def test_something_else(self, tmp_path: Path, name: str, content: bytes, says: str):
        """It ends the run before it starts; there is nothing that could be skipped."""
        path = write(tmp_path / name, content)
        faults = Faults(skip=True, limit=9)
        for check in (functools.partial(check_files, path, "data.train"), functools.partial(read, path, faults=faults)):
            with pytest.raises(ValueError, match=re.escape(f"data.train: cannot read {path}: {says}")):
                check()

    def test_a_table_that_is_packed(self, tmp_path: Path):
        path = write(tmp_path / "r.jsonl.gz", gzip.compress(b"prompt,response\na,b\n"))
        assert "heading of a CSV table" in message(path)


class TestParquet:
    def write(self, path: Path, rows: list[dict], **options) -> str:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, **options)
        return str(path)

    def test_rows(self, tmp_path: Path):
        rows = [{"a": i, "messages": [{"role": "user", "content": f"ü{i}"}]} for i in range(3000)]
        path = self.write(tmp_path / "r.parquet", rows, row_group_size=700)
        assert read(path) == rows
        assert [r.where for r in read(path)][::1500] == [f"{path}: row 1", f"{path}: row 1501"]

    def test_no_row(self, tmp_path: Path):
        path = self.write(tmp_path / "r.parquet", [])
        assert message(path) == f"data.train: {path} holds no record"

    def test_invalid_utf8(self, tmp_path: Path):
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        offsets, data = pa.py_buffer(b"\x00\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")
        column = pa.StringArray.from_buffers(2, offsets, data)
        parquet.write_table(pa.table({"a": column}), tmp_path / "r.parquet")
        assert message(tmp_path / "r.parquet") == f"{tmp_path}/r.parquet: row 2: a: not valid UTF-8"

    @pytest.mark.parametrize(("unit", "value"), [("ns", 1), ("us", 2**60), ("s", 2**40)])
    def test_times_that_python_cannot_say(self, tmp_path: Path, unit: str, value: int, monkeypatch):
        """A bad record, unless nobody asks for the column."""
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        monkeypatch.setitem(sys.modules, "pandas", None)  # which has a type for nanoseconds
        table = pa.table({"a": [1, 2], "when": pa.array([0, value], pa.timestamp(unit))})
        path = str(tmp_path / "r.parquet")
        parquet.write_table(table, path)
        assert message(path).startswith(f"{path}: row 2: when: cannot be read: ")
        faults = Faults(skip=True, limit=1)
        assert ([r["a"] for r in read(path, faults=faults)], faults.count) == ([1], 1)
        assert list(read_records(path, "data.train", ignored=["when"])) == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all " * 99])
    def test_another_file_under_its_name(self, tmp_path: Path, content: bytes):
        pytest.importorskip("pyarrow")
        path = write(tmp_path / "r.parquet", content)
        assert message(path).startswith(f"data.train: cannot read {path}: ")

    def test_torn(self, tmp_path: Path):
        path = Path(self.write(tmp_path / "r.parquet", [{"a": i} for i in range(1000)]))
        path.write_bytes(path.read_bytes()[:-20])
        assert message(path).startswith(f"data.train: cannot read {path}: ")

    def test_without_its_library(self, tmp_path: Path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        path = write(tmp_path / "r.parquet", b"x")
        assert message(path) == f"{path}: needs the package pyarrow: pip install pyarrow, or titan_hd[hub]"


class TestSkipping:
    def test_an_empty_file_among_others(self, tmp_path: Path):
        write(tmp_path / "a.jsonl", lines({"a": 1}))
        write(tmp_path / "b.jsonl", b"")
        write(tmp_path / "c.jsonl", lines({"a": 2}))
        assert message(tmp_path) == f"data.train: {tmp_path}/b.jsonl holds no record"
        faults = Faults(skip=True, limit=1)
        assert read(tmp_path, faults=faults) == [{"a": 1}, {"a": 2}]
        assert faults.first == f"data.train: {tmp_path}/b.jsonl holds no record"

    def test_a_file_of_nothing_but_faults_is_not_counted_twice(self, tmp_path: Path):
        faults = Faults(skip=True, limit=9)
        assert read(write(tmp_path / "a.jsonl", lines("{", "}")), faults=faults) == []
        assert faults.count == 2

    def test_a_torn_file_is_never_skipped(self, tmp_path: Path):
        path = write(tmp_path / "a.jsonl.gz", packed(lines({"a": 1}), ".gz")[:-9])
        with pytest.raises(ValueError, match="cannot read"):
            read(path, faults=Faults(skip=True, limit=9))
