"""Where a certificate comes from: the protocol, what a source tells, and how that is taken."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import NoReturn, Protocol, TypeVar

from registry.backoff import Backoff

__all__ = ["IdentitySource", "Leaf", "Roots", "keep_taking"]

T = TypeVar("T")


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


async def keep_taking(
    tell: Callable[[], AsyncGenerator[T, None]],
    take: Callable[[T], None],
    failed: Callable[[Exception], None],
    *,
    base: float,
) -> NoReturn:
    """Takes whatever is told, and asks anew when that ends or fails, after a pause that grows from ``base`` seconds.

    What was taken last serves on meanwhile: this ends only by cancellation.
    """
    backoff, failures = Backoff(base=base, cap=2.0), 0
    while True:
        try:
            async with aclosing(tell()) as told:
                async for one in told:
                    take(one)
                    failures = 0
        except Exception as error:
            failed(error)
        failures += 1
        await asyncio.sleep(backoff.delay(failures))
