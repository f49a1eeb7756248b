"""Who may call this service: Consul's intentions, kept here and decided here, for each request anew.

Source: https://developer.hashicorp.com/consul/api-docs/connect/intentions#list-matching-intentions
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from registry.background import background_context
from registry.consul.changes import Answer, changes
from registry.consul.connection import AsyncConsul
from registry.errors import RegistryError
from registry.mesh.source import keep_taking
from registry.settings import ConsulSettings
from registry.validation import check_service

__all__ = ["Intentions"]

logger = logging.getLogger("registry")


@dataclass(frozen=True, slots=True)
class _Rule:
    source: str
    allows: bool

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "_Rule | None":
        """None: it is about callers that this mesh does not have."""
        if told.get("SourcePeer") or told.get("SourceType", "consul") != "consul":
            return None
        # What a rule asks beyond the caller's name is not looked at here: then nobody may, as
        # /v1/agent/connect/authorize has it for permissions.
        partial = told.get("Permissions") or told.get("JWT")
        return cls(str(told["SourceName"]).lower(), told.get("Action") == "allow" and not partial)


class Intentions:
    """The intentions of one destination, watched from ``start`` to ``aclose``. Belongs to one event loop.

    A change applies to the next request, on open connections, too. While Consul is away, the last ones serve on.
    """

    def __init__(self, service: str, consul: ConsulSettings | None = None) -> None:
        self.service = check_service(service).lower()
        self._consul = AsyncConsul(consul or ConsulSettings())
        self._rules: tuple[_Rule, ...] = ()
        self._default = False
        self._complaint: str | None = "Consul has not answered yet"
        self._task: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        """Set once they are known."""

    async def start(self) -> None:
        """Begins in the background; never blocks and never fails."""
        self._task = asyncio.get_running_loop().create_task(self._keep(), context=background_context())

    async def aclose(self) -> None:
        """Ends watching, and closes the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._consul.http.close()

    async def __aenter__(self) -> Self:
        """Starts."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def complaint(self) -> str | None:
        """Why they are not known, or may be old; None: Consul answers."""
        return self._complaint and f"intentions: {self._complaint}"

    def allows(self, caller: str) -> bool:
        """Whether that service may call this one; never blocks. False while nothing is known."""
        name = caller.lower()
        # Consul sorts by precedence: the first that matches decides.
        return next((rule.allows for rule in self._rules if rule.source in {name, "*"}), self._default)

    async def _keep(self) -> None:
        path, params = "/v1/connect/intentions/match", [("by", "destination"), ("name", self.service)]
        tell = partial(changes, self._consul, path, params, consistent=True)
        await keep_taking(tell, self._take, self._failed, base=0.1)

    def _take(self, answer: Answer) -> None:
        found = {name.lower(): rules for name, rules in answer.content.items()}[self.service]
        self._rules = tuple(rule for told in found or () if (rule := _Rule.of(told)) is not None)
        self._default = answer.headers.get("X-Consul-Default-ACL-Policy") == "allow"
        self._complaint = None
        self.ready.set()

    def _failed(self, error: Exception) -> None:
        words = str(error) if isinstance(error, RegistryError) else repr(error)
        if words != self._complaint:
            logger.warning(
                "no news of the intentions; %s, and this is tried again every 2 s: %s",
                "the last ones serve on" if self.ready.is_set() else "nobody is let in until they are known",
                words,
                extra={"service": self.service},
            )
        self._complaint = words
