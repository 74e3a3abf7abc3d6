"""Raw records -> chunks of token ids and labels -> the flat arrays of a `TokenizedDataset`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from titan_hd.data.example import IGNORE, Example
from titan_hd.data.formats import Format, QuestionFormat
from titan_hd.data.sources import RawRecord, Record, parse, read_raw
from titan_hd.data.tokens.statistics import Statistics
from titan_hd.errors import UserError

# The arrays of a `TokenizedDataset`. Those named *ends are prefix sums that begin with 0: offsets into ids
# and labels (ends), spans (span_ends) and questions (question_ends).
DTYPES = {
    "ids": np.dtype("<i4"),
    "ends": np.dtype("<i8"),
    "labels": np.dtype("<i4"),
    "spans": np.dtype("<i4"),
    "span_ends": np.dtype("<i8"),
    "questions": np.dtype("u1"),
    "question_ends": np.dtype("<i8"),
}


@dataclass
class Chunk:
    """Some records, encoded.

    arrays: what they add to each array; for those that end in "ends" the records' sizes, not yet summed up.
    statistics: what became of the records, without the bad ones.
    faults: what is wrong with each bad record, in their order.
    read: how many records these were.
    """

    arrays: dict[str, np.ndarray]
    statistics: Statistics
    faults: list[str]
    read: int


@dataclass(frozen=True)
class Encoder:
    """How the records of one source are encoded. Other processes get it pickled.

    name: what messages call the source. stop_at_fault: what comes behind a bad record is not wanted. ignored: fields
        that are passed over.
    keep_questions: also keep what it takes to generate answers and compare them, if the format has questions.
    """

    name: str
    format: Format
    seq_len: int
    stop_at_fault: bool
    ignored: tuple[str, ...] = ()
    keep_questions: bool = False

    @property
    def questions(self) -> QuestionFormat | None:
        """The format, if questions are kept."""
        return self.format if self.keep_questions and isinstance(self.format, QuestionFormat) else None

    def new_statistics(self) -> Statistics:
        return Statistics(self.name, self.format.name)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays that the records have."""
        labels = ("labels",) if self.format.own_labels else ("spans", "span_ends")
        return ("ids", "ends", *labels, *(("questions", "question_ends") if self.questions else ()))

    def example(self, raw: RawRecord, statistics: Statistics) -> tuple[Example, bytes] | None:
        """One record, cut at seq_len and counted; and its question as it is kept, empty where none is.

        A record without anything to train on is counted and left out; but where records bring their own labels, only
        if the cut took them.

        Raises:
            UserError: it is a bad one; the line begins with its file and line.
        """
        record = parse(raw, self.ignored)
        try:
            example = self.format.encode(record)
            question = self._question(record)
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None
        s, length = statistics, len(example.input_ids)
        s.unused += [name for name in self.format.unused(record) if name not in s.unused]
        s.longest, is_cut = max(s.longest, length), length > self.seq_len
        if is_cut:
            example = self.format.cut(example, self.seq_len)
        for note in example.notes:
            s.note(note, record.where)
        trained = example.trained_tokens
        if not trained and (is_cut or not self.format.own_labels):
            s.unlabelled += 1
            s.first_unlabelled = s.first_unlabelled or record.where
            return None
        s.truncated += is_cut
        s.records += 1
        s.tokens += len(example.input_ids)
        s.trained += trained
        return example, question

    def unused_at_first(self, path: str, count: int = 200) -> frozenset[str]:
        """Fields that the first records at `path` have and that are not used. Bad records are passed over."""
        found: set[str] = set()
        for raw in itertools.islice(read_raw(path, self.name), count):
            with contextlib.suppress(UserError):
                found |= self.format.unused(parse(raw, self.ignored))
        return frozenset(found)

    def _question(self, record: Record) -> bytes:
        """As it is kept; empty where none is.

        Raises:
            UserError: a table's row has something that JSON cannot hold where the chat template may read it.
        """
        if self.questions is None:
            return b""
        question = self.questions.question(record)
        try:
            return json.dumps(question).encode()
        except TypeError as error:
            raise UserError(f"cannot be kept for validation: {error}; write it as a text") from None

    def chunk(self, raws: list[RawRecord]) -> Chunk:
        """Many records at once."""
        statistics, asked, faults = self.new_statistics(), self.questions, []
        ids: list[int] = []
        labels: list[int] = []
        lengths: list[int] = []
        questions: list[bytes] = []
        for raw in raws:
            try:
                encoded = self.example(raw, statistics)
            except UserError as error:
                faults.append(str(error))
                if self.stop_at_fault:
                    break
                continue
            if encoded is None:
                continue
            example, question = encoded
            ids += example.input_ids
            labels += example.labels
            lengths.append(len(example.input_ids))
            if asked:
                questions.append(question)
        arrays = {"ids": np.array(ids, DTYPES["ids"]), "ends": np.array(lengths, DTYPES["ends"])}
        if "labels" in self.names:
            arrays["labels"] = np.array(labels, DTYPES["labels"])
        else:
            arrays["spans"], arrays["span_ends"] = _spans(np.array(labels, DTYPES["labels"]), arrays["ends"])
        if asked:
            arrays["questions"] = np.frombuffer(b"".join(questions), DTYPES["questions"])
            arrays["question_ends"] = np.array([len(text) for text in questions], DTYPES["question_ends"])
        return Chunk(arrays, statistics, faults, len(raws))


def _spans(labels: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of labels: (start, stop) in its record of each, int32 [n, 2], and how many each record has, int64."""
    starts_of_records = np.cumsum(lengths) - lengths
    trained = np.concatenate(([False], labels != IGNORE, [False]))
    # A border between two records ends a run and begins another.
    change = trained[1:] != trained[:-1]
    change[starts_of_records] = trained[1:][starts_of_records]
    starts = np.flatnonzero(trained[1:] & change)
    ends = change.copy()
    ends[starts_of_records] = trained[:-1][starts_of_records]
    stops = np.flatnonzero(trained[:-1] & ends)
    record = np.searchsorted(starts_of_records, starts, side="right") - 1
    spans = np.stack((starts, stops), 1) - starts_of_records[record, None]
    return spans.astype(DTYPES["spans"]), np.bincount(record, minlength=len(lengths)).astype(DTYPES["span_ends"])


class ArrayWriter:
    """Appends chunks to the arrays of a data set, each a file of plain little-endian numbers.

    open_file: gives the file of an array by its name.
    """

    def __init__(self, names: tuple[str, ...], open_file: Callable[[str], BinaryIO]):
        self.files = {name: open_file(name) for name in names}
        self._hashes = {name: hashlib.blake2b(digest_size=8) for name in names if not name.startswith("question")}
        self._ends = {name: 0 for name in names if name.endswith("ends")}
        for name in self._ends:
            self._write(name, np.zeros(1, DTYPES[name]))

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            if name in self._ends:
                values = self._ends[name] + np.cumsum(values, dtype=DTYPES[name])
                self._ends[name] = int(values[-1]) if len(values) else self._ends[name]
            self._write(name, np.ascontiguousarray(values))

    def _write(self, name: str, values: np.ndarray) -> None:
        flat = values.reshape(-1).data
        self.files[name].write(flat)
        if name in self._hashes:
            self._hashes[name].update(flat)

    def content(self) -> str:
        """A hash of the ids and labels of all records, however they came in chunks."""
        digests = b"".join(self._hashes[name].digest() for name in sorted(self._hashes))
        return hashlib.blake2b(digests, digest_size=8).hexdigest()


def as_array(name: str, values: np.ndarray) -> np.ndarray:
    """The array that a file of plain bytes holds."""
    array = values.view(DTYPES[name])
    return array.reshape(-1, 2) if name == "spans" else array
