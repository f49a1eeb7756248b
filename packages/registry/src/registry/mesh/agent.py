"""Certificates from the Consul agent, which makes the key, too.

Source: https://developer.hashicorp.com/consul/api-docs/agent/connect
"""

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime

from consul.callback import CB
from consul.exceptions import ACLDisabled, ACLPermissionDenied
from pydantic import SecretStr

from registry.consul.changes import Answer, changes
from registry.consul.connection import AsyncConsul, consul_errors
from registry.errors import RegistryError, RegistryUnavailableError, UnsafeAgentError
from registry.mesh.source import Leaf, Roots
from registry.settings import ConsulSettings

__all__ = ["AgentSource"]

logger = logging.getLogger("registry")


class AgentSource:
    """The agent's own endpoints, behind which it caches each service's key. Belongs to one event loop.

    Before the first certificate is told, it looks whether the agent gives it to others, too (CVE-2026-105765), and then
    raises UnsafeAgentError instead. ``allow_unsafe_agent``: don't look, this agent serves this service only.
    """

    def __init__(self, settings: ConsulSettings | None = None, *, allow_unsafe_agent: bool = False) -> None:
        self._settings = settings or ConsulSettings()
        self._consul = AsyncConsul(self._settings)
        self._allow_unsafe_agent = allow_unsafe_agent
        self._warned = False

    async def leaves(self, service: str) -> AsyncGenerator[Leaf, None]:
        """What the agent makes, and renews at 60 to 90 % of its life or after the root has changed."""
        path, checked = f"/v1/agent/connect/ca/leaf/{service}", self._allow_unsafe_agent
        async with aclosing(changes(self._consul, path)) as answers:
            async for answer in answers:
                if not checked:
                    await self._check(path, service)
                    checked = True
                yield self._leaf(answer)

    async def roots(self) -> AsyncGenerator[Roots, None]:
        """The active root, and those before it as long as they may be in use."""
        async with aclosing(changes(self._consul, "/v1/agent/connect/ca/roots")) as answers:
            async for answer in answers:
                yield self._roots(answer)

    async def aclose(self) -> None:
        """Closes connections."""
        await self._consul.http.close()

    async def _check(self, path: str, service: str) -> None:
        """Asks once more for what the agent has in its cache by now. Raises: UnsafeAgentError."""
        with consul_errors(self._settings):
            try:
                await self._consul.http.get(CB.json(), "/v1/acl/token/self")
            except ACLDisabled:
                if not self._warned:
                    logger.warning(
                        "Consul's ACLs are off: whoever reaches it gets any service's certificate and may write "
                        "intentions, so mutual TLS protects against nobody who does",
                        extra={"service": service},
                    )
                self._warned = True
                return
            except ACLPermissionDenied:
                pass  # the anonymous token has not even the right to read itself: they are on
        for token in (None, str(uuid.uuid4())):
            if await self._gives(path, token):
                raise UnsafeAgentError(self._settings.url, service)

    async def _gives(self, path: str, token: str | None) -> bool:
        stated = SecretStr(token) if token else None
        others = {"token_file": None, "auth_method": None, "bearer_token_file": None}
        settings = self._settings.model_copy(update={"token": stated, **others})
        stranger = AsyncConsul(settings)
        try:
            with consul_errors(settings):
                await stranger.http.get(CB.json(allow_404=False), path)
        except RegistryUnavailableError:
            raise
        except RegistryError:
            return False
        finally:
            await stranger.http.close()
        return True

    def _leaf(self, answer: Answer) -> Leaf:
        try:
            told = answer.content
            return Leaf(
                str(told["CertPEM"]),
                str(told["PrivateKeyPEM"]),
                str(told["ServiceURI"]),
                datetime.fromisoformat(told["ValidBefore"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken("certificate", error) from None

    def _roots(self, answer: Answer) -> Roots:
        try:
            roots = tuple(str(root["RootCert"]) for root in answer.content["Roots"])
            return Roots(str(answer.content["TrustDomain"]), roots)
        except (KeyError, TypeError) as error:
            raise self._broken("root", error) from None

    def _broken(self, what: str, error: Exception) -> RegistryUnavailableError:
        return RegistryUnavailableError(f"Consul at {self._settings.url} sent a broken {what}: {error!r}")
