"""Where records come from: files, directories and globs of JSONL, JSON arrays and Parquet, perhaps compressed; or a
data set of the Hub, which `titan_hd.data.hub_datasets` reads.

Files are read as `Raw` records, which cost next to nothing to pass over; `parse` makes a Record of one, perhaps in
another process. Whatever is wrong with a record is said with its file and its line (or row), and passes through
`Faults`, which knows whether bad records end the run or are skipped. What is wrong with a file as a whole always ends
it.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titan_hd.config.errors import UserError
from titan_hd.data.hub_datasets import is_hub_name, read_dataset

MAX_RECORD = 8 * 2**20  # bytes of a line; longer ones are binary data or a file without line ends
_COMPRESSED = (".gz", ".zst")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
_SPACE = re.compile(r"[ \t\r\n]*")


class Fault(str):
    """What is wrong with a record, beginning with its file and line."""


class Raw(NamedTuple):
    """A record before it is understood.

    where: its file and line (or row).
    data: its line as it is in the file, a value that is decoded already, or what is wrong with it.
    """

    where: str
    data: bytes | Fault | Any


class Record(dict):
    """The fields of one record; `where` is its file and line (or row), for messages."""

    __slots__ = ("where",)

    def __init__(self, fields: dict[str, Any], where: str):
        super().__init__(fields)
        self.where = where


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
        known = tuple(suffix + packed for suffix in _SUFFIXES for packed in ("", *_COMPRESSED))
        files = [p for p in Path(path).iterdir() if p.name.endswith(known) and p.name[0] != "." and p.is_file()]
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


def read_records(path: str, key: str, faults: Faults | None = None) -> Iterator[Record]:
    """All records at `path`, in the order of `read_raw`.

    Raises:
        UserError: a file is missing or cannot be read, or what `faults` lets through (default: every bad record).
    """
    faults = faults or Faults()
    for raw in read_raw(path, key):
        try:
            record = parse(raw)
        except UserError as error:
            faults.report(str(error))
        else:
            yield record


def read_raw(path: str, key: str) -> Iterator[Raw]:
    """All records at `path`, in the order of `find_files` and of their lines; empty lines are passed over.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if is_hub_name(path):
        for number, row in enumerate(read_dataset(path, key), 1):
            yield Raw(f"{path}: row {number}", row)
        return
    for file in find_files(path, key):
        raw = None
        for raw in _read_file(file, key):
            yield raw
        if raw is None:
            yield Raw(str(file), Fault(f"{key}: {file} holds no record"))


def parse(raw: Raw) -> Record:
    """The record that a Raw is.

    Raises:
        UserError: it is none; the line begins with its file and line.
    """
    if isinstance(raw.data, Fault):
        raise UserError(raw.data)
    value = _decode(raw.where, raw.data) if isinstance(raw.data, bytes) else raw.data
    if not isinstance(value, dict):
        raise UserError(f"{raw.where}: must be a JSON object, not {type(value).__name__}")
    return Record(value, raw.where)


def _decode(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        reason = "not valid UTF-8"
    except RecursionError:
        reason = "not valid JSON: nested too deeply"
    except ValueError as error:
        reason = f"not valid JSON: {error}"
    raise UserError(f"{where}: {reason}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read_file(path: Path, key: str) -> Iterator[Raw]:
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, key)
        return
    try:
        with _open(path) as stream:
            # What is in a file says more than its name: many a .json has one record a line.
            is_array = stream.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            yield from (_read_array if is_array else _read_lines)(stream, path)
    except OSError as error:  # gzip's own are among them
        raise UserError(f"{key}: cannot read {path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{key}: cannot read {path}: {error}") from None


def _open(path: Path) -> io.BufferedReader:
    if path.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path))
    if path.name.endswith(".zst"):
        return io.BufferedReader(_Chunks(_unpack_zst(path)))
    return open(path, "rb")


class _Chunks(io.RawIOBase):
    """A file made of pieces."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
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


def _read_lines(stream: io.BufferedReader, path: Path) -> Iterator[Raw]:
    number = 0
    while line := stream.readline(MAX_RECORD + 1):
        number += 1
        if len(line) > MAX_RECORD:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_RECORD)
            where = f"{path}:{number}"
            yield Raw(where, Fault(f"{where}: is longer than {MAX_RECORD} bytes, the most that a record may have"))
        elif not line.isspace():
            yield Raw(f"{path}:{number}", line)


def _read_array(stream: io.BufferedReader, path: Path) -> Iterator[Raw]:
    """A file that is one JSON array."""
    data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{1 + data.count(10, 0, error.start)}: not valid UTF-8") from None
    del data
    for value, where in _array_values(text, path):
        yield Raw(where, value)


def _array_values(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """Each value of a JSON array, and where it begins. A mistake ends the run: behind it nothing is sure."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    place, line, number = 0, 1, 0

    def advance(to: int) -> str:
        """Go on to the first sign from `to` on, which is returned."""
        nonlocal place, line
        start, place = place, _SPACE.match(text, to).end()
        line += text.count("\n", start, place)
        return text[place : place + 1]

    advance(0)
    sign = advance(place + 1)
    while sign != "]":
        number += 1
        where = f"{path}:{line}: record {number}"
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: record {number}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{where}: not valid JSON: {reason}") from None
        yield value, where
        sign = advance(end)
        if sign == "," and advance(place + 1) != "]":
            sign = ","
        elif sign != "]":
            raise UserError(f"{path}:{line}: record {number}: not valid JSON: no comma and record, or ], behind it")
    if advance(place + 1):
        raise UserError(f"{path}:{line}: not valid JSON: something stands behind the array")


def _read_parquet(path: Path, key: str) -> Iterator[Raw]:
    parquet, number = _library("pyarrow.parquet", path), 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in range(batch.num_rows):
                number += 1
                where = f"{path}: row {number}"
                try:
                    fields = {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns)}
                except UnicodeDecodeError:
                    fields = Fault(f"{where}: not valid UTF-8")
                yield Raw(where, fields)
    except OSError as error:  # pyarrow's ArrowIOError is one
        raise UserError(f"{key}: cannot read {path}: {error.strerror or error}") from None
    except _library("pyarrow", path).ArrowException as error:
        raise UserError(f"{key}: cannot read {path}: {' '.join(str(error).split())}") from None


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{path}: needs the package {package}: pip install {package}, or titan_hd[hub]") from None
