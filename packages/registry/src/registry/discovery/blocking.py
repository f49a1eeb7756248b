"""One call between the thread that waits for it and the event loop that makes it."""

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import httpx

from registry.discovery.background import BACKGROUND
from registry.discovery.sender import Stream

__all__ = ["BlockingCall"]

_AHEAD = 262_144
"""Bytes of an answer that are taken over at a time, if they have come."""

_Result = TypeVar("_Result")
_Wanted = asyncio.Future[bytes | None]


class BlockingCall:
    """Made by the calling thread, which alone calls ``run``, ``next_piece`` and ``close``. They block."""

    def __init__(self, request: httpx.Request) -> None:
        self.request = request
        """As the event loop can send it."""
        self._loop = BACKGROUND.loop()
        self._wanted = queue.SimpleQueue[_Wanted | None]()
        """Pieces of the request's body that the loop waits for; None: it has done what it was asked."""
        self._body = request.stream
        self._source: Iterator[bytes] | None = None
        self._answer: Stream | None = None
        self._pieces = deque[bytes]()
        self._over = False
        if not isinstance(request.stream, httpx.ByteStream):
            method, url, headers, extensions = request.method, request.url, request.headers, request.extensions
            self.request = httpx.Request(method, url, headers=headers, stream=_Upload(self), extensions=extensions)

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Has the loop do it, and reads the request's body meanwhile. Interrupted, it cancels the call."""
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
        if not self._pieces and not self._over:
            if self._loop is not BACKGROUND.loop():
                raise httpx.ReadError("this answer came before a fork: it is the parent process's to read")
            self.run(self._more())
        return self._pieces.popleft() if self._pieces else b""

    def close(self) -> None:
        """Releases the connection."""
        if not self._over and self._loop is BACKGROUND.loop():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()

    def _read(self, wanted: _Wanted) -> None:
        """Here and not on the loop: a source may be slow, and may belong to its thread, as a database's cursor does."""
        piece = error = None
        try:
            if self._source is None:
                assert isinstance(self._body, Iterable)
                self._source = iter(self._body)
            piece = next(self._source, None)
        except Exception as raised:
            error = raised
        self._loop.call_soon_threadsafe(_settle, wanted, piece, error)

    # On the event loop.

    async def upload(self) -> AsyncIterator[bytes]:
        """The request's body, each piece read by the waiting thread when it is asked for."""
        loop = asyncio.get_running_loop()
        self._wanted.put(wanted := loop.create_future())
        while (piece := await wanted) is not None:
            yield piece
            self._wanted.put(wanted := loop.create_future())

    def begin(self, answer: httpx.Response) -> httpx.Response:
        """The call's answer: small ones are often here whole, and the thread need not ask again."""
        assert isinstance(answer.stream, Stream)
        self._answer = answer.stream
        self._take(self._answer)
        return answer

    async def _more(self) -> None:
        assert self._answer is not None
        piece = await self._answer.next_piece()
        self._over = not piece
        if piece:
            self._pieces.append(piece)
            self._take(self._answer)

    def _take(self, answer: Stream) -> None:
        size = 0
        while size < _AHEAD and (piece := answer.here()) is not None:
            if not piece:
                self._over = True
                break
            self._pieces.append(piece)
            size += len(piece)

    async def _end(self) -> None:
        if self._answer is not None:
            await self._answer.aclose()


class _Upload(httpx.AsyncByteStream):
    def __init__(self, call: BlockingCall) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._call.upload()


def _settle(wanted: _Wanted, piece: bytes | None, error: Exception | None) -> None:
    if wanted.done():
        return  # Cancelled meanwhile.
    if error is None:
        wanted.set_result(piece)
    else:
        wanted.set_exception(error)
