"""A FastAPI service that is found as long as it can answer, and finds others: lifespan, middleware, dependency."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry import context
from registry.client import ServiceDiscoveryClient
from registry.consul.presence import Registrar
from registry.consul.resolver import ConsulResolver
from registry.drain import DrainOnSigterm
from registry.health import Check, DegradedError, health_router
from registry.limits import SlowBodyMiddleware
from registry.settings import ConsulSettings, ServiceSettings

__all__ = [
    "Check",
    "DegradedError",
    "DiscoveryClient",
    "RegistryMiddleware",
    "health_router",
    "lifespan",
    "refuse_invalid_request",
]

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
            async with DrainOnSigterm(registrar.withdraw, settings.drain_seconds):
                yield state

    return run


class RegistryMiddleware:
    """Puts ``X-Service-Instance: <id>`` on every response: ``app.add_middleware(RegistryMiddleware)``.

    While the instance drains, also ``Connection: close``: no caller keeps a connection that is about to be cut.
    A request whose deadline has passed is answered 504 at once, and the app never sees it. The deadline and the retry
    marker hold for the calls that a ServiceDiscoveryClient makes on the request's behalf, until it is answered. A body
    that comes in too slowly is answered 408 (``registry.limits``).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = SlowBodyMiddleware(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _within_deadline(self._app, scope, receive, send)
            return
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        # Starlette answers an unhandled exception outside of every added middleware: only around the whole app is
        # every response seen.
        app = scope["app"]
        whole, app.middleware_stack = app.middleware_stack, partial(_sign, app.middleware_stack)
        try:
            await self._app(scope, receive, send)
        finally:
            app.middleware_stack = whole


async def _within_deadline(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    deadline, is_retry = context.read(scope["headers"])
    if deadline is not None and deadline <= time.time():
        # Whoever asked has gone: an instance that was stopped must not work off what queued up meanwhile.
        late = f"the deadline in {context.DEADLINE_HEADER} passed {time.time() - deadline:.3f} s ago"
        await JSONResponse({"detail": late}, status_code=504)(scope, receive, send)
        return

    async def send_and_release(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            # Nobody waits for what background tasks do.
            context.deadline.set(None)
            context.is_retry.set(False)

    before = context.deadline.set(deadline), context.is_retry.set(is_retry)
    try:
        await app(scope, receive, send_and_release)
    finally:
        context.deadline.reset(before[0])
        context.is_retry.reset(before[1])


async def _sign(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    registrar: Registrar | None = getattr(scope["app"].state, "registrar", None)
    if scope["type"] != "http" or registrar is None or registrar.instance_id is None:
        await app(scope, receive, send)
        return
    signature = (b"x-service-instance", registrar.instance_id.encode())
    may_close = scope["http_version"].startswith("1")  # RFC 9113, 8.2.2: no Connection header in HTTP/2

    async def send_signed(message: Message) -> None:
        if message["type"] == "http.response.start":
            closing = [(b"connection", b"close")] if registrar.leaving and may_close else []
            message["headers"] = [*message.get("headers", ()), signature, *closing]
        await send(message)

    await app(scope, receive, send_signed)


async def refuse_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """FastAPI's 422, without the refused value: ``app.exception_handler(RequestValidationError)(…)``.

    The value may be long, or the very thing that can't be written as JSON (half a surrogate pair, NaN), and then
    FastAPI's own answer would be a 500.
    """
    detail = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
    return JSONResponse({"detail": detail}, 422)


def _discovery_client(request: Request) -> ServiceDiscoveryClient:
    client: ServiceDiscoveryClient = request.app.state.discovery_client
    return client


DiscoveryClient = Annotated[ServiceDiscoveryClient, Depends(_discovery_client)]
"""An endpoint's parameter type: the app's one client, as in ``async def route(client: DiscoveryClient)``."""
