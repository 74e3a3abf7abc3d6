"""tools/evaluate.py on several processes: starts them, and shares the batches out between them.

In words: the tool that is given NGPU=n starts itself n times, by the launcher that trains. The processes talk through
the launcher's store. By default each has the whole model, and takes the next batch as soon as it is done with its last.
With --shard-weights each holds a part of every weight, and gathers a block's weights when the block computes: so all
must make equally many passes, and take batches of the same task in rounds; who has none in the last round takes part
without prompts. Rank 0 writes what the others have answered, in the order of the plan.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from titan_hd.errors import UserError
from titan_hd.evaluation.backends import Backend, Request

_PATIENCE = datetime.timedelta(days=30)  # a worker that fails is noticed by the launcher, which then ends the others

_GRACE_SECONDS = 3.0


def wanted_processes() -> int:
    """NGPU; 1 without it.

    Raises:
        UserError: it is no number.
    """
    text = os.environ.get("NGPU", "") or "1"
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"NGPU: must be a whole number above 0, not {text!r}")
    return int(text)


def is_worker() -> bool:
    """Whether the launcher has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(processes: int, device: str | None, output: Path, argv: Sequence[str]) -> None:
    """Run the tool with these arguments in so many processes; exits with the status of the one that failed first.

    device: as --device names it. output: gets errors.jsonl if one fails.

    Raises:
        UserError: there are fewer GPUs.
    """
    from titan_hd.process import launch  # with it comes all of training, which one process does without

    gpus = torch.cuda.device_count()
    if processes > gpus and (device or ("cuda" if gpus else "cpu")).startswith("cuda"):
        raise UserError(f"NGPU: {processes} processes are more than the {gpus} GPU(s) here")
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    tool = str(Path(__file__).resolve().parent / "evaluate.py")
    launch.start_workers(launch.torchrun_arguments(["--nproc_per_node", str(processes), tool, *argv]), output)


def run_worker(run: Callable[[], None]) -> NoReturn:
    """Do the work of one process, and leave: with status 0, 2 for what the user can mend, or 1 and a traceback."""
    from titan_hd.process.streams import keep_streams
    from titan_hd.process.worker import leave, say

    for number in (signal.SIGINT, signal.SIGTERM):  # whatever is written are whole batches: there is nothing to save
        signal.signal(number, signal.SIG_DFL)
    keep_streams()
    handler, status = get_error_handler(), 0
    handler.initialize()
    try:
        run()
    except Exception as error:
        said = UserError(str(error)) if isinstance(error, FloatingPointError) else error
        handler.record_exception(said)
        status = say(said, rank())
        if rank() and status == 2:
            # Rank 0 says what all of them meet; the launcher would end it before.
            time.sleep(_GRACE_SECONDS)
    leave(status)


def own_device(name: str | None) -> str | None:
    """The name of this process's own GPU, where the device that is asked for is one.

    Raises:
        UserError: it names one GPU for all.
    """
    if not is_worker() or name == "cpu" or (name is None and not torch.cuda.is_available()):
        return name
    if name not in (None, "cuda"):
        raise UserError(f"--device: with NGPU every process takes a GPU of its own; give cuda, not {name}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


class Workers:
    """The processes, each with the whole model; see `titan_hd.evaluation.answering.Crew`."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.writes, self.rank, self.size = rank == 0, rank, size
        self._store, self._agreed, self._led = store, 0, 0

    def agree(self, find: Callable[[], Any]) -> Any:
        self._agreed += 1
        if self.writes:
            self._store.set(f"agreed {self._agreed}", json.dumps(find()))
        return self._get(f"agreed {self._agreed}")

    def results(
        self, kinds: Sequence[str], first: int, ask: Callable[[int], Any], idle: Callable[[int], object]
    ) -> Iterator[Any]:
        place = first
        for number, own in self._shares(kinds, first):
            if own:
                self._store.set(f"answered {number}", json.dumps(ask(number)))
            else:
                idle(number)
            while self.writes and place < len(kinds) and self._store.check([f"answered {place}"]):
                yield self._take(place)
                place += 1
        while self.writes and place < len(kinds):
            yield self._take(place)
            place += 1

    def _shares(self, kinds: Sequence[str], first: int) -> Iterator[tuple[int, bool]]:
        """The batches in which this process takes part, and whether it is the one that asks them."""
        while (number := first + self._store.add("taken", 1) - 1) < len(kinds):
            yield number, True

    def _take(self, number: int) -> Any:
        found = self._get(f"answered {number}")
        self._store.delete_key(f"answered {number}")
        return found

    def _get(self, key: str) -> Any:
        self._store.wait([key], _PATIENCE)
        return json.loads(self._store.get(key))

    @contextlib.contextmanager
    def led(self, backend: Backend) -> Iterator[Backend | None]:
        """In the body rank 0 alone asks, with what it is given; the others are given None."""
        yield backend if self.writes else None


class ShardedWorkers(Workers):
    """The processes, each with its shards of the model: they generate in rounds."""

    def _shares(self, kinds: Sequence[str], first: int) -> Iterator[tuple[int, bool]]:
        while first < len(kinds):
            end = min(first + self.size, len(kinds))
            end = next((number for number in range(first, end) if kinds[number] != kinds[first]), end)
            number = first + self.rank
            yield (number, True) if number < end else (first, False)
            first = end

    @contextlib.contextmanager
    def led(self, backend: Backend) -> Iterator[Backend | None]:
        """The others take part in the passes for what rank 0 asks, without prompts."""
        if self.writes:
            yield _Leading(backend, self._call)
            self._call(None)
            return
        while (call := self._next_call()) is not None:
            max_new_tokens, beams = call
            backend.generate([], Request((), max_new_tokens, beams))
        yield None

    def _call(self, call: tuple[int, int] | None) -> None:
        self._led += 1
        self._store.set(f"led {self._led}", json.dumps(call))

    def _next_call(self) -> list[int] | None:
        self._led += 1
        return self._get(f"led {self._led}")


class _Leading:
    """A backend on rank 0 that tells the others to take part."""

    def __init__(self, backend: Backend, call: Callable[[tuple[int, int]], None]):
        self._backend, self._call = backend, call

    def generate(self, prompts: list[list[int]], request: Request) -> list[list[int]]:
        """As `Backend.generate`."""
        self._call((request.max_new_tokens, request.beams))
        return self._backend.generate(prompts, request)


def join(device: torch.device, sharded: bool) -> Workers:
    """Meet the other processes; with sharded weights in a process group, too."""
    store, place, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
    if not sharded:
        return Workers(dist.PrefixStore("evaluation", store), place, size)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=place,
        world_size=size,
        timeout=datetime.timedelta(hours=2),
    )
    return ShardedWorkers(dist.PrefixStore("evaluation", store), place, size)


def rank() -> int:
    """0 where one process does everything."""
    return int(os.environ["RANK"]) if is_worker() else 0


def say_on_rank_zero(line: str) -> None:
    if rank() == 0:
        print(f"titan_hd: {line}", file=sys.stderr)
