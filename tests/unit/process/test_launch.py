"""What the launcher makes of its arguments before it starts anything."""

from __future__ import annotations

import logging
import os
import signal
import types

import pytest
from torch.distributed import run

from titan_hd.errors import UserError
from titan_hd.process import launch
from titan_hd.process.launch import split_arguments


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("--nproc_per_node 2 -- --config run.toml --training.steps=3", "--config run.toml --training.steps=3"),
        ("--nproc_per_node 2 --config run.toml --training.steps=3", "--config run.toml --training.steps=3"),
        ("--rdzv_endpoint=a.b:29500 --log-dir ./logs --training.steps 3", "--training.steps 3"),
        ("--config=run.toml", "--config=run.toml"),
        ("--nproc_per_node 2 -- --nproc_per_node 2", "--nproc_per_node 2"),
        ("--nproc_per_node 2", ""),
        ("--", ""),
    ],
)
def test_torchruns_options_and_ours(words: str, ours: str):
    theirs, found = split_arguments(words.split())
    assert found == ours.split()
    assert theirs == [word for word in words.removesuffix(ours).split() if word != "--"]


def arguments(*words: str):
    args = launch.torchrun_arguments([*words, "-m", "titan_hd.train"])
    launch._choose_network(args)
    return args


@pytest.fixture(autouse=True)
def interface(monkeypatch):
    """That of the workers is a variable, which is restored."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


class TestOneNode:
    def test_it_needs_no_name_and_no_port_that_others_may_have(self):
        args = arguments("--nproc_per_node", "2")
        assert args.local_addr == "127.0.0.1"
        assert args.standalone
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"

    def test_what_is_said_holds(self):
        args = arguments("--local_addr", "10.0.0.1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
        assert args.local_addr == "10.0.0.1"
        assert not args.standalone
        assert not arguments("--master_port", "1234").standalone


class TestSeveralNodes:
    """The head is 10.0.0.1, and this node finds it from the address `own`."""

    @pytest.fixture
    def named(self, monkeypatch):
        def start(own: str, known: bool, *words: str):
            monkeypatch.setattr(launch, "address_towards", lambda head: own)
            monkeypatch.setattr(launch, "interface_of", lambda address: None)
            names = {"head": {"10.0.0.1"}} | ({launch.socket.gethostname(): {"10.0.0.9"}} if known else {})
            monkeypatch.setattr(launch, "addresses_of", lambda host: names.get(host, set()))
            return arguments("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=head:29500", *words)

        return start

    def test_a_node_whose_name_nobody_knows_finds_out_by_addresses_whether_it_is_the_head(self, named):
        """torch looks its name up, and fails."""
        assert named("10.0.0.1", False).rdzv_conf == "is_host=1"
        assert named("10.0.0.2", False, "--rdzv_conf=join_timeout=9").rdzv_conf == "join_timeout=9,is_host=0"

    def test_else_it_is_left_to_torch_or_to_the_user(self, named):
        assert named("10.0.0.1", True).rdzv_conf == ""
        assert named("10.0.0.1", False, "--rdzv_conf=is_host=0").rdzv_conf == "is_host=0"


class TestSignals:
    def test_a_terminal_that_goes_is_told_to_the_workers(self, monkeypatch):
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
        assert set(arguments().signals_to_handle.split(",")) == {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"}

    def test_under_nohup_it_is_not(self, monkeypatch):
        """torchrun would install its own handler, and end the run in spite of nohup."""
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
        assert set(arguments().signals_to_handle.split(",")) == {"SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"}


@pytest.fixture
def levels():
    """The launcher silences loggers, for the rest of its life."""
    loggers = [logging.getLogger(name) for name in ("titan_hd", "torch.distributed.elastic")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before):
        logger.setLevel(level)


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize(
    ("text", "status", "line"),
    [
        ("EADDRINUSE: port 29501 is in use", 2, "--master_port: another process has 127.0.0.1:29501; name a free"),
        ("nobody came", 1, "titan_hd: the nodes have not met at 127.0.0.1:29501 (rendezvous none): nobody came"),
    ],
)
def test_a_rendezvous_that_fails_is_one_line(text: str, status: int, line: str, tmp_path, monkeypatch, capsys):
    def fail(args):
        raise launch.DistNetworkError(text)

    monkeypatch.setattr(run, "run", fail)
    monkeypatch.setattr(launch, "leave_when_told", lambda: None)
    monkeypatch.setattr(launch, "plan_run", lambda *args, **settings: None)
    config = tmp_path / "run.toml"
    config.write_text(
        "[data]\ntrain = 'x.jsonl'\n[training]\nsteps = 1\n[model]\nname = 'llama3'\nflavor = 'debugmodel'"
    )
    monkeypatch.setattr("sys.argv", ["launch", "--master_port", "29501", "--config", str(config)])
    with pytest.raises(SystemExit) as left:
        launch.main()
    assert left.value.code == status
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "message", "why"),
    [
        (0, "ValueError: a bug", ""),  # it stands above
        (3, "ValueError: a bug", ": ValueError: a bug"),
        (
            0,
            "RuntimeError: Connection closed by peer [10.0.0.2]:1",
            ": the connection to a worker at 10.0.0.2 is lost; ",
        ),
        (
            0,
            "RuntimeError: Timed out waiting 8000ms for recv",
            ": it has waited for another worker for longer than the",
        ),
    ],
)
def test_why_a_worker_ended(rank: int, message: str, why: str):
    failure = types.SimpleNamespace(exitcode=1, message={"message": message})
    said = launch._why(rank, failure)
    assert said.startswith(why)
    assert bool(said) == bool(why)
    assert launch._why(rank, types.SimpleNamespace(exitcode=-9, message="Signal 9")) == ""


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--nnodes", "two"], "--nnodes (PET_NNODES): must be N, or MIN:MAX, not 'two'"),
        (["--nproc_per_node", "gpu"], "--nproc_per_node (NGPU): 'gpu': "),
        (["--nproc_per_node", "many"], "--nproc_per_node (NGPU): 'many': "),
    ],
)
def test_sizes_that_are_none(options: list[str], line: str):
    args = launch.torchrun_arguments([*options, "-m", "titan_hd.train"])
    with pytest.raises(UserError) as error:
        launch._sizes(args)
    assert str(error.value).startswith(line)
