"""One instance's entry in Consul: written, watched and removed, whichever agent happens to answer.

An agent knows only what was registered with it. Where ``CONSUL_HTTP_ADDR`` is a load balancer or a name with several
addresses, each new connection may reach another one, whose 404 says nothing; the catalog knows them all.
"""

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

from consul.base import Response
from consul.callback import CB

from registry.backoff import Backoff
from registry.consul.connection import AsyncConsul, SyncConsul, consul_errors
from registry.consul.health import parse_local_health
from registry.errors import RegistryError, RegistryUnavailableError
from registry.model import ServiceHealth
from registry.presence.registration import Registration

__all__ = ["ATTEMPTS", "Entry", "holders", "parse_nodes", "take_out"]

logger = logging.getLogger("registry")

ATTEMPTS = 20
"""Connections, until the agent that has an instance must be among those reached: of five, 99 % are."""
PAUSE = 0.03
"""Seconds between them; an agent tells the catalog within milliseconds."""


def holders(service_id: str) -> tuple[str, list[tuple[str, str]]]:
    """Path and parameters of the question which nodes hold the instance; its checks say so, as every entry has one."""
    return "/v1/health/state/any", [("filter", f'ServiceID == "{service_id}"')]


def parse_nodes(response: Response) -> set[str]:
    """The nodes named by a list of checks."""
    checks: list[dict[str, Any]] = CB.json()(response)
    return {check["Node"] for check in checks}


def take_out(consul: SyncConsul, node: str, service_id: str) -> Any:
    """Deregisters the instance in the catalog. Its agent, if alive, puts it back when it next compares: in a minute."""
    # Not by py-consul's method, which prefers the token of the environment.
    entry = json.dumps({"Node": node, "ServiceID": service_id})
    return consul.http.put(CB.boolean(), "/v1/catalog/deregister", data=entry)


def _parse_own_node(response: Response) -> str | None:
    """The node of the agent that answers, by what it says of an instance's health; None: it does not know it."""
    known = CB.json()(Response(200 if response.code in {429, 503} else response.code, response.headers, response.body))
    return next((str(check["Node"]) for check in known["Checks"] or ()), None) if known else None


class Entry:
    """What Consul holds of this process's instance. Belongs to one event loop.

    All methods raise RegistryUnavailableError when Consul can't be asked, RegistryError when it refuses.
    """

    def __init__(self, consul: AsyncConsul) -> None:
        self._consul = consul
        self._settings = consul.settings
        self._backoff = Backoff(base=0.2, cap=2.0)
        self._nodes: set[str] = set()
        """Where it was written, as far as is known: one, unless agents came and went."""
        self._written_with: str | None = None
        """The token that the agent has for the instance."""

    async def write(self, registration: Registration) -> None:
        """Registers the instance as passing, so that callers find it at once."""
        with consul_errors(self._settings):
            known = await self._health(registration.id)
            if known is None:
                # Another agent may have it, from before a kill: of two entries, one would be left behind.
                with suppress(RegistryError):
                    await self.remove(registration.id)
            elif known.status not in {"passing", "maintenance"}:
                # "Status: passing" is ignored for a check that exists: left critical, it would stay so for a while.
                # But an instance that somebody put into maintenance stays there.
                await self._consul.agent.service.deregister(registration.id)
            await self._put(registration)
        with suppress(RegistryUnavailableError), consul_errors(self._settings):  # Cut, it is registered all the same.
            node = await self._consul.http.get(_parse_own_node, _health_path(registration.id))
            self._nodes |= {node} - {None}

    async def is_outdated(self) -> bool:
        """Whether the token is another one by now than the agent has for the instance; False if that can't be told."""
        try:
            token: str | None = await self._consul.http.current_token()
        except RegistryError:
            return False
        return token != self._written_with

    async def rewrite(self, registration: Registration) -> bool:
        """Gives the agent the new token for what it has registered; nothing else changes, its checks' state included.

        The agent keeps the token of a registration, to tell the servers of the instance's health: ended there, it
        would silently leave them with what they know. Returns whether the agent asked had the instance.
        Source: https://github.com/hashicorp/consul/issues/4372
        """
        with consul_errors(self._settings):
            if await self._health(registration.id) is None:
                return False
            await self._put(registration)
        return True

    async def is_in_maintenance(self, service_id: str) -> bool:
        """Whether an operator took this very instance, not its whole node, out of discovery."""
        with consul_errors(self._settings):
            known = await self._health(service_id)
        return known is not None and f"_service_maintenance:{service_id}" in known.checks

    async def remove(self, service_id: str) -> None:
        """Returns when Consul offers the instance nowhere any more; at once, where one agent is all there is."""
        await self._remove(service_id)
        self._consul.http.tokens.drop(service_id)

    async def _remove(self, service_id: str) -> None:
        path, gone = f"/v1/agent/service/deregister/{service_id}", False
        for _ in range(ATTEMPTS):
            with consul_errors(self._settings):
                gone = await self._consul.http.last("PUT", CB.boolean(), path) or gone
            if gone and len(self._nodes) < 2:
                return
            nodes = await self._holders(service_id)
            if not nodes:
                return
            await asyncio.sleep(PAUSE)
        with consul_errors(self._settings):
            for node in nodes:
                await take_out(self._consul, node, service_id)
        logger.warning(
            "%s was taken out of the catalog, as no agent reached at %s has it; that of %s may bring it back until it "
            "finds its check failing: let CONSUL_HTTP_ADDR lead to one agent",
            service_id,
            self._settings.url,
            " and ".join(sorted(nodes)),
            extra={"instance": service_id},
        )

    async def until_forgotten(self, registration: Registration) -> None:
        """Parks at the agent, and returns when the entry must be written again: it is gone, or was reset by a restart.

        A question that was cut, by a proxy say, is asked again and is no reason to write, which would hide failing
        checks. Raises: RegistryError, when Consul refuses.
        """
        params: list[tuple[str, str]] = []
        failures, in_doubt = 0, False
        loop, wait = asyncio.get_running_loop(), self._settings.wait
        while True:
            begun = loop.time()
            try:
                with consul_errors(self._settings):
                    known = await self._consul.http.get(CB.json(), f"/v1/agent/service/{registration.id}", params)
                    if known is not None and in_doubt and await self._was_reset(registration.id):
                        return
                    if known is None and not await self._stands(registration):
                        return
            except RegistryUnavailableError as error:
                params, failures, in_doubt = [], failures + 1, True
                # The first may be a proxy's doing, each minute.
                log = logger.warning if failures == 2 else logger.debug
                log(
                    "Consul does not say whether this instance is still registered; it serves on and asks again "
                    "every 2 s: %s",
                    error,
                )
                await asyncio.sleep(self._backoff.delay(failures))
                continue
            if known is None:
                params, failures = [], failures + 1
                await asyncio.sleep(self._backoff.delay(failures))
                continue
            current = ("hash", known["ContentHash"])
            # No news, and early: so answers an agent that is being stopped. The next one has our check as critical.
            in_doubt = current in params and loop.time() - begun < wait
            if params:
                await asyncio.sleep(0.1)  # an answer that comes at once, again and again, must not become a busy loop
            params, failures = [] if in_doubt else [current, ("wait", f"{wait:g}s")], 0

    async def _put(self, registration: Registration) -> None:
        # Asked before: should it change meanwhile, the instance is written once more, rather than once too little.
        token = await self._consul.http.current_token()
        await self._consul.agent.service.register(**registration.arguments(passing=True))
        self._written_with = token
        self._consul.http.tokens.hold(registration.id)

    async def _health(self, service_id: str) -> ServiceHealth | None:
        health: ServiceHealth | None = await self._consul.http.get(parse_local_health, _health_path(service_id))
        return health

    async def _was_reset(self, service_id: str) -> bool:
        """Whether the check is as an agent has it that has just read it from disk: critical, and never asked since."""
        known, check = await self._health(service_id), f"service:{service_id}"
        return known is not None and known.checks.get(check) == "critical" and not known.outputs[check]

    async def _stands(self, registration: Registration) -> bool:
        """Whether the catalog has the instance on a node that is alive: then the question went to another agent."""
        path = f"/v1/health/service/{registration.name}"
        params = [("filter", f'Service.ID == "{registration.id}"')]
        try:
            with consul_errors(self._settings):
                entries = await self._consul.http.last("GET", CB.json(), path, params)
        except RegistryUnavailableError:
            raise
        except RegistryError:
            return False
        return any(
            all(check["ServiceID"] or check["Status"] != "critical" for check in entry["Checks"]) for entry in entries
        )

    async def _holders(self, service_id: str) -> set[str]:
        """The nodes that hold the instance; where that can't be asked, those that it was written to, if known."""
        try:
            with consul_errors(self._settings):
                nodes: set[str] = await self._consul.http.get(parse_nodes, *holders(service_id))
        except RegistryError:
            if not self._nodes:
                raise
            return self._nodes
        return nodes


def _health_path(service_id: str) -> str:
    return f"/v1/agent/health/service/id/{service_id}"
