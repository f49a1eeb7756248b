"""The own health check, asked as Consul asks it: before registering, and to see whether a sibling still serves."""

import asyncio
import ssl
from typing import Protocol

import httpx

from registry.presence.registration import Registration

__all__ = ["Mesh", "Probe"]


class Mesh(Protocol):
    """How the service is served: ``registry.mesh.membership.Membership`` is one."""

    @property
    def serves(self) -> bool:
        """Whether it speaks Consul Connect itself."""
        ...

    def hindrance(self) -> str | None:
        """What must come before it can be registered, in words; None: nothing."""
        ...


class Probe:
    """Asks whether the advertised address answers as this instance. Belongs to one event loop."""

    def __init__(self, mesh: Mesh | None = None) -> None:
        self._client: httpx.AsyncClient | None = None
        self._mesh = mesh

    @property
    def is_native(self) -> bool:
        """Whether the instance speaks Consul Connect itself."""
        return self._mesh is not None and self._mesh.serves

    async def complaint(self, registration: Registration, timeout: float) -> str | None:
        """What is wrong with the answer, in words; None: it is 200. At most ``timeout`` seconds, raises nothing."""
        if self._mesh is not None and (hindrance := self._mesh.hindrance()):
            return hindrance
        asked, name = f"GET {registration.health_check_url}", registration.tls_server_name
        self._client = self._client or _connect(registration)
        try:
            async with asyncio.timeout(timeout):
                answer = await self._client.get(
                    registration.health_check_url,
                    headers=registration.health_check_headers,
                    extensions={} if name is None else {"sni_hostname": name},
                )
        except TimeoutError:
            return f"{asked} was not answered within {timeout:g} s"
        except (httpx.HTTPError, OSError) as error:
            return f"{asked} failed: {str(error) or type(error).__name__}"
        if answer.status_code == httpx.codes.OK:
            return None
        to = f" to {answer.headers['Location']!r}" if answer.has_redirect_location else ""
        return f"{asked} answered {answer.status_code}{to}"

    async def aclose(self) -> None:
        """Closes what is open."""
        if self._client is not None:
            await self._client.aclose()


def _connect(registration: Registration) -> httpx.AsyncClient:
    verify: ssl.SSLContext | bool = False
    if registration.scheme == "https" and not registration.tls_skip_verify:
        verify = ssl.create_default_context()
    # A new connection for each question, as a caller would make one.
    return httpx.AsyncClient(verify=verify, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
