"""Where the time of a step goes: data, forward and backward passes, optimizer, exchange.

A step is cut where one phase ends and the next begins. On a GPU a cut is an event in the stream that computes: the host
waits for none, and reads them when a later step is long under way. So what is measured there is the GPU's time: data
is how long it had nothing to do for want of a batch, not how long the host read. On a CPU a cut is the clock's time.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from titan_hd.distributed.named_ranges import named

PHASES = ("data", "forward_backward", "optimizer", "exchange")


class _ClockMoment:
    """A moment of the host."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def over(self) -> bool:
        return True

    def seconds_until(self, later: _ClockMoment) -> float:
        return later.time - self.time


class _DeviceMoment:
    """When the device has done what it was given so far."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def over(self) -> bool:
        return self.event.query()

    def seconds_until(self, later: _DeviceMoment) -> float:
        return self.event.elapsed_time(later.event) / 1e3


class Phases:
    """`begin_step`, then `begin` a phase wherever another one starts, `end` the step; `take` what has been measured."""

    def __init__(self, device: torch.device):
        self._moment = _DeviceMoment if device.type == "cuda" else _ClockMoment
        self._cuts: list[tuple[str, Any]] = []  # of the step that is under way: phase, and the moment it began
        self._ended: deque[list[tuple[str, Any]]] = deque()  # steps that the device is not done with
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of the steps that it is, by phase
        self._range: AbstractContextManager = nullcontext()  # the phase's name in a trace

    def begin_step(self, phase: str) -> None:
        """A step starts, with this phase. What is left of one that ended by an exception counts for nothing."""
        self._cuts = []
        self.begin(phase)

    def begin(self, phase: str) -> None:
        """This phase, one of PHASES, starts here; the one before it, if there is one, ends."""
        self._cut(phase)
        self._range = named(phase)
        self._range.__enter__()

    def end(self) -> None:
        """The step is over."""
        self._cut("")
        self._ended.append(self._cuts)
        self._cuts = []
        self._drain()  # who makes steps and never takes what they took piles up nothing

    def _cut(self, phase: str) -> None:
        self._range.__exit__(None, None, None)
        self._range = nullcontext()
        self._cuts.append((phase, self._moment()))

    def forget(self) -> None:
        """Leave out the steps so far: warm-up and compilation."""
        self._ended.clear()
        self._seconds.clear()

    def take(self) -> dict[str, float]:
        """Shares of the time of the steps since the last call, by the names of docs/metrics.md; of phases that there
        were. What a device is not done with yet is left for the next call; nothing where that is all."""
        self._drain()
        seconds, self._seconds = self._seconds, defaultdict(float)
        total = sum(seconds.values())
        return {f"{phase}_share": seconds[phase] / total for phase in PHASES if phase in seconds} if total else {}

    def _drain(self) -> None:
        """Add up the steps that the device is done with."""
        while self._ended and self._ended[0][-1][1].over():
            for (phase, begin), (_, end) in itertools.pairwise(self._ended.popleft()):
                self._seconds[phase] += begin.seconds_until(end)
