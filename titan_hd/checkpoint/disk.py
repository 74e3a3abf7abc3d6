"""Calls of a disk, which may never return: a file server is gone, a device hangs.

Whoever waits for such a call itself cannot say so, and the ranks that wait for it end with the time-out of their
collective, which nobody explains. So the call is made by a thread of its own, and given up in time to tell the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from titan_hd.distributed.watch import place_of, waits_for

T = TypeVar("T")
_PATIENCE = 0.9  # part of the collectives' time-out after which a call is given up


class DiskIsLate(Exception):
    """A disk has not answered in time; the text says for how long, and where the call is."""


class Disk:
    """The disk of this rank during one save, all of whose calls together have a part of `timeout` seconds."""

    def __init__(self, timeout: float):
        self._timeout, self._start = timeout, time.monotonic()

    def call(self, function: Callable[[], T]) -> T:
        """Call a function that reads or writes files; its result, or what it raises.

        Raises:
            DiskIsLate: it has not returned. It may do so later.
        """
        outcome: Future[T] = Future()
        done = threading.Event()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def call() -> None:
            try:
                if gpu is not None:  # every thread begins with the first one
                    torch.cuda.set_device(gpu)
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)
            done.set()

        thread = threading.Thread(target=call, name="disk", daemon=True)  # one that does not return holds up no exit
        thread.start()
        assert thread.ident is not None  # it has begun
        with waits_for(thread.ident):
            if not done.wait(max(0.0, self._start + _PATIENCE * self._timeout - time.monotonic())):
                waited, most = time.monotonic() - self._start, f"{self._timeout:g} s (comm.save_timeout_seconds)"
                raise DiskIsLate(f"has waited for {waited:.0f} s of {most} for its disk, in {place_of(thread.ident)}")
        return outcome.result()
