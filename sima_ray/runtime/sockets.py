"""Ports that nobody listens on."""

import secrets
import socket

_FIRST, _LAST = 20000, 32767
"""Above the ports of Ray's workers, and below those that systems give to outgoing connections: such a connection
may take a port between the moment when it is found free and the one when a server binds it."""


def is_free(host: str, port: int) -> bool:
    """Whether a port of this machine can be listened on at this moment."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """So many different ports that nobody listens on at this moment, drawn at random.

    Raises:
        OSError: Hardly any is free.
    """
    found: list[int] = []
    for _ in range(100 * count):
        port = _FIRST + secrets.randbelow(_LAST - _FIRST + 1)
        if port not in found and is_free(host, port):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports from {_FIRST} to {_LAST} on {host}")
