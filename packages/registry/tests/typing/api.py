"""Uses the whole public API as a service would; never run, only type-checked: what mypy accepts here stays possible."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, assert_type

import httpx
from fastapi import FastAPI
from pydantic import Field, SecretStr

from registry import (
    ConnectionOptions,
    ConsulResolver,
    ConsulSettings,
    DiscoveryTransport,
    Instance,
    InvalidInputError,
    NoHealthyInstanceError,
    Registrar,
    RegistryError,
    RegistryUnavailableError,
    Resolver,
    RetryPolicy,
    ServiceDiscoveryClient,
    ServiceHealth,
    ServiceNotFoundError,
    ServiceRegistry,
    ServiceSettings,
    Snapshot,
    StaticResolver,
    SyncDiscoveryTransport,
)
from registry.fastapi import (
    Check,
    DiscoveryClient,
    RegistryMiddleware,
    add_problem_handlers,
    discovery_client,
    health_router,
    lifespan,
    problem,
    problem_responses,
)


class Settings(ServiceSettings):
    """A service's settings."""

    name: str = "cards-api"
    port: int = 8002
    database_url: str = Field(default="sqlite://", validation_alias="DATABASE_URL")


def control_plane() -> None:
    """ServiceRegistry."""
    with ServiceRegistry("localhost", 8500, "token", "https", "stale", ca_file=Path("ca.pem"), timeout=1.0) as registry:
        assert_type(registry, ServiceRegistry)
    registry = ServiceRegistry(host="consul", port=8501, token=None, scheme="http", consistency="default")
    registry = ServiceRegistry(settings=ConsulSettings())
    registered = registry.register_service(
        "cards-api",
        "10.0.0.1",
        8002,
        service_id="cards-1",
        tags=["v1"],
        meta={"version": "1"},
        health_check_interval="10s",
        health_check_timeout="5s",
        health_check_path="/health",
        deregister_critical_service_after=None,
    )
    assert_type(registered, str)
    assert_type(registry.deregister_service(registered), bool)
    assert_type(registry.discover_service("cards-api", tag="v1", passing=False), list[Instance])
    assert_type(registry.discover_all_services(), dict[str, list[str]])
    assert_type(registry.get_service_url("cards-api", tag=None, load_balance=False, scheme="https"), str | None)
    assert_type(registry.get_service_health("cards-1"), ServiceHealth | None)
    assert_type(registry.is_healthy(), bool)
    assert_type(registry.resolver(), ConsulResolver)
    registry.close()


def model(instance: Instance, health: ServiceHealth, snapshot: Snapshot) -> None:
    """What discovery answers."""
    assert_type(instance.id, str)
    assert_type(instance.address, str)
    assert_type(instance.port, int)
    assert_type(instance.tags, Sequence[str])
    assert_type(instance.meta, Mapping[str, str])
    assert_type(instance.weight, int)
    assert_type(instance.netloc, str)
    assert_type(instance["address"], str)
    assert_type(instance["port"], int)
    assert_type(health.status, str)
    assert_type(health.checks, Mapping[str, str])
    assert_type(snapshot[0], Instance)
    Instance("id", "cards-api", "10.0.0.1", 8002, tags=("v1",), meta={}, weight=2, connect=True)
    assert_type(instance["connect"], bool)


async def client(resolver: Resolver) -> None:
    """ServiceDiscoveryClient and the transport under any httpx client."""
    async with ServiceDiscoveryClient(ServiceRegistry(), timeout=30.0, max_retries=3, retry_delay=1.0) as calls:
        assert_type(calls, ServiceDiscoveryClient)
    calls = ServiceDiscoveryClient(resolver, deadline=5.0, transport=httpx.ASGITransport(FastAPI()))
    response = await calls.call_service(
        "cards-api",
        "/api/cards",
        "POST",
        tag="v1",
        headers={"Idempotency-Key": "1"},
        params={"q": "a"},
        json={"title": "x"},
        data=None,
        idempotent=True,
        timeout=1.0,
    )
    assert_type(response, httpx.Response)
    assert_type(await calls.get("cards-api", "/", params={"q": "a"}), httpx.Response)
    assert_type(await calls.post("cards-api", "/", json={}), httpx.Response)
    assert_type(await calls.put("cards-api", "/", json={}), httpx.Response)
    assert_type(await calls.patch("cards-api", "/", json={}), httpx.Response)
    assert_type(await calls.delete("cards-api", "/"), httpx.Response)
    await calls.aclose()
    transport: httpx.AsyncBaseTransport = DiscoveryTransport(
        resolver, retry=RetryPolicy(max_retries=2, retry_delay=0.1), deadline=3.0
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://cards-api") as http:
        await http.get("/", extensions={"tag": "v1", "idempotent": True})


def blocking(resolver: Resolver) -> None:
    """The transport under any ``httpx.Client``."""
    transport: httpx.BaseTransport = SyncDiscoveryTransport(
        resolver, retry=RetryPolicy(max_retries=2), deadline=3.0, policy="random", connections=ConnectionOptions()
    )
    with httpx.Client(transport=transport, base_url="http://cards-api") as http:
        assert_type(http.get("/"), httpx.Response)


async def resolvers() -> Resolver:
    """Both kinds fulfil the protocol."""
    static: Resolver = StaticResolver({"cards-api": [Instance("1", "cards-api", "10.0.0.1", 8002)]})
    live = ConsulResolver(
        ConsulSettings(), upstreams=["cards-api"], first_answer_timeout=2.0, datacenters=["dc1", "dc2"]
    )
    await live.start()
    assert_type(live.resolve("cards-api", "v1"), Snapshot | None)
    await live.ready("cards-api")
    await live.aclose()
    protocol: Resolver = live
    return protocol if live.resolve("cards-api") else static


def errors(error: RegistryError) -> None:
    """The tree."""
    if isinstance(error, NoHealthyInstanceError):
        assert_type(error.known, int)
    if isinstance(error, ServiceNotFoundError):
        assert_type(error.service, str)
    value_errors: list[type[ValueError]] = [InvalidInputError, ServiceNotFoundError, NoHealthyInstanceError]
    registry_errors: list[type[RegistryError]] = [RegistryUnavailableError, *(InvalidInputError, ServiceNotFoundError)]
    print(value_errors, registry_errors)  # noqa: T201


async def presence() -> None:
    """Registrar and settings."""
    settings = Settings(
        name="cards-api", port=8002, address="10.0.0.1", tags=("v1",), meta={"a": "b"}, drain_seconds=1.0
    )
    consul = ConsulSettings(host="consul", port=8501, scheme="https", token=SecretStr("t"), ca_file=Path("ca.pem"))
    assert_type(consul.url, str)
    assert_type(consul.read_token(), str | None)
    logging_in = ConsulSettings(auth_method="platform", bearer_token_file=Path("identity"))
    assert_type(logging_in.read_bearer_token(), str)
    registrar = Registrar(settings, consul)
    registrar.start()
    assert_type(registrar.instance_id, str | None)
    await registrar.withdraw()
    await registrar.aclose()


def service() -> FastAPI:
    """A whole service."""

    async def ping() -> None: ...

    check: Check = ping

    @asynccontextmanager
    async def database(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {}

    app = FastAPI(lifespan=lifespan(Settings(), upstreams=["research-api"], consul=ConsulSettings(), inner=database))
    app.add_middleware(RegistryMiddleware)
    app.include_router(health_router(timeout=0.5, database=check))
    add_problem_handlers(app)
    app.exception_handler(ValueError)(lambda _, error: problem(400, str(error), {"Retry-After": "1"}, field="title"))
    app.dependency_overrides[discovery_client] = ServiceDiscoveryClient

    @app.get("/api/cards", responses=problem_responses({404: "No card has this id."}))
    async def cards(client: DiscoveryClient) -> object:
        assert_type(client, ServiceDiscoveryClient)
        return (await client.get("research-api", "/")).json()

    return app
