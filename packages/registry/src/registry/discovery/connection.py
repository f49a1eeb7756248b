"""One connection to an instance, for one exchange at a time, over asyncio."""

import asyncio
import select
import ssl
import time
from collections.abc import Callable
from typing import cast

import httpx

from registry.discovery.http11 import Exchange
from registry.discovery.peers import rejection
from registry.discovery.plain import Answer

__all__ = ["Connection"]

_UNREAD = 262_144
"""Bytes that may wait for a slow reader before the sender is made to wait."""
_TURNS = 8
"""Within so many turns of its own, the event loop has told what came in."""
# Whatever there is to read on an idle connection, its end included, makes it unusable: nobody has asked for it.
_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


class Connection(asyncio.Protocol):
    """A connection; whoever sends on it reads the answer, and ends the exchange with ``finish``."""

    def __init__(self, on_lost: Callable[["Connection"], None]) -> None:
        self.idle_since = 0.0
        self.uploading = False
        """Whether the request is still being written."""
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._poll = select.poll()
        self._exchange: Exchange | None = None
        self._upload: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._closed = False
        self._lost_by: Exception | None = None
        self._heard = False
        """Whether the other side has ever said anything."""

    async def secure(self, context: ssl.SSLContext, host: str) -> ssl.SSLObject:
        """Speaks TLS from here on. Raises: ssl.SSLError, whatever else ends the handshake."""
        try:
            transport = await self._loop.start_tls(self._transport, self, context, server_hostname=host)
        except ssl.SSLError:
            raise
        except OSError as error:
            raise ssl.SSLError(f"the TLS handshake broke off: {error!r}") from error
        assert transport is not None
        self._transport = transport
        return cast("ssl.SSLObject", transport.get_extra_info("ssl_object"))

    async def settle(self) -> None:
        """Looks once more before the first request, without waiting. Raises: ssl.SSLError, if it is closed already.

        With TLS 1.3 a server looks at our certificate when our handshake is over: if it has said by now that it does
        not accept that, nothing is sent.
        """
        if self._poll.poll(0):
            for _ in range(_TURNS):
                await asyncio.sleep(0)
        if self._closed:
            raise rejection(self._lost_by) or ssl.SSLError("the connection was closed right after the handshake")

    def start(self, exchange: Exchange) -> None:
        """Sends the request, or begins to, without waiting."""
        self._exchange = exchange
        if self._closed:
            exchange.end()
            return
        self._transport.write(exchange.first)
        self.uploading = self._drained is not None
        if exchange.body is not None:
            self.uploading = True
            self._upload = self._loop.create_task(self._send(exchange))

    async def head(self) -> Answer:
        """The answer's head, as soon as it is there: perhaps before the request is sent whole.

        Raises: httpx.TransportError; ResponseTooLargeError; what the source of the request's body raises.
        """
        exchange = self._exchange
        assert exchange is not None
        while (head := exchange.head()) is None:
            await self._news(exchange)
        return head

    async def data(self) -> bytes:
        """The next piece of the answer's body, undecoded; empty: there is no more. Raises: as ``head``."""
        exchange = self._exchange
        assert exchange is not None
        while (data := exchange.data()) is None:
            await self._news(exchange)
        return data

    def here(self) -> bytes | None:
        """What ``data`` would return at once; None: it would wait. Raises: as ``head``."""
        assert self._exchange is not None
        return self._exchange.data()

    def finish(self) -> bool:
        """Ends the exchange; whether another may follow on this connection. Otherwise it is closed."""
        exchange, self._exchange = self._exchange, None
        if self._closed or self._failure or self.uploading or exchange is None or not exchange.over:
            self.close()
            return False
        self.idle_since = time.monotonic()
        return True

    def is_usable(self) -> bool:
        """Whether a request may be sent: still open, known to the event loop or not, and nothing came unasked."""
        return not self._closed and not self._poll.poll(0)

    def close(self) -> None:
        """Closes at once; what is not sent is not sent any more."""
        self._closed = True
        if self._upload is not None:
            self._upload.cancel()
        self._transport.abort()  # close() would wait for what is not sent, and for the farewell of TLS.

    async def _news(self, exchange: Exchange) -> None:
        """Returns when there may be something new: bytes, the end, or the request is sent whole. Raises: failures."""
        if self._failure is not None:
            raise self._failure
        self._transport.resume_reading()
        timer = None
        if self._drained is not None:
            limit, unsent = exchange.timeouts.get("write"), self._transport.get_write_buffer_size()
            if limit is not None:
                timer = self._loop.call_later(limit, self._check_progress, unsent)
        elif not self.uploading:
            limit = exchange.timeouts.get("read")
            if limit is not None:
                timer = self._loop.call_later(limit, self._fail, httpx.ReadTimeout(f"nothing came for {limit:g} s"))
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    async def _send(self, exchange: Exchange) -> None:
        try:
            async for piece in exchange.pieces():
                if self._drained is not None:
                    await self._drained
                if self._poll.poll(0):
                    await asyncio.sleep(0)  # An early answer is read first: a write that fails would throw it away.
                if self._closed:
                    break
                self._transport.write(piece)
        except BaseException as error:  # whatever the caller's own source raises is the caller's to see
            self._fail(error)
        self._upload = None
        self.uploading = self._drained is not None
        self._wake()

    def _check_progress(self, unsent: int) -> None:
        if self._transport.get_write_buffer_size() >= unsent:
            self._fail(httpx.WriteTimeout("the instance takes nothing of the request any more"))
        self._wake()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _go_on_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own type is none of asyncio's
        self._poll.register(transport.get_extra_info("socket"), _READABLE)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self.close()  # An answer that nobody asked for must not become the answer to the next request.
            return
        self._heard = True
        self._exchange.receive(data)
        if self._exchange.unread > _UNREAD:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error)
        self._go_on_writing()
        self._on_lost(self)

    def _end(self, error: Exception | None) -> None:
        self._closed = True
        self._lost_by = self._lost_by or error
        if self._exchange is None:
            return
        if not self._heard and (rejected := rejection(error)):
            unsent = httpx.ConnectError(str(rejected))
            unsent.__cause__ = rejected
            self._fail(unsent)
        elif error is not None:
            self._fail(httpx.ReadError(str(error) or type(error).__name__))
        else:
            self._exchange.end()
        self._wake()

    def pause_writing(self) -> None:
        self._drained = self._loop.create_future()
        self._wake()  # Whoever waits for news waits for the instance now, within the write time-out.

    def resume_writing(self) -> None:
        self._go_on_writing()
        self.uploading = self._upload is not None
        self._wake()
