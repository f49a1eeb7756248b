"""A FastAPI service that is found as long as it can answer, and finds others: lifespan, middleware, dependency."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import FrameType
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.client import ServiceDiscoveryClient
from registry.consul.presence import Registrar
from registry.consul.resolver import ConsulResolver
from registry.health import Check, health_router
from registry.settings import ConsulSettings, ServiceSettings

__all__ = ["Check", "DiscoveryClient", "RegistryMiddleware", "health_router", "lifespan"]

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def lifespan(
    settings: ServiceSettings,
    *,
    upstreams: Sequence[str] = (),
    consul: ConsulSettings | None = None,
    inner: Lifespan | None = None,
) -> Lifespan:
    """The lifespan of a registered service: ``FastAPI(lifespan=lifespan(settings))``.

    Registers the service once its advertised address answers ``/health``, keeps it registered, and opens one
    ServiceDiscoveryClient for the dependency ``DiscoveryClient``. On SIGTERM it deregisters first, goes on serving for
    ``settings.drain_seconds`` and only then lets the server stop. Never fails and never waits because Consul is away.

    ``upstreams``: services this one calls; they are known before the first request, if Consul answers within 2 s.
    ``inner``: the app's own lifespan, entered before and left after. ``consul``: the environment's unless given.
    """

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[Any]:
        connection = consul or ConsulSettings()
        async with AsyncExitStack() as stack:
            state = await stack.enter_async_context(inner(app)) if inner else None
            resolver = ConsulResolver(connection, upstreams=upstreams)
            client = await stack.enter_async_context(ServiceDiscoveryClient(resolver))
            await resolver.start()
            registrar = Registrar(settings, connection)
            stack.push_async_callback(registrar.aclose)
            app.state.registrar, app.state.discovery_client = registrar, client
            registrar.start()
            with _DrainOnSigterm(registrar, settings.drain_seconds):
                yield state

    return run


class _DrainOnSigterm:
    """Puts deregistering and draining in front of the server's own SIGTERM handler.

    uvicorn closes its listener before lifespan shutdown, too late to withdraw; but it installs its handler before
    lifespan startup, so that ours can stand in front and call it afterwards. A second SIGTERM goes straight to it.
    """

    def __init__(self, registrar: Registrar, drain_seconds: float) -> None:
        self._registrar = registrar
        self._drain_seconds = drain_seconds
        self._loop = asyncio.get_running_loop()
        self._server: Any = signal.SIG_DFL
        self._draining: asyncio.Task[None] | None = None
        # Signals reach the main thread only; an app that a test runs in another thread is not stopped by one.
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._active:
            self._server = signal.signal(signal.SIGTERM, self._terminate)

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._server)
        if self._draining is not None:
            self._draining.cancel()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._draining is not None or not callable(self._server):
            self._stop_server(number, frame)
        else:
            self._loop.call_soon_threadsafe(self._start_draining, number)

    def _start_draining(self, number: int) -> None:
        self._draining = self._loop.create_task(self._drain(number), name="registry drain")

    async def _drain(self, number: int) -> None:
        await self._registrar.withdraw()
        await asyncio.sleep(self._drain_seconds)
        self._stop_server(number, None)

    def _stop_server(self, number: int, frame: FrameType | None) -> None:
        if callable(self._server):
            self._server(number, frame)
        else:
            signal.signal(number, self._server)
            signal.raise_signal(number)


class RegistryMiddleware:
    """Puts ``X-Service-Instance: <id>`` on every response: ``app.add_middleware(RegistryMiddleware)``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        registrar: Registrar | None = getattr(scope["app"].state, "registrar", None)
        instance_id = registrar.instance_id if registrar else None

        async def send_signed(message: Message) -> None:
            if message["type"] == "http.response.start" and instance_id:
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-service-instance", instance_id.encode()),
                ]
            await send(message)

        await self._app(scope, receive, send_signed)


def _discovery_client(request: Request) -> ServiceDiscoveryClient:
    client: ServiceDiscoveryClient = request.app.state.discovery_client
    return client


DiscoveryClient = Annotated[ServiceDiscoveryClient, Depends(_discovery_client)]
"""An endpoint's parameter type: the app's one client, as in ``async def route(client: DiscoveryClient)``."""
