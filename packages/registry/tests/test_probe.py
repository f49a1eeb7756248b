"""The own health check, by the probe and by Consul alike: over https, behind a prefix, a token and a Host check."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trustme
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from starlette.middleware.trustedhost import TrustedHostMiddleware

from registry import ConsulSettings, ServiceRegistry, ServiceSettings
from registry.fastapi import health_router, lifespan
from registry.presence.probe import Probe
from registry.presence.registration import Registration
from registry.testing.agent import ConsulAgent, running_agent
from registry.testing.ports import free_ports
from tests.support.command import found, wait_until
from tests.support.server import Answer, Serve

Complaint = Callable[..., Awaitable[str | None]]


@asynccontextmanager
async def served(app: FastAPI, port: int, certificate: Path | None = None) -> AsyncIterator[None]:
    """uvicorn serves the app until the context ends, over TLS if there is a certificate."""
    config = uvicorn.Config(app, port=port, log_level="error", lifespan="on", ssl_certfile=certificate)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    await asyncio.to_thread(wait_until, lambda: server.started or running.done())
    try:
        yield
    finally:
        server.should_exit = True
        await running


def outputs(agent: ConsulAgent, service_id: str) -> str:
    """What Consul's check of the instance saw last."""
    with ServiceRegistry("127.0.0.1", agent.http_port) as registry:
        health = registry.get_service_health(service_id)
    return "" if health is None else health.outputs[f"service:{service_id}"]


async def until_checked(agent: ConsulAgent, settings: ServiceSettings) -> None:
    """Returns once discovery finds the instance, and Consul itself has asked it and got a 200."""
    service_id = f"{settings.name}-127.0.0.1-{settings.port}"
    await asyncio.to_thread(wait_until, lambda: found(agent, settings.name))
    await asyncio.to_thread(wait_until, lambda: "200" in outputs(agent, service_id))
    assert found(agent, settings.name) == [service_id]


@pytest.mark.parametrize("verified", [True, False])
async def test_a_service_that_speaks_https_only_is_registered(
    verified: bool, consul_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probe and check speak https, verify the name that is set, or nothing if told so; Consul knows it as secure."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("shop.test").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    if verified:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))  # Consul's agent and we both read it
    settings = ServiceSettings(
        name="tls-only",
        port=free_ports(1)[0],
        address="127.0.0.1",
        scheme="https",
        health_check_interval=0.5,
        health_check_tls_server_name="shop.test" if verified else None,
        health_check_tls_skip_verify=not verified,
    )
    with running_agent(binary=consul_binary, in_memory=True) as agent:
        app = FastAPI(lifespan=lifespan(settings, consul=ConsulSettings(host="127.0.0.1", port=agent.http_port)))
        app.include_router(health_router())
        async with served(app, settings.port, tmp_path / "cert.pem"):
            await until_checked(agent, settings)
            with ServiceRegistry("127.0.0.1", agent.http_port) as registry:
                (instance,) = registry.discover_service("tls-only")
            assert instance.meta["secure"] == "true"
        assert found(agent, "tls-only", passing=False) == []


async def test_a_guarded_health_endpoint_is_asked_as_it_wants(
    consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a prefix, a token and a Host check: with path and headers set, the instance registers and passes."""
    monkeypatch.setenv("SERVICE_HEALTH_CHECK_PATH", "/v1/health")
    monkeypatch.setenv("SERVICE_HEALTH_CHECK_HEADERS", '{"Authorization": "Bearer 5ecret", "Host": "shop.test"}')
    settings = ServiceSettings(name="guarded", port=free_ports(1)[0], address="127.0.0.1", health_check_interval=0.5)

    def guard(request: Request) -> None:
        if request.headers.get("Authorization") != "Bearer 5ecret":
            raise HTTPException(401)

    consul = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    app = FastAPI(lifespan=lifespan(settings, consul=consul), dependencies=[Depends(guard)])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["shop.test"])
    app.include_router(health_router(), prefix="/v1")
    async with served(app, settings.port):
        await until_checked(consul_agent, settings)


@pytest.fixture
async def complaint() -> AsyncIterator[Complaint]:
    """What a probe says of a port of this host: ``complaint(port, scheme="https")``."""
    probes: list[Probe] = []

    async def ask(port: int, **options: str) -> str | None:
        registration = Registration.of(
            ServiceSettings.model_validate({"name": "shop", "port": port, **options}), "127.0.0.1"
        )
        probes.append(Probe())
        return await probes[-1].complaint(registration, 0.5)

    yield ask
    for probe in probes:
        await probe.aclose()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(401), "answered 401"),
        (Answer(400), "answered 400"),
        (Answer(307, headers={"Location": "https://shop.test/"}), "answered 307 to 'https://shop.test/'"),
        (Answer(200), None),
    ],
)
async def test_the_answer_is_said(answer: Answer, said: str | None, complaint: Complaint, serve: Serve) -> None:
    """What came back in place of 200 is said, with what was asked."""
    port = serve(lambda _: answer).port
    expected = said and f"GET http://127.0.0.1:{port}/health?instance=shop-127.0.0.1-{port} {said}"
    assert await complaint(port) == expected


async def test_silence_and_other_failures_are_said(complaint: Complaint, serve: Serve) -> None:
    """So is what went wrong where nothing came back."""
    assert "All connection attempts failed" in str(await complaint(free_ports(1)[0]))
    assert "SSL" in str(await complaint(serve().port, scheme="https"))
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        assert str(await complaint(silent.getsockname()[1])).endswith(" was not answered within 0.5 s")


async def test_a_query_of_ones_own_is_kept(complaint: Complaint, serve: Serve) -> None:
    """The path may have a query: the instance's id comes after it."""
    server = serve()
    assert await complaint(server.port, health_check_path="/health?deep=1") is None
    (request,) = server.requests
    assert request.target == f"/health?deep=1&instance=shop-127.0.0.1-{server.port}"
