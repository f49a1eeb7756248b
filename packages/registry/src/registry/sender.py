"""One attempt: a request to a given instance over kept-alive connections, its answer or an httpx error.

Why not httpx-aiohttp, see docs/adr: it reports a connection that broke after the request was written as one that was
never made, and a POST would be sent twice.
"""

import asyncio
import math
import select
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from typing import Any, Protocol

import aiohttp
import httpx
from aiohttp.connector import Connection
from yarl import URL

from registry.model import Instance

__all__ = ["AiohttpSender", "HttpxSender", "Sender"]

KEEPALIVE = 4.0
"""Seconds that an idle connection is kept: less than uvicorn's 5, or a request would meet a connection just closed."""


_UNTYPED = frozenset({"Content-Type"})


class Sender(Protocol):
    """Sends a request to one instance, whatever host its URL names."""

    async def send(
        self, request: httpx.Request, instance: Instance, extra: Mapping[str, str], limit: float | None, *, read: bool
    ) -> httpx.Response:
        """The answer, its body read if ``read``. ``extra``: headers of this attempt. ``limit``: seconds for all of it.

        Raises: httpx.TransportError: ConnectError and ConnectTimeout mean that nothing was sent.
        """
        ...

    async def aclose(self) -> None:
        """Closes all connections."""
        ...


class HttpxSender:
    """Sends through any httpx transport: one attempt is one request with another host."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def send(
        self, request: httpx.Request, instance: Instance, extra: Mapping[str, str], limit: float | None, *, read: bool
    ) -> httpx.Response:
        addressed = httpx.Request(
            request.method,
            request.url.copy_with(host=instance.address, port=instance.port),
            # The Host header stays the logical one: a redirect then comes back to the service, and is balanced again.
            headers=[*request.headers.multi_items(), *extra.items()],
            stream=request.stream,
            extensions=request.extensions,
        )
        try:
            async with asyncio.timeout(limit):
                response = await self._transport.handle_async_request(addressed)
                if read:
                    await response.aread()
                    await response.aclose()
        except TimeoutError:
            raise httpx.ReadTimeout(f"no answer within {limit:.3f} s", request=request) from None
        response.request = request
        return response

    async def aclose(self) -> None:
        """Closes the transport."""
        await self._transport.aclose()


class AiohttpSender:
    """Sends through aiohttp, whose connections cost a quarter of httpx's. Opens its session with the first request."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(
        self, request: httpx.Request, instance: Instance, extra: Mapping[str, str], limit: float | None, *, read: bool
    ) -> httpx.Response:
        url = request.url
        target = URL(f"{url.scheme}://{instance.netloc}{url.raw_path.decode('ascii')}", encoded=True)
        headers = _headers(request)
        headers += extra.items()
        body: bytes | httpx.AsyncByteStream | None
        if isinstance(request.stream, httpx.ByteStream):
            body = b"".join(request.stream) or None  # not .content, which a redirected request lacks
        else:
            body = request.stream  # type: ignore[assignment]  # httpx types it wider than what async clients send
            headers = [pair for pair in headers if pair[0].lower() != "transfer-encoding"]  # aiohttp sets its own
        timeouts = request.extensions.get("timeout", {})
        timeout = _client_timeout(
            limit if read else None,
            _less(timeouts.get("connect"), limit),
            timeouts.get("read") if limit is None or not read else None,
        )
        sent = self._open().request(
            request.method,
            target,
            headers=headers,
            data=body,
            allow_redirects=False,
            timeout=timeout,
            # aiohttp would name a body's type where the caller did not.
            skip_auto_headers=None if body is None or "Content-Type" in request.headers else _UNTYPED,
        )
        content = stream = None
        try:
            if read:
                async with sent as response:
                    content = await response.read()
            else:
                async with asyncio.timeout(limit):
                    response = await sent
                stream = _Stream(response)
        except (aiohttp.ClientError, OSError) as error:
            raise _as_httpx(error, request) from error
        except ValueError as error:
            raise httpx.LocalProtocolError(str(error), request=request) from error
        answer = httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=stream or httpx.ByteStream(content or b""),
            request=request,
            extensions={
                "http_version": b"HTTP/1.1",
                "reason_phrase": (response.reason or "").encode(errors="surrogateescape"),
            },
        )
        if read and "Content-Encoding" in response.headers:
            answer.read()
        elif read:
            _mark_read(answer, content or b"")
        return answer

    def _open(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            self._loop = loop
            self._session = aiohttp.ClientSession(
                connector=_Connector(limit=0, keepalive_timeout=KEEPALIVE),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
            # By itself it would send an idempotent request again to the instance that broke it off: beside the budget,
            # and where it failed just now. There is no public switch; test_sender counts requests at the server.
            self._session._retry_connection = False  # noqa: SLF001
        return self._session

    async def aclose(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()


class _Connector(aiohttp.TCPConnector):
    """Gives no request a kept-alive connection which the instance has closed meanwhile.

    The event loop learns of that only with its next turn: a POST written before then would be lost.
    """

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            if not _is_closed(connection.transport):
                return connection
            connection.close()


_CLOSED = getattr(select, "POLLRDHUP", select.POLLHUP) | select.POLLHUP | select.POLLERR


def _is_closed(transport: asyncio.Transport | None) -> bool:
    """Whether the other side has closed the connection, known to the event loop or not. Never blocks."""
    if transport is None or transport.is_closing():
        return True
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), _CLOSED)
    return bool(poll.poll(0))


@lru_cache(maxsize=64)
def _client_timeout(total: float | None, connect: float | None, read: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total, sock_connect=connect, sock_read=read)


def _headers(request: httpx.Request) -> list[tuple[str, str]]:
    try:
        return [(name.decode("ascii"), value.decode()) for name, value in request.headers.raw]
    except UnicodeDecodeError as error:
        # aiohttp can send nothing else: better an error than another value.
        raise httpx.LocalProtocolError(f"a header is no UTF-8: {error}", request=request) from error


def _less(connect: float | None, limit: float | None) -> float | None:
    """A little less than the limit for connecting, so that a time-out there is told from one after sending."""
    return connect if limit is None else min(math.inf if connect is None else connect, 0.9 * limit)


class _Stream(httpx.AsyncByteStream):
    """A body that is read piece by piece; closing it early closes its connection."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise _as_httpx(error, None) from error

    async def aclose(self) -> None:
        self._response.release()


def _mark_read(response: httpx.Response, content: bytes) -> None:
    """What ``response.read()`` does, without the decoders, where there is nothing to decode: 8 µs less."""
    response._content = content  # noqa: SLF001  # there is no public way; test_sender holds that all is as if read
    response._num_bytes_downloaded = len(content)  # noqa: SLF001
    response.is_closed = response.is_stream_consumed = True


def _as_httpx(error: Exception, request: httpx.Request | None) -> httpx.TransportError:
    """aiohttp's error in httpx's words. Only what proves that no byte was written becomes a connect error."""
    kind: type[httpx.TransportError] = httpx.ReadError
    if isinstance(error, aiohttp.ClientConnectorError):
        kind = httpx.ConnectError
    elif isinstance(error, aiohttp.ConnectionTimeoutError):
        kind = httpx.ConnectTimeout
    elif isinstance(error, TimeoutError):
        kind = httpx.ReadTimeout
    elif isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientResponseError, aiohttp.ClientPayloadError)):
        kind = httpx.RemoteProtocolError
    elif isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
        kind = httpx.UnsupportedProtocol
    return kind(str(error) or type(error).__name__, request=request)
