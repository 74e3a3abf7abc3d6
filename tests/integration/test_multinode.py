"""Several nodes on one machine: a launcher for each, on loopback or in network namespaces of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, REPOSITORY

SECONDS = 400  # for one run, on a machine that does other things besides
# A worker that has lost its peers must be gone after so many seconds, on a machine that does other things besides.
NOTICED_SECONDS = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    runs.write_model(folder / "model")
    runs.write_records(folder / "records.jsonl")
    (folder / "run.toml").write_text("")
    return folder


class Nodes:
    """Launchers that were started; whatever is left of them at the end is killed."""

    def __init__(self, inputs: Path, dump: Path):
        self.inputs, self.dump = inputs, dump
        self.processes: list[subprocess.Popen] = []

    def start(self, node: int, workers: int = 1, prefix: tuple[str, ...] = (), environment=None, **settings) -> None:
        values = runs.options(self.inputs / "model", self.inputs / "records.jsonl", self.dump, **settings)
        # Files and not pipes: nobody reads while the node runs.
        with open(self.dump.parent / f"node-{node}.log", "w") as log:
            command = [*prefix, str(REPOSITORY / "run_train.sh"), "--config", str(self.inputs / "run.toml"), *values]
            process = subprocess.Popen(
                command,
                env={**CPU_ONLY, "NGPU": str(workers), **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)

    def log(self, node: int) -> str:
        return (self.dump.parent / f"node-{node}.log").read_text()

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Statuses of all of them."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not (self.metrics() and self.metrics()[-1]["step"] >= step):
            assert time.monotonic() < deadline, self.log(0)
            assert self.processes[0].poll() is None, self.log(0)
            time.sleep(0.2)

    def metrics(self) -> list[dict]:
        path = self.dump / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if (path.exists())
            else []
        )

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                kill_tree(process.pid)


def children(pid: int) -> list[int]:
    """All processes below one."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [p for child in map(int, found) for p in (child, *children(child))]


def kill_tree(pid: int) -> None:
    """As a node that loses its power: the launcher first, so that it cannot tell anyone."""
    for process in [pid, *children(pid)]:
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def nodes(inputs, tmp_path):
    found = Nodes(inputs, tmp_path / "dump")
    yield found
    found.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_nodes(endpoint: str, **others: str) -> dict[str, str]:
    return {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": endpoint, "PET_RDZV_ID": "test", **others}


@pytest.fixture(scope="module")
def one_node(inputs, tmp_path_factory, workers) -> Nodes:
    """The same run with two workers on one node."""
    found = Nodes(inputs, tmp_path_factory.mktemp("one") / "dump")
    workers.run(2, runs.train, runs.options(inputs / "model", inputs / "records.jsonl", found.dump))
    return found


@pytest.fixture
def namespaces():
    """Two network namespaces joined by a cable: no node reaches the other's loopback, and both know their own name as
    127.0.0.1 or so, which is what breaks clusters."""
    names = [f"titan{os.getpid()}{side}" for side in "ab"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev veth0" for i, name in enumerate(names)),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("lo", "veth0")),
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def check_equal(nodes: Nodes, one_node: Nodes) -> None:
    """The sums of two workers are the same wherever they are: bit for bit."""
    ours, theirs = runs.exported(nodes.dump), runs.exported(one_node.dump)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r["loss"] for r in nodes.metrics()] == [r["loss"] for r in one_node.metrics()]


def test_two_nodes_train_as_one_does(nodes, one_node):
    endpoint = f"127.0.0.1:{free_port()}"
    for node in range(2):
        nodes.start(node, environment=two_nodes(endpoint))
    assert nodes.wait() == [0, 0], nodes.log(0)
    check_equal(nodes, one_node)


@pytest.mark.slow
def test_two_nodes_that_know_themselves_as_localhost(nodes, one_node, namespaces):
    for node, name in enumerate(namespaces):
        more = {"PET_RDZV_CONF": f"is_host={1 - node}"}
        nodes.start(node, prefix=("ip", "netns", "exec", name), environment=two_nodes("10.77.0.1:29500", **more))
    assert nodes.wait() == [0, 0], nodes.log(0)
    check_equal(nodes, one_node)


def test_a_fault_of_the_configuration_ends_both_nodes_with_one_line(nodes):
    endpoint = f"127.0.0.1:{free_port()}"
    for node in range(2):
        nodes.start(node, environment=two_nodes(endpoint), training__global_batch_size=3)
    assert nodes.wait() == [2, 2]
    for node in range(2):
        (line,) = nodes.log(node).splitlines()
        assert line.startswith("titan_hd: error: training.global_batch_size: 3 must be a multiple of 2")
    assert not nodes.dump.exists()


def test_a_killed_worker_ends_both_nodes_within_seconds(nodes):
    endpoint = f"127.0.0.1:{free_port()}"
    for node in range(2):
        nodes.start(node, environment=two_nodes(endpoint), training__steps=100000)
    nodes.wait_for_step(3)
    (worker,) = workers_of(nodes.processes[1].pid)
    os.kill(worker, signal.SIGKILL)
    start = time.monotonic()
    statuses = nodes.wait()
    seconds = time.monotonic() - start
    print(f"noticed on both nodes after {seconds:.1f} s")
    assert statuses == [1, 137], nodes.log(0) + nodes.log(1)
    assert seconds < NOTICED_SECONDS
    assert "ended with signal 9" in nodes.log(1)
    errors = [json.loads(line) for line in (nodes.dump / "errors.jsonl").read_text().splitlines()]
    assert {e["status"] for e in errors} == {-9, 1}


def workers_of(launcher: int) -> list[int]:
    """The worker processes of a node."""
    found = []
    for pid in children(launcher):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"titan_hd.train" in command:
            found.append(pid)
    return found


@pytest.mark.slow
def test_the_late_rank_is_named_before_the_time_out(nodes, tmp_path):
    """Rank 1 of two sleeps in its third step. The run ends with the time-out, and says for whom it waited."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import titan_hd.components.lr_scheduler as schedule\n"
        "    factor = schedule.lr_factor\n"
        "    def late(config, step, total):\n"
        "        if step == 2:\n"
        "            time.sleep(600)\n"
        "        return factor(config, step, total)\n"
        "    schedule.lr_factor = late\n"
    )
    start = time.monotonic()
    hook = {"PYTHONPATH": str(tmp_path / "hook")}
    nodes.start(0, workers=2, environment=hook, comm__train_timeout_seconds=10)
    assert nodes.wait() == [1]
    print(f"ended after {time.monotonic() - start:.1f} s")
    (line,) = [line for line in nodes.log(0).splitlines() if " is late: " in line]
    assert line.startswith("titan_hd: rank 0 has waited for ")
    assert "s of 10 s in 'step 3': rank 1 is late: in 'step 3' since " in line
    assert line.endswith("s (titan_hd/train.py:" + line.rpartition(":")[2])
    assert "titan_hd: worker 0 ended with status 1" in nodes.log(0)


@pytest.mark.slow
def test_the_run_goes_on_without_a_node_that_is_lost(nodes, inputs, tmp_path):
    """--nnodes 1:2: one node loses its power; the other goes on from the last checkpoint with the same K."""
    port = free_port()
    conf = "is_host={},last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=3"
    settings = {
        "training__steps": 120,
        "hdpissa__num_adapters": 2,
        "training__global_batch_size": 2,
        "checkpoint__enable": "true",
        "checkpoint__interval": 5,
    }
    for node in range(2):
        more = {"PET_NNODES": "1:2", "PET_MAX_RESTARTS": "3", "PET_RDZV_CONF": conf.format(1 - node)}
        nodes.start(node, environment={**two_nodes(f"127.0.0.1:{port}"), **more}, **settings)
    nodes.wait_for_step(7)
    kill_tree(nodes.processes[1].pid)
    start = time.monotonic()
    assert nodes.wait()[0] == 0, nodes.log(0)
    print(f"ended {time.monotonic() - start:.1f} s after the loss")
    assert [r["step"] for r in nodes.metrics()] == list(range(1, 121))
    assert re.findall(r"mesh +(\d x \d x \d)", nodes.log(0)) == ["1 x 2 x 1", "1 x 1 x 1"]
    assert "resumed from" in nodes.log(0)
