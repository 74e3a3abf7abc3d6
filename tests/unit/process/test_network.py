import resource

import pytest

from titan_hd.process.network import address_towards, allow_connections, interface_of, lost_worker, timed_out


def test_thousands_of_ranks_may_connect():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65_536) if hard > 0 else 65_536, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        allow_connections()  # nothing is taken away
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_way_to_this_machine_is_its_loopback():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_an_unknown_host_is_an_error_of_the_network():
    with pytest.raises(OSError):
        address_towards("no-such-host.invalid")


@pytest.mark.parametrize(
    ("message", "lost", "late"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:20867. This is", " at 10.0.0.2", False),
        ("[gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:1: Connection reset by peer", "", False),
        ("NCCL error: remote process exited or there was a network error", "", False),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation", None, True),
        ("Application timeout caused pair closure", None, True),
        ("CUDA out of memory", None, False),
    ],
)
def test_what_is_told_of_another_worker(message: str, lost: str | None, late: bool):
    found = {None: None, "": "the connection to another worker"}.get(lost, f"the connection to a worker{lost}")
    assert lost_worker(message) == found
    assert timed_out(message) == late
