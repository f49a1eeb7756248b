"""The facade: call a service by name, get an ``httpx.Response`` or an error that says what happened."""

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import httpx

from registry.balancing import Pick
from registry.errors import InvalidInputError
from registry.resolver import Resolver
from registry.retry import RetryPolicy
from registry.transport import DiscoveryTransport
from registry.upstream import Explanation
from registry.validation import check_path, check_service, check_tag

__all__ = ["ServiceDiscoveryClient"]

_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH"})
_METHOD = re.compile(r"[A-Z]{1,32}", re.ASCII)
_UNSAFE_IN_HEADER = re.compile(r"[\r\n\0]")
_MAX_CONNECT = 2.0


@runtime_checkable
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
        policy: str | Pick = "p2c",
        hedge: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout = _check_seconds("timeout", timeout)
        self._hedge = hedge
        self._transport = DiscoveryTransport(
            registry.resolver() if isinstance(registry, _HasResolver) else registry,
            retry=RetryPolicy(max_retries, retry_delay),
            deadline=2 * timeout if deadline is None else _check_seconds("deadline", deadline),
            policy=policy,
            transport=transport,
        )
        self.http = httpx.AsyncClient(transport=self._transport, timeout=_timeouts(timeout), follow_redirects=True)
        """The httpx client over the same transport, for what the facade does not offer: streams, hooks, auth.

        URLs are ``http://<service name>/path``. Of what is set here, hooks and auth hold for the facade's calls too.
        """
        self._default_headers = lru_cache(maxsize=256)(
            lambda service: httpx.Headers({"Host": service, **self.http.headers})
        )
        self._timeouts = {timeout: _timeouts(timeout).as_dict()}

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
        hedge: bool | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """The answer of one instance of the service, its body read; other keywords go to ``httpx.AsyncClient.request``.

        ``path`` starts with ``/`` and may carry a query. ``idempotent=True``: this request may be sent twice, whatever
        its method. ``hedge=True``: when the answer takes longer than 95 % of the last ones, ask another instance too
        and take the first answer; idempotent requests only. ``timeout``: seconds for one attempt, instead of the
        client's. Cancelling the call cancels its attempts.

        Raises: httpx.HTTPStatusError for a 4xx at once and for a 5xx after the last attempt; httpx.TransportError
        after the last attempt; ServiceNotFoundError (a ValueError), NoHealthyInstanceError, RegistryUnavailableError;
        InvalidInputError before anything is sent.
        """
        url = _url(service_name, path)
        method = method if method in _METHODS else _check_method(method)
        for name, value in (headers or {}).items():
            if _UNSAFE_IN_HEADER.search(f"{name}{value}"):
                raise InvalidInputError(f"header {name!r} holds a line break or NUL: remove it")
        extensions: dict[str, Any] = {
            "tag": None if tag is None else check_tag(tag),
            "hedge": self._hedge if hedge is None else hedge,
        }
        if idempotent is not None:
            extensions["idempotent"] = idempotent
        limit = self._timeout if timeout is None else _check_seconds("timeout", timeout)
        extensions["timeout"] = self._timeouts.get(limit) or _timeouts(limit).as_dict()
        if isinstance(data, (str, bytes)):
            kwargs["content"], data = data, None
        if params is not None:
            url = url.copy_merge_params(params)
        http = self.http
        if kwargs or http.auth is not None or http.event_hooks["request"] or http.event_hooks["response"]:
            sending = {key: kwargs.pop(key) for key in ("auth", "follow_redirects") if key in kwargs}
            extensions |= kwargs.pop("extensions", None) or {}
            request = http.build_request(
                method, url, headers=headers, json=json, data=data, extensions=extensions, **kwargs
            )
            response = await http.send(request, **sending)
        else:
            request = self._request(method, service_name, url, headers, json, data, extensions)
            # The short way: through the same transport, without httpx's client around it.
            started = perf_counter()
            response = await self._transport.send(request, read=True, limit=limit)
            response.elapsed = timedelta(seconds=perf_counter() - started)
            if response.has_redirect_location:
                request.extensions["answered"] = response
                response = await http.send(request)
        try:
            return response.raise_for_status() if response.is_error else response
        except httpx.HTTPStatusError as error:
            for note in response.extensions.get("attempts", ()):
                error.add_note(note)
            raise

    def _request(
        self,
        method: str,
        service: str,
        url: httpx.URL,
        headers: Mapping[str, str] | None,
        json: Any,
        data: Any,
        extensions: dict[str, Any],
    ) -> httpx.Request:
        defaults = self._default_headers(service)
        if headers is not None:
            defaults = httpx.Headers({**defaults, **httpx.Headers(headers)})
        if json is not None or data is not None:
            return httpx.Request(method, url, headers=defaults, json=json, data=data, extensions=extensions)
        if method in _WITHOUT_BODY:
            request = httpx.Request(method, url, headers=defaults, stream=httpx.ByteStream(b""), extensions=extensions)
            request.read()
            return request
        return httpx.Request(method, url, headers=defaults, extensions=extensions)

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

    def explain(self, service_name: str, tag: str | None = None) -> Explanation:
        """Why an instance of the service would be chosen or not, as this process sees it now. Memory only."""
        return self._transport.explain(service_name, tag)

    async def aclose(self) -> None:
        """Closes all connections and ends the watches."""
        await self.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def _check_seconds(name: str, seconds: float) -> float:
    if not 0 < seconds < math.inf:
        raise InvalidInputError(f"{name}={seconds!r}: pass a number of seconds above 0")
    return seconds


def _timeouts(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=min(seconds, _MAX_CONNECT))


@lru_cache(maxsize=1024)
def _url(service: str, path: str) -> httpx.URL:
    return httpx.URL(f"http://{check_service(service)}{check_path(path)}")


def _check_method(method: str) -> str:
    if not _METHOD.fullmatch(method.upper()):
        raise InvalidInputError(f"{method!r} is not an HTTP method: pass GET, POST, PUT, PATCH, DELETE or another")
    return method.upper()
