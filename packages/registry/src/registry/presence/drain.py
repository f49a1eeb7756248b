"""SIGTERM in the right order: leave Consul, go on serving for a while, and only then let the server stop."""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["DrainOnSigterm"]

logger = logging.getLogger("registry")

_LOOK = 0.01, 0.5
"""Seconds, from and to, between two looks at whether we still stand in front of the loop."""


class DrainOnSigterm:
    """Puts withdrawing and draining in front of the server's own SIGTERM handler, for as long as it is entered.

    Servers close their listener before lifespan shutdown, too late to withdraw; but they install their handler before
    lifespan startup, so that ours can stand in front and call it afterwards: uvicorn with ``signal.signal``, granian
    and hypercorn with ``loop.add_signal_handler``, which is told through a file descriptor. A second SIGTERM goes
    straight to the server. One that is told to stop in another way, as hypercorn's worker processes are, is not held.
    Where SIGTERM is ignored, or handled by code that is not Python, or in another than the main thread, nothing is
    changed.

    ``close`` runs when it is left: the server has stopped. Until that is done, no SIGTERM ends the process.
    """

    def __init__(
        self, withdraw: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]], drain_seconds: float
    ) -> None:
        self._withdraw = withdraw
        self._close = close
        self._drain_seconds = drain_seconds
        self._loop = asyncio.get_running_loop()
        self._server: Any = None
        self._wakeup = _Wakeup(self._loop)
        self._draining: asyncio.Task[None] | None = None
        self._straight = False
        """From now on, a signal is the server's alone."""
        self._closing = False
        self._late = False

    async def __aenter__(self) -> Self:
        server = signal.getsignal(signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and (callable(server) or server is signal.SIG_DFL):
            self._server = server
            self._wakeup.hold()
            signal.signal(signal.SIGTERM, self._terminate)
            if server is signal.SIG_DFL and multiprocessing.parent_process() is not None:
                logger.warning(
                    "nobody handles SIGTERM in this worker process, so it hears too late that it must leave Consul, "
                    "and calls may break then; under hypercorn, use --workers 0"
                )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._straight = self._closing = True
        if self._draining is not None:
            self._draining.cancel()
            await asyncio.wait({self._draining})
        try:
            await self._close()
        finally:
            # Whoever put a handler in front of ours meanwhile, keeps it.
            if self._server is not None and signal.getsignal(signal.SIGTERM) == self._terminate:
                signal.signal(signal.SIGTERM, self._server)
            self._wakeup.release()
            self._closing = False
            if self._late:
                self._stop_server(signal.SIGTERM, None)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        # Runs between any two bytecodes of the main thread: it only leaves a note for the loop.
        if self._straight:
            self._stop_server(number, frame)
        else:
            self._straight = True
            self._loop.call_soon_threadsafe(self._start_draining, number)

    def _start_draining(self, number: int) -> None:
        self._draining = self._loop.create_task(self._drain(number), name="registry drain")

    async def _drain(self, number: int) -> None:
        try:
            await self._withdraw()
            await asyncio.sleep(self._drain_seconds)
        except Exception:
            # Whatever went wrong, the process was told to stop.
            logger.exception("draining failed: stopping at once")
        self._stop_server(number, None)

    def _stop_server(self, number: int, frame: FrameType | None) -> None:
        if callable(self._server):
            self._wakeup.tell(number)
            self._server(number, frame)
        elif self._closing:
            self._late = True
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class _Wakeup:
    """Stands in front of the file descriptor that tells the loop of signals, and lets through all but SIGTERM."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._target = -1
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._look: asyncio.TimerHandle | None = None

    def hold(self, pause: float = _LOOK[0]) -> None:
        """Begins, once the loop is told of any signal; in the main thread."""
        if self._ends is None:
            self._ends = socket.socketpair()
            for end in self._ends:
                end.setblocking(False)
            self._loop.add_reader(self._ends[0], self._let_through)
        own = self._ends[1].fileno()
        current = signal.set_wakeup_fd(own, warn_on_full_buffer=False)
        if current == -1:
            signal.set_wakeup_fd(-1)
        elif current != own:
            self._target = current
        # The loop takes it back when it is run anew, as granian does after the startup, or gets another handler.
        self._look = self._loop.call_later(pause, self.hold, min(pause * 2, _LOOK[1]))

    def release(self) -> None:
        """Ends: the loop is told as before."""
        if self._ends is None or self._look is None:
            return
        self._look.cancel()
        reading, writing = self._ends
        current = signal.set_wakeup_fd(self._target)
        if current != writing.fileno():
            signal.set_wakeup_fd(current)
        self._let_through()
        self._loop.remove_reader(reading)
        for end in self._ends:
            end.close()
        self._ends = None

    def tell(self, number: int) -> None:
        """Lets the loop know of this signal."""
        self._write(bytes([number]))

    def _let_through(self) -> None:
        with suppress(BlockingIOError):
            if self._ends is not None:
                self._write(self._ends[0].recv(4096).replace(bytes([signal.SIGTERM]), b""))

    def _write(self, numbers: bytes) -> None:
        with suppress(OSError):  # nobody to tell, or a loop that is closed
            os.write(self._target, numbers)
