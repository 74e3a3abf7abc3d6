"""Numbers of a run: metrics.jsonl, the console, a progress bar and the trackers. Rank 0 alone writes."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from titan_hd.components.records import RecordFile
from titan_hd.components.step_line import StepLines
from titan_hd.components.trackers.registry import Trackers
from titan_hd.components.trackers.tracker import METRICS, SAMPLES, Sample, Samples
from titan_hd.config.job_config import JobConfig
from titan_hd.console import on_terminal

logger = logging.getLogger("titan_hd")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: what CUDA's allocator reserved, or the resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class NoMetrics:
    """What the ranks other than 0 have in the place of a `MetricsLogger`."""

    @property
    def tracker_runs(self) -> dict[str, str]:
        """Identifiers of the trackers' own runs, by tracker, for a checkpoint."""
        return {}

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of one step (1-based) everywhere."""

    def log_detail(self, step: int, values: dict[str, float]) -> None:
        """The same, but for the console, where they would be too many."""

    def log_samples(self, step: int, name: str, rows: Sequence[Sample]) -> None:
        """Keep generated answers of a validation in validation_samples.jsonl and in the trackers' tables."""

    def sync(self) -> None:
        """Wait until the records are on the disk: a checkpoint must not know more steps than they."""

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar to so many steps."""

    def close(self, failed: bool = False) -> None:
        """Write what is left, and end the trackers. failed: leave them to `finish_failed_run`, which comes after the
        error's message, for it may wait for a server."""


class MetricsLogger(NoMetrics):
    """Takes one record per logged step to metrics.jsonl, the console and the trackers that the configuration names.

    first_step: of the checkpoint that the run goes on from; later records are dropped. 0: the records of an earlier run
    in the folder are kept, under another name. tracker_runs: what that checkpoint has of the trackers.
    """

    def __init__(
        self, config: JobConfig, total_steps: int, first_step: int, tracker_runs: dict[str, str] | None = None
    ):
        folder = Path(config.job.dump_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.records = RecordFile(folder / METRICS, first_step)
        self.samples = RecordFile(folder / SAMPLES, first_step, lazily=True)
        went_back = self.records.went_back or self.samples.went_back
        self.trackers = Trackers(config, first_step, tracker_runs or {}, went_back)
        self._lines, self._bar = StepLines(first_step, total_steps), None
        if config.metrics.progress_bar and on_terminal():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=False)

    @property
    def tracker_runs(self) -> dict[str, str]:
        return self.trackers.run_ids

    def log(self, step: int, values: dict[str, float]) -> None:
        self.log_detail(step, values)
        logger.info("%s", self._lines.line(step, values), extra={"painted": True})

    def log_detail(self, step: int, values: dict[str, float]) -> None:
        self.records.append({"step": step, **values})
        self.trackers.each(lambda tracker: tracker.log(step, values))

    def log_samples(self, step: int, name: str, rows: Sequence[Sample]) -> None:
        for row in rows:
            self.samples.append({"step": step, "name": name, **row})
        self.trackers.each(lambda tracker: tracker.log_samples(step, Samples(name, rows)))

    def sync(self) -> None:
        self.records.write(sync=True)
        self.samples.write(sync=True)

    def advance(self, step: int, loss: float) -> None:
        expected = self._lines.advance(step)
        if expected:
            logger.info("%s", expected)
        if self._bar:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self, failed: bool = False) -> None:
        self.records.close()
        self.samples.close()
        if self._bar:
            self._bar.close()
        if not failed:
            self.trackers.finish()


def write_svd_report(path: Path, reports: list[dict[str, Any]]) -> None:
    """One JSON line per decomposed weight, and a summary in the log, with the weights that cannot move. A disk that
    does not take the lines gives a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(report) + "\n" for report in reports), encoding="utf-8")
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the run goes on without it", path.name, error.strerror)
    energy = [r["captured_energy"] for r in reports]
    logger.info(
        "SVD of %d weights (%d from the cache), %.1f s of work; captured energy %.3f to %.3f, orthogonal to %.1e",
        len(reports),
        sum(r["cached"] for r in reports),
        sum(r["seconds"] for r in reports),
        min(energy),
        max(energy),
        max(r["orthogonality_error"] for r in reports),
    )
    still = [f"{r['layer']} ({r['zero_directions']} of {r['directions']})" for r in reports if r["zero_directions"]]
    if still:
        logger.warning("directions without a singular value, in which these weights can never move: %s", _list(still))


def _list(names: list[str], most: int = 20) -> str:
    """Names on one line, of many the first."""
    more = f" and {len(names) - most} more (svd.jsonl)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
