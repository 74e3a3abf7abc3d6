"""job.dry_run: whether a run would start, asked in one process, on any machine that sees the files.

The mesh is there in name alone: torch's "fake" backend returns from every collective at once, so that the model gets
its wrappers as on rank 0 of a run on any number of workers. Nothing is trained, and nothing is written but tokens into
their cache, where the run finds them.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path

import torch.distributed as dist

from titan_hd.adapters.methods import ignored_keys
from titan_hd.checkpoint.folder import incomplete, read_train_state
from titan_hd.checkpoint.object_store import checkpoint_folder
from titan_hd.checkpoint.reader import CheckpointReader
from titan_hd.checkpoint.resume_check import check_resume
from titan_hd.components.assembly import assemble
from titan_hd.components.run_data import RunData, read_data
from titan_hd.config.job_config import JobConfig
from titan_hd.console import init_logging, silence_libraries
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.errors import Faults, UserError
from titan_hd.files import disk_faults
from titan_hd.overview import Overview, data_lines, screen, version_line
from titan_hd.preflight import RunPlan, run_identity_of
from titan_hd.process.run_lock import check_unlocked

logger = logging.getLogger("titan_hd")


def dry_run(config: JobConfig, plan: RunPlan, overview: Overview) -> None:
    """Print what the run is and what has been checked; warnings go to the log.

    config: as it was given. plan: of all workers.

    Raises:
        UserError: a line for everything that would keep it from starting, or from ending well.
    """
    init_logging(rank=0)
    silence_libraries()
    tables = [overview.tables] if config.job.print_plan else []
    print(version_line(), screen(overview.lines, sys.stdout), *tables, sep="\n", flush=True)
    for line in (*ignored_keys(config), *plan.warnings):
        logger.warning("%s", line)
    errors = Faults()

    errors.attempt(_check_dump_folder, Path(config.job.dump_folder))
    has_folder = not errors
    data = errors.attempt(read_data, plan.config, plan.decoder.vocab_size, plan.global_batch_size)
    resumes = None
    if data is not None:
        print(screen(data_lines(data, plan.config, plan.global_batch_size), sys.stdout), flush=True)
        resumes = errors.attempt(_check_resume, plan, data) if has_folder else None
    errors.attempt(_assemble, plan)
    if overview.device_type == "cuda":
        errors += overview.faults()
    else:
        for line in overview.faults():
            logger.warning("%s", line)
    if errors:
        raise UserError("\n".join(errors))
    last = [("start", resumes or "from the base model"), ("checked", _checked(plan, overview))]
    print(screen(last, sys.stdout))
    print("the run would start")


def _checked(plan: RunPlan, overview: Overview) -> str:
    records = "the first record of every source" if plan.config.data.streaming else "every record of the data"
    memory = "memory" if overview.device_type == "cuda" else "memory for CPU workers (job.gpu_gib counts for GPUs)"
    mesh = f"the model on the mesh, as rank 0 of {math.prod(plan.mesh)}"
    return (
        f"every key; files, headers of the weights, tokenizer, template; {records}; folders to write to; {mesh}; the "
        f"exchange; {memory}. Not checked: values of the weights, GPUs, network"
    )


def _check_dump_folder(folder: Path) -> None:
    """It, or where it will be made, can be written to, and no other run has it."""
    with disk_faults(folder):
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not place.is_dir():
            raise UserError(f"job.dump_folder: {place} is no folder; name another one")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"job.dump_folder: {place} cannot be written by this user; name another one")
        check_unlocked(folder)


def _check_resume(plan: RunPlan, data: RunData) -> str | None:
    """Where the run goes on, in words; None if it starts anew. A checkpoint's files are looked for, and not read."""
    c = plan.config.checkpoint
    if not c.enable:
        return None
    folder = checkpoint_folder(plan.config)
    step = folder.first_whole(folder.candidates(c.load_step), c.load_step, incomplete)
    if step is None:
        return None
    path = folder.path(step)
    stored = CheckpointReader(path).read_metadata().state_dict_metadata
    identity = run_identity_of(plan, data.summary)
    check_resume(read_train_state(path), identity, stored, c.allow_mismatch, data.total_steps)
    return f"from {path}"


def _assemble(plan: RunPlan) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(plan.mesh))
    try:
        dims = ParallelDims(plan.dp_replicate, plan.dp_shard, "cpu", plan.tp)
        assemble(plan.config, plan.decoder, plan.method, dims, plan.untouched)
    finally:
        dist.destroy_process_group()
