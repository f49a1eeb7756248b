"""The same transport for callers that block: their threads wait, the work is done by one event loop in the background.

The loop runs in a daemon thread of its own, one per process, from the first call on. A forked child gets another one.
"""

import asyncio
import queue
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import httpx

from registry.discovery.background import BACKGROUND
from registry.discovery.balancing import Pick
from registry.discovery.options import ConnectionOptions
from registry.discovery.resolver import Resolver
from registry.discovery.retry import RetryPolicy
from registry.discovery.transport import DiscoveryTransport

__all__ = ["SyncDiscoveryTransport"]

_Result = TypeVar("_Result")
_Wanted = asyncio.Future[bytes | None]


class SyncDiscoveryTransport(httpx.BaseTransport):
    """What DiscoveryTransport does, for any ``httpx.Client``: Django, Flask, Celery, scripts. Safe to share by threads.

    ``httpx.Client(transport=SyncDiscoveryTransport(registry.resolver()), base_url="http://backend-api")``. Takes the
    same options and request extensions, and raises the same errors, in the calling thread. The body of a request is
    read in the calling thread too, piece by piece. A call that is interrupted, by Ctrl-C say, is cancelled. May be
    made before a fork and used after it, on both sides. Neither for coroutines, whose event loop it would block, nor
    for gevent and eventlet.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        retry: RetryPolicy | None = None,
        deadline: float | None = None,
        policy: str | Pick = "p2c",
        connections: ConnectionOptions | None = None,
    ) -> None:
        """The options mean what they mean to DiscoveryTransport. ``resolver``: not used on any other event loop."""

        def engine() -> DiscoveryTransport:
            return DiscoveryTransport(resolver, retry=retry, deadline=deadline, policy=policy, connections=connections)

        self._make, self._engine = engine, engine()
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(request)
        exchange.run(self._send(exchange))
        answer = exchange.answer
        assert answer is not None
        return httpx.Response(
            answer.status_code, headers=answer.headers, stream=_Body(exchange), extensions=answer.extensions
        )

    def close(self) -> None:
        """Closes all connections and ends the watches. The event loop's thread stays, for other transports."""
        if self._loop is not None and self._loop is BACKGROUND.loop():
            asyncio.run_coroutine_threadsafe(self._engine.aclose(), self._loop).result()

    async def _send(self, exchange: "_Exchange") -> None:
        if self._loop is not (loop := asyncio.get_running_loop()):
            if self._loop is not None:
                self._engine = self._make()  # What a parent process is in the middle of never ends in this one.
            self._loop = loop
        exchange.answer = await self._engine.handle_async_request(exchange.request)


class _Exchange:
    """One call, between the thread that waits for it and the event loop that makes it."""

    def __init__(self, request: httpx.Request) -> None:
        self.request = request
        self.answer: httpx.Response | None = None
        self._loop = BACKGROUND.loop()
        self._wanted = queue.SimpleQueue[_Wanted | None]()
        """Pieces of the request's body that the loop waits for; None: it has done what it was asked."""
        self._source: Iterator[bytes] | None = None
        self._pieces: AsyncIterator[bytes] | None = None
        self._over = False
        self._stream = request.stream
        if not isinstance(request.stream, httpx.ByteStream):
            method, url, headers, extensions = request.method, request.url, request.headers, request.extensions
            self.request = httpx.Request(method, url, headers=headers, stream=_Upload(self), extensions=extensions)

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Has the loop do it, and reads the request's body meanwhile. Interrupted, it takes everything back."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.add_done_callback(lambda _: self._wanted.put(None))
            while (wanted := self._wanted.get()) is not None:
                if not wanted.cancelled():
                    self._read(wanted)
            return future.result()
        except BaseException:
            future.cancel()
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            raise

    def next_piece(self) -> bytes:
        """Of the answer's body; empty: there is no more."""
        if self._loop is not BACKGROUND.loop():
            raise httpx.ReadError("this answer came before a fork: it is the parent process's to read")
        piece = self.run(self._next_piece())
        self._over = not piece
        return piece

    def close(self) -> None:
        """Releases the connection."""
        if not self._over and self._loop is BACKGROUND.loop():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()

    def _read(self, wanted: _Wanted) -> None:
        piece = error = None
        try:
            if self._source is None:
                assert isinstance(self._stream, Iterable)
                self._source = iter(self._stream)
            piece = next(self._source, None)
        except Exception as raised:
            error = raised
        self._loop.call_soon_threadsafe(_settle, wanted, piece, error)

    async def upload(self) -> AsyncIterator[bytes]:
        """The request's body, each piece read by the waiting thread when it is asked for."""
        loop = asyncio.get_running_loop()
        self._wanted.put(wanted := loop.create_future())
        while (piece := await wanted) is not None:
            yield piece
            self._wanted.put(wanted := loop.create_future())

    async def _next_piece(self) -> bytes:
        assert self.answer is not None
        self._pieces = self._pieces or self.answer.aiter_raw()
        return await anext(self._pieces, b"")

    async def _end(self) -> None:
        if self.answer is not None:
            await self.answer.aclose()


class _Upload(httpx.AsyncByteStream):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._exchange.upload()


class _Body(httpx.SyncByteStream):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._exchange.next_piece():
            yield piece

    def close(self) -> None:
        self._exchange.close()


def _settle(wanted: _Wanted, piece: bytes | None, error: Exception | None) -> None:
    if wanted.done():
        return  # Cancelled meanwhile.
    if error is None:
        wanted.set_result(piece)
    else:
        wanted.set_exception(error)
