"""Who waits says for whom, and where."""

from __future__ import annotations

import re
import time

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from titan_hd.process import waiting
from titan_hd.process.waiting import announce, missing_ranks, telling, telling_of_nodes


def wait_for(capsys, pattern: str, seconds: float = 20) -> str:
    said, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, said):
        assert time.monotonic() < deadline, said
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said


def test_a_short_wait_says_nothing(capsys):
    with telling(lambda: "waiting for Godot", after=30):
        pass
    assert capsys.readouterr().err == ""


def test_a_long_one_says_so_each_time_it_has_doubled(capsys):
    with telling(lambda: "waiting for Godot", after=0.05):
        said = wait_for(capsys, r"(?s)waiting.*waiting")
    assert said.startswith("titan_hd: waiting for Godot (since 0 s)\n")
    with telling(lambda: "waiting for Godot", after=0.05):
        time.sleep(0.5)  # 0.05, 0.1, 0.2, 0.4
    assert 2 <= capsys.readouterr().err.count("\n") <= 4


def test_ranks_that_have_not_come():
    store = dist.HashStore()
    for rank in (0, 2):
        announce(store, rank)
    assert missing_ranks(store, 4) == "rank 1, 3"
    assert missing_ranks(store, 20) == "rank 1, 3, 4, 5, 6, 7, 8, 9, 10 more"
    announce(store, 1)
    assert missing_ranks(store, 3).startswith("nobody")


@pytest.mark.parametrize(("backend", "here"), [("c10d", "; here is 127.0.0.1"), ("static", "")])
def test_nodes_that_have_not_come(backend: str, here: str, monkeypatch, capsys):
    """torch's own rendezvous of two nodes, of which one is there."""
    monkeypatch.setattr(waiting, "_FIRST_SECONDS", 0.2)
    with telling_of_nodes("head:29500", "my-run", 2, 2):
        if backend == "static":  # its store waits for the others
            settings = {"rank": 1, "timeout": 1}
            endpoint = "127.0.0.1:1"
        else:
            settings = {"join_timeout": 1, "local_addr": "127.0.0.1"}
            endpoint = "127.0.0.1:0"
        parameters = RendezvousParameters(backend, endpoint, "my-run", 2, 2, **settings)
        with pytest.raises((RendezvousTimeoutError, dist.DistError)):
            get_rendezvous_handler(parameters).next_rendezvous()
    said = wait_for(capsys, "waiting for")
    assert f"titan_hd: waiting for 2 nodes at head:29500 (rendezvous my-run){here} (since 0 s)\n" in said


def test_torch_is_left_as_it_was():
    before = [handler.next_rendezvous for handler in (waiting.DynamicRendezvousHandler, waiting.StaticTCPRendezvous)]
    with telling_of_nodes("head:29500", "my-run", 1, 2):
        assert waiting.DynamicRendezvousHandler.next_rendezvous is not before[0]
    after = [handler.next_rendezvous for handler in (waiting.DynamicRendezvousHandler, waiting.StaticTCPRendezvous)]
    assert after == before
