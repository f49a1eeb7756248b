import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

import anyio.to_thread
import httpx
import pytest

from orchestrator.main import create_app
from orchestrator.settings import Settings
from orchestrator.topology import complaint
from registry import ConsulSettings, ServiceDiscoveryClient, ServiceRegistry
from registry.fastapi import discovery_client
from registry.testing.fixtures import ConsulAgent

Start: TypeAlias = Callable[[ConsulAgent], Awaitable[httpx.AsyncClient]]
HEALTHY = {"status": "healthy"}
SICK = {"status": "unhealthy", "components": {"database": {"status": "unhealthy", "error": "OperationalError"}}}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts orchestrator-api on a real Consul, without registering it."""
    async with AsyncExitStack() as stack:

        async def run(agent: ConsulAgent) -> httpx.AsyncClient:
            app = create_app(Settings())
            consul = ConsulSettings(host="127.0.0.1", port=agent.http_port, timeout=1.0)
            registry = ServiceRegistry(settings=consul)
            app.state.service_registry = stack.enter_context(registry)
            discovery = await stack.enter_async_context(ServiceDiscoveryClient(registry))
            app.dependency_overrides[discovery_client] = lambda: discovery
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", timeout=10)
            return await stack.enter_async_context(client)

        yield run


@contextmanager
def service(status: int, body: dict[str, Any], instance: str | None = None) -> Iterator[int]:
    """A real HTTP server that answers everything alike; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if instance:
                self.send_header("X-Service-Instance", instance)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def register(agent: ConsulAgent, name: str, port: int, status: str) -> None:
    """Registers an instance and returns when Consul has checked it as expected, and says so to everybody."""
    with ServiceRegistry("127.0.0.1", agent.http_port) as registry:
        instance_id = registry.register_service(name, "127.0.0.1", port, health_check_interval="1s", tags=["v1"])

        def checked() -> bool:
            health = registry.get_service_health(instance_id)
            passing = {instance.id for instance in registry.discover_service(name)}
            return (
                health is not None
                and health.status == status
                and all(health.outputs.values())
                and (instance_id in passing) == (status == "passing")
            )

        # What an agent could not tell its server at once, it tells it 15 to 30 s later.
        with anyio.fail_after(40):
            while not await anyio.to_thread.run_sync(checked):  # noqa: ASYNC110 (Consul has no event for it)
                await anyio.sleep(0.02)


async def test_topology_shows_every_instance_with_its_health(fresh_consul_agent: ConsulAgent, start: Start) -> None:
    """All services by name, all instances by id, healthy or not, as Consul has them."""
    front = await start(fresh_consul_agent)
    with service(200, HEALTHY) as good, service(503, SICK) as bad:
        await register(fresh_consul_agent, "backend-api", good, "passing")
        await register(fresh_consul_agent, "backend-api", bad, "critical")
        answer = await front.get("/api/topology")
    assert answer.status_code == 200
    services = {found["service"]: found for found in answer.json()["services"]}
    assert list(services) == ["backend-api", "consul"]
    assert services["backend-api"]["healthy_instances"] == 1
    assert services["backend-api"]["instances"] == [
        {
            "id": f"backend-api-127.0.0.1-{port}",
            "address": "127.0.0.1",
            "port": port,
            "tags": ["v1"],
            "healthy": port == good,
        }
        for port in sorted((good, bad), key=str)
    ]


async def test_health_says_that_everything_works(fresh_consul_agent: ConsulAgent, start: Start) -> None:
    """Both upstreams answer by name and pass their checks: 200."""
    front = await start(fresh_consul_agent)
    with service(200, HEALTHY) as one, service(200, HEALTHY) as two:
        await register(fresh_consul_agent, "backend-api", one, "passing")
        await register(fresh_consul_agent, "research-api", two, "passing")
        answer = await front.get("/api/health")
    assert (answer.status_code, answer.json()["status"], answer.json()["words"]) == (200, "healthy", "Everything works")
    assert [upstream["words"] for upstream in answer.json()["services"]] == [
        "backend-api works; instances that pass their checks: 1 of 1",
        "research-api works; instances that pass their checks: 1 of 1",
    ]


async def test_health_says_which_instance_and_component_is_sick(fresh_consul_agent: ConsulAgent, start: Start) -> None:
    """A sick instance beside a good one: degraded, and the words name the component. A missing service: 503."""
    front = await start(fresh_consul_agent)
    with service(200, HEALTHY) as good, service(503, SICK) as bad:
        await register(fresh_consul_agent, "backend-api", good, "passing")
        await register(fresh_consul_agent, "backend-api", bad, "critical")
        answer = await front.get("/api/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
    backend, research = answer.json()["services"]
    assert backend == {
        "service": "backend-api",
        "status": "degraded",
        "words": "backend-api works; instances that pass their checks: 1 of 2; "
        f"backend-api-127.0.0.1-{bad}: database is unhealthy (OperationalError)",
        "instance": None,
    }
    assert research["status"] == "unhealthy"
    assert research["words"] == "research-api has no healthy instance: try again in a moment; none is registered"
    assert answer.json()["words"] == f"{backend['words']}; {research['words']}"


async def test_any_registered_service_is_called_by_name(fresh_consul_agent: ConsulAgent, start: Start) -> None:
    """A service that this one was never told of is asked by name: 200 or 503; a name that nobody has is 404."""
    front = await start(fresh_consul_agent)
    with service(200, HEALTHY, instance="billing-1") as good:
        await register(fresh_consul_agent, "billing-api", good, "passing")
        answer = await front.get("/api/health/billing-api")
    assert (answer.status_code, answer.json()) == (
        200,
        {
            "service": "billing-api",
            "status": "healthy",
            "words": "billing-api works; instances that pass their checks: 1 of 1",
            "instance": "billing-1",
        },
    )
    gone = await front.get("/api/health/billing-api")
    assert (gone.status_code, gone.json()["status"], gone.json()["instance"]) == (503, "unhealthy", None)
    unknown = await front.get("/api/health/nobody-api")
    assert (unknown.status_code, unknown.json()["detail"]) == (404, "Nobody has registered 'nobody-api'")


async def test_consul_is_asked_itself(fresh_consul_agent: ConsulAgent, start: Start) -> None:
    """Consul is registered under the port of its servers, which speak no HTTP there: its own API is asked instead."""
    front = await start(fresh_consul_agent)
    answer = await front.get("/api/health/consul")
    assert answer.status_code == 200
    assert answer.json() == {
        "service": "consul",
        "status": "healthy",
        "words": "consul works; instances that pass their checks: 1 of 1",
        "instance": None,
    }


async def test_what_works_in_part_is_told(fresh_consul_agent: ConsulAgent, start: Start) -> None:
    """An instance that answers 200 and says that it is degraded is in service, and the words name the component."""
    front = await start(fresh_consul_agent)
    database = {"status": "degraded", "error": "the last write failed"}
    degraded = {"status": "degraded", "components": {"database": database}}
    with service(200, degraded, instance="backend-1") as one, service(200, HEALTHY) as two:
        await register(fresh_consul_agent, "backend-api", one, "passing")
        await register(fresh_consul_agent, "research-api", two, "passing")
        answer = await front.get("/api/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    backend = answer.json()["services"][0]
    assert (backend["status"], backend["instance"]) == ("degraded", "backend-1")
    assert backend["words"] == (
        "backend-api works in part: database is degraded (the last write failed); "
        "instances that pass their checks: 1 of 1"
    )
    assert answer.json()["words"] == backend["words"]


async def test_health_tells_what_the_call_met_before_consul_noticed(
    fresh_consul_agent: ConsulAgent, start: Start
) -> None:
    """An instance that passed its last check but answers 503 now: unhealthy, in the words of its own answer."""
    front = await start(fresh_consul_agent)
    with service(200, HEALTHY) as port:
        await register(fresh_consul_agent, "backend-api", port, "passing")
    answer = (await front.get("/api/health")).json()
    assert answer["services"][0]["status"] == "unhealthy"
    assert answer["services"][0]["words"].startswith("backend-api could not be reached (ConnectError); ")


async def test_a_dead_consul_is_told_in_words(fresh_consul_agent: ConsulAgent, start: Start) -> None:
    """Without Consul topology and health are 503 with a sentence, not a 500, and not 'nothing registered'."""
    front = await start(fresh_consul_agent)
    fresh_consul_agent.kill()
    topology = await front.get("/api/topology")
    assert (topology.status_code, topology.json()["detail"]) == (503, "Consul can't be asked")
    health = await front.get("/api/health")
    assert health.status_code == 503
    assert "Consul can't be asked where backend-api is" in health.json()["words"]
    assert "its checks are unknown" in health.json()["words"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (f"HTTP GET http://x/health: 503 Output: {json.dumps(SICK)}", "database is unhealthy (OperationalError)"),
        (json.dumps(SICK), "database is unhealthy (OperationalError)"),
        (json.dumps(HEALTHY), json.dumps(HEALTHY)),
        ('{"components": {"database": 1}}', '{"components": {"database": 1}}'),
        ('{"components": [1]}', '{"components": [1]}'),
        ("dial tcp: connection refused", "dial tcp: connection refused"),
        ("x" * 1000, "x" * 200),
        ("{", "{"),
        ("", "no reason given"),
        ("{" * 50_000, "{" * 200),
        ('{"components": {"x": {"status": "\\ud800"}}}', "x is ? (no reason given)"),
    ],
)
def test_a_check_output_becomes_words(output: str, words: str) -> None:
    """The sick components if the output names them, else its beginning."""
    assert complaint(output) == words
