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
    """`begin` a phase wherever one starts, `end` a step; `take` what has been measured."""

    def __init__(self, device: torch.device):
        self._moment = _DeviceMoment if device.type == "cuda" else _ClockMoment
        self._cuts: list[tuple[str, Any]] = []  # of the step that is under way: phase, and the moment it began
        self._ended: deque[list[tuple[str, Any]]] = deque()
        self._range: AbstractContextManager = nullcontext()  # the phase's name in a trace

    def begin(self, phase: str) -> None:
        self._cut(phase)
        self._range = named(phase)
        self._range.__enter__()

    def end(self) -> None:
        """The step is over."""
        self._cut("")
        self._ended.append(self._cuts)
        self._cuts = []

    def _cut(self, phase: str) -> None:
        self._range.__exit__(None, None, None)
        self._range = nullcontext()
        self._cuts.append((phase, self._moment()))

    def forget(self) -> None:
        """Leave out the steps so far: warm-up and compilation."""
        self._ended.clear()

    def take(self) -> dict[str, float]:
        """Shares of the time of the steps since the last call, by the names of docs/metrics.md; of phases that there
        were. What a device is not done with yet is left for the next call; nothing where that is all."""
        seconds: defaultdict[str, float] = defaultdict(float)
        while self._ended and self._ended[0][-1][1].over():
            cuts = self._ended.popleft()
            for (phase, begin), (_, end) in itertools.pairwise(cuts):
                seconds[phase] += begin.seconds_until(end)
        total = sum(seconds.values())
        return {f"{phase}_share": seconds[phase] / total for phase in PHASES if phase in seconds} if total else {}
