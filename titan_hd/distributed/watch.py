"""Who is late: one readable line shortly before a collective's time-out ends the run.

Every rank knows which phase of the run it is in; that costs nothing. A thread looks at it now and then. Only where a
phase lasts longer than half of the time-out does it tell the others, through the store of the process group: the phase,
since when, where the main thread is, and whether it waits for others there. A rank that has waited in one place for
most of the time-out reads what the others told and prints who does not wait: that is who the rest waits for. It works
alike for gloo, whose time-outs are exceptions, and for nccl, which ends the process.

A rank waits for others where it stands still inside of torch, or inside of `waiting()`. On a GPU a collective that does
not end holds up the device, and the host stands wherever it next needs the device: in a copy, in an allocation, or in a
launch that finds the queue full. So what works on a device is marked as a whole. Where the main thread waits for a
thread of this process (`waits_for`), that one is looked at in its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

# Parts of the time-out after which a rank that has not moved waits, a rank tells its phase, and names who is late.
_STILL, _TELL, _REPORT = 0.2, 0.5, 0.8
_MOST_NAMED = 8
_PACKAGE, _TORCH = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent)


class _Phase:
    name, since, timed = "starting", time.monotonic(), True
    timeout: float | None = None
    waits = 0  # how many blocks of `waiting` the main thread is in


_now = _Phase()
_waits_for: dict[int, int] = {}  # a thread that waits for another -> that one


def enter_phase(name: str, timed: bool = True, timeout: float | None = None) -> None:
    """This rank begins another phase of the run. timed: the collectives' time-out holds for it. timeout: of the phase's
    collectives, if they have one of their own, in seconds."""
    _now.name, _now.since, _now.timed, _now.timeout = name, time.monotonic(), timed, timeout


def phase_name() -> str:
    return _now.name


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Where the main thread stands still in here, it waits for other ranks, or for a device that waits for them.

    Not for what may take long by itself on the host: reading files, a decomposition. May be nested.
    """
    _now.waits += 1
    try:
        yield
    finally:
        _now.waits -= 1


@contextlib.contextmanager
def waits_for(thread: int) -> Iterator[None]:
    """This thread waits in here for another one of this process: where that is, and whether it waits for other ranks,
    is what there is to tell."""
    me = threading.get_ident()
    _waits_for[me] = thread
    try:
        yield
    finally:
        del _waits_for[me]


def place_of(thread: int) -> str:
    """File and line of titan_hd where a thread is."""
    return _where(sys._current_frames().get(thread))


class Watch:
    """Watches the main thread of this rank, from a thread, as long as the process lives.

    connect: gives a connection to the store of all ranks that nobody else uses. It is called where this rank has
    something to tell: thousands of ranks would hold thousands of connections otherwise, all of them to one process.
    timeout: seconds after which collectives give up; may be changed.
    leave: called where this rank stands still beyond the time-out, which no collective does.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        world_size: int,
        timeout: float,
        leave: Callable[[], None],
    ):
        self.timeout = timeout
        self._connect, self._rank, self._world_size, self._leave = connect, rank, world_size, leave
        self._store: dist.Store | None = None
        main = threading.main_thread().ident
        assert main is not None  # it runs
        self._main = main
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        place, still, still_since, reported = None, 0.0, time.monotonic(), ""
        while True:
            time.sleep(min(0.5, self.timeout / 40))  # short also where the time-out is about to become so
            phase, seconds, timeout = _now.name, time.monotonic() - _now.since, _now.timeout or self.timeout
            told, stands = seconds > _TELL * timeout, still > _STILL * timeout
            seen = _look(_last_waited_for(self._main), keep=stands, where=told) if _now.timed else None
            if seen is None or place != (*seen.place, phase):
                place, still_since = seen and (*seen.place, phase), time.monotonic()
            still = time.monotonic() - still_since
            if seen is None:
                continue
            waits = still > _STILL * timeout and (seen.in_torch or _now.waits > 0)
            try:
                if told:
                    store = self._store = self._store or self._connect()
                    self._tell(store, phase, seconds, seen.where, waits)
                    if still > _REPORT * timeout and reported != phase and waits:
                        reported = phase
                        self._report(store, phase, still, timeout)
            except RuntimeError:  # the store's host has ended: so has the run
                return
            if still > timeout:
                self._leave()

    def _tell(self, store: dist.Store, phase: str, seconds: float, where: str, waits: bool) -> None:
        said = {"phase": phase, "seconds": round(seconds), "waits": waits, "where": where}
        store.set(f"rank {self._rank}", json.dumps(said))

    def _report(self, store: dist.Store, phase: str, seconds: float, timeout: float) -> None:
        if store.add(f"reported {phase}", 1) > 1:
            return
        late = [line for rank in range(self._world_size) if (line := _lateness(store, rank, phase))]
        if len(late) > _MOST_NAMED:
            late[_MOST_NAMED:] = [f"and {len(late) - _MOST_NAMED} more ranks are late"]
        found = "; ".join(late) or "nobody is late: the ranks may wait for different collectives"
        waited = f"rank {self._rank} has waited for {seconds:.0f} s of {timeout:.0f} s in {phase!r}"
        print(f"titan_hd: {waited}: {found}", file=sys.stderr, flush=True)


def _lateness(store: dist.Store, rank: int, phase: str) -> str | None:
    """A line if a rank does not wait in this phase."""
    key = f"rank {rank}"
    if not store.check([key]):
        return f"rank {rank} is late: it says nothing"
    said = json.loads(store.get(key))
    if said["waits"] and said["phase"] == phase:
        return None
    return f"rank {rank} is late: in {said['phase']!r} since {said['seconds']} s ({said['where']})"


class _Seen(NamedTuple):
    """Of the main thread's innermost frame: which instruction of which call it is at, whether that is inside of torch,
    the line of titan_hd, if it was asked for, and the frame itself, if it is to be kept."""

    place: tuple[int, int, int]
    in_torch: bool
    where: str
    frame: FrameType | None


def _last_waited_for(thread: int) -> int:
    """The thread itself, if it waits for none."""
    while (other := _waits_for.get(thread)) is not None:
        thread = other
    return thread


def _look(thread: int, keep: bool, where: bool) -> _Seen | None:
    """Where a thread is; None if it is no more.

    keep: for a thread that seems to stand still. As long as its frame is referred to, no other has the same id. A frame
    keeps what all functions have in hand that it was called from, on the device as well, when these have long returned:
    one of a thread that moves must not outlive the look.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return None
    place, in_torch = (id(frame), id(frame.f_code), frame.f_lasti), frame.f_code.co_filename.startswith(_TORCH)
    return _Seen(place, in_torch, _where(frame) if where else "", frame if keep else None)


def _where(frame: FrameType | None) -> str:
    """File and line of the innermost frame of titan_hd."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside of titan_hd"
    return f"{os.path.relpath(frame.f_code.co_filename, Path(_PACKAGE).parent)}:{frame.f_lineno}"
