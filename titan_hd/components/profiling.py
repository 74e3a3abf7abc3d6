"""Optional traces of torch.profiler."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from titan_hd.config.job_config import JobConfig

logger = logging.getLogger("titan_hd")


def build_profiler(config: JobConfig, rank: int) -> torch.profiler.profile | None:
    """A started profiler that writes one trace of a single step every profile_freq steps, or None if not enabled.

    A trace that cannot be written is a warning; OSError: there can be no folder for them.
    """
    if not config.profiling.enable_profiling:
        return None
    folder = Path(config.job.dump_folder) / config.profiling.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: torch.profiler.profile) -> None:
        path = folder / f"step{profiler.step_num}-rank{rank}.json"
        try:
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning("%s: cannot be written (%s); the run goes on without it", path, error)

    wait = max(0, config.profiling.profile_freq - 2)
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=wait, warmup=1, active=1), on_trace_ready=write, record_shapes=True
    )
    profiler.start()
    return profiler
