"""Who is late, as told through a store; the clock is made short."""

import threading
import time

import torch.distributed as dist

from titan_hd.distributed import watch


def lines(monkeypatch, capsys, tell, wait: float = 3.0) -> str:
    """What is printed while this thread waits in torch, with a time-out of one second.

    tell: what ranks 1 and 2 say.
    """
    store = dist.HashStore()
    for rank, said in tell.items():
        store.set(f"rank {rank}", said)
    left = threading.Event()
    watch.enter_phase("step 3")
    monkeypatch.setattr(watch, "_TORCH", threading.__file__)  # Event.wait stands for a collective
    watch.Watch(lambda: store, 0, 3, 1.0, left.set)
    time_up = threading.Event()
    time_up.wait(wait)
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


def test_work_of_our_own_is_no_waiting(capsys):
    """A rank that computes or reads for long says nothing about others."""
    watch.enter_phase("reading the data")
    watch.Watch(dist.HashStore, 0, 2, 0.5, lambda: None)
    time.sleep(1.5)
    watch.enter_phase("over", timed=False)
    assert not capsys.readouterr().err
