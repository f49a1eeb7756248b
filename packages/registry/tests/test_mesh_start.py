"""CONSUL_CONNECT=true starts as it should or not at all: the server, the agent, and a Consul that comes later."""

import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Scope

from registry import InvalidInputError, ServiceSettings
from registry.fastapi import lifespan
from registry.mesh.guard import only_judged
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.command import ServiceProcess, wait_until
from tests.support.mesh import admin, answer_of, authority_of, token_for

HERE = Path(__file__).parent
APP = "mesh_served_app:app"


class Started(ServiceProcess):
    """`mesh_served_app` under any program."""

    def __init__(self, command: list[str], consul: ConsulAgent, name: str, **env: str) -> None:
        variables = {"CONSUL_CONNECT": "true", "PYTHONPATH": str(HERE)} | env
        super().__init__(APP, name, consul=consul, port=None, cwd=HERE, env=variables)
        program = str(Path(sys.executable).with_name(command[0]))
        self._command = [program, *(part.format(port=self.port) for part in command[1:])]


Start = Callable[..., Started]
UVICORN = ["uvicorn", APP, "--port={port}"]
GUNICORN = ["gunicorn", APP, "--bind=127.0.0.1:{port}"]


@contextmanager
def starting(command: list[str], consul: ConsulAgent, name: str, **env: str) -> Iterator[Started]:
    """Begun; killed when the context ends."""
    service = Started(command, consul, name, **env)
    try:
        service.start(wait=False)
        yield service
    finally:
        service.close()


def nobody() -> ssl.SSLContext:
    """A client without a certificate that trusts everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.real
@pytest.mark.parametrize(
    "command",
    [
        ["hypercorn", APP, "--bind=127.0.0.1:{port}", "--workers=0"],
        ["granian", APP, "--interface=asgi", "--port={port}", "--loop=asyncio"],
        [*GUNICORN, "--worker-class=asgi"],
    ],
    ids=["hypercorn", "granian", "gunicorn, its own asgi worker"],
)
def test_other_servers_serve_nothing(consul_agent: ConsulAgent, service_name: str, command: list[str]) -> None:
    """They say what is missing and what to do; not one request is answered, and nothing is registered."""
    with starting(command, consul_agent, service_name) as service:
        wait_until(lambda: "CONSUL_CONNECT=true needs uvicorn" in service.log, 90)
        assert "CONSUL_CONNECT=client" in service.log
        for context in (None, nobody()):
            assert answer_of(service.port, context).startswith("refused")
        with admin(consul_agent) as http:
            assert http.get(f"/v1/health/service/{service_name}").json() == []


@pytest.mark.real
def test_gunicorn_with_uvicorns_worker_serves_it(consul_agent: ConsulAgent, service_name: str) -> None:
    """There uvicorn is the server."""
    command = [*GUNICORN, "--worker-class=uvicorn_worker.UvicornWorker", "--workers=2"]
    with starting(command, consul_agent, service_name) as service:
        wait_until(service.is_found, 90)
        assert answer_of(service.port, nobody(), "GET /health").startswith("HTTP/1.1 200 ")
        assert answer_of(service.port, nobody()).startswith("HTTP/1.1 403 ")
        assert answer_of(service.port, None).startswith("refused")
        service.end(signal.SIGTERM)


@pytest.mark.real
def test_certificate_of_uvicorns_own_is_refused(fresh_consul_agent: ConsulAgent, tmp_path: Path) -> None:
    """Two certificates for one port: the start says which options to leave out."""
    signed = authority_of(fresh_consul_agent).service("backend-api")
    (tmp_path / "pem").write_text(signed.key + signed.certificate)
    with starting([*UVICORN, f"--ssl-certfile={tmp_path / 'pem'}"], fresh_consul_agent, "backend-api") as service:
        assert service.process.wait(90) != 0
        assert "leave out uvicorn's --ssl-certfile and --ssl-keyfile" in service.log


@pytest.mark.real
def test_uvicorn_outside_of_the_main_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that handles no signals can't be found: it does not start."""
    monkeypatch.setenv("CONSUL_CONNECT", "true")
    (port,) = free_ports(1)
    app = FastAPI(lifespan=lifespan(ServiceSettings(name="threaded", port=port)))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    ended: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except SystemExit as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert ended
    assert not server.started


@pytest.mark.real
def test_unsafe_agent_ends_the_start(fresh_locked_agent: ConsulAgent) -> None:
    """The process ends with the reason; with the variable that allows it, or with a server's signature, it runs."""
    name = "backend-api"
    rules = f'service "{name}" {{ policy = "write" }}\nnode_prefix "" {{ policy = "read" }}'
    env = {"CONSUL_HTTP_TOKEN": token_for(fresh_locked_agent, rules)}
    with starting(UVICORN, fresh_locked_agent, name, **env) as service:
        assert service.process.wait(90) != 0
        assert "CVE-2026-105765" in service.log
        assert "Application startup failed" in service.log
        assert env["CONSUL_HTTP_TOKEN"] not in service.log
    ways = [
        {"CONSUL_CONNECT_ALLOW_UNSAFE_AGENT": "true"},
        {"CONSUL_GRPC_ADDR": f"127.0.0.1:{fresh_locked_agent.grpc_port}"},
    ]
    for way in ways:
        with starting(UVICORN, fresh_locked_agent, name, **env, **way) as service:
            wait_until(service.is_found, 90)
            assert answer_of(service.port, nobody()).startswith("HTTP/1.1 403 ")
            service.end(signal.SIGTERM)


@pytest.mark.real
def test_consul_that_comes_later_is_waited_for(private_consul_agent: ConsulAgent) -> None:
    """Meanwhile it listens and refuses each handshake, and the log says why, once; then it registers by itself."""
    private_consul_agent.kill()
    with starting(UVICORN, private_consul_agent, "late-api") as service:
        wait_until(lambda: "running on https://" in service.log, 90)
        for context in (nobody(), None):
            assert answer_of(service.port, context, "GET /health").startswith("refused")
        wait_until(lambda: "not answer 200 as this instance (certificate: Consul at" in service.log, 60)
        assert service.log.count("no news of the mesh's") == 1
        private_consul_agent.start()
        wait_until(service.is_found, 60)
        assert answer_of(service.port, nobody(), "GET /health").startswith("HTTP/1.1 200 ")


@pytest.mark.real
def test_token_without_the_right_registers_nothing(fresh_locked_agent: ConsulAgent) -> None:
    """It serves nobody and is not found; the log names what Consul said."""
    token = token_for(fresh_locked_agent, 'service "other-api" { policy = "write" }')
    with starting(UVICORN, fresh_locked_agent, "backend-api", CONSUL_HTTP_TOKEN=token) as service:
        wait_until(lambda: "no news of the mesh's certificate" in service.log, 90)
        assert "Permission denied" in service.log
        wait_until(lambda: answer_of(service.port, nobody(), "GET /health").startswith("refused"), 30)
        with admin(fresh_locked_agent) as http:
            assert http.get("/v1/health/service/backend-api").json() == []


async def test_what_no_guard_has_judged_is_refused() -> None:
    """The net below the hook: whatever server brings a request, by whatever way, gets 403."""
    reached: list[Scope] = []

    async def app(scope: Scope, receive: object, send: object) -> None:
        reached.append(scope)

    guarded = only_judged(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="https://service") as client:
        answer = await client.get("/health")
    assert answer.status_code == 403
    assert answer.json()["detail"].startswith("this service is served by mutual TLS only")
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await guarded({"type": "websocket", "path": "/", "extensions": {}}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert reached == []
    await guarded({"type": "lifespan"}, receive, send)
    await guarded({"type": "http", "registry.caller": None}, receive, send)
    assert [scope["type"] for scope in reached] == ["lifespan", "http"]


async def test_outside_of_a_server_the_lifespan_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a test client, for example: the error names the variable."""
    monkeypatch.setenv("CONSUL_CONNECT", "true")
    app = FastAPI(lifespan=lifespan(ServiceSettings(name="backend-api", port=8002)))
    with pytest.raises(InvalidInputError, match="CONSUL_CONNECT=true needs uvicorn"):
        async with app.router.lifespan_context(app):
            pass
