"""How a worker leaves."""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from titan_hd.distributed.groups import LAZY
from titan_hd.distributed.watch import enter_phase
from titan_hd.errors import UserError
from titan_hd.process import worker

SCRIPT = """
import multiprocessing, time
from titan_hd.process import worker
multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True).start()
worker._exit_status = lambda run: 3
worker.run_worker(None)
"""


def test_it_leaves_no_process_behind():
    """os._exit runs none of the interpreter's own cleaning up. The child holds the pipe that is read here."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).resolve().parents[3],
        stdout=subprocess.PIPE,
        timeout=90,
        check=False,
    )
    assert done.returncode == 3


@pytest.fixture
def alone(monkeypatch):
    """The environment of the only worker of a run; returns how it joins at a port."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, **LAZY}.items():
        monkeypatch.setenv(name, value)

    def join(port: int) -> dist.Store:
        monkeypatch.setenv("MASTER_PORT", str(port))
        return worker._join("gloo", datetime.timedelta(seconds=30))

    return join


def test_a_single_process_takes_any_free_port(alone):
    """It has no partner to tell it to, and the second of two on a machine must start, too."""
    store = alone(0)
    try:
        assert dist.get_world_size() == 1
        store.clone().set("key", "value")
    finally:
        dist.destroy_process_group()


def test_a_port_that_is_taken_is_named(alone):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"^MASTER_PORT: another process has 127.0.0.1:{port}; name a free"):
            alone(port)


@pytest.mark.parametrize(("world_size", "port"), [("1", "0"), ("2", "29500")])
def test_the_port_that_nobody_has_named(world_size: str, port: str, monkeypatch):
    def failing(argv):
        raise UserError(worker.os.environ["MASTER_PORT"])

    for name in ("RANK", "MASTER_PORT", "MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(worker.StopSignals, "listen", lambda self: None)
    monkeypatch.setattr(worker, "init_logging", lambda rank: None)
    monkeypatch.setattr(worker, "get_error_handler", unused_handler)
    monkeypatch.setattr(worker.manager, "load_or_exit", failing)
    monkeypatch.setattr(worker, "say", lambda error, rank: str(error))
    assert worker._exit_status(lambda *_: 0) == port
    assert worker.os.environ["MASTER_ADDR"] == "127.0.0.1"


class unused_handler:
    def initialize(self):
        pass

    def record_exception(self, error):
        pass


def test_a_lost_connection_takes_a_line_and_hides_nothing(capsys):
    """Where the others stood when one was killed is of no use, on 512 ranks least."""
    enter_phase("step 3", timed=False)
    lost = RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.2]:20867. This is typically")
    assert worker.say(lost, 5) == 1
    assert capsys.readouterr().err == (
        "titan_hd: rank 5 ends in 'step 3': the connection to a worker at 10.0.0.2 is lost\n"
    )
    for bug in (RuntimeError("CUDA error"), BrokenPipeError(32, "Broken pipe")):
        assert worker.say(bug, 5) == 1
        assert capsys.readouterr().err.rstrip().endswith(f"{type(bug).__name__}: {bug}")
