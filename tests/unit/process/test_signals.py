"""Which signals are noted, which stop at once, and what a repetition means."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from titan_hd.process import signals
from titan_hd.process.signals import INTERRUPTED, REQUEUE, StopSignals


class Left(BaseException):
    """Instead of leaving the process."""


@pytest.fixture(autouse=True)
def stays(monkeypatch):
    def leave(status):
        raise Left(status)

    monkeypatch.setattr(signals.os, "_exit", leave)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, REQUEUE),
        (signal.SIGUSR1, REQUEUE),
        (signal.SIGHUP, REQUEUE),
        (signal.SIGINT, INTERRUPTED),
    ],
)
def test_noted_while_steps_run_and_obeyed_at_once_otherwise(number, status):
    stop = StopSignals()
    with stop.deferred():
        stop._take(number)
    assert stop.status == status
    with pytest.raises(Left, match=str(int(status))):
        stop._take(number)


def test_the_same_signal_by_two_ways_is_one(clock):
    """A scheduler signals workers and launcher, and the launcher passes it on."""
    stop = StopSignals()
    with stop.deferred():
        stop._take(signal.SIGINT)
        clock[0] = 0.5
        stop._take(signal.SIGINT)
        assert stop.status == INTERRUPTED


def test_a_second_ctrl_c_stops_at_once(clock):
    """What the launcher makes of it is SIGTERM."""
    for second in (signal.SIGINT, signal.SIGTERM):
        stop = StopSignals()
        clock[0] = 0.0
        with stop.deferred():
            stop._take(signal.SIGINT)
            clock[0] = 3.0
            with pytest.raises(Left, match=str(int(INTERRUPTED))):
                stop._take(second)


def test_a_scheduler_may_repeat_itself(clock):
    """SIGUSR1 before the limit, SIGTERM at the limit: the save goes on."""
    stop = StopSignals()
    with stop.deferred():
        stop._take(signal.SIGUSR1)
        clock[0] = 100.0
        stop._take(signal.SIGTERM)
    assert stop.status == REQUEUE


@pytest.mark.parametrize(("before", "listens"), [(signal.SIG_IGN, False), (signal.SIG_DFL, True)], ids=["nohup", "ssh"])
def test_nohup_is_obeyed(before, listens: bool):
    """Who ignores SIGHUP from the start wants the run to go on without its terminal."""
    kept = {number: signal.getsignal(number) for number in signals.STATUS}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        signal.signal(signal.SIGHUP, before)
        StopSignals().listen()
        assert callable(signal.getsignal(signal.SIGHUP)) is listens
        assert all(callable(signal.getsignal(number)) for number in kept if number != signal.SIGHUP)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_launcher_without_workers_leaves_at_once(number: signal.Signals, status: int):
    code = (
        "import time; from titan_hd.process.signals import *; leave_when_told(); print(1, flush=True); time.sleep(60)"
    )
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **both) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(timeout=30) == status
        assert process.stderr.read() == f"titan_hd: stopped by {number.name}, status {status}\n"


def test_where_workers_have_started_their_launchers_handlers_decide():
    code = """if True:
        import signal, time; from titan_hd.process.signals import leave_when_told
        leave_when_told()
        signal.signal(signal.SIGTERM, lambda *_: print("torch's", flush=True))
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "torch's\n")
