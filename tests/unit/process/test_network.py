import resource

import pytest

from titan_hd.process.network import address_towards, allow_connections, interface_of


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
