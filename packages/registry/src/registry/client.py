"""The facade: call a service by name, get an ``httpx.Response`` or an error that says what happened."""

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from registry.balancing import Pick, random_pick
from registry.errors import InvalidInputError
from registry.resolver import Resolver
from registry.retry import RetryPolicy
from registry.transport import DiscoveryTransport
from registry.validation import check_path, check_service, check_tag

__all__ = ["ServiceDiscoveryClient"]

_METHOD = re.compile(r"[A-Z]{1,32}", re.ASCII)
_UNSAFE_IN_HEADER = re.compile(r"[\r\n\0]")
_MAX_CONNECT = 2.0


class _HasResolver(Protocol):
    def resolver(self) -> Resolver: ...


class ServiceDiscoveryClient:
    """Calls services by name over one long-lived httpx client; belongs to one event loop. Close it when done.

    ``registry``: a ServiceRegistry, or any Resolver. ``timeout``: seconds that one attempt may take; connecting takes
    at most 2 of them. ``deadline``: seconds for the whole call, by default twice the timeout. ``max_retries``:
    attempts in total, at least 1; each goes to an instance not yet tried, and only once all were tried comes a
    back-off that grows from ``retry_delay`` seconds.
    """

    def __init__(
        self,
        registry: "Resolver | _HasResolver",
        timeout: float = 30.0,
        max_retries: int = 3,
        retry_delay: float = 1.0,
        *,
        deadline: float | None = None,
        pick: Pick = random_pick,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if timeout <= 0 or retry_delay < 0 or max_retries < 1 or (deadline is not None and deadline <= 0):
            raise InvalidInputError(
                "timeout and deadline are seconds above 0, retry_delay is 0 or more, max_retries is 1 or more"
            )
        self._timeout = timeout
        discovery = DiscoveryTransport(
            registry if isinstance(registry, Resolver) else registry.resolver(),
            retry=RetryPolicy(max_retries, retry_delay),
            deadline=2 * timeout if deadline is None else deadline,
            pick=pick,
            transport=transport,
        )
        self._http = httpx.AsyncClient(transport=discovery, timeout=_timeouts(timeout), follow_redirects=True)

    async def call_service(
        self,
        service_name: str,
        path: str,
        method: str = "GET",
        tag: str | None = None,
        headers: Mapping[str, str] | None = None,
        params: Any = None,
        json: Any = None,
        data: Any = None,
        *,
        idempotent: bool | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """The answer of one instance of the service, its body read; other keywords go to ``httpx.AsyncClient.request``.

        ``path`` starts with ``/`` and may carry a query. ``idempotent=True``: this request may be sent twice, whatever
        its method. ``timeout``: seconds for one attempt, instead of the client's. Cancelling it cancels the attempt.

        Raises: httpx.HTTPStatusError for a 4xx at once and for a 5xx after the last attempt; httpx.TransportError
        after the last attempt; ServiceNotFoundError (a ValueError), NoHealthyInstanceError, RegistryUnavailableError;
        InvalidInputError before anything is sent.
        """
        check_service(service_name)
        check_path(path)
        if not _METHOD.fullmatch(method.upper()):
            raise InvalidInputError(f"{method!r} is not an HTTP method: pass GET, POST, PUT, PATCH, DELETE or another")
        for name, value in (headers or {}).items():
            if _UNSAFE_IN_HEADER.search(name + str(value)):
                raise InvalidInputError(f"header {name!r} holds a line break or NUL: remove it")
        extensions = dict(kwargs.pop("extensions", None) or {})
        if tag is not None:
            extensions["tag"] = check_tag(tag)
        if idempotent is not None:
            extensions["idempotent"] = idempotent
        response = await self._http.request(
            method.upper(),
            f"http://{service_name}{path}",
            headers=headers,
            params=params,
            json=json,
            data=data,
            extensions=extensions,
            timeout=_timeouts(self._timeout if timeout is None else timeout),
            **kwargs,
        )
        try:
            return response.raise_for_status() if response.is_error else response
        except httpx.HTTPStatusError as error:
            for note in response.extensions.get("attempts", ()):
                error.add_note(note)
            raise

    async def get(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with GET."""
        return await self.call_service(service_name, path, "GET", **kwargs)

    async def post(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with POST: sent again only if it can't have been seen, or may be sent twice."""
        return await self.call_service(service_name, path, "POST", **kwargs)

    async def put(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with PUT."""
        return await self.call_service(service_name, path, "PUT", **kwargs)

    async def delete(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with DELETE."""
        return await self.call_service(service_name, path, "DELETE", **kwargs)

    async def patch(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with PATCH: sent again only if it can't have been seen, or may be sent twice."""
        return await self.call_service(service_name, path, "PATCH", **kwargs)

    async def aclose(self) -> None:
        """Closes all connections and ends the watches."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def _timeouts(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=min(seconds, _MAX_CONNECT))
