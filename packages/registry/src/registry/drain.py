"""SIGTERM in the right order: leave Consul, go on serving for a while, and only then let the server stop."""

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["DrainOnSigterm"]

logger = logging.getLogger("registry")


class DrainOnSigterm:
    """Puts withdrawing and draining in front of the server's own SIGTERM handler, for as long as it is entered.

    uvicorn closes its listener before lifespan shutdown, too late to withdraw; but it installs its handler with
    ``signal.signal`` before lifespan startup, so that ours can stand in front and call it afterwards. A second SIGTERM
    goes straight to it. A server that uses ``loop.add_signal_handler`` is told by the loop itself and stops at once:
    there, withdrawing begins with the signal, but nothing waits for it. Where SIGTERM is ignored, or handled by code
    that is not Python, or in another than the main thread, nothing is changed.
    """

    def __init__(self, withdraw: Callable[[], Awaitable[None]], drain_seconds: float) -> None:
        self._withdraw = withdraw
        self._drain_seconds = drain_seconds
        self._loop = asyncio.get_running_loop()
        self._server: Any = None
        self._draining: asyncio.Task[None] | None = None
        self._straight = False
        """From now on, a signal is the server's alone."""

    async def __aenter__(self) -> Self:
        server = signal.getsignal(signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and (callable(server) or server is signal.SIG_DFL):
            self._server = server
            signal.signal(signal.SIGTERM, self._terminate)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._straight = True
        # Whoever put a handler in front of ours meanwhile, keeps it.
        if self._server is not None and signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, self._server)
        if self._draining is not None:
            self._draining.cancel()
            await asyncio.wait({self._draining})

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
            self._server(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
