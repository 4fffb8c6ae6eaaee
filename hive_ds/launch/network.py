"""Which network interface ranks talk through.

A host often has several, and Debian lets it call itself 127.0.1.1, so that gloo and NCCL pick one that the other hosts
cannot reach. The right one is that with the route to rank 0's host.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import MutableMapping

_SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface."""

_ELSEWHERE = "192.0.2.1"
"""Reserved for documentation: stands for any address far away, and nothing is sent to it."""


def interface_towards(host: str) -> str | None:
    """Name of the interface with the route to ``host``; None where there is none but loopback.

    On ``host`` itself that route is loopback, of no use to the others: then the default route's, or the first there is.
    """
    addresses = interface_addresses()
    for target in (host, _ELSEWHERE):
        source = _source_address(target)
        for name, address in addresses.items():
            if address == source:
                return name
    return next(iter(addresses), None)


def interface_addresses() -> dict[str, str]:
    """Interface -> IPv4 address, without loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # no IPv4 address
            address = socket.inet_ntoa(reply[20:24])
            if not address.startswith("127."):
                found[name] = address
    return found


def choose_interface(env: MutableMapping[str, str], host: str) -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where they are not set, to the interface towards ``host``."""
    name = interface_towards(host)
    if name is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", name)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # else NCCL takes whatever begins so: bond0.100 for bond0


def _source_address(target: str) -> str | None:
    """The address that this host would send from to ``target``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
