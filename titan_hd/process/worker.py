"""One worker as a process: its environment, its process group, and how it leaves."""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

# Every DTensor imports torch's compiler at its first use. Here all ranks do it at once; there one waits for the other.
import torch._dynamo
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from titan_hd.components.trackers.registry import finish_failed_run
from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.console import init_logging, silence_libraries
from titan_hd.distributed.collectives import on_rank_zero
from titan_hd.distributed.groups import LAZY
from titan_hd.distributed.watch import Watch, phase_name
from titan_hd.errors import UserError
from titan_hd.fitting import device_memory
from titan_hd.overview import Overview, screen, version_line
from titan_hd.preflight import RunPlan, plan_run
from titan_hd.process.network import LOOPBACK, allow_connections, lost_worker
from titan_hd.process.signals import StopSignals
from titan_hd.process.streams import keep_streams
from titan_hd.process.waiting import announce, missing_ranks, telling

logger = logging.getLogger("titan_hd")

DIVERGED = 3  # the exit status of a run whose loss or gradients are not finite


def device_name(device: torch.device) -> str:
    """What people call a worker's device: the name of its GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


_watch: Watch | None = None


def stand_alone() -> None:
    """Let a process that no launcher has started be the only worker."""
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if os.environ.get(key) == "":
            del os.environ[key]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": LOOPBACK}.items():
        os.environ.setdefault(key, str(value))
    os.environ.setdefault("MASTER_PORT", "29500" if world_size > 1 else "0")  # 0: one that is free, for nobody else


def init_process(config: JobConfig, signals: StopSignals | None) -> torch.device:
    """Start the process group (nccl on GPUs, gloo on CPUs) and its watch; returns this worker's device.

    signals: None in a process that has other things to do than this run, and that nothing watches.

    Raises:
        UserError: there are more workers than GPUs, or the configuration asks for what no worker does.
    """
    global _watch
    if config.job.dry_run or config.job.print_plan:
        raise UserError(
            "job.dry_run, job.print_plan: the launcher answers them, before there are workers: ask by ./run_train.sh, "
            "titan-hd or python -m titan_hd.launch"
        )
    if torch.cuda.is_available():
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            line = f"NGPU: more workers on this node than its {count} GPU(s)"
            if int(os.environ["RANK"]):  # which `say` leaves to rank 0, and that one has a GPU
                manager.print_errors([line])
            raise UserError(line)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    _record_flight(Path(config.job.dump_folder))
    timeout = datetime.timedelta(seconds=config.comm.init_timeout_seconds)
    store = _join(backend, timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    if signals is not None:

        def leave() -> None:  # it was told to stop, and is in a step that does not end
            if signals.status:
                os._exit(signals.status)

        def own_store() -> dist.Store:
            # pyrefly: ignore[missing-attribute]: torch's stubs leave `clone` of stores out
            return dist.PrefixStore("watch", store.clone())

        _watch = Watch(own_store, rank, world_size, config.comm.init_timeout_seconds, leave)
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    if config.debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def _join(backend: str, timeout: datetime.timedelta) -> dist.Store:
    """Start the process group with the other workers; its store. Who waits long says for whom.

    Raises:
        UserError: another process has MASTER_PORT.
    """
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    # The store is there when all ranks have connected to it; those that a launcher starts have one already.
    others = f"the other {world_size - 1} ranks" if rank == 0 else f"rank 0 and the others of {world_size} ranks"
    waits = telling(lambda: f"rank {rank} waits at {place} for {others}")
    allow_connections()
    try:
        with waits if local_rank == 0 else contextlib.nullcontext():  # one of a node is enough to say it
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT: another process has {place}; name a free port, for all ranks alike"
            ) from None
        raise
    store = dist.PrefixStore(_attempt(), store)
    announce(store, rank)
    with _telling_of_ranks(store, place, world_size) if rank == 0 else contextlib.nullcontext():
        for name, value in LAZY.items():
            os.environ.setdefault(name, value)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        # Returns when all are here, and connected to those that later collectives over the world need. Who connects to
        # a rank that has gone may wait five times as long as the time-out says (gloo in torch 2.11 to 2.13).
        dist.barrier()
    return store


def _telling_of_ranks(store: dist.Store, place: str, world_size: int) -> contextlib.AbstractContextManager[None]:
    """`telling`, by rank 0, which ranks have not come yet. It asks on a connection of its own."""
    # pyrefly: ignore[missing-attribute]: torch's stubs leave `clone` of stores out
    own_store = store.clone()
    return telling(lambda: f"rank 0 waits at {place} for {missing_ranks(own_store, world_size)}")


def _attempt() -> str:
    """Tells apart the groups of workers that an elastic launcher starts one after another on one store."""
    names = ("TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE", "WORLD_SIZE")
    return "/".join(os.environ.get(name, "0") for name in names)


def _record_flight(dump_folder: Path) -> None:
    """Let nccl keep its last collectives, and write them to dump_folder/flight_recorder/rank_N when one times out."""
    folder = dump_folder / "flight_recorder"
    if not torch.cuda.is_available():
        return
    if int(os.environ["RANK"]) == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning("%s: cannot be made (%s); nccl will write nothing there", folder, error.strerror)
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / "rank_"),
    }.items():
        os.environ.setdefault(name, value)


def set_timeout(seconds: int, but_not: set[dist.ProcessGroup]) -> None:
    """From now on collectives give up after so many seconds: loading and compiling are over."""
    dist.barrier()
    # There is no public way yet (torch 2.11 to 2.13): a time-out can be given only when a group is made.
    for group in dist.distributed_c10d._world.pg_map.keys() - but_not:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
    if _watch:
        _watch.timeout = seconds


def show_start(plan: RunPlan, device: torch.device) -> Overview | None:
    """Log the run on one screen, before anything is loaded; what it shows, on rank 0."""
    if dist.get_rank():
        return None
    overview = Overview(plan, device.type, device_name(device), device_memory(device))
    logger.info("%s\n%s", version_line(), screen(overview.lines, sys.stderr), extra={"painted": True})
    for line in overview.faults():
        logger.warning("%s", line)
    return overview


Run = Callable[[JobConfig, RunPlan, torch.device, StopSignals], int]


def run_worker(run: Run) -> NoReturn:
    """Entry point of one worker: leaves with the status that the run returns, 2 for what the user can mend (one line),
    3 for numbers that are not finite (one line), or 1 and a traceback."""
    leave(_exit_status(run))


def leave(status: int) -> NoReturn:
    """End this process now.

    At interpreter exit a gloo thread can abort the process and turn a finished run into a failure. os._exit avoids
    that; it also skips multiprocessing's cleanup, so the children are killed here.
    """
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_status(run: Run) -> int:
    """The exit status of this worker; what it had to say is said."""
    stand_alone()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keep_streams()
    init_logging(rank)
    silence_libraries()
    signals = StopSignals()
    signals.listen()
    handler = get_error_handler()
    handler.initialize()
    try:
        config = manager.load_or_exit(sys.argv[1:])
        device = init_process(config, signals)
        plan = on_rank_zero("reading the model's configuration", lambda: plan_run(config, world_size))
        return run(config, plan, device, signals)
    except Exception as error:
        handler.record_exception(error)
        status = say(error, rank)
        sys.stderr.flush()
        finish_failed_run()  # last: it may wait for a server
        return status


def say(error: Exception, rank: int) -> int:
    """Print what went wrong; the exit status that goes with it."""
    if not isinstance(error, UserError | FloatingPointError):
        lost = lost_worker(str(error)) if isinstance(error, RuntimeError) else None
        if lost:  # by whoever has failed: where this one stood says nothing, and hides what that one says
            print(f"titan_hd: rank {rank} ends in {phase_name()!r}: {lost} is lost", file=sys.stderr)
        else:
            traceback.print_exception(error)
        return 1
    # These are the same on every rank (see `raise_on_all`): one says them, all leave with the same status.
    if rank == 0:
        manager.print_errors(str(error).splitlines())
    return 2 if isinstance(error, UserError) else DIVERGED
