"""Datasets: sequences of examples, as the loader and the validation read them.

`Dataset` is what a run can train on. A `FiniteDataset` can also be counted and validated on: it is tokenized ahead,
from one source (`TokenizedDataset`) or several (`Concatenation`, `Mixture`). The other kind is
`streaming.StreamedDataset`. Indices count records in the order of the files and their lines, without those left out.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from titan_hd.config.job_config import DataSource
from titan_hd.data.example import IGNORE, Example
from titan_hd.data.formats import QuestionFormat
from titan_hd.data.order.mixture import MixtureOrder, share_of
from titan_hd.data.order.sample_order import Order, OrderSettings, build_order
from titan_hd.data.tokens.statistics import Statistics

logger = logging.getLogger("titan_hd")


class Dataset(ABC):
    """A sequence of examples that a run can train on. Data workers get it pickled."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    @abstractmethod
    def order(self, settings: OrderSettings) -> Order:
        """Which of the records make up which sample of the run."""

    @abstractmethod
    def summary(self, pack_to: int | None = None) -> str:
        """What tells the samples of a run from those of another: equal for equal records, mixtures and packs (of a
        stream, for files of equal sizes)."""

    @property
    @abstractmethod
    def rows(self) -> list[Statistics]:
        """What `statistics_table` shows of these records."""


class FiniteDataset(Dataset):
    """A dataset whose records are known ahead.

    Attributes:
        statistics: of all records.
        answerable: whether answers to all records can be generated and compared; only then `prompt_ids`, `response` and
            `stop_ids` may be called.
    """

    statistics: Statistics

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Tokens of every record, int64 [len(self)]."""

    @property
    @abstractmethod
    def answerable(self) -> bool: ...

    @abstractmethod
    def prompt_ids(self, index: int) -> list[int]:
        """BOS (if the family or the chat template has one) and the prompt: what generation starts from."""

    @abstractmethod
    def response(self, index: int) -> str: ...

    @abstractmethod
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a generated response."""

    def order(self, settings: OrderSettings) -> Order:
        return build_order(self.lengths, len(self), settings)

    def summary(self, pack_to: int | None = None) -> str:
        s = self.statistics
        text = f"{s.records} records of format {s.format}, {s.tokens} tokens, {s.trained} trained, content {s.content}"
        text += self._shares_in_words()
        return f"{text}; packs of {pack_to} tokens" if pack_to else text

    def _shares_in_words(self) -> str:
        return ""


class TokenizedDataset(FiniteDataset):
    """Ids and labels of all records, one behind the other in flat arrays, in memory or mapped from files.

    arrays: ids int32 [tokens]; ends int64 [records + 1], where each record begins and the last one ends; and either
        labels int32 [tokens], or spans int32 [n, 2], from where to where in its record the label of each token is its
        id, with span_ends int64 [records + 1]. With questions, also questions uint8 [bytes], the question of every
        record as JSON, and question_ends int64 [records + 1].
    questions: the format of records whose questions are kept, so that answers can be generated and compared.
    """

    def __init__(
        self, statistics: Statistics, arrays: Mapping[str, np.ndarray], questions: QuestionFormat | None = None
    ):
        self.statistics, self._arrays, self._questions = statistics, arrays, questions

    @property
    def rows(self) -> list[Statistics]:
        return [self.statistics]

    def __len__(self) -> int:
        return len(self._arrays["ends"]) - 1

    def lengths(self) -> np.ndarray:
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

    @property
    def answerable(self) -> bool:
        return self._questions is not None

    def _question(self, index: int) -> tuple[QuestionFormat, list]:
        assert self._questions is not None, "not answerable"
        begin, end = self._arrays["question_ends"][index : index + 2].tolist()
        return self._questions, json.loads(self._arrays["questions"][begin:end].tobytes())

    def prompt(self, index: int) -> str:
        """The text in front of the response."""
        format, question = self._question(index)
        return format.write(question)

    def prompt_ids(self, index: int) -> list[int]:
        format, question = self._question(index)
        return format.prompt_ids(question)

    def response(self, index: int) -> str:
        return self._question(index)[1][-1]

    def stop_ids(self) -> frozenset[int]:
        assert self._questions is not None, "not answerable"
        return self._questions.stop_ids()


class Concatenation(FiniteDataset):
    """The records of several sources, one source behind the other. name: what messages call it."""

    def __init__(self, name: str, parts: Sequence[FiniteDataset]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.statistics = Statistics(name, "all")
        for part in parts:
            self.statistics.add(part.statistics)

    @property
    def rows(self) -> list[Statistics]:
        """One for each source, and one for all."""
        return [*(part.statistics for part in self.parts), self.statistics]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[FiniteDataset, int]:
        """The source of a record, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        i = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[i]
        return part, index - int(self._ends[i]) + len(part)

    def __getitem__(self, index: int) -> Example:
        part, place = self._locate(index)
        return part[place]

    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths() for part in self.parts])

    @property
    def answerable(self) -> bool:
        return all(part.answerable for part in self.parts)

    def prompt_ids(self, index: int) -> list[int]:
        part, place = self._locate(index)
        return part.prompt_ids(place)

    def response(self, index: int) -> str:
        part, place = self._locate(index)
        return part.response(place)

    def stop_ids(self) -> frozenset[int]:
        """What ends a response of any source."""
        return frozenset().union(*(part.stop_ids() for part in self.parts))


class Mixture(Concatenation):
    """The records of several sources, of which an epoch takes what `sources` say.

    Attributes:
        shares: what an epoch takes of each source.
    """

    def __init__(self, name: str, parts: Sequence[FiniteDataset], sources: list[DataSource]):
        super().__init__(name, parts)
        self.shares = [share_of(s, len(p), f"{name}[{i}]") for i, (s, p) in enumerate(zip(sources, parts))]
        for part, share in zip(parts, self.shares):
            logger.info("%s: an epoch takes %d of %d records", part.statistics.name, share.taken, share.records)

    def order(self, settings: OrderSettings) -> Order:
        mixed = MixtureOrder(self.shares, settings.shuffle, settings.seed)
        return build_order(self.lengths, mixed.size, settings, mixed.index)

    def _shares_in_words(self) -> str:
        return ", of each source " + ", ".join(f"{share.taken} of {share.records}" for share in self.shares)
