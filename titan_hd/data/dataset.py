"""Tokenized records, as the loader and the validation read them, and what became of all records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

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
    tokens of the longest record before the cut. first_unlabelled, first_bad: file and line of the first of those, and
    what is wrong with it. content: a hash of the ids and labels of all records, one for each source.
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
    first_bad: str = ""
    content: str = ""

    def add(self, other: Statistics) -> None:
        """Count other records, which come behind these, as well."""
        for name in ("records", "tokens", "trained", "truncated", "unlabelled", "bad"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first_unlabelled = self.first_unlabelled or other.first_unlabelled
        self.first_bad = self.first_bad or other.first_bad
        self.content = " ".join(filter(None, (self.content, other.content)))


def statistics_table(rows: list[Statistics]) -> str:
    """One line per data set, under a heading."""
    width = max([17, *(len(s.name) + 2 for s in rows)])
    lines = [
        f"{'data set':<{width}}{'format':<12}{'records':>10}{'tokens':>14}{'trained':>14}{'truncated':>11}"
        f"{'unlabelled':>12}{'bad':>6}{'longest':>9}"
    ]
    lines += [
        f"{s.name:<{width}}{s.format:<12}{s.records:>10}{s.tokens:>14}{s.trained:>14}{s.truncated:>11}{s.unlabelled:>12}"
        f"{s.bad:>6}{s.longest:>9}"
        for s in rows
    ]
    return "\n  ".join(lines)


class Questions(Protocol):
    """How generated answers to records begin and end. A question is the list that a format made of a record, with the
    reference answer as its last entry."""

    def write(self, question: list) -> str: ...

    def prompt_ids(self, question: list) -> list[int]: ...

    def stop_ids(self) -> frozenset[int]: ...


class TokenizedRecords:
    """Ids and labels of all records, one behind the other in flat arrays, in memory or mapped from files.

    arrays: ids int32 [tokens]; ends int64 [records + 1], where each record begins and the last one ends; and either
        labels int32 [tokens], or spans int32 [n, 2], from where to where in its record the label of each token is its
        id, with span_ends int64 [records + 1].
    """

    answerable = False

    def __init__(self, statistics: Statistics, arrays: Mapping[str, np.ndarray]):
        self.statistics, self._arrays = statistics, arrays

    @property
    def rows(self) -> list[Statistics]:
        """What `statistics_table` shows of these records."""
        return [self.statistics]

    def __len__(self) -> int:
        return len(self._arrays["ends"]) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of every record, int64 [records]."""
        return np.diff(self._arrays["ends"])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        a = self._arrays
        begin, end = a["ends"][index : index + 2].tolist()
        ids = a["ids"][begin:end].tolist()
        if "labels" in a:
            return Example(ids, a["labels"][begin:end].tolist())
        labels = [IGNORE] * len(ids)
        first, last = a["span_ends"][index : index + 2].tolist()
        for start, stop in a["spans"][first:last].tolist():
            labels[start:stop] = ids[start:stop]
        return Example(ids, labels)


class InstructionRecords(TokenizedRecords):
    """Records with a prompt and a response (of a chat: the last assistant turn) whose texts are kept, so that answers
    can be generated and compared.

    arrays: also questions uint8 [bytes], the question of every record as JSON, and question_ends int64 [records + 1].
    questions: the format that made them.
    """

    answerable = True

    def __init__(self, statistics: Statistics, arrays: Mapping[str, np.ndarray], questions: Questions):
        super().__init__(statistics, arrays)
        self._questions = questions

    def _question(self, index: int) -> list:
        begin, end = self._arrays["question_ends"][index : index + 2].tolist()
        return json.loads(self._arrays["questions"][begin:end].tobytes())

    def prompt(self, index: int) -> str:
        """The text in front of the response."""
        return self._questions.write(self._question(index))

    def prompt_ids(self, index: int) -> list[int]:
        """BOS (if the family or the chat template has one) and the prompt: what generation starts from."""
        return self._questions.prompt_ids(self._question(index))

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a generated response."""
        return self._questions.stop_ids()

    def response(self, index: int) -> str:
        return self._question(index)[-1]
