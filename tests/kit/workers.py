"""A pool of worker processes that lives as long as a file of tests; every call makes a fresh process group.

Importing torch and the package takes seconds, forking a process that has them, or making a gloo group, milliseconds. So
one server of the test session imports them, has no other thread, and forks the workers of every pool.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

_TIMEOUT = 240  # seconds for one call; a deadlock must fail its test, not the whole suite


def _serve(rank: int, connection) -> None:
    faulthandler.enable()  # one that a signal kills says where it was: in Python, and in C++
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    import torch.distributed as dist

    from titan_hd.distributed.groups import LAZY

    os.environ.update(LAZY)  # as in a run
    while (job := connection.recv()) is not None:
        world_size, store, function, args, kwargs = job
        try:
            os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)})
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size) if world_size > 1 else dist.HashStore(),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=60),
            )
            result = (True, function(*args, **kwargs))
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            torch._dynamo.reset()
        connection.send(result)
        gc.collect()  # a Trainer refers to itself; the threads of its process groups live as long as it does
        gc.freeze()  # what is left are modules: the next collection need not look at them


def fork_server() -> mp.context.ForkServerContext:
    """What forks processes that have imported torch and the package."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.kit.preloaded"])
    return context


class WorkerPool:
    """`run(n, function, ...)` calls an importable function on n ranks and returns their results in rank order."""

    def __init__(self, size: int = 4):
        self._size = size
        self._workers: list[tuple[mp.Process, Any]] = []

    def run(self, world_size: int, function: Callable, *args, **kwargs) -> list[Any]:
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            job = (world_size, os.path.join(folder, "store"), function, args, kwargs)
            for _, connection in self._workers[:world_size]:
                connection.send(job)
            results = []
            for rank, (process, connection) in enumerate(self._workers[:world_size]):
                if not connection.poll(_TIMEOUT):
                    self.close()
                    raise TimeoutError(f"rank {rank} of {world_size} gave no answer in {_TIMEOUT} s")
                try:
                    results.append(connection.recv())
                except EOFError:  # the tests after this one get new workers
                    process.join()
                    self.close()
                    raise RuntimeError(f"rank {rank} of {world_size} ended with status {process.exitcode}") from None
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [value for _, value in results]

    def _start(self) -> None:
        context = fork_server()
        while len(self._workers) < self._size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(len(self._workers), theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()
