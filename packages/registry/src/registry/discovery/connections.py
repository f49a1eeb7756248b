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

from registry.discovery.connection import Connection
from registry.discovery.options import ConnectionOptions
from registry.discovery.peers import context_for, proven
from registry.model import Instance

__all__ = ["Connections", "Origin", "is_local_shortage"]

_HAPPY_EYEBALLS = 0.25
"""RFC 8305, 5: "Connection Attempt Delay … recommended value … 250 milliseconds"."""
_LOCAL_SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}


class Origin(NamedTuple):
    """What a connection leads to."""

    scheme: str
    host: str
    port: int
    peer: str = ""
    """The service that it is proven to lead to. Empty: nobody's proof is asked for."""

    @classmethod
    def of(cls, instance: Instance, scheme: str) -> "Origin":
        """Where to reach an instance."""
        return cls(scheme, instance.address, instance.port, instance.service if instance.connect else "")


class Connections:
    """A pool for one event loop."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._idle: dict[Origin, deque[Connection]] = {}
        self._used: set[Connection] = set()
        self._all: set[Connection] = set()
        """Those that are being opened or closed too: each may hold a descriptor."""
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._called: asyncio.Future[None] | None = None
        """The waiter whose turn it is, until it runs: whoever comes meanwhile comes after it."""
        self._short = False
        """Whether this machine had no descriptor or port for one more, and none was given back since."""
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
        if self._waiters or self._called is not None:
            pool = await self._turn(pool, until)
        while True:
            connection = self._kept(origin)
            if connection is None and self._has_room():
                connection = await self._connect(origin, self._least(connect, until))
            if connection is not None:
                self._used.add(connection)
                if self._waiters:
                    self._next_turn()
                return connection
            self._evict()
            pool = await self._turn(pool, until, again=True)

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
            self._sweep = None
        for connection in [*self._used, *(kept for idle in self._idle.values() for kept in idle)]:
            connection.close()
        self._idle.clear()

    def _least(self, limit: float | None, until: float | None) -> float | None:
        if until is None:
            return limit
        left = until - self._loop.time()
        return left if limit is None else min(limit, left)

    def _kept(self, origin: Origin) -> Connection | None:
        idle, oldest = self._idle.get(origin), time.monotonic() - self._keepalive(origin)
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and connection.is_usable():
                return connection
            connection.close()
        return None

    async def _connect(self, origin: Origin, limit: float | None) -> Connection | None:
        """A new connection; None: this machine has nothing left for one, until another is closed."""
        connection, connected, stands, short = Connection(self._lost), False, False, False
        self._all.add(connection)
        if self._waiters:
            self._loop.call_soon(self._next_turn)  # There may be room for one more, unless this one finds a shortage.
        try:
            async with asyncio.timeout(limit) as scope:
                tls, peers = self._context(origin), self._options.peers
                connect = self._loop.create_connection
                # uvloop does not know the delay, and tries one address of a name after the other.
                if isinstance(self._loop, asyncio.BaseEventLoop) and not _is_address(origin.host):
                    connect = partial(connect, happy_eyeballs_delay=_HAPPY_EYEBALLS)
                await connect(lambda: connection, origin.host, origin.port)
                connected = True
                if origin.peer and tls and peers:
                    with proven(origin.peer, f"{origin.host}:{origin.port}"):
                        peers.verify(origin.peer, await connection.secure(tls, peers.server_name(origin.peer)))
                        await connection.settle()
                elif tls:
                    await connection.secure(tls, origin.host)
            stands = True
            return connection
        except TimeoutError as error:
            if not scope.expired():
                raise httpx.ConnectTimeout(str(error)) from error
            silent = ssl.SSLError("the other side does not answer in TLS") if connected else None
            raise httpx.ConnectTimeout(f"no connection within {limit:.3f} s") from silent
        except OSError as error:
            # Out of descriptors or ports is like being at the limit, as long as one may be given back.
            short = not isinstance(error, socket.gaierror) and is_local_shortage(error) and len(self._all) > 1
            if short:
                return None
            raise httpx.ConnectError(str(error) or type(error).__name__) from error
        finally:
            if not stands:
                if connected:
                    connection.close()
                self._all.discard(connection)
                self._short = short
                self._next_turn()

    def _keepalive(self, origin: Origin) -> float:
        return self._options.peers_keepalive if origin.peer else self._options.keepalive

    def _context(self, origin: Origin) -> ssl.SSLContext | None:
        """What to secure the connection with; None: nothing. Raises: NoCertificateError."""
        if origin.peer:
            return context_for(self._options.peers, origin.peer)
        if origin.scheme == "http":
            return None
        if self._tls is None:
            self._tls = self._options.ssl or httpx.create_ssl_context()
        return self._tls

    def _has_room(self) -> bool:
        return len(self._all) < self._options.max_connections and not self._short

    def _lost(self, connection: Connection) -> None:
        self._all.discard(connection)
        self._short = False
        self._next_turn()

    async def _turn(self, limit: float | None, until: float | None, *, again: bool = False) -> float | None:
        """Waits until there may be a connection, or room for one. Returns what is left of ``limit``."""
        waiter, started = self._loop.create_future(), self._loop.time()
        if again:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._least(limit, until)):
                await waiter
        except BaseException as error:
            if waiter is self._called:
                self._called = None
                self._next_turn()  # It came too late for this caller: the next one's.
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            if isinstance(error, TimeoutError):
                most, waited = self._options.max_connections, self._loop.time() - started
                raise httpx.PoolTimeout(f"no connection (of at most {most}) was free within {waited:.3f} s") from None
            raise
        self._called = None
        return None if limit is None else limit - (self._loop.time() - started)

    def _next_turn(self) -> None:
        """Calls the one that has waited longest, if there may be something for it and no other is being called."""
        while self._waiters and self._called is None and (self._has_room() or any(self._idle.values())):
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._called = waiter
                waiter.set_result(None)

    def _evict(self) -> None:
        """Closes the idle connection that was idle longest, if there is one, to make room for another."""
        while kept := [idle for idle in self._idle.values() if idle]:
            connection = min(kept, key=lambda idle: idle[0].idle_since).popleft()
            if connection in self._all:
                connection.close()
                return

    def _close_expired(self) -> None:
        now = time.monotonic()
        for origin, idle in list(self._idle.items()):
            oldest = now - self._keepalive(origin)
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
