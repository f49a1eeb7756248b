"""TLS contexts from a certificate and roots, and the one name in a peer's certificate."""

import os
import ssl
import tempfile
import time
from typing import Protocol

from registry.mesh.source import Leaf, Roots

__all__ = ["Connection", "peer_uri", "tls_context"]


class Connection(Protocol):
    """What a verified peer is read from: ``ssl.SSLObject`` and its like."""

    def getpeercert(self) -> object:
        """As ``ssl.SSLObject.getpeercert``."""
        ...


def tls_context(protocol: int, leaf: Leaf | None = None, roots: Roots | None = None) -> ssl.SSLContext:
    """For one side, ``ssl.PROTOCOL_TLS_SERVER`` or ``ssl.PROTOCOL_TLS_CLIENT``: TLS 1.2 or newer.

    A client verifies that its peer is of this mesh, but not its name; a server does, if a certificate is shown.
    Raises: ssl.SSLError, if certificate, key or roots can't be used.
    """
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No tickets: each handshake verifies anew, but for TLS 1.2's session ids, which can't be turned off here.
    context.options |= ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
        # Consul's agent, which asks /health, has no certificate of the mesh.
        context.verify_mode = ssl.CERT_OPTIONAL
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
    if roots is not None:
        context.load_verify_locations(cadata="\n".join(roots.certificates))
    if leaf is not None:
        _load(context, leaf)
    return context


def peer_uri(connection: Connection) -> str | None:
    """The SPIFFE id of a peer whose certificate was verified; None: it showed none.

    Raises: ssl.CertificateError, if there is not exactly one URI among its names, or if it has ended since.
    Source: https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md#2-spiffe-id
    """
    certificate = connection.getpeercert()
    if not certificate or not isinstance(certificate, dict):
        return None
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    if len(uris) != 1:
        raise ssl.CertificateError(f"the peer's certificate names {len(uris)} URIs, and must name one")
    if ssl.cert_time_to_seconds(str(certificate["notAfter"])) < time.time():
        raise ssl.CertificateError(f"the peer's certificate ended on {certificate['notAfter']}")
    return str(uris[0])


def _load(context: ssl.SSLContext, leaf: Leaf) -> None:
    pem = f"{leaf.key}\n{leaf.certificate}".encode()
    if hasattr(os, "memfd_create"):
        # Only a file can be loaded; this one is in memory, and only this process can open it.
        descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return
    with tempfile.NamedTemporaryFile() as file:  # readable by this user alone
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)
