"""Says for whom, and where, this process waits before a run has begun."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

_FIRST_SECONDS = 20.0
_MOST_NAMED = 8


@contextlib.contextmanager
def telling(line: Callable[[], str], after: float | None = None) -> Iterator[None]:
    """While the body waits: `line()` on the standard error after so many seconds (default: 20), and again whenever the
    wait has doubled."""
    first, done = after or _FIRST_SECONDS, threading.Event()

    def tell() -> None:
        waited, pause = 0.0, first
        while not done.wait(pause):
            waited += pause
            pause = waited
            with contextlib.suppress(RuntimeError):  # of a store whose host has gone: the body notices it, too
                print(f"titan_hd: {line()} (since {waited:.0f} s)", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def telling_of_nodes(endpoint: str, run_id: str, least: int, most: int) -> Iterator[None]:
    """While a launcher in the body waits for other nodes, it says so: at every rendezvous, also of a restart.

    The wrapped methods are public; torch (2.11 to 2.13) has no hook there, and logs what happens in its own terms.
    """
    wanted = f"{most}" if least == most else f"{least} to {most}"

    def wrapped(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(method)
        def next_rendezvous(handler: Any) -> Any:
            def line() -> str:
                here = _nodes_here(handler)
                present = f"; here {_are(len(here))} {', '.join(here)}" if here else ""
                return f"waiting for {wanted} nodes at {endpoint} (rendezvous {run_id}){present}"

            with telling(line):
                return method(handler)

        return next_rendezvous

    handlers = (DynamicRendezvousHandler, StaticTCPRendezvous)
    methods = [handler.next_rendezvous for handler in handlers]
    for handler, method in zip(handlers, methods):
        setattr(handler, "next_rendezvous", wrapped(method))  # noqa: B010 (the type checker refuses an assignment)
    try:
        yield
    finally:
        for handler, method in zip(handlers, methods):
            setattr(handler, "next_rendezvous", method)  # noqa: B010


def _nodes_here(handler: Any) -> list[str]:
    """Addresses of the nodes that have come, as far as torch's private state tells."""
    state = getattr(getattr(handler, "_state_holder", None), "state", None)
    found = sorted(str(node.addr) for node in getattr(state, "participants", ()))
    return [*found[:_MOST_NAMED], "..."] if len(found) > _MOST_NAMED else found


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def missing_ranks(store: dist.Store, world_size: int) -> str:
    """The ranks that have not said `announce`, in words."""
    missing = [str(rank) for rank in range(world_size) if not store.check([f"here {rank}"])]
    named = [*missing[:_MOST_NAMED], f"{len(missing) - _MOST_NAMED} more"] if len(missing) > _MOST_NAMED else missing
    return f"rank {', '.join(named)}" if missing else "nobody: all ranks are here, and connect to each other"


def announce(store: dist.Store, rank: int) -> None:
    store.set(f"here {rank}", "1")
