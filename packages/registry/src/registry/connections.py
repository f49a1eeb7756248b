"""The connections to all instances: kept while they are fresh, bounded in number, callers queueing for them."""

import asyncio
import errno
import socket
import ssl
import time
from collections import deque
from functools import partial
from typing import NamedTuple

import httpx

from registry.connection import Connection
from registry.options import ConnectionOptions

__all__ = ["Connections", "Origin", "is_local_shortage"]

_HAPPY_EYEBALLS = 0.25
"""RFC 8305, 5: "Connection Attempt Delay … recommended value … 250 milliseconds"."""
_LOCAL_SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}


class Origin(NamedTuple):
    """What a connection leads to."""

    scheme: str
    host: str
    port: int


class Connections:
    """A pool for one event loop."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._idle: dict[Origin, deque[Connection]] = {}
        self._used: set[Connection] = set()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._open: set[object] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None

    async def acquire(
        self, origin: Origin, connect: float | None, pool: float | None, until: float | None
    ) -> Connection:
        """A connection that nobody else uses: a kept one if there is a usable one, else a new one.

        Waits at most ``pool`` seconds for its turn, then at most ``connect`` seconds, the name's look-up included; and
        no longer than ``until``, in the event loop's time.

        Raises: httpx.PoolTimeout, ConnectTimeout, ConnectError.
        """
        if self._waiters:
            await self._turn(self._least(pool, until))
        while True:
            connection = self._kept(origin)
            if connection is None and (len(self._open) < self._options.max_connections or self._evict()):
                try:
                    connection = await self._connect(origin, self._least(connect, until))
                except OSError as error:
                    # Out of descriptors or ports is like being at the limit, as long as one may be given back.
                    if not is_local_shortage(error) or not (self._evict() or self._used):
                        raise httpx.ConnectError(str(error) or type(error).__name__) from error
            if connection is not None:
                self._used.add(connection)
                return connection
            await self._turn(self._least(pool, until))

    def release(self, connection: Connection, origin: Origin) -> None:
        """The exchange is over, whether it ended well or not: keeps the connection, or closes it."""
        self._used.discard(connection)
        if connection.finish():
            self._idle.setdefault(origin, deque()).append(connection)
            if self._sweep is None:
                self._sweep = self._loop.call_later(self._options.keepalive, self._close_expired)
        self._next_turn()

    def close(self) -> None:
        """Closes all connections, those in use too."""
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in [*self._used, *(kept for idle in self._idle.values() for kept in idle)]:
            connection.close()
        self._idle.clear()

    def _least(self, limit: float | None, until: float | None) -> float | None:
        if until is None:
            return limit
        left = until - self._loop.time()
        return left if limit is None else min(limit, left)

    def _kept(self, origin: Origin) -> Connection | None:
        idle, now = self._idle.get(origin), time.monotonic()
        while idle:
            connection = idle.pop()
            if now - connection.idle_since < self._options.keepalive and connection.is_usable():
                return connection
            connection.close()
        return None

    async def _connect(self, origin: Origin, limit: float | None) -> Connection:
        slot, connection, ready = object(), None, False
        self._open.add(slot)
        try:
            async with asyncio.timeout(limit) as scope:
                _, connection = await self._loop.create_connection(
                    lambda: Connection(partial(self._lost, slot)),
                    origin.host,
                    origin.port,
                    happy_eyeballs_delay=None if _is_address(origin.host) else _HAPPY_EYEBALLS,
                )
                if origin.scheme == "https":
                    await connection.secure(self._context(), origin.host)
            ready = True
            return connection
        except TimeoutError as error:
            if not scope.expired():
                raise httpx.ConnectTimeout(str(error)) from error
            silent = None if connection is None else ssl.SSLError("the other side does not answer in TLS")
            raise httpx.ConnectTimeout(f"no connection within {limit:.3f} s") from silent
        finally:
            if not ready:
                if connection is not None:
                    connection.close()
                self._lost(slot)

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = httpx.create_ssl_context()
        return self._tls

    def _lost(self, slot: object) -> None:
        self._open.discard(slot)
        self._next_turn()

    async def _turn(self, limit: float | None) -> None:
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(limit):
                await waiter
        except BaseException as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self._next_turn()  # It came too late for this caller: the next one's.
            if isinstance(error, TimeoutError):
                most = self._options.max_connections
                raise httpx.PoolTimeout(f"no connection (of at most {most}) was free within {limit:.3f} s") from None
            raise

    def _next_turn(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _evict(self) -> bool:
        """Closes the idle connection that was idle longest, if there is one, to make room for another."""
        kept = [idle for idle in self._idle.values() if idle]
        if not kept:
            return False
        min(kept, key=lambda idle: idle[0].idle_since).popleft().close()
        return True

    def _close_expired(self) -> None:
        oldest = time.monotonic() - self._options.keepalive
        for origin, idle in list(self._idle.items()):
            while idle and (idle[0].idle_since <= oldest or not idle[0].is_usable()):
                idle.popleft().close()
            if not idle:
                del self._idle[origin]
        self._sweep = self._loop.call_later(self._options.keepalive / 4, self._close_expired) if self._idle else None


def is_local_shortage(error: BaseException | None) -> bool:
    """Whether it is this machine that has nothing left to connect with: descriptors, ports, memory, its resolver."""
    if isinstance(error, socket.gaierror):
        return error.errno not in {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
    return isinstance(error, OSError) and error.errno in _LOCAL_SHORTAGE


def _is_address(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdigit()
