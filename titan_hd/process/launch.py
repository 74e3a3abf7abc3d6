"""Starts the workers of this node: torchrun with a check of the configuration before, and one honest line after.

    python -m titan_hd.launch [torchrun options] [--] [titan_hd options]

Same options and rendezvous as torchrun. What differs: faults of the configuration are reported once, with status 2,
before any process starts; one node needs no name and no port, and several say for whom they wait; and the exit status
is that of the worker that failed first, or 75 or 130 where a signal has stopped the run (see
titan_hd/process/signals.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from torch.distributed import DistNetworkError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.console import printable
from titan_hd.errors import UserError
from titan_hd.fitting import device_memory, usable_bytes
from titan_hd.preflight import plan_run
from titan_hd.process.network import (
    LOOPBACK,
    address_towards,
    addresses_of,
    allow_connections,
    interface_of,
    lost_worker,
    timed_out,
)
from titan_hd.process.signals import REQUEUE, STATUS, leave_when_told, outlives_terminal
from titan_hd.process.streams import keep_streams
from titan_hd.process.waiting import telling_of_nodes

# Time for a last checkpoint before torchrun kills the workers. torch 2.11 ignores this and waits 30 s.
_GRACE_SECONDS = 600
_MASTER_PORT = 29500  # torchrun's default


def main() -> None:
    """Check, then start the workers; exits with the status of the one that failed first."""
    keep_streams()
    leave_when_told()
    launcher_args, train_args = split_arguments(sys.argv[1:])
    args = torchrun_arguments([*launcher_args, "-m", "titan_hd.train", *train_args])
    config = manager.load_or_exit(train_args)
    logging.getLogger("titan_hd").setLevel(logging.ERROR)  # the first worker gives the warnings
    try:
        local_workers, nodes = _sizes(args)
        workers = local_workers * nodes
        if config.job.print_plan or config.job.dry_run:
            ask_plan(config, workers, local_workers)
            return
        plan_run(config, workers)
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    start_workers(args, Path(config.job.dump_folder))


def _sizes(args: argparse.Namespace) -> tuple[int, int]:
    """Workers of a node, and nodes at most.

    Raises:
        UserError: torchrun's options for them are none, or ask for GPUs that are not there.
    """
    try:
        workers = run.determine_local_world_size(args.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--nproc_per_node (NGPU): {args.nproc_per_node!r}: {error}") from None
    try:
        nodes = run.parse_min_max_nnodes(args.nnodes)[1]
    except (ValueError, RuntimeError):
        raise UserError(f"--nnodes (PET_NNODES): must be N, or MIN:MAX, not {args.nnodes!r}") from None
    assert workers is not None  # torch does not say so
    return workers, nodes


def ask_plan(config: JobConfig, workers: int, local_workers: int) -> None:
    """job.print_plan and job.dry_run, of a run on so many workers: counted for the GPUs of job.gpu_gib, or for what
    this machine has.

    Raises:
        UserError: a line for everything that would keep the run from starting.
    """
    # Only here: a run's launcher needs none of it, and would start later.
    from titan_hd.overview import Overview, screen
    from titan_hd.process.dry_run import dry_run

    job, cuda = config.job, torch.cuda.is_available()
    if job.gpu_gib is not None:
        device_type, device, available = "cuda", f"GPU of {job.gpu_gib:g} GiB", usable_bytes(job.gpu_gib)
    elif cuda:
        device_type, device, available = "cuda", torch.cuda.get_device_name(), device_memory(torch.device("cuda"))
    else:  # the plan of a run on GPUs, asked without them, is not measured by this machine's memory
        device_type, device = "cpu", "CPU"
        available = device_memory(torch.device("cpu")) // local_workers if job.dry_run else None
    if job.print_config:
        print(manager.to_toml(config))
    plan = plan_run(config, workers, job.dry_run, device_type)
    overview = Overview(plan, device_type, device, available)
    if job.dry_run:
        dry_run(config, plan, overview)
    else:
        print(screen(overview.lines, sys.stdout), overview.tables, *overview.faults(), sep="\n")


def start_workers(args: argparse.Namespace, folder: Path) -> None:
    """Start the workers of this node and wait for their end; exits with the status of the one that failed first.

    args: of `torchrun_arguments`. folder: gets errors.jsonl if a worker fails.
    """
    allow_connections()
    _choose_network(args)
    least, most = run.parse_min_max_nnodes(args.nnodes)
    if least < most:
        # A node that joins later waits for ever on the first nodes' store: torch (2.11 to 2.13) tells its address only
        # in the first round. Without sharing, every round has a store of its own.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The agent repeats a worker's failure as a banner and a traceback of its own; the worker has said it already.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or _MASTER_PORT}"
    try:
        with telling_of_nodes(endpoint, args.rdzv_id, least, most):
            run.run(args)
    except (RendezvousError, DistNetworkError) as error:
        if "EADDRINUSE" in str(error):
            manager.exit_with([f"--master_port: another process has {endpoint}; name a free port, on every node alike"])
        print(f"titan_hd: the nodes have not met at {endpoint} (rendezvous {args.rdzv_id}): {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except SignalException as error:
        status = STATUS.get(error.sigval, 128 + error.sigval)
        print(f"titan_hd: stopped by {error.sigval.name}, status {status}", file=sys.stderr)
        raise SystemExit(status) from None
    except ChildFailedError as error:
        (rank, failure), *_ = failures = _root_cause_first(error.failures)
        _write_errors(folder, failures)
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        reason = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}"
        print(f"titan_hd: worker {rank} ended with {reason}{printable(_why(rank, failure))}", file=sys.stderr)
        raise SystemExit(status) from None


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """torchrun's options and ours. Without "--" between them ours begin at the first one of the form that torchrun's
    never have: --config, or --section.key."""
    for place, word in enumerate(argv):
        if word == "--":
            return argv[:place], argv[place + 1 :]
        option = word.partition("=")[0]
        if option == "--config" or (option.startswith("--") and "." in option):
            return argv[:place], argv[place:]
    return argv, []


def _choose_network(args: argparse.Namespace) -> None:
    """Talk to the other nodes from the address that faces the head, whatever this node's own name resolves to: torchrun
    tells it to the others, and gloo listens on its interface. One node talks to itself, and needs no name for that."""
    if run.parse_min_max_nnodes(args.nnodes)[1] == 1:
        args.local_addr = args.local_addr or LOOPBACK
        _listen_at(args.local_addr)
        if args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port in (None, _MASTER_PORT):
            args.standalone = True  # a free port; torch below 2.13 would take 29500, once a machine
        return
    if not args.rdzv_endpoint:
        return
    head = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=-1)[0]
    try:
        address = args.local_addr or address_towards(head)
    except OSError as error:
        manager.exit_with([f"--rdzv_endpoint: cannot reach {head}: {error.strerror}"])
    args.local_addr = address
    if "is_host" not in args.rdzv_conf and not addresses_of(socket.gethostname()):
        # torch tells the head by this node's own name, which nobody knows.
        args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, f"is_host={int(address in addresses_of(head))}")))
    _listen_at(address)


def _listen_at(address: str) -> None:
    """Let the workers' gloo use the interface of an address; by itself it would look this node's own name up."""
    interface = interface_of(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def torchrun_arguments(argv: list[str]) -> argparse.Namespace:
    """torchrun's, but that SIGUSR1 is passed on too, SIGHUP only where nohup has not made this process ignore it, and
    that workers have time to save before they are killed."""
    args = run.parse_args(argv)
    names = [name for name in args.signals_to_handle.split(",") if name != "SIGUSR1"] + ["SIGUSR1"]
    args.signals_to_handle = ",".join(name for name in names if name != "SIGHUP" or not outlives_terminal())
    if getattr(args, "shutdown_timeout", 0) is None and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        args.shutdown_timeout = _GRACE_SECONDS
    return args


def _root_cause_first(failures: dict[int, ProcessFailure]) -> list[tuple[int, ProcessFailure]]:
    """The workers of this node, the one that failed by itself first.

    One that a signal killed (out of memory, say) leaves the others with broken connections, the agent ends those with
    SIGTERM, and a time-out ends waiting ones with SIGABRT: so other signals come first, these last, then time decides
    (in whole seconds, which is why a lost peer is told by what it said)."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int]:
        code, said = item[1].exitcode, str(item[1].message)
        consequence = code in (-signal.SIGTERM, -signal.SIGABRT, REQUEUE) or lost_worker(said) is not None
        return (2 if consequence else 0 if code < 0 else 1, item[1].timestamp)

    return sorted(failures.items(), key=order)


def _why(rank: int, failure: ProcessFailure) -> str:
    """What there is to add to how a worker ended: others may have caused it; what rank 0 said itself stands above."""
    said = _first_line(failure.message)
    if failure.exitcode < 0:
        return ""
    if lost := lost_worker(said):
        return f": {lost} is lost; that one says why, or its node is lost"
    if timed_out(said):
        return ": it has waited for another worker for longer than the time-out"
    return f": {said}" if rank else ""


def _write_errors(folder: Path, failures: list[tuple[int, ProcessFailure]]) -> None:
    """Append how every worker of this node ended to errors.jsonl, in the order given: one object per rank, with its
    exception and traceback if it had one."""
    host, lines = socket.gethostname(), []
    for rank, failure in failures:
        said = failure.message if isinstance(failure.message, dict) else {"message": failure.message}
        known = {"rank": rank, "host": host, "time": failure.timestamp_isoformat(), "status": failure.exitcode}
        lines.append(json.dumps({**known, "error": said["message"], "details": said.get("extraInfo")}) + "\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "errors.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        print(f"titan_hd: {folder / 'errors.jsonl'}: cannot be written: {error.strerror}", file=sys.stderr)


def _first_line(message: object) -> str:
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    return text.strip().split("\n")[0]


if __name__ == "__main__":
    main()
