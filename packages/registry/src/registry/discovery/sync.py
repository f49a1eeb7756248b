"""The same transport for callers that block: their threads wait, the work is done by one event loop in the background.

The loop runs in a daemon thread of its own, one per process, from the first call on. A forked child gets another one.
"""

import asyncio
from collections.abc import Iterator

import httpx

from registry.discovery.background import BACKGROUND
from registry.discovery.balancing import Policy
from registry.discovery.blocking import BlockingCall
from registry.discovery.options import ConnectionOptions, EjectionPolicy
from registry.discovery.resolver import Resolver
from registry.discovery.retry import RetryPolicy
from registry.discovery.transport import DiscoveryTransport
from registry.telemetry import Observer

__all__ = ["SyncDiscoveryTransport"]


class SyncDiscoveryTransport(httpx.BaseTransport):
    """What DiscoveryTransport does, for any ``httpx.Client``: Django, Flask, Celery, scripts. Safe to share by threads.

    ``httpx.Client(transport=SyncDiscoveryTransport(registry.resolver()), base_url="http://backend-api")``. Takes the
    same options and request extensions, and raises the same errors, in the calling thread. The body of a request is
    read in the calling thread too, piece by piece. A call that is interrupted, by Ctrl-C say, is cancelled. May be
    made before a fork and used after it, on both sides. Not for coroutines, whose event loop
    it would block, and not under gevent or eventlet.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        retry: RetryPolicy | None = None,
        deadline: float | None = None,
        policy: Policy = "p2c",
        ejection: EjectionPolicy | None = None,
        connections: ConnectionOptions | None = None,
        observer: Observer | None = None,
        zone: str | None = None,
    ) -> None:
        """The options mean what they mean to DiscoveryTransport. ``resolver``: not used on any other event loop.

        ``observer``: is told on the event loop's thread, within the calling thread's context.
        """

        def engine() -> DiscoveryTransport:
            return DiscoveryTransport(
                resolver,
                retry=retry,
                deadline=deadline,
                policy=policy,
                ejection=ejection,
                connections=connections,
                observer=observer,
                zone=zone,
            )

        self._make, self._engine = engine, engine()
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """What ``httpx.Client`` calls. Blocks until the answer's head is there."""
        call = BlockingCall(request)
        answer = call.run(self._send(call))
        return httpx.Response(
            answer.status_code, headers=answer.headers, stream=_Body(call), extensions=answer.extensions
        )

    def close(self) -> None:
        """Closes all connections and ends the watches. The event loop's thread stays, for other transports."""
        if self._loop is not None and self._loop is BACKGROUND.loop():
            asyncio.run_coroutine_threadsafe(self._engine.aclose(), self._loop).result()

    async def _send(self, call: BlockingCall) -> httpx.Response:
        if self._loop is not (loop := asyncio.get_running_loop()):
            if self._loop is not None:
                self._engine = self._make()  # What a parent process is in the middle of never ends in this one.
            self._loop = loop
        return call.begin(await self._engine.handle_async_request(call.request))


class _Body(httpx.SyncByteStream):
    def __init__(self, call: BlockingCall) -> None:
        self._call = call

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._call.next_piece():
            yield piece

    def close(self) -> None:
        self._call.close()
