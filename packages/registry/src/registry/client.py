"""The facade: call a service by name; get an ``httpx.Response``, or an error that says what happened."""

import math
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import httpx
from httpx._types import HeaderTypes

from registry.discovery.balancing import Pick
from registry.discovery.call import Terms
from registry.discovery.options import ConnectionOptions
from registry.discovery.redirects import Way
from registry.discovery.resolver import Resolver
from registry.discovery.retry import RetryPolicy
from registry.discovery.transport import DiscoveryTransport
from registry.discovery.upstream import Explanation
from registry.errors import InvalidInputError
from registry.validation import check_known_service, check_path, check_service, check_tag

__all__ = ["ServiceDiscoveryClient"]

_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH"})
_METHOD = re.compile(r"[A-Z]{1,32}", re.ASCII)
# RFC 9110, 5.6.2: token = 1*tchar
_HEADER_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNSAFE_IN_VALUE = re.compile(rb"[\r\n\0]")
_MAX_CONNECT = 2.0


@runtime_checkable
class _HasResolver(Protocol):
    def resolver(self) -> Resolver: ...


class ServiceDiscoveryClient:
    """Calls services by name, over connections that it keeps open. Belongs to one event loop; close it when done.

    ``registry``: a ServiceRegistry, or any Resolver. ``timeout``: time limit for one attempt, in seconds; connecting
    may take at most 2 s of it. ``deadline``: time limit for the whole call, in seconds; by default twice the timeout.
    ``max_retries``: attempts in total, at least 1. Each attempt goes to an instance that the call has not tried. Once
    all have been tried, it waits before the next attempt, for a delay that grows from ``retry_delay`` seconds.
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
        connections: ConnectionOptions | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout = _check_seconds("timeout", timeout)
        self._deadline = 2 * timeout if deadline is None else _check_seconds("deadline", deadline)
        self._hedge = hedge
        self._transport = DiscoveryTransport(
            registry.resolver() if isinstance(registry, _HasResolver) else registry,
            retry=RetryPolicy(max_retries, retry_delay),
            deadline=self._deadline,
            policy=policy,
            connections=connections,
            transport=transport,
        )
        self.http = httpx.AsyncClient(transport=self._transport, timeout=_timeouts(timeout), follow_redirects=True)
        """The httpx client over the same transport, for what the facade does not offer: streams, cookies.

        URLs are ``http://<service name>/path``. Headers, params, hooks and auth that are set here also apply to the
        calls of the facade; cookies do not.
        """
        self._way = Way(self._transport, self.http, self._terms)
        self._defaults: dict[str, httpx.Headers] = {}
        self._defaults_of: list[tuple[bytes, bytes]] = []
        self._timeouts = {timeout: _timeouts(timeout).as_dict()}

    async def call_service(
        self,
        service_name: str,
        path: str,
        method: str = "GET",
        tag: str | None = None,
        headers: HeaderTypes | None = None,
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
        timeout: float | httpx.Timeout | None = None,
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
        url, other = _target(service_name, path)
        method = method if method in _METHODS else _check_method(method)
        if isinstance(data, (str, bytes)):
            content, data = data, None
        if default_params := self.http.params:
            params = default_params.merge(params)
        if params is not None:
            url = url.copy_merge_params(params)
        limit: float | None = self._timeout
        if isinstance(timeout, httpx.Timeout):
            limit, timeouts = None, timeout.as_dict()
        else:
            limit = self._timeout if timeout is None else _check_seconds("timeout", timeout)
            timeouts = self._timeouts.get(limit) or _timeouts(limit).as_dict()
        asked: dict[str, Any] = {"timeout": timeouts, "hedge": self._hedge if hedge is None else hedge}
        if idempotent is not None:
            asked["idempotent"] = idempotent
        if extensions:
            asked |= extensions
            tag = asked.get("tag", tag)
        shape: dict[str, Any] = {"headers": self._headers(url, headers), "extensions": asked}
        if not (content is None and data is None and files is None and json is None):
            shape |= {"content": content, "data": data, "files": files, "json": json}
        elif method in _WITHOUT_BODY:
            shape["stream"] = httpx.ByteStream(b"")  # what httpx comes to, in a quarter of the time
        request = httpx.Request(method, url, cookies=cookies, **shape)
        if "stream" in shape:
            request.read()
        terms = self._terms(limit, None if tag is None else check_tag(tag), other)
        response = await self._way.send(request, terms, auth, follow_redirects)
        try:
            return response.raise_for_status() if response.is_error else response
        except httpx.HTTPStatusError as error:
            for note in response.extensions.get("attempts", ()):
                error.add_note(note)
            raise

    def _headers(self, url: httpx.URL, headers: HeaderTypes | None) -> httpx.Headers:
        """What httpx's client would send: its own headers, those of the call in place of what they name."""
        if (now := self.http.headers.raw) != self._defaults_of:
            self._defaults, self._defaults_of = {}, now
        defaults = self._defaults.get(url.host)
        if defaults is None:
            defaults = self._defaults[url.host] = httpx.Headers([(b"Host", url.netloc), *now])
        if headers is None:
            return defaults
        merged = httpx.Headers(defaults)
        given = httpx.Headers(headers)
        for name, value in given.raw:
            if not _HEADER_NAME.fullmatch(name):
                raise InvalidInputError(f"{name!r} is no header name: use letters, digits and hyphens")
            if _UNSAFE_IN_VALUE.search(value):
                raise InvalidInputError(f"header {name!r} holds a line break or NUL: remove it")
        merged.update(given)
        return merged

    def _terms(self, limit: float | None = None, tag: str | None = None, service: str | None = None) -> Terms:
        return Terms(service, tag, True, limit, self._timeout, time.time() + self._deadline)

    async def get(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with GET."""
        return await self.call_service(service_name, path, "GET", **kwargs)

    async def post(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with POST: repeated only if no instance can have seen it, or if it may be sent twice."""
        return await self.call_service(service_name, path, "POST", **kwargs)

    async def put(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with PUT."""
        return await self.call_service(service_name, path, "PUT", **kwargs)

    async def delete(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with DELETE."""
        return await self.call_service(service_name, path, "DELETE", **kwargs)

    async def patch(self, service_name: str, path: str, **kwargs: Any) -> httpx.Response:
        """``call_service`` with PATCH: repeated only if no instance can have seen it, or if it may be sent twice."""
        return await self.call_service(service_name, path, "PATCH", **kwargs)

    def explain(self, service_name: str, tag: str | None = None) -> Explanation:
        """The state of each instance in this process: why it is picked or not. Reads memory only, never blocks."""
        return self._transport.explain(service_name, tag)

    async def aclose(self) -> None:
        """Closes all connections and ends the watches."""
        await self._way.aclose()
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
def _target(service: str, path: str) -> tuple[httpx.URL, str | None]:
    """The URL, and the service's name if it is not a valid host: somebody else registered it."""
    check_path(path)
    try:
        return httpx.URL(f"http://{check_service(service)}{path}"), None
    except InvalidInputError:
        name = check_known_service(service).lower()
    host = re.sub("[^a-z0-9]+", "-", name)[:60].strip("-")
    return httpx.URL(f"http://s-{host or 'x'}{path}"), name


def _check_method(method: str) -> str:
    if not _METHOD.fullmatch(method.upper()):
        raise InvalidInputError(f"{method!r} is not an HTTP method: pass GET, POST, PUT, PATCH, DELETE or another")
    return method.upper()
