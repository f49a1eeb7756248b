"""Makes a FastAPI app a service that others find while it can answer, and that can call them by name."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.apps import about, known
from registry.client import ServiceDiscoveryClient
from registry.consul.resolver import ConsulResolver
from registry.discovery import context
from registry.discovery.resolver import Resolver
from registry.errors import InvalidInputError
from registry.limits import SlowBodyMiddleware
from registry.logs import set_fields, take_over_uvicorn
from registry.mesh.guard import CALLER
from registry.mesh.membership import joined
from registry.presence.drain import DrainOnSigterm
from registry.presence.health import ROOT, Check, DegradedError, find_state, health_router
from registry.presence.registrar import Registrar
from registry.problems import add_problem_handlers, problem, problem_responses
from registry.settings import ConsulSettings, ServiceSettings
from registry.shedding import Shedding, shedding
from registry.state import state_router
from registry.telemetry import Journal, Observer, Observers

__all__ = [
    "Caller",
    "Check",
    "DegradedError",
    "DiscoveryClient",
    "RegistryMiddleware",
    "add_problem_handlers",
    "calling_service",
    "discovery_client",
    "health_router",
    "lifespan",
    "problem",
    "problem_responses",
    "state_router",
]

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]
ClientFactory = Callable[[Resolver], ServiceDiscoveryClient]


def lifespan(
    settings: ServiceSettings,
    *,
    upstreams: Sequence[str] = (),
    consul: ConsulSettings | None = None,
    inner: Lifespan | None = None,
    client: ClientFactory | None = None,
    observer: Observer | None = None,
) -> Lifespan:
    """The lifespan of a registered service: ``FastAPI(lifespan=lifespan(settings))``.

    It registers the service once its advertised address answers ``/health``, keeps it registered, and opens the one
    ServiceDiscoveryClient that ``DiscoveryClient`` returns. On SIGTERM it deregisters first, keeps serving for
    ``settings.drain_seconds``, and only then lets the server stop. If Consul is away, the app starts anyway.

    ``upstreams``: services that this one calls. Their instances are known before the first request, provided that
    Consul answers within 2 s. ``inner``: the app's own lifespan, entered first and left last. ``consul``: by default
    taken from the environment. ``client``: builds the client from a resolver, for options that ``settings`` does not
    have: ``lambda resolver: ServiceDiscoveryClient(resolver, ejection=...)``. ``observer``: is told of calls, instances
    and this one's registration (``registry.telemetry``); one that is an asynchronous context manager is entered first.

    ``CONSUL_CONNECT=true``: uvicorn then serves mutual TLS only, and lets in whom Consul's intentions allow.

    Raises InvalidInputError when the app starts and already has such a lifespan: one app has one name.
    """
    make = client or partial(
        ServiceDiscoveryClient,
        timeout=settings.call_timeout,
        max_retries=settings.call_retries,
        deadline=settings.call_deadline,
    )

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[Any]:
        connection, journal = consul or ConsulSettings(), Journal()
        told = Observers(journal, observer)
        take_over_uvicorn()
        async with AsyncExitStack() as stack:
            for one in told.each:
                if isinstance(one, AbstractAsyncContextManager):
                    await stack.enter_async_context(one)
            state = await stack.enter_async_context(inner(app)) if inner else None
            if hasattr(app.state, "registrar"):
                raise InvalidInputError(
                    f"this app registers itself under another name already, so not as {settings.name!r}, too: run it "
                    "once for each name, or register the second with ServiceRegistry.register_service"
                )
            member = await stack.enter_async_context(joined(settings, connection, lambda: registrar.instance_id))
            resolver = ConsulResolver(connection, upstreams=upstreams, observer=told, mesh=member.settings.mode)
            caller = await stack.enter_async_context(make(resolver))
            caller.observe(told)
            caller.use_peers(member.identity)
            caller.use_zone(settings.zone)
            await resolver.start()
            registrar = Registrar(settings, connection, about=about(app), observer=told, mesh=member)
            stack.enter_context(known(app, registrar=registrar, discovery_client=caller, journal=journal, mesh=member))
            stack.enter_context(shedding(app.state, settings))
            member.protect(app)
            set_fields("registrar", lambda: {"instance": registrar.instance_id})
            async with DrainOnSigterm(registrar.withdraw, registrar.aclose, settings.drain_seconds):
                registrar.start()
                yield state

    return run


class RegistryMiddleware:
    """Puts ``X-Service-Instance: <id>`` on every response: ``app.add_middleware(RegistryMiddleware)``.

    It can also wrap the whole app: ``app = RegistryMiddleware(app)``.

    During the drain it adds ``Connection: close``, so that callers keep no connection that is about to be closed.
    A request whose deadline has passed gets 504 at once, and the app never sees it. The calls that a
    ServiceDiscoveryClient makes for a request inherit its deadline (until the response begins) and its retry marker
    (until the response is complete). ``trust_caller=False`` ignores both headers: use it for a service that strangers
    can call. A request whose body arrives too slowly gets 408 (``registry.limits``). What the settings say is too much
    gets 503 or 429 at once (``registry.shedding``).
    """

    def __init__(self, app: ASGIApp, *, trust_caller: bool = True) -> None:
        self._app = app
        patient = SlowBodyMiddleware(app)
        self._serve: ASGIApp = partial(_within_deadline, patient) if trust_caller else patient
        self._outermost: Scope = {}
        """The scope of the lifespan, if this stands around the app, which then puts itself into it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "app" in scope:
            await self._serve(scope, receive, send)
            return
        if scope["type"] == "http":
            scope[ROOT] = self._outermost.get("app")
            await _sign(self._serve, scope, receive, send)
            return
        if scope["type"] != "lifespan" or "app" not in scope:
            if scope["type"] == "lifespan":
                self._outermost = scope
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
    imposed = context.read(scope["headers"], (scope.get("client") or ("",))[0])
    if imposed.deadline is not None and imposed.deadline <= time.time():
        # Whoever asked has gone: an instance that was stopped must not work off what queued up meanwhile.
        late = f"the deadline in {context.DEADLINE_HEADER} passed {time.time() - imposed.deadline:.3f} s ago"
        await problem(504, late)(scope, receive, send)
        return

    def send_and_release(message: Message) -> Awaitable[None]:
        # The deadline is for the answer's beginning: what streams on may take its time, and so may what a task does
        # after the answer. Both see it, since they share what was imposed.
        imposed.deadline = None
        if message["type"] == "http.response.body" and not message.get("more_body"):
            imposed.is_retry = False
        return send(message)

    before = context.inherited.set(imposed)
    try:
        await app(scope, receive, send_and_release)
    finally:
        imposed.deadline, imposed.is_retry = None, False
        context.inherited.reset(before)


async def _sign(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    sheds: Shedding | None = find_state(scope, "shedding")
    if sheds is not None and scope["type"] == "http":
        app = partial(sheds.serve, app)
    registrar: Registrar | None = find_state(scope, "registrar")
    if scope["type"] != "http" or registrar is None or registrar.instance_id is None:
        await app(scope, receive, send)
        return
    signature = (b"x-service-instance", registrar.instance_id.encode())
    may_close = scope["http_version"].startswith("1")  # RFC 9113, 8.2.2: no Connection header in HTTP/2

    def send_signed(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            closing = [(b"connection", b"close")] if registrar.leaving and may_close else []
            message["headers"] = [*message.get("headers", ()), signature, *closing]
        return send(message)

    await app(scope, receive, send_signed)


def discovery_client(connection: HTTPConnection) -> ServiceDiscoveryClient:
    """What ``DiscoveryClient`` depends on. A test gives its own: ``app.dependency_overrides[discovery_client] = …``.

    Raises: RuntimeError, when the app has no client.
    """
    client: ServiceDiscoveryClient | None = find_state(connection.scope, "discovery_client")
    if client is None:
        raise RuntimeError("no discovery client: give the app lifespan=lifespan(settings), and start it")
    return client


DiscoveryClient = Annotated[ServiceDiscoveryClient, Depends(discovery_client)]
"""An endpoint's parameter type: the app's one client, as in ``async def route(client: DiscoveryClient)``."""


def calling_service(connection: HTTPConnection) -> str | None:
    """What ``Caller`` depends on. A test gives its own: ``app.dependency_overrides[calling_service] = …``."""
    name: str | None = connection.scope.get(CALLER)
    return name


Caller = Annotated[str | None, Depends(calling_service)]
"""An endpoint's parameter type: the service that calls, in lower case, as its certificate proves and an intention
allows. None: this service is not served by mutual TLS (``CONSUL_CONNECT=true``), or it is ``GET /health``."""
