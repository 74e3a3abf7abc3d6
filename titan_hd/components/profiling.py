"""What a run's section [profiling] asks of one worker: traces of steps, names in them, snapshots of a GPU's memory.

Files that cannot be written are warnings; the training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction

from titan_hd.config.job_config import JobConfig
from titan_hd.config.job_config import Profiling as Settings
from titan_hd.distributed.named_ranges import PREFIX, name_ranges

logger = logging.getLogger("titan_hd")

_ROWS = 40  # of the table beside a trace
_MOST_EVENTS = 100_000  # allocations and frees that a snapshot can tell of, the last ones


class Traces:
    """Traces of the chosen steps of this rank, each with a table of what took how long.

    step: optimizer steps done so far.
    """

    def __init__(self, settings: Settings, folder: Path, rank: int, step: int):
        """OSError: there can be no folder for them."""
        self._settings, self._folder, self._rank, self._step = settings, folder, rank, step
        folder.mkdir(parents=True, exist_ok=True)
        self._profiler = torch.profiler.profile(
            schedule=lambda _: self._action(self._step + 1),  # not by its own count: a step may be made by hand
            on_trace_ready=self._write,
            record_shapes=True,
            with_stack=settings.with_stack,
        )
        self._profiler.start()

    def after_step(self, step: int) -> None:
        """step: optimizer steps done; of a `Trainer.train_step` by hand nothing is told."""
        self._step = step
        self._profiler.step()

    def close(self) -> None:
        """Stop the profiler; a trace that is under way is written as it is."""
        self._profiler.stop()

    def _chosen(self, step: int) -> bool:
        steps = self._settings.profile_steps
        return step in steps if steps else step % self._settings.profile_freq == 0

    def _action(self, step: int) -> ProfilerAction:
        """What the profiler does in a step, counted from 1. It warms up in the step before, whose time that costs."""
        following = self._chosen(step + 1)
        if self._chosen(step):
            goes_on = following and self._settings.profile_steps
            return ProfilerAction.RECORD if goes_on else ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if following else ProfilerAction.NONE

    def _write(self, profiler: torch.profiler.profile) -> None:
        path = self._folder / f"step{self._step}-rank{self._rank}.json"
        try:
            path.write_bytes(b"")  # the profiler says nothing of a place where it cannot write
            profiler.export_chrome_trace(str(path))
            path.with_suffix(".txt").write_text(summary(profiler.key_averages()), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            logger.warning("%s: cannot be written (%s); the run goes on without it", path, error)


def summary(averages: Any) -> str:
    """The named ranges, by their time, then the operations that took the most themselves.

    averages: torch.profiler's `key_averages()`.
    """
    on_device = any(event.device_type != torch.autograd.DeviceType.CPU for event in averages)
    lines = [f"{'part of a step':<24}{'calls':>8}{'host, ms':>12}" + (f"{'device, ms':>12}" if on_device else "")]
    ranges = [e for e in averages if e.key.startswith(PREFIX) and e.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(ranges, key=lambda event: -event.cpu_time_total):
        line = f"{event.key.removeprefix(PREFIX):<24}{event.count:>8}{event.cpu_time_total / 1e3:>12.3f}"
        lines.append(line + (f"{event.device_time_total / 1e3:>12.3f}" if on_device else ""))
    by = "self_device_time_total" if on_device else "self_cpu_time_total"
    return "\n".join([*lines, "", averages.table(sort_by=by, row_limit=_ROWS, max_name_column_width=50)])


class MemorySnapshots:
    """A record of a GPU's allocations with the lines of code that made them, written down after chosen steps, when
    this process gets SIGUSR2, and where memory runs out. It begins when this is made.

    writes_steps: whether this rank is one that writes after the chosen steps.
    """

    def __init__(self, settings: Settings, folder: Path, rank: int, writes_steps: bool):
        self._folder, self._rank = folder, rank
        self._steps = settings.memory_snapshot_steps if writes_steps else []
        self._asked = False
        self._before: Any = None
        # A thread, such as a notebook's, cannot listen to signals.
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGUSR2, self._ask)
        torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS, stacks="python")
        logger.info("memory snapshots: kill -USR2 %d on %s asks for one", os.getpid(), socket.gethostname())

    def after_step(self, step: int) -> None:
        """step: optimizer steps done."""
        if self._asked or step in self._steps:
            self._asked = False
            logger.info("memory snapshot: %s", self._write(f"step{step}"))

    def ran_out(self, step: int) -> None:
        """Memory ran out in the step after `step` steps, or in the set-up before."""
        logger.error("memory ran out; snapshot: %s", self._write(f"out-of-memory-step{step + 1}"))

    def close(self) -> None:
        """End the record of allocations, and give SIGUSR2 back."""
        torch.cuda.memory._record_memory_history(enabled=None)
        if self._listens:
            signal.signal(signal.SIGUSR2, self._before)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _write(self, name: str) -> Path | None:
        """The file; None if it cannot be written."""
        path = self._folder / f"{name}-rank{self._rank}.pickle"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning("%s: cannot be written (%s); the run goes on without it", path, error)
            return None
        return path


class Profiling:
    """Everything that [profiling] asks of this worker; nothing, if it asks for nothing.

    It is made before the model, so that the record of the memory has all of it; `start` comes before the first step.
    """

    def __init__(self, config: JobConfig, rank: int, device: torch.device):
        self._settings, self._rank = config.profiling, rank
        self._folder = Path(config.job.dump_folder)
        self._chosen = rank in config.profiling.profile_ranks
        self._traces: Traces | None = None
        self._snapshots: MemorySnapshots | None = None
        if config.profiling.enable_memory_snapshot and device.type == "cuda":
            folder = self._folder / config.profiling.save_memory_snapshot_folder
            self._snapshots = MemorySnapshots(config.profiling, folder, rank, self._chosen)
        openers: list[Callable] = []
        if config.profiling.enable_profiling and self._chosen:
            openers.append(torch.profiler.record_function)
        if config.profiling.enable_nvtx and device.type == "cuda":
            openers.append(torch.cuda.nvtx.range)
        name_ranges(*openers)

    def start(self, step: int, total_steps: int) -> None:
        """Begin with the traces. step: optimizer steps done.

        Raises:
            OSError: there can be no folder for them.
        """
        s = self._settings
        if step < total_steps:
            self._warn_of_steps(step, total_steps)
        if s.enable_profiling and self._chosen:
            self._traces = Traces(s, self._folder / s.save_traces_folder, self._rank, step)

    def _warn_of_steps(self, step: int, total_steps: int) -> None:
        """Of those that the run does not make."""
        s = self._settings
        for key, steps in (("profile_steps", s.profile_steps), ("memory_snapshot_steps", s.memory_snapshot_steps)):
            outside = [number for number in steps if not step < number <= total_steps]
            if outside:
                logger.warning(
                    "profiling.%s: %s: this run makes steps %d to %d",
                    key, ", ".join(map(str, outside)), step + 1, total_steps,
                )  # fmt: skip
        if s.enable_profiling and not s.profile_steps and total_steps // s.profile_freq == step // s.profile_freq:
            line = "profiling.profile_freq: %d: there will be no trace, for this run makes steps %d to %d"
            logger.warning(line, s.profile_freq, step + 1, total_steps)

    @property
    def after_each_step(self) -> list[Callable[[int], None]]:
        """What to call after every step, with the number of steps done."""
        return [one.after_step for one in (self._traces, self._snapshots) if one is not None]

    @contextlib.contextmanager
    def watching_memory(self, step: Callable[[], int]) -> Iterator[None]:
        """Where memory runs out inside, there is a snapshot of that moment. step: steps done."""
        try:
            yield
        except torch.OutOfMemoryError:
            if self._snapshots:
                self._snapshots.ran_out(step())
            raise

    def close(self) -> None:
        """End the traces and the record of the memory; from now on ranges have no names."""
        if self._traces:
            self._traces.close()
        if self._snapshots:
            self._snapshots.close()
        name_ranges()
