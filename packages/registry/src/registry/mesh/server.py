"""uvicorn serves mutual TLS, though it was started by its plain command: ``uvicorn backend.main:app --port 8002``."""

import signal
import ssl
from asyncio import BaseTransport
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp

from registry.errors import InvalidInputError
from registry.mesh.guard import Guard
from registry.mesh.tls import peer_uri

__all__ = ["mutual_tls", "running_uvicorn"]

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: a handshake costs ten times a call. Callers keep theirs for 60."""
_PLAIN_KEEP_ALIVE = 5
"""uvicorn's default."""


def running_uvicorn() -> Any:
    """The server in which this runs; called by a lifespan's startup, before anything is served.

    Raises: InvalidInputError, if it is another one, or serves TLS of its own.
    """
    # It answers SIGTERM by a method of its own, which is all that leads to it from here.
    server: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    config: Any = getattr(server, "config", None)
    if not hasattr(config, "http_protocol_class") or not hasattr(config, "ssl"):
        raise InvalidInputError(
            "CONSUL_CONNECT=true needs uvicorn, in the main thread of its process: run `uvicorn module:app`, or set "
            "CONSUL_CONNECT=client, and put a sidecar proxy in front"
        )
    if config.ssl is not None:
        raise InvalidInputError(
            "CONSUL_CONNECT=true serves by the mesh's certificate: leave out uvicorn's --ssl-certfile and --ssl-keyfile"
        )
    return server


@contextmanager
def mutual_tls(server: Any, guard: Guard) -> Iterator[None]:
    """What this uvicorn will listen with, as soon as the startup is complete; as before when it is left."""
    config = server.config
    changed = {
        "ssl": guard.identity.server_context(),
        "http_protocol_class": _guarded(config.http_protocol_class, guard),
        "ws_protocol_class": config.ws_protocol_class and _guarded(config.ws_protocol_class, guard),
    }
    if config.timeout_keep_alive == _PLAIN_KEEP_ALIVE:
        changed["timeout_keep_alive"] = KEEP_ALIVE
    before = {name: getattr(config, name) for name in changed}
    for name, value in changed.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _guarded(protocol: Any, guard: Guard) -> Any:
    """The protocol class, whose app is guarded once its connection's peer is known."""

    class Guarded(protocol):  # type: ignore[misc]  # a class that uvicorn chose
        app: ASGIApp

        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)
            connection = transport.get_extra_info("ssl_object")
            if connection is None:
                return  # not over TLS: not judged, and so not let in
            peer = flaw = None
            try:
                peer = peer_uri(connection)
            except ssl.CertificateError as error:
                flaw = str(error)
            self.app = guard.around(self.app, peer, flaw)

    return Guarded
