"""Tokenized records, as the loader and the validation read them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from titan_hd.data.chat import ChatTurns
from titan_hd.data.sources import Record
from titan_hd.data.templates import Template
from titan_hd.data.tokenizer_base import Tokenizer

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one record; label -100 is not trained on, position t predicts labels[t + 1]."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE)


@dataclass
class Statistics:
    """What became of the records of a data set.

    records, tokens, trained: of what is kept, after the cut. truncated: records that were cut. unlabelled: records
    left out because no label is within training.seq_len. bad: records left out by data.on_error = "skip". longest:
    tokens of the longest record before the cut. first_unlabelled: file and line of the first of those.
    """

    name: str
    format: str
    records: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    unlabelled: int = 0
    bad: int = 0
    longest: int = 0
    first_unlabelled: str = ""


def statistics_table(rows: list[Statistics]) -> str:
    """One line per data set, under a heading."""
    lines = [
        f"{'data set':<17}{'format':<12}{'records':>10}{'tokens':>14}{'trained':>14}{'truncated':>11}{'unlabelled':>12}"
        f"{'bad':>6}{'longest':>9}"
    ]
    lines += [
        f"{s.name:<17}{s.format:<12}{s.records:>10}{s.tokens:>14}{s.trained:>14}{s.truncated:>11}{s.unlabelled:>12}"
        f"{s.bad:>6}{s.longest:>9}"
        for s in rows
    ]
    return "\n  ".join(lines)


class TokenizedRecords:
    """Ids and labels of all records, one behind the other in two int32 arrays: eight bytes per token."""

    def __init__(self, statistics: Statistics, seq_len: int):
        self.statistics, self.seq_len = statistics, seq_len
        self._ids, self._labels, self._ends = array("i"), array("i"), array("q", [0])

    def add(self, example: Example, record: Record) -> bool:
        """Append a record, cut at seq_len; whether it has been taken.

        A record without anything to train on is counted and left out; but in format "tokens", where records are taken
        as they are, only if the cut took its labels.
        """
        s, length = self.statistics, len(example.input_ids)
        s.longest, is_cut = max(s.longest, length), length > self.seq_len
        example = Example(example.input_ids[: self.seq_len], example.labels[: self.seq_len])
        if not example.trained_tokens and (is_cut or s.format != "tokens"):
            s.unlabelled += 1
            s.first_unlabelled = s.first_unlabelled or record.where
            return False
        s.truncated += is_cut
        self._ids.extend(example.input_ids)
        self._labels.extend(example.labels)
        self._ends.append(len(self._ids))
        s.records += 1
        s.tokens += len(example.input_ids)
        s.trained += example.trained_tokens
        return True

    def __len__(self) -> int:
        return len(self._ends) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of every record, [N] int64."""
        return np.diff(np.array(self._ends, dtype=np.int64))

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = slice(self._ends[index], self._ends[index + 1])
        return Example(self._ids[place].tolist(), self._labels[place].tolist())


class InstructionRecords(TokenizedRecords):
    """Records with a prompt and a response whose texts are kept: answers can be generated and compared.

    parts: prompt, input and response of a record, as the template takes them.
    """

    def __init__(
        self,
        statistics: Statistics,
        seq_len: int,
        tokenizer: Tokenizer,
        template: Template | ChatTurns,
        parts: Callable[[Record], tuple[str, str, str]],
    ):
        super().__init__(statistics, seq_len)
        self._tokenizer, self._template, self._parts = tokenizer, template, parts
        self._texts: list[tuple[str, str, str]] = []

    def add(self, example: Example, record: Record) -> bool:
        taken = super().add(example, record)
        if taken:
            self._texts.append(self._parts(record))
        return taken

    def prompt(self, index: int) -> str:
        """The text in front of the response."""
        return self._template.write(*self._texts[index][:2])

    def prompt_ids(self, index: int) -> list[int]:
        """BOS (if the family or the chat template has one) and the prompt: what generation starts from."""
        return self._template.prompt_ids(self._tokenizer, *self._texts[index][:2])

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a generated response."""
        return self._template.stop_ids(self._tokenizer)

    def response(self, index: int) -> str:
        return self._texts[index][2]
