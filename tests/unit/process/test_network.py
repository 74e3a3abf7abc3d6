import pytest

from titan_hd.process.network import address_towards, interface_of


def test_the_way_to_this_machine_is_its_loopback():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_an_unknown_host_is_an_error_of_the_network():
    with pytest.raises(OSError):
        address_towards("no-such-host.invalid")
