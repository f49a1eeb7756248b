"""Where a certificate comes from: the protocol, and what a source tells."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

__all__ = ["IdentitySource", "Leaf", "Roots"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """This service's certificate with its key."""

    certificate: str
    """PEM, followed by intermediate certificates if there are any."""
    key: str = field(repr=False)
    """PEM, not encrypted."""
    uri: str
    """The SPIFFE id in the certificate: ``spiffe://<trust domain>/ns/default/dc/<datacenter>/svc/<service>``."""
    expires: datetime
    """With its time zone."""


@dataclass(frozen=True, slots=True)
class Roots:
    """The authorities of the mesh: several while they are being changed."""

    trust_domain: str
    certificates: tuple[str, ...]
    """PEM, one each."""


class IdentitySource(Protocol):
    """Tells a service's certificate and the roots, each at once and again when there is a newer one.

    Both iterators go on until they are closed. They raise RegistryError when nothing can be had now: ask anew after a
    pause.
    """

    def leaves(self, service: str) -> AsyncGenerator[Leaf, None]:
        """The certificates of that service, each before the former ends."""
        ...

    def roots(self) -> AsyncGenerator[Roots, None]:
        """The authorities that are trusted."""
        ...

    async def aclose(self) -> None:
        """Closes connections."""
        ...
