"""The shares of a step's time, by a clock and by the events of a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from titan_hd.components import phases as module
from titan_hd.components.phases import Phases


def step(phases: Phases, *names: str) -> None:
    for name in names:
        phases.begin(name)
    phases.end()


def test_by_the_clock(monkeypatch):
    """Phases may come twice; what lies between two steps belongs to none."""
    times = iter([0, 1, 2, 6, 7, 8, 100, 101, 103, 107, 108, 110])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        step(phases, "data", "optimizer", "forward_backward", "optimizer", "exchange")
    assert phases.take() == pytest.approx(
        {"data_share": 2 / 18, "forward_backward_share": 8 / 18, "optimizer_share": 5 / 18, "exchange_share": 3 / 18}
    )
    assert phases.take() == {}, "there was no step since"


def test_a_phase_that_there_is_not_and_steps_that_are_left_out(monkeypatch):
    times = iter([0, 9, 10, 11, 0, 1, 3, 4])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    phases = Phases(torch.device("cpu"))
    step(phases, "data", "forward_backward", "optimizer")
    phases.forget()
    step(phases, "data", "forward_backward", "optimizer")
    assert phases.take() == {"data_share": 0.25, "forward_backward_share": 0.5, "optimizer_share": 0.25}


class Device:
    """A device that is at `now`; an event that is recorded is over when it has come to `planned`."""

    now = 0.0
    planned = 0.0

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=None)

        def elapsed_time(later) -> float:
            assert event.query()
            assert later.query(), "torch would wait for the device"
            return (later.at - event.at) * 1e3

        event.record = lambda: setattr(event, "at", self.planned)
        event.query = lambda: event.at <= self.now
        event.elapsed_time = elapsed_time
        return event


def test_a_device_is_never_waited_for(monkeypatch):
    """A step whose last kernel still runs when it is logged is counted with the next record."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    phases = Phases(torch.device("cuda"))
    for number in range(2):
        for name, seconds in (("data", 1), ("forward_backward", 6), ("optimizer", 1), ("exchange", 2 + number * 10)):
            phases.begin(name)
            device.planned += seconds
        phases.end()
    device.now = 8.0
    assert phases.take() == {}
    device.now = 10.0
    assert phases.take() == pytest.approx(
        {"data_share": 0.1, "forward_backward_share": 0.6, "optimizer_share": 0.1, "exchange_share": 0.2}
    )
    device.now = 30.0
    assert phases.take()["exchange_share"] == pytest.approx(0.6)


def test_steps_that_nobody_asks_about_pile_up_nothing():
    phases = Phases(torch.device("cpu"))
    for _ in range(3):
        step(phases, "data", "exchange")
    assert len(phases._ended) == 0
    assert phases.take().keys() == {"data_share", "exchange_share"}


def test_a_step_that_failed_counts_for_nothing(monkeypatch):
    """Not as a part of the next one either, which may come much later."""
    times = iter([0, 5, 100, 101, 104])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    phases = Phases(torch.device("cpu"))
    phases.begin_step("data")
    phases.begin("optimizer")
    phases.begin_step("data")
    phases.begin("exchange")
    phases.end()
    assert phases.take() == {"data_share": 0.25, "exchange_share": 0.75}
