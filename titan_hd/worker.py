"""One worker as a process: its environment, its process group, and how it leaves."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from titan_hd.components.metrics import finish_failed_run, init_logging
from titan_hd.config import manager
from titan_hd.config.errors import UserError
from titan_hd.config.job_config import JobConfig
from titan_hd.preflight import RunPlan, plan_run
from titan_hd.signals import StopSignals


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def init_process(config: JobConfig) -> torch.device:
    """Start the process group (nccl on GPUs, gloo on CPUs) and return this worker's device."""
    if torch.cuda.is_available():
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"NGPU: more workers on this node than its {count} GPU(s)")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = datetime.timedelta(seconds=config.comm.init_timeout_seconds)
    dist.init_process_group(backend, timeout=timeout)
    if config.debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def set_timeout(seconds: int, but_not: dist.ProcessGroup) -> None:
    """From now on collectives give up after so many seconds: loading and compiling are over."""
    dist.barrier()
    for group in dist.distributed_c10d._world.pg_map.keys() - {but_not}:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


Run = Callable[[JobConfig, RunPlan, StopSignals], int]


def run_worker(run: Run) -> NoReturn:
    """Entry point of one worker: leaves with the status that the run returns, 2 for what the user can mend (one line),
    or 1 and a traceback.

    It leaves by os._exit: while the interpreter takes itself apart, a thread of gloo may want it once more and abort
    the process (now and then on a busy machine), and a run that was complete would have failed.
    """
    status = _exit_status(run)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_status(run: Run) -> int:
    """The exit status of this worker; what it had to say is said."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(key, str(value))
    os.environ.setdefault("MASTER_PORT", "29500")
    init_logging(rank)
    signals = StopSignals()
    signals.listen()
    handler = get_error_handler()
    handler.initialize()
    try:
        config = manager.load_or_exit(sys.argv[1:])
        return run(config, plan_run(config, world_size), signals)
    except Exception as error:
        handler.record_exception(error)
        status = _say(error, rank)
        sys.stderr.flush()
        finish_failed_run()  # last: it may wait for a server
        return status


def _say(error: Exception, rank: int) -> int:
    """Print what went wrong; the exit status that goes with it."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        return 1
    # User errors are the same on every rank (see `together`): one says them, all leave with status 2.
    if rank == 0:
        print(*(f"titan_hd: error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    return 2
