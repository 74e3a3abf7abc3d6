"""What a tracker is: a place outside of the run's folder, or a format, to which the run's numbers go.

A run that is resumed may have logged steps that it will do again. metrics.jsonl and validation_samples.jsonl have each
step once; a tracker that takes no step back logs everything again from them (`TrackedRun.entries`) into an empty run.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from titan_hd.components.records import read_records
from titan_hd.config.job_config import JobConfig

METRICS, SAMPLES = "metrics.jsonl", "validation_samples.jsonl"
SAMPLE_COLUMNS = ("record", "prompt", "reference", "output", "right")

Sample = Mapping[str, Any]  # by SAMPLE_COLUMNS


class Samples(NamedTuple):
    """Rows of a validation that are logged together. name: "samples", or "samples/NAME" of a named set."""

    name: str
    rows: Sequence[Sample]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run when it starts.

    first_step: of the checkpoint that the run goes on from, 0 if it is new. run_id: what this tracker's `run_id` was
    when that checkpoint was saved, or None. went_back: steps after first_step have been logged before, and come again.
    """

    config: JobConfig
    first_step: int
    run_id: str | None
    went_back: bool

    @property
    def folder(self) -> Path:
        return Path(self.config.job.dump_folder)

    def entries(self, first: int = 0) -> Iterator[tuple[int, dict[str, float] | Samples]]:
        """What has been logged of the steps from `first` up to first_step: (step, values or samples), in order."""
        metrics = ((r.pop("step"), r) for r in read_records(self.folder / METRICS))
        samples = (
            (step, Samples(name, [{key: row.get(key) for key in SAMPLE_COLUMNS} for row in rows]))
            for (step, name), rows in itertools.groupby(
                read_records(self.folder / SAMPLES), key=itemgetter("step", "name")
            )
        )
        for step, entry in heapq.merge(metrics, samples, key=itemgetter(0)):
            if first <= step <= self.first_step:
                yield step, entry


class Tracker:
    """Base class of trackers, of which only rank 0 has some. Whatever a method raises is logged once as a warning, and
    the run goes on without this tracker.

    title: for messages. package: that must be installed. run_id: of the place's own run, which a checkpoint keeps.
    """

    title: ClassVar[str] = ""
    package: ClassVar[str] = ""
    run_id: str | None = None

    def start(self, run: TrackedRun) -> None:
        """Before the first `log`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step by the names of docs/metrics.md. Several calls may have the same step; it never falls."""
        raise NotImplementedError

    def log_samples(self, step: int, samples: Samples) -> None:
        """Answers that a validation after `step` has generated."""

    def finish(self, failed: bool) -> None:
        """After the last `log`. failed: the run ends by an error."""

    def log_again(self, run: TrackedRun, first: int = 0) -> None:
        """Log what has been logged of the steps from `first` on before this start of the run."""
        for step, entry in run.entries(first):
            if isinstance(entry, Samples):
                self.log_samples(step, entry)
            else:
                self.log(step, entry)
