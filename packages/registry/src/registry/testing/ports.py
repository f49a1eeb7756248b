"""Ports on loopback that can be listened on."""

import fcntl
import functools
import os
import random
import socket

from registry.testing.cache import cache

__all__ = ["free_ports", "is_free"]

_PORTS = range(20_000, 32_000)
"""Not the system's ephemeral range: while an agent is down, a client that keeps connecting to such a port of its own
host can be given that very port as its source and so reach itself."""


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that nobody listens on, TCP nor UDP, all different.

    No other process that asks here is given them while this one lives, so that what listens there may restart.
    """
    # Not from the seedable generator: a seeded test run would be offered the same ports again and again.
    candidates = iter(random.SystemRandom().sample(_PORTS, 1_000))
    kinds = socket.SOCK_STREAM, socket.SOCK_DGRAM
    free = (port for port in candidates if _reserve(port) and all(is_free(port, kind) for kind in kinds))
    return [next(free) for _ in range(count)]


def is_free(port: int, kind: socket.SocketKind) -> bool:
    """Whether this port of 127.0.0.1 can be listened on."""
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind == socket.SOCK_STREAM:
            # As Consul does it: connections that linger after a close do not make a port taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _reserve(port: int) -> bool:
    """Whether no other process has this port; then none gets it until this one ends, and the system unlocks it."""
    try:
        if (reservations := _reservations()) is not None:
            fcntl.lockf(reservations, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@functools.cache
def _reservations() -> int | None:
    """A file in the cache, of which a process locks the byte at each port's number; None: it can't be written."""
    try:
        cache().mkdir(parents=True, exist_ok=True)
        return os.open(cache() / "ports", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
