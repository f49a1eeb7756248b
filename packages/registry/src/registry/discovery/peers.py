"""Who is at the other end, proven: what connections need to know of a mesh, and how they say that a proof failed.

Nothing here knows Consul. An instance with ``connect`` is called over mutual TLS: no byte of a request is written
before its certificate was found to be that of the service which is called.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import httpx

from registry.model import Instance

__all__ = [
    "NoCertificateError",
    "PeerError",
    "Peers",
    "RejectedError",
    "context_for",
    "proven",
    "refuse_peer",
    "rejection",
]

_REJECTED = ("UNKNOWN_CA", "CERTIFICATE", "ACCESS_DENIED", "DECRYPT_ERROR")
"""What the alerts have in their names by which a server refuses the client's certificate: RFC 8446, 6.2."""


class Peers(Protocol):
    """This service's own certificate, and its judgement of others'. Every method is quick, and safe for threads."""

    def client_context(self) -> ssl.SSLContext:
        """With the newest certificate and roots, for the next handshake. Raises: ssl.SSLError, there is none yet."""
        ...

    def server_name(self, service: str) -> str:
        """The name to ask for in the handshake (SNI)."""
        ...

    def verify(self, service: str, connection: ssl.SSLObject) -> None:
        """Raises: ssl.CertificateError, which says who answered, unless that is an instance of the service."""
        ...


class _TlsError(ssl.SSLError):
    def __str__(self) -> str:
        return str(self.args[0])  # ssl's own shows a tuple


class NoCertificateError(_TlsError):
    """This side has nothing to prove itself with: no connection was opened, and nobody else is to blame."""


class RejectedError(_TlsError):
    """The other side does not accept our certificate: it read nothing, and may be right."""


class PeerError(_TlsError):
    """Whoever answers did not prove to be the service that was called: no byte of the request was written."""


def context_for(peers: Peers | None, service: str) -> ssl.SSLContext:
    """What to call this service with. Raises: NoCertificateError."""
    if peers is None:
        raise NoCertificateError(
            f"{service!r} is called over mutual TLS only, and this client has no certificate: set CONSUL_CONNECT=client"
            " for a service, pass ConnectionOptions(peers=...) to a client of your own; a transport of httpx's can't"
            " verify who answers"
        )
    try:
        return peers.client_context()
    except ssl.SSLError as error:
        raise NoCertificateError(f"{service!r} can't be called over mutual TLS yet: {_words(error)}") from error


def refuse_peer(instance: Instance) -> None:
    """For senders that can't verify who answers. Raises: httpx.ConnectError, if this instance asks for that."""
    if not instance.connect:
        return
    try:
        context_for(None, instance.service)
    except ssl.SSLError as error:
        raise httpx.ConnectError(str(error)) from error


@contextmanager
def proven(service: str, netloc: str) -> Iterator[None]:
    """Around a handshake and what verifies it: says who was expected. Raises: PeerError."""
    try:
        yield
    except (ssl.SSLError, ValueError) as error:  # the latter of a connection that has ended
        raise PeerError(f"{service!r} was expected at {netloc}: {_words(rejection(error) or error)}") from error


def _words(error: Exception) -> str:
    return str(error.args[0] if len(error.args) == 1 else error)


def rejection(error: BaseException | None) -> RejectedError | None:
    """The error, if it is how the other side says that it does not accept our certificate.

    With TLS 1.3 it says so after our handshake is over, when a request may be on its way already. But it says so
    *instead* of ending its own handshake, so that it has not decrypted a byte of that request.
    """
    reason = str(getattr(error, "reason", "")) if isinstance(error, ssl.SSLError) else ""
    if "ALERT" not in reason or not any(name in reason for name in _REJECTED):
        return None
    return RejectedError(f"the other side does not accept our certificate: {error}")
