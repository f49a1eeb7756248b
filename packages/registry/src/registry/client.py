"""The facade: call a service by name; get an ``httpx.Response``, or an error that says what happened."""

import time
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

import httpx

from registry.discovery.balancing import Policy
from registry.discovery.call import Terms
from registry.discovery.explanation import Explanation
from registry.discovery.options import ConnectionOptions, EjectionPolicy
from registry.discovery.peers import Peers
from registry.discovery.redirects import Way
from registry.discovery.request import Headers, Requests, timeouts_of
from registry.discovery.resolver import HasResolver, Resolver
from registry.discovery.retry import RetryPolicy
from registry.discovery.transport import DiscoveryTransport
from registry.telemetry import Observer
from registry.validation import check_seconds, check_tag

__all__ = ["ServiceDiscoveryClient"]

Seconds: TypeAlias = float | httpx.Timeout | None


class ServiceDiscoveryClient:
    """Calls services by name, over connections that it keeps open. Belongs to one event loop; close it when done.

    ``registry``: a ServiceRegistry, or any Resolver. ``timeout``: time limit for one attempt, in seconds; connecting
    may take at most 2 s of it. ``deadline``: time limit for the whole call, in seconds; by default twice the timeout.
    ``max_retries``: attempts in total, at least 1. Each attempt goes to an instance that the call has not tried. Once
    all have been tried, it waits before the next attempt, for a delay that grows from ``retry_delay`` seconds.
    ``retry``: all of these and more, instead of the last two. ``observer``: see ``registry.telemetry``.
    ``zone``: where this process runs; instances there are preferred while they have capacity.
    """

    def __init__(
        self,
        registry: "Resolver | HasResolver",
        timeout: float = 30.0,
        max_retries: int = 3,
        retry_delay: float = 1.0,
        *,
        deadline: float | None = None,
        policy: Policy = "p2c",
        hedge: bool = False,
        retry: RetryPolicy | None = None,
        ejection: EjectionPolicy | None = None,
        connections: ConnectionOptions | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        observer: Observer | None = None,
        zone: str | None = None,
    ) -> None:
        self._timeout = check_seconds("timeout", timeout)
        self._deadline = 2 * timeout if deadline is None else check_seconds("deadline", deadline)
        self._hedge = hedge
        self._transport = DiscoveryTransport(
            registry.resolver() if isinstance(registry, HasResolver) else registry,
            retry=retry or RetryPolicy(max_retries, retry_delay),
            ejection=ejection,
            deadline=self._deadline,
            policy=policy,
            connections=connections,
            transport=transport,
            observer=observer,
            zone=zone,
        )
        self.http = httpx.AsyncClient(transport=self._transport, timeout=timeouts_of(timeout), follow_redirects=True)
        """The httpx client over the same transport, for what the facade does not offer: streams, cookies.

        URLs are ``http://<service name>/path``. The facade uses its headers, params, hooks and auth, no cookies.
        """
        self._way = Way(self._transport, self.http, self._terms)
        self._requests = Requests(self.http)
        self._timeouts = timeouts_of(timeout).as_dict()

    async def call_service(
        self,
        service_name: str,
        path: str,
        method: str = "GET",
        tag: str | None = None,
        headers: Headers | None = None,
        params: Any = None,
        json: Any = None,
        data: Any = None,
        *,
        content: Any = None,
        files: Any = None,
        cookies: Any = None,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: bool | None = None,
        extensions: Mapping[str, Any] | None = None,
        idempotent: bool | None = None,
        hedge: bool | None = None,
        timeout: Seconds = None,
    ) -> httpx.Response:
        """Returns the response of one instance of the service, body included. Cancelling the call cancels its attempts.

        ``path`` starts with ``/`` and may have a query. ``idempotent=True``: this request may be sent twice, whatever
        its method. ``hedge=True``: if the response takes longer than 95 % of recent ones, ask another instance as well
        and return the first response; idempotent requests only. ``timeout``: seconds for one attempt, instead of the
        client's; an httpx.Timeout limits each step as in httpx. ``follow_redirects``: True also follows redirects to
        other services, but without ``Authorization`` and cookies; False follows none; None follows those within the
        service. All other arguments mean the same as in httpx.

        Raises: httpx.HTTPStatusError for a 4xx at once and for a 5xx after the last attempt; httpx.TransportError
        after the last attempt; ServiceNotFoundError (a ValueError), NoHealthyInstanceError, RegistryUnavailableError;
        InvalidInputError before anything is sent, and for a redirect that leaves the service; any error that the source
        of the request's body raises.
        """
        limit, timeouts = self._limits(timeout)
        asked: dict[str, Any] = {"timeout": timeouts, "hedge": self._hedge if hedge is None else hedge}
        if idempotent is not None:
            asked["idempotent"] = idempotent
        asked |= extensions or {}
        tag = asked.get("tag", tag)
        body = {"content": content, "data": data, "files": files, "json": json}
        request, other = self._requests.build(
            method, service_name, path, headers=headers, params=params, cookies=cookies, extensions=asked, body=body
        )
        terms = self._terms(limit, None if tag is None else check_tag(tag), other)
        response = await self._way.send(request, terms, auth, follow_redirects)
        try:
            return response.raise_for_status() if response.is_error else response
        except httpx.HTTPStatusError as error:
            for note in response.extensions.get("attempts", ()):
                error.add_note(note)
            raise

    def _limits(self, timeout: Seconds) -> tuple[float | None, dict[str, float | None]]:
        """Seconds for one attempt, and for each of its steps."""
        if isinstance(timeout, httpx.Timeout):
            return None, timeout.as_dict()
        limit = self._timeout if timeout is None else check_seconds("timeout", timeout)
        return limit, self._timeouts if limit == self._timeout else timeouts_of(limit).as_dict()

    def _terms(self, limit: float | None = None, tag: str | None = None, service: str | None = None) -> Terms:
        return Terms(service, tag, True, limit, self._timeout, time.time() + self._deadline)

    async def get(
        self,
        service_name: str,
        path: str,
        *,
        tag: str | None = None,
        idempotent: bool | None = None,
        hedge: bool | None = None,
        timeout: Seconds = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """``call_service`` with GET."""
        kwargs |= {"tag": tag, "idempotent": idempotent, "hedge": hedge, "timeout": timeout}
        return await self.call_service(service_name, path, "GET", **kwargs)

    async def post(
        self,
        service_name: str,
        path: str,
        *,
        tag: str | None = None,
        idempotent: bool | None = None,
        hedge: bool | None = None,
        timeout: Seconds = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """``call_service`` with POST: repeated only if no instance can have seen it, or if it may be sent twice."""
        kwargs |= {"tag": tag, "idempotent": idempotent, "hedge": hedge, "timeout": timeout}
        return await self.call_service(service_name, path, "POST", **kwargs)

    async def put(
        self,
        service_name: str,
        path: str,
        *,
        tag: str | None = None,
        idempotent: bool | None = None,
        hedge: bool | None = None,
        timeout: Seconds = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """``call_service`` with PUT."""
        kwargs |= {"tag": tag, "idempotent": idempotent, "hedge": hedge, "timeout": timeout}
        return await self.call_service(service_name, path, "PUT", **kwargs)

    async def delete(
        self,
        service_name: str,
        path: str,
        *,
        tag: str | None = None,
        idempotent: bool | None = None,
        hedge: bool | None = None,
        timeout: Seconds = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """``call_service`` with DELETE."""
        kwargs |= {"tag": tag, "idempotent": idempotent, "hedge": hedge, "timeout": timeout}
        return await self.call_service(service_name, path, "DELETE", **kwargs)

    async def patch(
        self,
        service_name: str,
        path: str,
        *,
        tag: str | None = None,
        idempotent: bool | None = None,
        hedge: bool | None = None,
        timeout: Seconds = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """``call_service`` with PATCH: repeated only if no instance can have seen it, or if it may be sent twice."""
        kwargs |= {"tag": tag, "idempotent": idempotent, "hedge": hedge, "timeout": timeout}
        return await self.call_service(service_name, path, "PATCH", **kwargs)

    def explain(self, service_name: str, tag: str | None = None) -> Explanation:
        """The state of each instance in this process: why it is picked or not. Reads memory only, never blocks."""
        return self._transport.explain(service_name, tag)

    def explain_all(self) -> tuple[Explanation, ...]:
        """The same of every service that was called and is still known, once for each tag."""
        return self._transport.explain_all()

    def observe(self, observer: Observer) -> None:
        """Tells it of all this, too, from now on."""
        self._transport.observers.add(observer)

    def use_peers(self, peers: Peers | None) -> None:
        """Calls instances of the mesh by it, unless ``connections`` names others; before the first call."""
        self._transport.use_peers(peers)

    def use_zone(self, zone: str | None) -> None:
        """Prefers instances of this zone, unless it was made with a ``zone``; before the first call."""
        self._transport.use_zone(zone)

    async def aclose(self) -> None:
        """Closes all connections and ends the watches."""
        await self._way.aclose()
        await self.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
