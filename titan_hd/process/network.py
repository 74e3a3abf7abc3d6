"""The address and the interface by which this node talks to the others; what it is told when one of them has gone."""

from __future__ import annotations

import contextlib
import fcntl
import re
import resource
import socket
import struct

LOOPBACK = "127.0.0.1"
_MOST_FILES = 65_536
# What gloo and nccl say where a worker has left, and gloo where it waits for too long.
_LEFT = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "remote process exited")
_LATE = ("Application timeout", "Timed out waiting")
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the IPv4 address of an interface


def allow_connections() -> None:
    """Let this process, and those that it starts, have as many files open as the system allows, up to 65,536. All ranks
    are connected to the one that has the rendezvous store, and many a system's default is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # it stays as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def address_towards(host: str) -> str:
    """This node's own address on the way to `host`. Nothing is sent: connecting a UDP socket only picks a route.

    Not by this node's name: many a node knows its own name as 127.0.1.1, where the other nodes do not find it.

    Raises:
        OSError: the name is unknown, or there is no route.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def addresses_of(host: str) -> set[str]:
    """All addresses of a host; empty if nobody knows its name."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def lost_worker(message: str) -> str | None:
    """What is lost, if a collective's error is that another worker has left; None if it is something else."""
    if not any(words in message for words in _LEFT):
        return None
    address = re.search(r"by peer \[([^\]]+)\]", message)
    return f"the connection to a worker at {address[1]}" if address else "the connection to another worker"


def timed_out(message: str) -> bool:
    """Whether a collective's error is that another worker has not come in time."""
    return any(words in message for words in _LATE)
