"""One way to Consul: py-consul's endpoints over an httpx client, sync or async, and its errors in our words."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode

import httpx
from consul.base import Consul, HTTPClient, Response
from consul.callback import CB
from consul.exceptions import ACLPermissionDenied, ConsulException

from registry.consul.login import LOGOUT_TIMEOUT, token_source
from registry.consul.opening import async_client, base_url, server_name, sync_client
from registry.consul.refusals import (
    MOST_EMPTY,
    UnprovenEmptyError,
    check_origin,
    check_rights,
    consul_errors,
    is_signed,
    is_unknown,
)
from registry.settings import ConsulSettings
from registry.threads import in_daemon_thread

__all__ = ["AsyncConsul", "SyncConsul", "UnprovenEmptyError", "consul_errors"]

Params = Sequence[tuple[str, Any]] | None
Callback = Callable[[Response], Any]
Request = dict[str, Any]
T = TypeVar("T")


class _Fed(Protocol):
    def feed(self, piece: bytes) -> None: ...


Sink = TypeVar("Sink", bound=_Fed)

_PARKING = {"hash", "index", "wait"}
_AGAIN = 0.2
"""Seconds until a denied request is sent once more with the same token, as nobody has another one."""


class _Requests(HTTPClient):  # type: ignore[misc]  # py-consul has no types
    """What the sync and the async client share: how a request is built and how an answer is read."""

    def __init__(self, settings: ConsulSettings) -> None:
        super().__init__(settings.host, settings.port, settings.scheme)
        self.base_uri = base_url(settings)
        self.settings = settings
        self.tokens = token_source(settings, self)

    def uri(self, path: str, params: Params = None) -> str:
        """As py-consul's, but what is percent-encoded stays as it is: a service's name may hold a slash."""
        return f"{self.base_uri}{quote(path, safe='/:%')}{'?' if params else ''}{urlencode(params or ())}"

    def request(self, method: str, path: str, params: Params, data: str | bytes = "") -> Request:
        query = list(params or ())
        if self.settings.consistency != "default" and path.startswith("/v1/health/"):
            query.append((self.settings.consistency, "1"))
        timeout = httpx.Timeout(self.settings.timeout)
        asked = dict(query).get("wait")
        if asked:
            wait = min(float(asked.removesuffix("s")), self.settings.wait)
            query = [(name, f"{wait:g}s" if name == "wait" else value) for name, value in query]
            # "a small random amount of additional wait time is added ... up to wait / 16"
            # Source: https://developer.hashicorp.com/consul/api-docs/features/blocking
            timeout.read = self.settings.timeout + wait * 17 / 16
        return {
            "method": method,
            "url": self.uri(path, query),
            "content": data.encode() if isinstance(data, str) else data,
            "headers": {},
            "timeout": timeout,
            "extensions": server_name(self.settings),
        }

    def signed(self, request: Request, token: str | None) -> Request:
        """With the token, for every endpoint: py-consul forgets it on some, and prefers its environment."""
        headers = request["headers"] | ({"X-Consul-Token": token} if token else {})
        return request | {"headers": headers}

    def answer(self, callback: Callback, answer: httpx.Response) -> Any:
        check_origin(answer)
        check_rights(answer, answer.content)
        return callback(Response(answer.status_code, answer.headers, answer.text))


def unparked(request: Request) -> Request:
    """The same, to be answered at once.

    A question that is parked with a token that Consul does not know ends like this: with an empty list, after the wait.
    """
    url = httpx.URL(request["url"])
    for name in _PARKING & set(url.params):
        url = url.copy_remove_param(name)
    return request | {"url": url}


class _SyncRequests(_Requests):
    def __init__(self, settings: ConsulSettings) -> None:
        super().__init__(settings)
        self._connect()

    def _connect(self) -> None:
        self.pid = os.getpid()
        self.client = sync_client(self.settings)

    def send(self, callback: Callback, **request: Any) -> Any:
        if self.pid != os.getpid():
            # Parent and child would read each other's answers from one socket. Not closed here: a thread that this
            # process does not have may hold its lock.
            self.inherited = self.client
            self._connect()
        token = self.tokens.current()
        try:
            return self.answer(callback, self.client.request(**self.signed(request, token)))
        except ACLPermissionDenied as denied:
            another = self.tokens.renewed(token, unknown=is_unknown(denied))
            if another is None:
                raise
        if another == token:
            time.sleep(_AGAIN)
        return self.answer(callback, self.client.request(**self.signed(unparked(request), another)))

    def last(self, method: str, callback: Callback, path: str, params: Params = None) -> Any:
        """A request that ends its connection: behind a load balancer, the next one may reach another agent."""
        request = self.request(method, path, params)
        request["headers"]["Connection"] = "close"
        return self.send(callback, **request)

    def get(self, callback: Callback, path: str, params: Params = None, headers: Any = None, raw: bool = False) -> Any:
        return self.send(callback, **self.request("GET", path, params))

    def put(
        self, callback: Callback, path: str, params: Params = None, data: str | bytes = "", headers: Any = None
    ) -> Any:
        return self.send(callback, **self.request("PUT", path, params, data))

    def delete(
        self, callback: Callback, path: str, params: Params = None, data: str | bytes = "", headers: Any = None
    ) -> Any:
        return self.send(callback, **self.request("DELETE", path, params, data))

    def post(self, callback: Callback, path: str, params: Params = None, data: str = "", headers: Any = None) -> Any:
        return self.send(callback, **self.request("POST", path, params, data))

    def close(self) -> None:
        self.client.close()
        self.tokens.leave(self)


class _AsyncRequests(_SyncRequests):
    """The same verbs; each returns an awaitable instead of its result."""

    def __init__(self, settings: ConsulSettings) -> None:
        _Requests.__init__(self, settings)
        self.async_client = async_client(settings)

    async def send(self, callback: Callback, **request: Any) -> Any:
        async def ask(request: Request) -> Any:
            return self.answer(callback, await self.async_client.request(**request))

        return await self._authorized(request, ask)

    async def get_in_pieces(self, new: Callable[[], Sink], path: str, params: Params = None) -> tuple[str, Sink]:
        """The index of an answer, and what was fed its body while that came in. A question asked again has a new one.

        Raises: as other requests do; consul.ConsulException, when there is no index.
        """

        async def pieces(request: Request) -> tuple[str, Sink]:
            sink, beginning = new(), b""
            async with self.async_client.stream(**request) as answer:
                if answer.is_error or not is_signed(answer):
                    await answer.aread()
                    self.answer(CB.json(allow_404=False), answer)
                async for piece in answer.aiter_bytes():
                    beginning += piece[: MOST_EMPTY - len(beginning)]
                    sink.feed(piece)
                    await asyncio.sleep(0)  # what came at once, unpacked, may be megabytes
            check_rights(answer, beginning)
            if "X-Consul-Index" not in answer.headers:
                raise ConsulException("an answer without an index")
            return answer.headers["X-Consul-Index"], sink

        return await self._authorized(self.request("GET", path, params), pieces)

    async def _authorized(self, request: Request, ask: Callable[[Request], Awaitable[T]]) -> T:
        token = await self.current_token()
        try:
            return await ask(self.signed(request, token))
        except ACLPermissionDenied as denied:
            another = await self._apart(partial(self.tokens.renewed, token, unknown=is_unknown(denied)))
            if another is None:
                raise
        if another == token:
            await asyncio.sleep(_AGAIN)
        return await ask(self.signed(unparked(request), another))

    async def current_token(self) -> str | None:
        """What the next request carries; None: nothing. Raises: RegistryError."""
        return await self._apart(self.tokens.current)

    async def aclose(self) -> None:
        await self.async_client.aclose()
        with suppress(TimeoutError):  # nobody waits for a resolver of names that hangs
            async with asyncio.timeout(LOGOUT_TIMEOUT):
                await self._apart(partial(self.tokens.leave, self))

    def close(self) -> Any:
        return self.aclose()

    async def _apart(self, work: Callable[[], T]) -> T:
        """Beside the loop, if it may block."""
        return await in_daemon_thread(work, "registry-login") if self.tokens.blocks else work()


class SyncConsul(Consul):  # type: ignore[misc]  # py-consul has no types
    """py-consul over ``httpx.Client``: every call blocks. Thread-safe."""

    requests: type[_SyncRequests] = _SyncRequests

    def __init__(self, settings: ConsulSettings) -> None:
        self.settings = settings
        # All of them given, so that py-consul reads none from the environment.
        super().__init__(settings.host, settings.port, scheme=settings.scheme, verify=True)

    def http_connect(self, *_: Any, **__: Any) -> _SyncRequests:
        return self.requests(self.settings)


class AsyncConsul(SyncConsul):
    """py-consul over ``httpx.AsyncClient``: every call returns an awaitable."""

    requests = _AsyncRequests
