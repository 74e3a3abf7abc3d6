"""Optional traces of torch.profiler."""

from __future__ import annotations

from pathlib import Path

import torch

from titan_hd.config.job_config import JobConfig


def build_profiler(config: JobConfig, rank: int) -> torch.profiler.profile | None:
    """A started profiler that writes one trace of a single step every profile_freq steps, or None if not enabled."""
    if not config.profiling.enable_profiling:
        return None
    folder = Path(config.job.dump_folder) / config.profiling.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(folder / f"step{profiler.step_num}-rank{rank}.json"))

    wait = max(0, config.profiling.profile_freq - 2)
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=wait, warmup=1, active=1), on_trace_ready=write, record_shapes=True
    )
    profiler.start()
    return profiler
