"""Where records come from: files, directories and globs of JSONL, JSON arrays, Parquet and TSV, perhaps compressed; or
a data set of the Hugging Face Hub by its name.

Files are read as RawRecords, which cost next to nothing to pass over; `parse` makes a Record of one, perhaps in another
process. Whatever is wrong with a record is said with its file and its line (or row), and passes through `Faults`, which
knows whether bad records end the run or are skipped. What is wrong with a file as a whole always ends the run.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titan_hd.data.json_text import MAX_RECORD, STRICT, TOO_LONG, ArrayText
from titan_hd.data.tables import Table, is_table
from titan_hd.errors import UserError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such files begin
_START = 4096  # bytes of a file by which it is known
# How files begin that hold no records (text in lower case) -> what they are.
_FOREIGN = {
    b"version https://git-lfs": "it is a pointer of git-lfs, not the file itself; fetch that with git lfs pull",
    b"<!doctype html": "it is a web page, not the data; a download has failed",
    b"<html": "it is a web page, not the data; a download has failed",
    b"\xff\xfe": "it is UTF-16; write it as UTF-8",
    b"\xfe\xff": "it is UTF-16; write it as UTF-8",
    b"PK\x03\x04": "it is a zip archive or a workbook; unpack it, or write it as JSONL",
    b"BZh": "it is compressed by bzip2; gzip and zstd are read",
    b"\xfd7zXZ": "it is compressed by xz; gzip and zstd are read",
    b"ARROW1": "it is an Arrow file; write it as Parquet",
    b"\xff\xff\xff\xff": "it is an Arrow stream, as save_to_disk writes; write it as Parquet",
}
_COLUMN = re.compile(rb"[a-z_][\w .-]*")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".tsv")
ENDINGS = tuple(suffix + packed for suffix in _SUFFIXES for packed in ("", ".gz", ".zst"))
"""Of the names of files of records."""
# Of the Hub: org/name, org/name:split or org/name:config:split; what ends or begins so is meant as a file.
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_FILE_NAME = re.compile(rf"({'|'.join(map(re.escape, ENDINGS))})$|^\.{{1,2}}/")


class Fault(str):
    """What is wrong with a record, beginning with its file and line."""


class RawRecord(NamedTuple):
    """A record before it is understood.

    where: its file and line (or row).
    data: its line as it is in the file, a value that is decoded already, or what is wrong with it; or the fields of a
        table's row, some of which may be Faults.
    from_table: it is a row of a table, whose objects have a null for every key that another row's have.
    """

    where: str
    data: bytes | Fault | Any
    from_table: bool = False


class Record(dict):
    """The fields of one record; `where` is its file and line (or row), for messages, `from_table` that of RawRecord."""

    __slots__ = ("from_table", "where")

    def __init__(self, fields: dict[str, Any], where: str, from_table: bool = False):
        super().__init__(fields)
        self.where, self.from_table = where, from_table


class InputFiles:
    """The files that one path of data.train or data.validation names, and what they were like when this was made.

    key: for messages.

    Attributes:
        source: the path.
        paths: the files; none for a data set of the Hub.

    Raises:
        UserError: there is no file.
    """

    def __init__(self, path: str, key: str):
        self.source = path
        self.paths = [] if is_hub_name(path) else find_files(path, key)
        self._stamps = [_stamp(file) for file in self.paths]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self._stamps)

    def check_unchanged(self, key: str) -> None:
        """Raise UserError if a file has another size or time than before."""
        for file, stamp in zip(self.paths, self._stamps):
            if _stamp(file) != stamp:
                raise UserError(f"{key}: {file} was changed while it was read; start again when it is complete")


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of the last change; of a missing file zeros."""
    status = file.stat() if file.exists() else None
    return (status.st_size, status.st_mtime_ns) if status else (0, 0)


class Faults:
    """data.on_error: the first bad record ends the run, or up to `limit` of them are counted and skipped."""

    def __init__(self, skip: bool = False, limit: int = 0):
        self.skip, self.limit = skip, limit
        self.count, self.first = 0, ""

    def report(self, line: str) -> None:
        """Note a bad record.

        Raises:
            UserError: nothing is to be skipped, or no more.
        """
        if not self.skip:
            raise UserError(line)
        self.count += 1
        self.first = self.first or line
        if self.count > self.limit:
            raise UserError(f"data.max_skipped: more than {self.limit} bad records; the first: {self.first}")


def find_files(path: str, key: str) -> list[Path]:
    """The files that data.train or data.validation names, sorted by name.

    path: a file, a directory (its record files, not those of folders in it) or a glob (** goes into folders).
    key: for messages.

    Raises:
        UserError: there is none.
    """
    if os.path.isdir(path):
        files = [p for p in Path(path).iterdir() if p.name.endswith(ENDINGS) and p.name[0] != "." and p.is_file()]
        if not files:
            raise UserError(f"{key}: {path} holds no records ({', '.join(_SUFFIXES)}, perhaps with .gz or .zst)")
    elif os.path.exists(path):
        files = [Path(path)]
    else:
        files = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        if not files:
            missing = (
                f"no file matches {path}" if glob.has_magic(path) else f"cannot read {path}: No such file or directory"
            )
            raise UserError(f"{key}: {missing}")
    return sorted(files)


def check_files(path: str, key: str) -> None:
    """See that the files at `path` are there, can be read and begin as records do.

    Raises:
        UserError: one does not.
    """
    for file in find_files(path, key):
        read_start(file, key)


def read_records(path: str, key: str, faults: Faults | None = None, ignored: Collection[str] = ()) -> Iterator[Record]:
    """All records at `path`, in the order of `read_raw`.

    Raises:
        UserError: a file is missing or cannot be read, or what `faults` lets through (default: every bad record).
    """
    faults = faults or Faults()
    for raw in read_raw(path, key):
        try:
            record = parse(raw, ignored)
        except UserError as error:
            faults.report(str(error))
        else:
            yield record


def read_raw(path: str, key: str) -> Iterator[RawRecord]:
    """All records at `path`, in the order of `find_files` and of their lines; empty lines are passed over.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if is_hub_name(path):
        yield from _read_hub(path, key)
        return
    for file in find_files(path, key):
        raw = None
        for raw in _read_file(file, key):
            yield raw
        if raw is None:
            yield RawRecord(str(file), Fault(f"{key}: {file} holds no record"))


def parse(raw: RawRecord, ignored: Collection[str] = ()) -> Record:
    """The record that a RawRecord is, as if it did not have the fields of data.ignore_fields.

    Raises:
        UserError: it is none, or another field cannot be read; the line begins with its file and line.
    """
    if isinstance(raw.data, Fault):
        raise UserError(raw.data)
    value = _decode(raw.where, raw.data) if isinstance(raw.data, bytes) else raw.data
    if not isinstance(value, dict):
        raise UserError(f"{raw.where}: must be a JSON object, not {type(value).__name__}")
    record = Record({name: field for name, field in value.items() if name not in ignored}, raw.where, raw.from_table)
    fault = next((field for field in record.values() if isinstance(field, Fault)), None)
    if fault is not None:
        raise UserError(fault)
    return record


def _decode(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), **STRICT)
    except UnicodeDecodeError:
        reason = "not valid UTF-8"
    except RecursionError:
        reason = "not valid JSON: nested too deeply"
    except ValueError as error:
        reason = f"not valid JSON: {error}"
    raise UserError(f"{where}: {reason}")


def _read_file(path: Path, key: str) -> Iterator[RawRecord]:
    start = read_start(path, key)
    try:
        if path.name.endswith(".parquet") or start.startswith(b"PAR1"):
            yield from _read_parquet(path, key)
            return
        with _open(path, start) as stream:
            # What is in a file says more than its name: many a .json has one record a line.
            text = stream.peek(_START)[:_START]
            _check_start(text, path, key)
            is_array = text.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            read = _read_table if is_table(path) else _read_array if is_array else _read_lines
            yield from read(stream, path)
    except OSError as error:  # gzip's own are among them
        raise UserError(f"{key}: cannot read {path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{key}: cannot read {path}: {error}") from None


def read_start(path: Path, key: str) -> bytes:
    """The first bytes of a file of records.

    Raises:
        UserError: it cannot be read, or these bytes say that it holds something else.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
    _check_start(start, path, key)
    return start


def _check_start(start: bytes, path: Path, key: str) -> None:
    """start: the first bytes of a file, or of what is packed in it."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for sign, reason in _FOREIGN.items():
        if start.startswith(sign) or text.startswith(sign):
            raise UserError(f"{key}: cannot read {path}: {reason}")
    line = (text.splitlines() or [b""])[0]
    for sign, name in () if is_table(path) else ((b",", "CSV"), (b"\t", "TSV")):
        names = [part.strip(b' "') for part in line.split(sign)]
        if len(names) > 1 and all(map(_COLUMN.fullmatch, names)):
            reason = f"its first line is the heading of a {name} table; write that as JSONL or Parquet"
            raise UserError(f"{key}: cannot read {path}: {reason}")


def _open(path: Path, start: bytes) -> io.BufferedReader:
    """What a file holds, unpacked if its first bytes (or its name) say that it is compressed."""
    if start.startswith(_GZIP) or path.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path))
    if start.startswith(_ZSTD) or path.name.endswith(".zst"):
        return io.BufferedReader(_Chunks(_unpack_zst(path)))
    return open(path, "rb")


class _Chunks(io.RawIOBase):
    """A file made of pieces."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _unpack_zst(path: Path) -> Iterator[bytes]:
    """By hand: the library's own reader takes a file that ends too early for a whole one."""
    zstandard = _library("zstandard", path)
    frame, data = None, b""
    with open(path, "rb") as file:
        while data := data or file.read(2**16):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame is not None:
        raise OSError("it ends too early")


def _read_lines(stream: io.BufferedReader, path: Path) -> Iterator[RawRecord]:
    number = 0
    while line := stream.readline(MAX_RECORD + 1):
        number += 1
        if len(line) > MAX_RECORD:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_RECORD)
            where = f"{path}:{number}"
            yield RawRecord(where, Fault(f"{where}: {TOO_LONG}"))
        elif not line.isspace():
            yield RawRecord(f"{path}:{number}", line)


def _read_table(stream: io.BufferedReader, path: Path) -> Iterator[RawRecord]:
    table = Table()
    for raw in _read_lines(stream, path):
        try:
            fields = raw.data if isinstance(raw.data, Fault) else table.fields(raw.data)
        except ValueError as error:
            fields = Fault(f"{raw.where}: {error}")
        if fields is not None:
            yield RawRecord(raw.where, fields)


def _read_array(stream: io.BufferedReader, path: Path) -> Iterator[RawRecord]:
    """A file that is one JSON array. A mistake in it ends the run: behind it nothing is sure."""
    array, number = ArrayText(stream, path), 0
    array.advance(0)
    sign = array.advance(1)
    while sign != "]":
        number += 1
        where = f"{path}:{array.line}: record {number}"
        value, size = array.value(number)
        yield RawRecord(where, value if size <= MAX_RECORD else Fault(f"{where}: {TOO_LONG}"))
        sign = array.advance(size)
        if sign == "," and array.advance(1) != "]":
            sign = ","
        elif sign != "]":
            raise array.error(number, array.line, "no comma and record, or ], behind it")
    if array.advance(1):
        raise UserError(f"{path}:{array.line}: not valid JSON: something stands behind the array")


def _read_parquet(path: Path, key: str) -> Iterator[RawRecord]:
    parquet, number = _library("pyarrow.parquet", path), 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in range(batch.num_rows):
                number += 1
                where = f"{path}: row {number}"
                columns = zip(batch.schema.names, batch.columns)
                fields = {name: _cell(column[row], f"{where}: {name}") for name, column in columns}
                yield RawRecord(where, fields, from_table=True)
    except OSError as error:  # pyarrow's ArrowIOError is one
        raise UserError(f"{key}: cannot read {path}: {error.strerror or error}") from None
    except _library("pyarrow", path).ArrowException as error:
        raise UserError(f"{key}: cannot read {path}: {' '.join(str(error).split())}") from None


def _cell(cell: Any, where: str) -> Any:
    """The value of a cell, or what is wrong with it: bytes that are no text, or a time that Python cannot say."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Fault(f"{where}: not valid UTF-8")
    except (ValueError, OverflowError) as error:
        return Fault(f"{where}: cannot be read: {' '.join(str(error).split())}; data.ignore_fields leaves a field out")


def _read_hub(path: str, key: str) -> Iterator[RawRecord]:
    rows, number = iter(load_hub_dataset(path, key)), 0
    while True:
        number += 1
        where = f"{path}: row {number}"
        try:
            row = next(rows, None)
        except (ValueError, OverflowError) as error:  # as of a cell of Parquet
            raise UserError(f"{key}: {where}: cannot be read: {' '.join(str(error).split())}") from None
        if row is None:
            return
        yield RawRecord(where, row, from_table=True)


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{path}: needs the package {package}: pip install {package}, or titan_hd[hub]") from None


def is_hub_name(path: str) -> bool:
    """Whether a path is meant as a data set of the Hub: there is no such file, and none could be meant."""
    return not os.path.exists(path) and not _FILE_NAME.search(path) and _HUB_NAME.fullmatch(path) is not None


def check_hub_library(path: str, key: str) -> Any:
    """The package `datasets`, which is imported only where it is needed.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"{key}: cannot read {path}: No such file or directory; as a data set of the Hub it needs the package "
            "datasets: pip install datasets, or titan_hd[hub]"
        ) from None


def load_hub_dataset(path: str, key: str) -> Any:
    """The `datasets.Dataset` of org/name, org/name:split or org/name:config:split (default split: train): its rows in
    their order, and as `_fingerprint` what stands for their content.

    Raises:
        UserError: the package is not there, or it cannot load the data set.
    """
    library, parts = check_hub_library(path, key), _HUB_NAME.fullmatch(path)
    assert parts, "is_hub_name"
    config, split = parts["config"], parts["split"]
    if split is None:
        config, split = None, config or "train"
    try:
        return library.load_dataset(parts["name"], config, split=split)
    except Exception as error:  # the package's, the network's and the builder's own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}: cannot read {path}: {reason}") from None
