"""Numbers of a run: metrics.jsonl, the console, a progress bar, TensorBoard and wandb. Rank 0 alone writes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from titan_hd.components.step_line import StepLines
from titan_hd.components.wandb_run import WandbRun
from titan_hd.config.job_config import JobConfig
from titan_hd.console import on_terminal
from titan_hd.files import replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("titan_hd")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: what CUDA's allocator reserved, or the resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _start_wandb(config: JobConfig, run_id: str | None) -> WandbRun:
    m = config.metrics
    return WandbRun(
        config.job.dump_folder,
        run_id,
        project=m.wandb_project,
        entity=m.wandb_entity,
        name=m.wandb_name,
        group=m.wandb_group,
        notes=config.job.description,
        config=dataclasses.asdict(config),
    )


def finish_failed_run() -> None:
    """Tell wandb, if it runs, that the run failed: the process will not end in the way that it waits for."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    try:
        wandb.finish(exit_code=1)
    except Exception as error:
        logger.warning("wandb failed (%s)", " ".join(str(error).split()))


class NoMetrics:
    """What the ranks other than 0 have in the place of a `MetricsLogger`."""

    @property
    def wandb_id(self) -> str | None:
        return None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of one step (1-based) everywhere."""

    def sync(self) -> None:
        """Wait until the records are on the disk: a checkpoint must not know more steps than they."""

    def advance(self, loss: float) -> None:
        """Move the progress bar by one step."""

    def close(self) -> None:
        """Write what is left, and end the trackers."""


class MetricsLogger(NoMetrics):
    """Takes one record per logged step to metrics.jsonl, the console and the trackers that the configuration names.

    first_step: of the checkpoint that the run goes on from; later records are dropped. 0: the records of an earlier run
    in the folder are kept, under another name. wandb_id: that of the run then.
    """

    def __init__(self, config: JobConfig, total_steps: int, first_step: int, wandb_id: str | None = None):
        folder = Path(config.job.dump_folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if first_step:
            keep_records_until(path, first_step)
        else:
            set_aside(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten = b""
        self._lines, self._bar = StepLines(first_step, total_steps), None
        if config.metrics.progress_bar and on_terminal():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=False)
        self._wandb = _start_wandb(config, wandb_id) if config.metrics.enable_wandb else None
        self._tensorboard = _tensorboard(folder / "tb", first_step) if config.metrics.enable_tensorboard else None

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.run_id if self._wandb else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a record of `step` everywhere; a place that fails is given up with a warning, the training goes on."""
        self._unwritten += json.dumps({"step": step, **values}).encode() + b"\n"
        self._write()
        if self._wandb:
            self._wandb.log(values, step)
        if self._tensorboard:
            try:
                for key, value in values.items():
                    self._tensorboard.add_scalar(key, value, step)
            except Exception as error:  # what a thread of its own met when it wrote earlier values
                self._tensorboard = None
                logger.warning("TensorBoard's events cannot be written (%s); going on without them", error)
        logger.info("%s", self._lines.line(step, values), extra={"painted": True})

    def sync(self) -> None:
        self._write(sync=True)

    def _write(self, sync: bool = False) -> None:
        """What a full disk does not take is written later: it stops neither training nor the record."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("metrics.jsonl: cannot be written (%s); its records wait", error.strerror)

    def advance(self, loss: float) -> None:
        expected = self._lines.advance()
        if expected:
            logger.info("%s", expected)
        if self._bar:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Write what the disk has not taken yet, and end every place; what is lost is said."""
        self._write()
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            logger.warning("metrics.jsonl: its last %d record(s) are lost: the disk has not taken them", lost)
        with contextlib.suppress(OSError):  # of a network disk, after everything that could be written was
            self._file.close()
        if self._bar:
            self._bar.close()
        if self._tensorboard:
            try:
                self._tensorboard.close()
            except Exception as error:
                logger.warning("TensorBoard's last events cannot be written (%s)", error)
        if self._wandb:
            self._wandb.finish()


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter | None:
    """A writer, or None with a warning: it never stops the training."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        # Records of later steps will be written again; that of step 0 only by a run that starts anew.
        return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)
    except Exception as error:
        logger.warning("TensorBoard cannot start (%s); going on without it", " ".join(str(error).split()))
        return None


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


def set_aside(path: Path) -> None:
    """Give the records of an earlier run, if there are any, the name of `path` with the first free number."""
    if not path.exists() or not path.stat().st_size:
        return
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    logger.warning("%s is of an earlier run; kept as %s", path, aside.name)


def keep_records_until(path: Path, step: int) -> None:
    """Drop records after `step` from a metrics file (and a torn last line): a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    text = "".join(line + "\n" for line in kept)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))  # a run killed here loses nothing


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none without one. A full disk may have cut its last line, which is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
