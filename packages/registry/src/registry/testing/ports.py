"""Ports on loopback that can be listened on."""

import random
import socket

__all__ = ["free_ports", "is_free"]


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that nobody listens on, TCP nor UDP, all different.

    They stay free only by luck until someone listens.
    """
    # Not from the system's ephemeral range: while the agent is down, a client that keeps connecting to such a
    # port of its own host can be given that very port as its source and so reach itself.
    # And not from the seedable generator: a seeded test run would be offered the same ports again and again.
    candidates = iter(random.SystemRandom().sample(range(20_000, 32_000), 1_000))
    kinds = socket.SOCK_STREAM, socket.SOCK_DGRAM
    free = (port for port in candidates if all(is_free(port, kind) for kind in kinds))
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
