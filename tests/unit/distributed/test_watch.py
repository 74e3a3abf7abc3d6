"""Who is late, as told through a store; the clock is made short."""

import json
import threading
import time
import weakref

import pytest
import torch.distributed as dist

from titan_hd.distributed import watch


def lines(monkeypatch, capsys, tell) -> str:
    """What is printed while this thread stands still beyond a time-out of one second, in a place that is marked.

    tell: what ranks 1 and 2 say.
    """
    store = dist.HashStore()
    for rank, said in tell.items():
        store.set(f"rank {rank}", said)
    left = threading.Event()
    watch.enter_phase("step 3")
    watch.Watch(lambda: store, 0, 3, 1.0, left.set)
    with watch.waiting():  # as for a device, in whose collective a rank is missing
        time.sleep(2.5)
    watch.enter_phase("over", timed=False)
    assert left.is_set()
    return capsys.readouterr().err


def test_ranks_elsewhere_and_silent_ranks_are_late(monkeypatch, capsys):
    said = '{"phase": "step 3", "seconds": 7, "waits": false, "where": "titan_hd/x.py:1"}'
    (line,) = lines(monkeypatch, capsys, {1: said}).splitlines()
    assert line.startswith("titan_hd: rank 0 has waited for 1 s of 1 s in 'step 3': ")
    assert line.endswith("rank 1 is late: in 'step 3' since 7 s (titan_hd/x.py:1); rank 2 is late: it says nothing")


def test_nobody_is_late_where_all_wait(monkeypatch, capsys):
    said = '{"phase": "step 3", "seconds": 7, "waits": true, "where": "titan_hd/x.py:1"}'
    assert "nobody is late" in lines(monkeypatch, capsys, {1: said, 2: said})


def test_a_collective_on_the_host_is_waiting(monkeypatch, capsys):
    """Nobody marks it: the main thread is in torch's own code. Event.wait stands for it."""
    left = threading.Event()
    watch.enter_phase("saving after step 5", timeout=0.5)  # which is the phase's own
    monkeypatch.setattr(watch, "_TORCH", threading.__file__)
    watch.Watch(dist.HashStore, 0, 2, 5, left.set)
    left.wait(2)
    watch.enter_phase("over", timed=False)
    said = capsys.readouterr().err
    assert "s of 0 s in 'saving after step 5': rank 1 is late: it says nothing" in said


def test_work_of_our_own_is_no_waiting(capsys):
    """A rank that computes or reads for long says nothing about others, and tells them that it does not wait."""
    store, connections = dist.HashStore(), []
    watch.enter_phase("reading the data")
    with watch.waiting():
        pass  # that is over
    watch.Watch(lambda: connections.append(1) or store, 0, 2, 0.5, lambda: None)
    time.sleep(0.15)
    assert not connections, "it has nothing to tell yet"
    time.sleep(1)
    watch.enter_phase("over", timed=False)
    assert not capsys.readouterr().err
    assert connections == [1]
    assert not json.loads(store.get("rank 0"))["waits"]


@pytest.mark.parametrize("in_torch", [False, True])
def test_a_thread_that_the_main_thread_waits_for_is_looked_at(monkeypatch, capsys, in_torch: bool):
    """As one that writes a checkpoint: it waits for others, or is what others wait for."""
    store, left = dist.HashStore(), threading.Event()
    thread = threading.Thread(target=left.wait, args=(1,))
    if in_torch:
        monkeypatch.setattr(watch, "_TORCH", threading.__file__)
    watch.enter_phase("saving after step 5")
    watch.Watch(lambda: store, 0, 2, 0.5, lambda: None)
    thread.start()
    with watch.waits_for(thread.ident):
        time.sleep(0.8)
    watch.enter_phase("over", timed=False)
    assert json.loads(store.get("rank 0"))["waits"] == in_torch
    assert ("rank 1 is late: it says nothing" in capsys.readouterr().err) == in_torch


def test_who_moves_does_not_wait(capsys):
    """Marked as work on a device, but it goes on: a slow rank, and perhaps the one that is late."""
    store = dist.HashStore()
    watch.enter_phase("step 4")
    watch.Watch(lambda: store, 0, 2, 0.5, lambda: None)

    def one() -> None:
        time.sleep(0.02)

    def another() -> None:
        time.sleep(0.02)

    with watch.waiting():
        for _ in range(25):
            one()
            another()
    watch.enter_phase("over", timed=False)
    assert not capsys.readouterr().err
    assert not json.loads(store.get("rank 0"))["waits"]


def test_what_a_function_had_in_hand_goes_when_it_returns():
    """Such as the tensors of a forward pass, of which a look at the main thread must not keep any."""
    watch.Watch(dist.HashStore, 0, 2, 0.5, lambda: None)  # looks every 12.5 ms

    def forward(step: int) -> weakref.ref:
        watch.enter_phase(f"step {step}")  # within one, calls in the same memory may seem to be one that stands still
        tensor = threading.Event()
        time.sleep(0.02)
        return weakref.ref(tensor)

    assert [forward(step)() for step in range(10)] == [None] * 10
    watch.enter_phase("over", timed=False)
