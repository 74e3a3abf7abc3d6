"""Weights & Biases: one run of theirs for one run of ours, however often that is resumed.

A history of theirs only grows: what is logged for a step that it has already is dropped. So

* a run that goes on where it stopped resumes theirs, and logs again what a crash has kept from their server;
* a run that goes back to an earlier step, and every one that is resumed offline, starts theirs anew under the same
  identifier, which replaces the old history, and logs all of metrics.jsonl again. Of offline runs it is therefore the
  last one that counts; the earlier ones are marked as synced, so that `wandb sync` leaves them out.

(Their own way to take steps back, `resume_from`, is a preview that most accounts and servers do not have.)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_hd.components.trackers.tracker import SAMPLE_COLUMNS, Samples, TrackedRun, Tracker
from titan_hd.components.wandb_run import WandbRun


class WandbTracker(Tracker):
    """`WandbRun` warns of what fails, and never raises."""

    title, package = "wandb", "wandb"

    def start(self, run: TrackedRun) -> None:
        """Start or resume a run of wandb, and log again what its history lacks of an earlier part of ours."""
        m = run.config.metrics
        self._run = WandbRun(
            str(run.folder),
            run.run_id,
            anew=run.went_back,
            project=m.wandb_project,
            entity=m.wandb_entity,
            name=m.wandb_name,
            group=m.wandb_group,
            notes=run.config.job.description,
            config=dataclasses.asdict(run.config),
        )
        self.run_id = self._run.run_id
        if run.run_id and self._run.run is not None:
            self.log_again(run, first=self._run.next_step)
            mark_superseded(run.folder / "wandb", run.run_id, but=self._run.folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step)

    def log_samples(self, step: int, samples: Samples) -> None:
        if self._run.run is not None:
            self._run.log({samples.name: _table(samples)}, step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else None)


def _table(samples: Samples) -> Any:
    wandb = sys.modules["wandb"]  # a run of it has started
    columns: list[str | int] = list(SAMPLE_COLUMNS)
    return wandb.Table(columns=columns, data=[[row[name] for name in SAMPLE_COLUMNS] for row in samples.rows])


def mark_superseded(folder: Path, run_id: str, but: Path | None) -> None:
    """Mark the offline runs in wandb's folder that have this identifier, but one, as `wandb sync` marks those that it
    has uploaded: the one that is left has all that they have."""
    for path in folder.glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"):
        if but is None or path.parent.resolve() != but.resolve():
            path.with_name(f"{path.name}.synced").touch()
