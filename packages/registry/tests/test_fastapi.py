"""The lifespan, the middleware and the dependency, in an app that a real uvicorn server runs in this process."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, WebSocket
from starlette.types import ASGIApp, Message, Scope

from registry import (
    ConsulSettings,
    EjectionPolicy,
    InvalidInputError,
    Registrar,
    Resolver,
    ServiceDiscoveryClient,
    ServiceRegistry,
    ServiceSettings,
)
from registry.fastapi import DiscoveryClient, RegistryMiddleware, health_router, lifespan
from registry.metrics import metrics_router
from registry.testing.fixtures import ConsulAgent, Instances
from registry.testing.ports import free_ports
from tests.support.command import found, wait_until


@pytest.fixture
def consul(consul_agent: ConsulAgent) -> ConsulSettings:
    """The shared agent."""
    return ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)


def identity(name: str) -> ServiceSettings:
    """A service on a free port of this host."""
    return ServiceSettings(name=name, port=free_ports(1)[0], address="127.0.0.1")


@asynccontextmanager
async def serving(app: ASGIApp, settings: ServiceSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, which uvicorn serves until the context ends and then stops by program, not by signal."""
    server = uvicorn.Server(uvicorn.Config(app, port=settings.port, log_level="error", lifespan="on"))
    running = asyncio.create_task(server.serve())
    await asyncio.to_thread(wait_until, lambda: server.started or running.done())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.port}") as client:
        try:
            yield client
        finally:
            server.should_exit = True
            await running


async def until_found(agent: ConsulAgent, name: str) -> None:
    """Return once discovery finds an instance."""
    await asyncio.to_thread(wait_until, lambda: found(agent, name))


async def test_registers_serves_and_leaves_without_a_trace(consul_agent: ConsulAgent, consul: ConsulSettings) -> None:
    """Found while it runs, gone after a programmatic stop; no task and (warnings are errors) no connection stays."""
    settings = identity("traceless")
    app = FastAPI(lifespan=lifespan(settings, upstreams=["nobody"], consul=consul))
    app.include_router(health_router())
    before = asyncio.all_tasks()
    async with serving(app, settings):
        await until_found(consul_agent, "traceless")
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert {"registrar traceless", "registry watch nobody"} <= names
    assert found(consul_agent, "traceless", passing=False) == []
    assert asyncio.all_tasks() == before
    gc.collect()  # a connection that was forgotten warns now


async def test_runs_again_after_it_has_ended(consul_agent: ConsulAgent, consul: ConsulSettings) -> None:
    """One app can be started and stopped many times, as test clients do."""
    settings = identity("again")
    app = FastAPI(lifespan=lifespan(settings, consul=consul))
    app.add_middleware(RegistryMiddleware)
    app.include_router(health_router())
    for _ in range(2):
        async with serving(app, settings) as client:
            await until_found(consul_agent, "again")
            answer = await client.get("/health")
            assert answer.headers.get_list("X-Service-Instance") == [f"again-127.0.0.1-{settings.port}"]
        assert found(consul_agent, "again", passing=False) == []


async def test_own_lifespan_is_entered_before_and_left_after(consul_agent: ConsulAgent, consul: ConsulSettings) -> None:
    """What the app opens is there before anybody can find it and until nobody can; its state reaches the requests."""
    settings = identity("composed")
    events: list[object] = []

    @asynccontextmanager
    async def inner(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        events.append(("enter", found(consul_agent, "composed", passing=False), hasattr(app.state, "registrar")))
        yield {"database": "open"}
        events.append(("leave", found(consul_agent, "composed", passing=False)))

    app = FastAPI(lifespan=lifespan(settings, consul=consul, inner=inner))
    app.include_router(health_router())

    @app.get("/state")
    async def state(request: Request) -> str:
        return str(request.state.database)

    async with serving(app, settings) as client:
        await until_found(consul_agent, "composed")
        assert (await client.get("/state")).json() == "open"
    assert events == [("enter", [], False), ("leave", [])]


async def test_a_failing_own_lifespan_starts_nothing(consul_agent: ConsulAgent, consul: ConsulSettings) -> None:
    """When the app can't start, nothing of ours has begun, and its own error is what comes out."""

    @asynccontextmanager
    async def inner(app: FastAPI) -> AsyncIterator[None]:
        if not hasattr(app.state, "database"):
            raise LookupError("no database")
        yield

    app = FastAPI()
    before = asyncio.all_tasks()
    with pytest.raises(LookupError, match="no database"):
        async with lifespan(identity("stillborn"), consul=consul, inner=inner)(app):
            pass
    assert not hasattr(app.state, "registrar")
    assert asyncio.all_tasks() == before


async def test_an_error_within_the_lifespan_still_withdraws(
    consul_agent: ConsulAgent, consul: ConsulSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the app ends, by an error of its own lifespan too, the instance leaves Consul first."""
    settings = identity("broken-off")
    left: list[list[str]] = []

    @asynccontextmanager
    async def inner(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            left.append(found(consul_agent, "broken-off", passing=False))
            raise LookupError("could not close")

    async def answers(registrar: Registrar) -> bool:
        return registrar.serves(registrar.instance_id or "")

    async def run() -> None:
        async with lifespan(settings, consul=consul, inner=inner)(FastAPI()):
            await until_found(consul_agent, "broken-off")
            raise RuntimeError("the app broke")

    monkeypatch.setattr(Registrar, "answers", answers)
    before = asyncio.all_tasks()
    with pytest.raises(LookupError, match="could not close"):
        await run()
    assert left == [[]]
    assert asyncio.all_tasks() == before


async def test_the_dependency_is_one_client_for_all(
    consul_agent: ConsulAgent, consul: ConsulSettings, instances: Instances
) -> None:
    """Every endpoint gets the same client, which calls upstreams by name."""
    (upstream,) = await asyncio.to_thread(instances, "called", consul=consul_agent)
    settings = identity("calling")
    app = FastAPI(lifespan=lifespan(settings, upstreams=["called"], consul=consul))
    clients: set[ServiceDiscoveryClient] = set()

    @app.get("/call")
    async def call(client: DiscoveryClient) -> str:
        clients.add(client)
        return str((await client.get("called", "/")).json()["instance"])

    async with serving(app, settings) as client:
        for _ in range(2):
            assert (await client.get("/call")).json() == upstream.instance.id
    assert len(clients) == 1


async def test_every_answer_is_signed(consul_agent: ConsulAgent, consul: ConsulSettings) -> None:
    """The id stands once on found and unfound, refused and failed answers, those of custom handlers too."""
    settings = identity("signed")
    app = FastAPI(lifespan=lifespan(settings, consul=consul))
    app.add_middleware(RegistryMiddleware)
    app.include_router(health_router())

    @app.get("/error")
    async def error() -> None:
        raise RuntimeError("unhandled")

    async with serving(app, settings) as client:
        await until_found(consul_agent, "signed")
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        for method, path, status in (
            ("GET", "/health", 200),
            ("GET", "/health?instance=another", 404),
            ("GET", "/nowhere", 404),
            ("POST", "/health", 405),
            ("GET", "/error", 500),
        ):
            answer = await client.request(method, path)
            assert (answer.status_code, path) == (status, path)
            assert answer.headers.get_list("X-Service-Instance") == [f"signed-127.0.0.1-{settings.port}"]


async def test_without_lifespan_nothing_is_signed() -> None:
    """An app that was not started, as in unit tests, answers as if the middleware were not there."""
    app = FastAPI(lifespan=lifespan(identity("unstarted")))
    app.add_middleware(RegistryMiddleware)
    app.include_router(health_router())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        answer = await client.get("/health")
    assert answer.status_code == 200
    assert "X-Service-Instance" not in answer.headers


async def test_a_reused_app_object_is_left_as_it_was(consul: ConsulSettings) -> None:
    """After the lifespan, the app's middleware stack is the one it had."""
    app = FastAPI(lifespan=lifespan(identity("restored"), consul=consul))
    app.add_middleware(RegistryMiddleware)
    stacks = []
    for _ in range(2):
        async with serving(app, identity("restored")):
            pass
        stacks.append(app.middleware_stack)
    assert stacks[0] is stacks[1]


async def test_a_mounted_app_knows_who_it_is(consul_agent: ConsulAgent, consul: ConsulSettings) -> None:
    """In a mounted app, and one mounted in that, the client is there, and the health router knows its instance."""
    settings = identity("mounting")
    deepest, mounted = FastAPI(), FastAPI()
    deepest.include_router(health_router())
    clients: list[ServiceDiscoveryClient] = []

    async def use(client: DiscoveryClient) -> None:
        clients.append(client)

    for part in (deepest, mounted):
        part.get("/use")(use)
    mounted.mount("/deep", deepest)
    app = FastAPI(lifespan=lifespan(settings, consul=consul))
    app.include_router(health_router())
    app.get("/use")(use)
    app.mount("/v1", mounted)
    async with serving(app, settings) as client:
        await until_found(consul_agent, "mounting")
        for path in ("/use", "/v1/use", "/v1/deep/use"):
            assert (await client.get(path)).status_code == 200
        assert len(set(clients)) == 1
        own = f"mounting-127.0.0.1-{settings.port}"
        assert (await client.get(f"/v1/deep/health?instance={own}")).status_code == 200
        assert (await client.get("/v1/deep/health?instance=ghost-10.0.0.9-80")).status_code == 404
        await app.state.registrar.withdraw()
        leaving = await client.get("/v1/deep/health")
        assert (leaving.status_code, leaving.json()["status"]) == (503, "leaving")


async def test_a_websocket_has_the_client(consul: ConsulSettings) -> None:
    """A WebSocket endpoint takes the dependency as any other does."""
    settings = identity("socketed")
    app = FastAPI(lifespan=lifespan(settings, consul=consul))

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, client: DiscoveryClient) -> None:
        await websocket.accept()
        await websocket.send_text(type(client).__name__)
        await websocket.close()

    sent: list[Message] = []
    scope: Scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"", "subprotocols": []}

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async with lifespan(settings, consul=consul)(app):
        await app(scope, receive, send)
    assert [message.get("text") for message in sent] == [None, "ServiceDiscoveryClient", None]


async def test_the_middleware_may_stand_around_the_app(consul_agent: ConsulAgent, consul: ConsulSettings) -> None:
    """Around the whole app, as any ASGI middleware, it signs every answer, its own 504 too, and the app registers."""
    settings = identity("wrapped")
    app = FastAPI(lifespan=lifespan(settings, consul=consul))
    app.include_router(health_router())
    mounted = FastAPI()
    app.mount("/v1", mounted)

    @mounted.get("/error")
    async def error() -> None:
        raise RuntimeError("unhandled")

    async with serving(RegistryMiddleware(app), settings) as client:
        await until_found(consul_agent, "wrapped")
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        late = {"X-Request-Deadline": f"{time.time() - 10:.3f}"}
        for path, headers, status in (
            ("/health", {}, 200),
            ("/nowhere", {}, 404),
            ("/v1/nowhere", {}, 404),
            ("/v1/error", {}, 500),
            ("/health", late, 504),
        ):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, path) == (status, path)
            assert answer.headers.get_list("X-Service-Instance") == [f"wrapped-127.0.0.1-{settings.port}"]


async def test_without_lifespan_the_middleware_around_the_app_signs_nothing() -> None:
    """Around an app that was not started it changes nothing."""
    app = RegistryMiddleware(FastAPI())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        answer = await client.get("/nowhere")
    assert (answer.status_code, answer.headers.get("X-Service-Instance")) == (404, None)


async def test_a_missing_lifespan_is_told() -> None:
    """The dependency in an app without the lifespan is an error that says what to do."""
    app = FastAPI()

    @app.get("/")
    async def use(client: DiscoveryClient) -> None: ...

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        with pytest.raises(RuntimeError, match="lifespan"):
            await client.get("/")


async def test_two_names_for_one_app_are_refused(consul: ConsulSettings) -> None:
    """A second lifespan of one app does not start, and the error says what to do instead; the app may try again."""
    app = FastAPI()
    twice = lifespan(identity("second-name"), consul=consul, inner=lifespan(identity("first-name"), consul=consul))
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"'second-name'.*register_service"):
            async with twice(app):
                pass
    async with lifespan(identity("one-name"), consul=consul)(app):
        pass


@pytest.mark.parametrize("where", ["route", "mount", "router", "/internal", None])
async def test_a_registration_speaks_for_itself(
    where: str | None, consul_agent: ConsulAgent, consul: ConsulSettings, service_name: str
) -> None:
    """Version, metrics path (if there is one) and scheme are registered; SERVICE_META and SERVICE_VERSION win."""
    app = FastAPI(version="7.1")
    if where == "route":
        app.get("/metrics")(lambda: "")
    if where == "mount":
        app.mount("/metrics", FastAPI())
    if where == "router":
        app.include_router(metrics_router())
    if where == "/internal":
        app.include_router(metrics_router(), prefix=where)
    app.include_router(health_router())
    measured = {"metrics_path": "/internal/metrics" if where == "/internal" else "/metrics"} if where else {}
    for change, expected in (
        ({}, {"version": "7.1", "secure": "false", **measured}),
        ({"version": "8"}, {"version": "8", "secure": "false", **measured}),
        ({"version": "8", "meta": {"version": "9", "team": "cards"}}, {"version": "9", "secure": "false"}),
    ):
        settings = identity(service_name).model_copy(update=change)
        app.router.lifespan_context = lifespan(settings, consul=consul)
        async with serving(app, settings):
            await until_found(consul_agent, service_name)
            with ServiceRegistry("127.0.0.1", consul_agent.http_port) as registry:
                (instance,) = registry.discover_service(service_name)
        assert {key: instance.meta[key] for key in expected} == expected
        assert ("metrics_path" in instance.meta) == bool(where)


def test_metadata_that_consul_would_refuse_is_told_at_the_start() -> None:
    """A version too long for Consul is an error when the registrar is made, not a service that never registers."""
    with pytest.raises(InvalidInputError, match="version"):
        Registrar(identity("verbose"), about={"version": "x" * 513})


async def test_calls_are_limited_as_the_settings_say(monkeypatch: pytest.MonkeyPatch, consul: ConsulSettings) -> None:
    """Time-out, attempts and deadline of the app's client come from the settings, and so from the environment."""
    monkeypatch.setenv("SERVICE_CALL_TIMEOUT", "0.2")
    monkeypatch.setenv("SERVICE_CALL_RETRIES", "2")
    monkeypatch.setenv("SERVICE_CALL_DEADLINE", "0.3")
    app = FastAPI(lifespan=lifespan(identity("limited"), consul=consul))
    async with app.router.lifespan_context(app):
        client: ServiceDiscoveryClient = app.state.discovery_client
        assert (client._timeout, client._transport._retry.max_retries, client._deadline) == (0.2, 2, 0.3)


async def test_client_of_ones_own_making(consul: ConsulSettings) -> None:
    """``client=`` makes the app's client, with any option that there is, from the resolver; it need not pass the zone.

    A zone that it passes is not replaced.
    """
    made: list[ServiceDiscoveryClient] = []

    def make(resolver: Resolver) -> ServiceDiscoveryClient:
        made.append(ServiceDiscoveryClient(resolver, ejection=EjectionPolicy(failures=2), policy="round_robin"))
        return made[0]

    settings = identity("made").model_copy(update={"zone": "eu-1a"})
    app = FastAPI(lifespan=lifespan(settings, consul=consul, client=make))
    async with app.router.lifespan_context(app):
        assert [app.state.discovery_client] == made
        assert zone_of(made[0]) == "eu-1a"
    app = FastAPI(lifespan=lifespan(settings, consul=consul))
    async with app.router.lifespan_context(app):
        assert zone_of(app.state.discovery_client) == "eu-1a"


def zone_of(client: ServiceDiscoveryClient) -> str | None:
    """The zone that its calls prefer."""
    zones = client.explain("nobody").zones
    return zones.own if zones else None
