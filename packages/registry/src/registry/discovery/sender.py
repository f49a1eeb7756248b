"""One attempt: a request to a given instance, its answer or an httpx error that says how far it came.

Why it speaks through h11 itself, see docs/adr/0005-inner-transport.md.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import httpx

from registry.discovery.connection import Connection
from registry.discovery.connections import Connections, Origin
from registry.discovery.decoding import unpacked
from registry.discovery.http11 import Exchange
from registry.discovery.options import ConnectionOptions
from registry.discovery.peers import refuse_peer
from registry.discovery.plain import Answer, names
from registry.errors import ResponseTooLargeError
from registry.model import Instance

__all__ = ["H11Sender", "HttpxSender", "Sender", "Stream"]


class Sender(Protocol):
    """Sends a request to one instance, whatever host its URL names."""

    async def send(
        self, request: httpx.Request, instance: Instance, extra: Mapping[str, str], limit: float | None, *, read: bool
    ) -> httpx.Response:
        """The answer, its body read if ``read``. ``limit``: seconds for all of it.

        ``extra``: headers of this attempt, in place of the request's own of these names.

        Raises: httpx.TransportError: ConnectError, ConnectTimeout, PoolTimeout, LocalProtocolError and
        UnsupportedProtocol mean that nothing was sent. httpx.DecodingError, if ``read``. What the source of the
        request's body raises.
        """
        ...

    async def aclose(self) -> None:
        """Closes all connections."""
        ...


class HttpxSender:
    """Sends through any httpx transport: one attempt is one request with another host."""

    def __init__(self, transport: httpx.AsyncBaseTransport, options: ConnectionOptions | None = None) -> None:
        self._transport = transport
        self._options = options or ConnectionOptions()

    async def send(
        self, request: httpx.Request, instance: Instance, extra: Mapping[str, str], limit: float | None, *, read: bool
    ) -> httpx.Response:
        refuse_peer(instance)
        replaced = names(extra)
        kept = [pair for pair in request.headers.raw if pair[0].lower() not in replaced]
        addressed = httpx.Request(
            request.method,
            request.url.copy_with(scheme=_scheme(request, instance), host=instance.address, port=instance.port),
            # The Host header stays the logical one: a redirect then comes back to the service, and is balanced again.
            headers=[*kept, *((name.encode(), value.encode()) for name, value in extra.items())],
            stream=request.stream,
            extensions=request.extensions,
        )
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                response = await self._transport.handle_async_request(addressed)
                if read:
                    try:
                        await self._read(response)
                    finally:
                        await response.aclose()
        except TimeoutError:
            if not scope.expired():
                raise  # the transport's own, or the upload's source's
            raise httpx.ReadTimeout(f"no answer within {limit:.3f} s", request=request) from None
        response.request = request
        return response

    async def _read(self, response: httpx.Response) -> None:
        if response.is_stream_consumed:  # It came read.
            _check_size(len(response.content), self._options)
            return
        content = bytearray()
        async for piece in response.aiter_raw():
            content += piece
            _check_size(len(content), self._options)
        await _mark_read(response, bytes(content), self._options)

    async def aclose(self) -> None:
        await self._transport.aclose()


class H11Sender:
    """Sends over connections of its own, opened with the first request; they belong to the event loop of that time."""

    def __init__(self, options: ConnectionOptions | None = None) -> None:
        self._options = options or ConnectionOptions()
        self._connections: Connections | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(
        self, request: httpx.Request, instance: Instance, extra: Mapping[str, str], limit: float | None, *, read: bool
    ) -> httpx.Response:
        if request.url.scheme not in {"http", "https"}:
            raise httpx.UnsupportedProtocol(f"{str(request.url)!r} is no http or https URL", request=request)
        exchange = Exchange(request, extra, self._options, whole=read)
        timeouts, pool = exchange.timeouts, self._pool()
        until = None
        if limit is not None:
            until = asyncio.get_running_loop().time() + limit
            if read and limit <= (timeouts.get("read") or limit):
                exchange.timeouts = {"write": timeouts.get("write")}  # The limit comes first: no timer for each wait.
        origin = Origin.of(instance, _scheme(request, instance))
        connection = stream = None
        scope = asyncio.timeout_at(until)
        try:
            # Not within the scope: whether it is for the pool, the connection or the answer that time has run out must
            # be known.
            connection = await pool.acquire(origin, timeouts.get("connect"), timeouts.get("pool"), until)
            async with scope:
                connection.start(exchange)
                head = await connection.head()
                if read:
                    packed = await self._read(connection)
                    pool.release(connection, origin)
                    connection = None  # It may be another call's by now.
                    response = _response(request, head, httpx.ByteStream(b""))
                    await _mark_read(response, packed, self._options)
                else:
                    stream = Stream(connection, pool, origin, request)
                    response = _response(request, head, stream)
        except BaseException as error:
            if connection is not None and stream is None:
                pool.release(connection, origin)
            if isinstance(error, TimeoutError) and scope.expired():
                late = httpx.WriteTimeout if connection is not None and connection.uploading else httpx.ReadTimeout
                raise late(f"no answer within {limit:.3f} s", request=request) from None
            if isinstance(error, httpx.RequestError):
                error.request = request
            raise
        return response

    async def _read(self, connection: Connection) -> bytes:
        pieces, size = [], 0
        while piece := await connection.data():
            size += len(piece)
            _check_size(size, self._options)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _pool(self) -> Connections:
        loop = asyncio.get_running_loop()
        if self._connections is None or self._loop is not loop:
            self._loop, self._connections = loop, Connections(self._options)
        return self._connections

    async def aclose(self) -> None:
        if self._connections is not None and self._loop is asyncio.get_running_loop():
            self._connections.close()
            await asyncio.sleep(0)  # The event loop closes sockets with its next turn.


class Stream(httpx.AsyncByteStream):
    """A body that is read piece by piece; closing it early closes its connection."""

    def __init__(self, connection: Connection, pool: Connections, origin: Origin, request: httpx.Request) -> None:
        self._connection: Connection | None = connection
        self._pool = pool
        self._origin = origin
        self._request = request
        self._failure: httpx.RequestError | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while piece := await self.next_piece():
                yield piece
        finally:
            await self.aclose()

    async def next_piece(self) -> bytes:
        """Undecoded; empty: there is no more. Raises: httpx.TransportError; what the source of the request raises."""
        piece = b""
        try:
            if self._failure is not None:
                raise self._failure
            if self._connection is not None:
                piece = await self._connection.data()
        except httpx.RequestError as error:
            error.request = self._request
            raise
        finally:
            if not piece:
                await self.aclose()
        return piece

    def here(self) -> bytes | None:
        """The next piece if it has come already; None: only ``next_piece`` can tell. Raises nothing."""
        piece: bytes | None = b""
        try:
            if self._connection is not None:
                piece = self._connection.here()
        except httpx.RequestError as error:
            self._failure = error
            return None
        if piece == b"":
            self._release()
        return piece

    async def aclose(self) -> None:
        self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.release(connection, self._origin)


def _response(request: httpx.Request, head: Answer, stream: httpx.AsyncByteStream) -> httpx.Response:
    return httpx.Response(
        head.status,
        headers=head.headers,
        stream=stream,
        request=request,
        extensions={"http_version": b"HTTP/" + head.version, "reason_phrase": head.reason},
    )


def _scheme(request: httpx.Request, instance: Instance) -> str:
    """What to speak: TLS with an instance that says so of itself, else what the caller asked for."""
    return "https" if instance.scheme == "https" else request.url.scheme


def _check_size(size: int, options: ConnectionOptions) -> None:
    if size > options.max_response_size:
        raise ResponseTooLargeError("the answer's body", "max_response_size", options.max_response_size)


async def _mark_read(response: httpx.Response, packed: bytes, options: ConnectionOptions) -> None:
    """What ``response.aread()`` does, within limits, and where there is nothing to unpack 8 µs quicker."""
    content = packed
    if "Content-Encoding" in response.headers and packed:
        content = await unpacked(response, packed, options.max_response_size)
    response._content = content  # noqa: SLF001  # there is no public way; test_sender holds that all is as if read
    response._num_bytes_downloaded = len(packed)  # noqa: SLF001
    response.is_closed = response.is_stream_consumed = True
