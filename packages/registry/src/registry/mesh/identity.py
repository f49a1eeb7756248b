"""Who this service is in the mesh: its certificate and the authorities that it trusts, always the newest."""

import asyncio
import logging
import re
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from registry.background import background_context
from registry.errors import RegistryError, RegistryUnavailableError, UnsafeAgentError
from registry.mesh.agent import AgentSource
from registry.mesh.settings import MeshSettings
from registry.mesh.source import IdentitySource, Leaf, Roots, keep_taking
from registry.mesh.tls import Connection, peer_uri, tls_context
from registry.settings import ConsulSettings
from registry.validation import check_service

__all__ = ["AgentSource", "IdentitySource", "Leaf", "MeshIdentity", "Roots", "choose_source"]

logger = logging.getLogger("registry")

FIRST_ANSWER = 2.0
"""Seconds that ``start`` waits."""
_SPIFFE = re.compile(r"spiffe://([\w.-]+)/ns/default/dc/([\w-]+)/svc/([\w.~-]+)", re.ASCII)
T = TypeVar("T")


def choose_source(mesh: MeshSettings | None = None, consul: ConsulSettings | None = None) -> IdentitySource:
    """The server's signature where ``CONSUL_GRPC_ADDR`` is set, else the agent.

    Raises: ModuleNotFoundError, which says what to install for the former.
    """
    mesh, consul = mesh or MeshSettings(), consul or ConsulSettings()
    if mesh.grpc_address is not None:
        from registry.mesh.signing import SigningSource  # what it needs comes with an extra

        return SigningSource(mesh, consul)
    return AgentSource(consul, allow_unsafe_agent=mesh.allow_unsafe_agent)


class MeshIdentity:
    """A service's certificate and roots, watched from ``start`` to ``aclose``. Belongs to one event loop.

    New ones apply to the next handshake; open connections stay. While Consul is away, the last ones serve on until the
    certificate ends, which is about three days after Consul made it, and at least seven hours after it was last seen.
    ``source``: by default what the environment says (``choose_source``).

    It also is what a client needs to call services of the mesh: ``ConnectionOptions(peers=identity)``.
    """

    def __init__(self, service: str, source: IdentitySource | None = None) -> None:
        self.service = check_service(service).lower()
        self._source = source or choose_source()
        self._leaf: Leaf | None = None
        self._roots: Roots | None = None
        self._client: ssl.SSLContext | None = None
        self._server: ssl.SSLContext | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._answered = asyncio.Event()
        self._unsafe: UnsafeAgentError | None = None
        self.ready = asyncio.Event()
        """Set once there are a certificate and roots."""
        self._complaints: dict[str, str] = {}
        self.trust_domain = ""
        """Of the mesh, such as ``11111111-2222-3333-4444-555555555555.consul``; empty until ``ready``."""
        self.datacenter = ""
        """Of this service; empty until ``ready``."""

    async def start(self) -> None:
        """Begins, and returns once it is ready or the source has failed or 2 s are over; it goes on trying.

        Raises: UnsafeAgentError, if the agent gives this service's key to others.
        """
        create, context = asyncio.get_running_loop().create_task, background_context
        self._tasks = (
            create(
                self._keep("certificate", lambda: self._source.leaves(self.service), self._take_leaf), context=context()
            ),
            create(self._keep("roots", self._source.roots, self._take_roots), context=context()),
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_ANSWER):
                await self._answered.wait()
        if self._unsafe is not None:
            await self.aclose()
            raise self._unsafe

    async def aclose(self) -> None:
        """Ends watching, and closes connections to the source."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._source.aclose()

    async def __aenter__(self) -> Self:
        """Starts; waits for at most 2 s. Raises: UnsafeAgentError."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def complaint(self) -> str | None:
        """Why there is no certificate, or no newer one; None: its source answers."""
        waiting = None if self.ready.is_set() else "Consul has not told this service's certificate yet"
        return next((f"{what}: {words}" for what, words in self._complaints.items()), waiting)

    def client_context(self) -> ssl.SSLContext:
        """For the next handshake with a server of the mesh; ``verify`` must then look at its name.

        Raises: ssl.SSLError, if there is no certificate that is still valid: nothing was sent.
        """
        if self._client is None or self._leaf is None:
            raise ssl.SSLError(f"this service, {self.service}, has no certificate of the mesh: {self.complaint}")
        if self._leaf.expires <= datetime.now(UTC):
            raise ssl.SSLError(f"this service's certificate ended at {self._leaf.expires:%F %T}Z: {self.complaint}")
        return self._client

    def server_name(self, service: str) -> str:
        """What the handshake with an instance of that service asks for (SNI)."""
        return f"{service.lower()}.default.{self.datacenter}.internal.{self.trust_domain}"

    def uri(self, service: str) -> str:
        """The SPIFFE id of a service of this datacenter."""
        return f"spiffe://{self.trust_domain}/ns/default/dc/{self.datacenter}/svc/{service.lower()}"

    def verify(self, service: str, connection: Connection) -> None:
        """Returns if the verified peer is that service in this datacenter. Raises: ssl.CertificateError."""
        found = peer_uri(connection)
        # Consul ignores the case of a service's name, and keeps it here.
        if self.service_of(found) != service.lower() or found is None or found.split("/")[6] != self.datacenter:
            raise ssl.CertificateError(f"expected {self.uri(service)}, and met {found or 'no certificate'}")

    def service_of(self, uri: str | None) -> str | None:
        """The service, in lower case, that a SPIFFE id of this mesh names; None: agents, gateways, other meshes."""
        match = _SPIFFE.fullmatch(uri or "")
        return match[3].lower() if match and match[1].lower() == self.trust_domain.lower() else None

    def server_context(self) -> ssl.SSLContext:
        """To listen with: each handshake gets the newest certificate and roots, and is refused while there are none.

        It asks for a certificate, and verifies what it is shown; whether there was one is told by ``peer_uri``.
        """
        front = tls_context(ssl.PROTOCOL_TLS_SERVER)

        def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
            if self._server is None:
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
            connection.context = self._server
            return None

        front.sni_callback = choose  # called without a name in the handshake, too
        return front

    async def _keep(self, what: str, tell: Callable[[], AsyncGenerator[T, None]], take: Callable[[T], None]) -> None:
        def take_gladly(one: T) -> None:
            take(one)
            self._complaints.pop(what, None)

        await keep_taking(tell, take_gladly, partial(self._failed, what), base=0.2)

    def _take_leaf(self, leaf: Leaf) -> None:
        if not (match := _SPIFFE.fullmatch(leaf.uri)) or match[3].lower() != self.service:
            raise RegistryUnavailableError(f"asked for the certificate of {self.service}, and was told {leaf.uri}")
        if leaf != self._leaf:
            self._leaf, self.datacenter = leaf, match[2]
            self._build()

    def _take_roots(self, roots: Roots) -> None:
        if roots != self._roots:
            self._roots, self.trust_domain = roots, roots.trust_domain
            self._build()

    def _build(self) -> None:
        if self._leaf is None or self._roots is None:
            return
        self._server = tls_context(ssl.PROTOCOL_TLS_SERVER, self._leaf, self._roots)
        self._client = tls_context(ssl.PROTOCOL_TLS_CLIENT, self._leaf, self._roots)
        logger.info(
            "this service is %s until %s",
            self._leaf.uri,
            f"{self._leaf.expires:%F %T}Z",
            extra={"service": self.service},
        )
        self.ready.set()
        self._answered.set()

    def _failed(self, what: str, error: Exception) -> None:
        self._unsafe = error if isinstance(error, UnsafeAgentError) else self._unsafe
        words = str(error) if isinstance(error, (RegistryError, ssl.SSLError)) else repr(error)
        if words not in self._complaints.values():
            logger.warning(
                "no news of the mesh's %s; %s, and this is tried again every 2 s: %s",
                what,
                "the last ones serve on" if self.ready.is_set() else "nobody is let in until there are some",
                words,
                extra={"service": self.service},
            )
        self._complaints[what] = words
        self._answered.set()
