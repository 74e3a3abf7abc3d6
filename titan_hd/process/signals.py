"""What stops a run before its end: SIGTERM and SIGUSR1 of a scheduler, SIGHUP of a terminal that goes, and Ctrl-C.

While the steps run a signal is only noted; the trainer asks for it once per step, agrees on it with the other workers,
saves and leaves. At other times there is nothing to save, and the process leaves at once. A thread listens, because the
main thread may be in a collective or a decomposition for a long time.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("titan_hd")

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"; the same command goes on
INTERRUPTED = 128 + signal.SIGINT
STATUS: dict[int, int] = {
    signal.SIGTERM: REQUEUE,
    signal.SIGUSR1: REQUEUE,
    signal.SIGHUP: REQUEUE,
    signal.SIGINT: INTERRUPTED,
}


def outlives_terminal() -> bool:
    """Whether whoever started this process lets it ignore SIGHUP, as nohup does: then it goes on without a terminal."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def leave_when_told() -> None:
    """Of a launcher without workers yet: a signal ends it at once, with a line and its status, also while the main
    thread waits in a call of torch's that looks at no signal. When workers start, torch's handlers take the places of
    these, and decide. To be called in the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def handler(*_: object) -> None:
        """A signal that has one is written to the pipe."""

    def watch() -> None:
        while number := os.read(reader, 1)[0]:
            if signal.getsignal(number) is handler:
                name = signal.Signals(number).name
                print(f"titan_hd: stopped by {name}, status {STATUS[number]}", file=sys.stderr, flush=True)
                os._exit(STATUS[number])

    for number in STATUS:
        if number != signal.SIGHUP or not outlives_terminal():
            signal.signal(number, handler)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="signals", daemon=True).start()


# A scheduler may signal the workers and their launcher, which passes it on: one request, not two.
_SAME_SECONDS = 1.0


class StopSignals:
    """`status` is 0, or the exit status that the first signal asks for."""

    def __init__(self) -> None:
        self.status = 0
        self._deferring, self._first = False, 0.0

    def listen(self) -> None:
        """From now on. To be called in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in STATUS:
            if number != signal.SIGHUP or not outlives_terminal():
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals inside are noted in `status`; a second one after Ctrl-C still stops at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _watch(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in STATUS:
                    self._take(number)

    def _take(self, number: int) -> None:
        now, status = time.monotonic(), STATUS[number]
        impatient = self.status == INTERRUPTED and now - self._first > _SAME_SECONDS
        if not self._deferring or impatient:
            logger.warning("%s: stopped at once, without a checkpoint of this step", signal.Signals(number).name)
            os._exit(self.status or status)
        if not self.status:
            self.status, self._first = status, now
            logger.warning("%s: saving and stopping after this step", signal.Signals(number).name)
