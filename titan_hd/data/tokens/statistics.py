"""What became of the records of a dataset, and the table of it in the log."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Statistics:
    """What became of the records of a dataset.

    Attributes:
        name: what messages call the dataset: data.train, data.train[1], ...
        format: the name of its format.
        records, tokens, trained: of what is kept, after the cut at training.seq_len; trained are tokens with a label.
        truncated: records that were cut.
        unlabelled: records left out because no label is within training.seq_len.
        bad: records left out by data.on_error = "skip".
        longest: tokens of the longest record before the cut.
        first_unlabelled: file and line of the first record without a label.
        first_bad: file and line of the first bad record, and what is wrong with it.
        unused: fields of records that say something and are not used, each once.
        notes: what there is to say about some of the records -> how many these are, file and line of the first.
        content: a hash of the ids and labels of all records; of several sources, one hash for each.
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
    unused: list[str] = field(default_factory=list)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    content: str = ""

    def note(self, text: str, where: str, count: int = 1) -> None:
        before, first = self.notes.get(text, (0, where))
        self.notes[text] = (before + count, first)

    def add(self, other: Statistics) -> None:
        """Count other records, which come behind these, as well."""
        for name in ("records", "tokens", "trained", "truncated", "unlabelled", "bad"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first_unlabelled = self.first_unlabelled or other.first_unlabelled
        self.first_bad = self.first_bad or other.first_bad
        self.unused += [name for name in other.unused if name not in self.unused]
        for text, (count, where) in other.notes.items():
            self.note(text, where, count)
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
