"""One example: what a format makes of a record, and what batches are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one record; label -100 is not trained on, position t predicts labels[t + 1].

    notes: what there is to say about the record, each a line that follows "so many records".
    """

    input_ids: list[int]
    labels: list[int]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def trained_tokens(self) -> int:
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE)


NOTHING = Example([0], [IGNORE])
"""Fills a place that has no record: one token, no loss."""


class Examples(Protocol):
    """What a batch is read from: a dataset, or a list."""

    def __getitem__(self, index: int, /) -> Example: ...


class SizedExamples(Examples, Protocol):
    def __len__(self) -> int: ...
