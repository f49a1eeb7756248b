"""What strangers send to the edge: a real HAProxy with the deployment's own configuration, on a real Consul's DNS."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from registry.testing.agent import ConsulAgent
from tests.edge import Edge, Replica, replicas, running_edge, until
from tests.hostile import failures, slow_bodies
from tests.processes import running_services
from tools.services import SERVICES

BACKEND, NAMES = "backend-api", [service.name for service in SERVICES]
OTHERS = [name for name in NAMES if name != BACKEND]
ATTACK_SECONDS = 8.0


@pytest.fixture
async def backends(consul_agent: ConsulAgent) -> AsyncIterator[list[Replica]]:
    """Three replicas of backend-api, and one of every other service."""
    async with AsyncExitStack() as stack:
        for name in OTHERS:
            await stack.enter_async_context(replicas(consul_agent, name, 1))
        yield await stack.enter_async_context(replicas(consul_agent, BACKEND, 3))


@pytest.fixture
async def edge(consul_agent: ConsulAgent, backends: list[Replica], tmp_path: Path) -> AsyncIterator[Edge]:
    """An edge that knows all of them."""
    async with running_edge(consul_agent, tmp_path, *NAMES) as running, httpx.AsyncClient(trust_env=False) as client:

        async def all_known() -> bool:
            await client.get(f"{running.url(BACKEND)}/look")
            return all(replica.ran("/look") for replica in backends)

        await until(all_known, "the edge knows every replica")
        yield running


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A caller that never repeats a request."""
    async with httpx.AsyncClient(trust_env=False, timeout=20) as caller:
        yield caller


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/500", 500),
        ("GET", "/503", 503),
        ("POST", "/503", 503),
        ("POST", "/break", 502),
        ("POST", "/hang", 504),
    ],
)
async def test_what_was_answered_is_not_asked_again(
    edge: Edge, backends: list[Replica], client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    """A GET that fails is run once; a POST that was sent is run once, whatever happens to it."""
    answer = await client.request(method, edge.url(BACKEND) + path)
    assert answer.status_code == status
    assert sum(replica.ran(path) for replica in backends) == 1


@pytest.mark.parametrize("fault", ["break", "hang"])
async def test_a_get_goes_on_where_a_connection_broke(
    edge: Edge, backends: list[Replica], client: httpx.AsyncClient, fault: str
) -> None:
    """A replica that hangs up or falls silent on a GET costs the caller nothing: another one is asked."""
    backends[0].fault = fault
    answers = await asyncio.gather(*(client.get(f"{edge.url(BACKEND)}/read") for _ in range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert backends[0].ran("/read")


@pytest.mark.parametrize("path", ["/break", "/hang"])
async def test_a_get_is_run_three_times_at_most(
    edge: Edge, backends: list[Replica], client: httpx.AsyncClient, path: str
) -> None:
    """A GET that no replica survives is not tried on and on."""
    assert (await client.get(edge.url(BACKEND) + path)).status_code in {502, 504}
    assert sum(replica.ran(path) for replica in backends) <= 3


@pytest.mark.parametrize("name", NAMES)
async def test_strangers_set_no_deadline_no_retry_marker_no_subject_and_no_trace(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient, name: str
) -> None:
    """On every port, what instances tell each other is dropped when it comes from outside; the rest arrives."""
    ours = ["x-request-deadline", "x-retry-attempt", "x-subject", "traceparent", "tracestate", "baggage"]
    headers = {**dict.fromkeys(map(str.title, ours), "1"), "X-Other": "3"}
    async with replicas(consul_agent, name, 1) as [replica], running_edge(consul_agent, tmp_path, name) as edge:
        await client.get(f"{edge.url(name)}/read", headers=headers)
        [seen] = replica.seen
    assert not set(ours) & {header.lower() for header in seen.headers}
    assert seen.headers["x-other"] == "3"


INTERNAL = (
    "/registry/state",
    "/%72egistry/state?after=1",
    "/Registry/state",
    "/registry%2Fstate/",
    "//registry",
    "/metrics",
)
PAGE = ("/", "/?caller=x", "/topology/stream", "/%74opology/topology.js", "/topology")


@pytest.mark.parametrize("name", NAMES)
async def test_strangers_see_nothing_internal(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient, name: str
) -> None:
    """On every port, states and metrics are 404 however they are spelt, and never reach an instance."""
    async with replicas(consul_agent, name, 1) as [replica], running_edge(consul_agent, tmp_path, name) as edge:
        for path in (*INTERNAL, *(PAGE if name == "orchestrator-api" else ())):
            assert (await client.get(edge.url(name) + path)).status_code == 404, path
        assert replica.seen == []
        assert (await client.get(f"{edge.url(name)}/api/registry/metrics")).status_code == 200


async def test_the_page_has_a_port_of_its_own(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient
) -> None:
    """There the page and its stream are served, and nothing else."""
    name = "orchestrator-api"
    async with replicas(consul_agent, name, 1) as [replica], running_edge(consul_agent, tmp_path, name) as edge:
        page = edge.url("topology")
        for path in ("/", "/?caller=x", "/topology/stream", "/topology/topology.js"):
            assert (await client.get(page + path)).status_code == 200, path
        seen = len(replica.seen)
        for path in (*INTERNAL, "/api/publish", "/docs", "/health", "/topology", "/%74opology/x"):
            assert (await client.get(page + path)).status_code == 404, path
        assert len(replica.seen) == seen


@pytest.mark.parametrize("name", NAMES)
async def test_strangers_see_nothing_of_what_operators_see(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient, name: str
) -> None:
    """On every port, metrics and state are 404, however their path is written; what only resembles them arrives."""
    private = [
        "/metrics",
        "/metrics/",
        "/metrics?x=1",
        "/%6Detrics",
        "//metrics",
        "/registry/state",
        "/registry%2Fstate",
    ]
    public = ["/metrics-of-cards", "/api/metrics"]
    async with replicas(consul_agent, name, 1) as [replica], running_edge(consul_agent, tmp_path, name) as edge:
        answers = [await client.get(edge.url(name) + path) for path in (*private, *public)]
        assert [seen.target for seen in replica.seen] == [f"GET {path}" for path in public]
    assert [answer.status_code for answer in answers] == [404] * len(private) + [200] * len(public)


@pytest.mark.parametrize("name", NAMES)
async def test_a_body_too_large_never_gets_in(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient, name: str
) -> None:
    """On every port, more than 2 MiB is 413 in words before the body is sent, and 2 MiB is not."""
    async with replicas(consul_agent, name, 1) as [replica], running_edge(consul_agent, tmp_path, name) as edge:
        assert (await client.post(f"{edge.url(name)}/write", content=bytes(2**21))).status_code == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.ports[name])
        # As much of it as the edge waits for: it closes the connection, and who sends on may not see the answer.
        writer.write(b"POST /write HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (2**21 + 1) + bytes(2**14))
        answer = await reader.read()
        writer.close()
        assert [seen.body for seen in replica.seen] == [2**21]
    assert answer.startswith(b"HTTP/1.1 413 ")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\ncontent-type: application/problem+json" in head
    assert json.loads(body) == {
        "title": "Content Too Large",
        "status": 413,
        "detail": "The body may have at most 2 MiB",
    }


async def test_slow_bodies_are_cut_and_others_served(edge: Edge) -> None:
    """One source with 700 slow bodies on one port is cut off; others are served there, and everybody elsewhere."""
    async with slow_bodies(edge.ports[BACKEND], ["127.0.0.2"], 700) as attack:
        await asyncio.sleep(1)
        victims = [failures(f"{edge.url(name)}/read", "127.0.0.3", ATTACK_SECONDS) for name in NAMES]
        found = await asyncio.gather(*victims)
    sys.stderr.write(f"\n{attack.opened} slow connections, cut: {attack.cut}; victims' calls and failures: {found}\n")
    assert attack.cut["HTTP/1.1 408 Request Time-out"] >= 400
    assert attack.cut[""] >= 200, "more than 500 connections at once are refused"
    assert [failed for _, failed in found] == [[], [], []]


async def test_one_silenced_port_silences_no_other(edge: Edge, client: httpx.AsyncClient) -> None:
    """4,050 slow bodies from nine sources on one port: no call elsewhere fails, and the port serves again after."""
    sources = [f"127.0.0.{number}" for number in range(10, 19)]
    async with slow_bodies(edge.ports[BACKEND], sources, 450) as attack:
        await asyncio.sleep(1)
        victims = [failures(f"{edge.url(name)}/read", "127.0.0.3", ATTACK_SECONDS) for name in OTHERS]
        found = await asyncio.gather(*victims)
    sys.stderr.write(f"\n{attack.opened} slow connections, cut: {attack.cut}; victims' calls and failures: {found}\n")
    assert attack.opened >= 2_000
    assert [failed for _, failed in found] == [[], []]
    assert (await client.get(f"{edge.url(BACKEND)}/read")).status_code == 200


async def _mebibytes(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 2**20


async def test_large_bodies_cost_no_memory(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient
) -> None:
    """Twelve bodies of 100 MB at once, chunked and not, through the edge and past it: 413, or cut off. No service grows
    by them, and no call of others fails meanwhile."""
    paths = {"research-api": "/api/enrich", "backend-api": "/api/publish", "orchestrator-api": "/api/publish"}
    kinds: tuple[dict[str, str], ...] = ({}, {"Content-Length": str(100 * 2**20)})
    statuses = Counter[int]()

    async def post(url: str, headers: dict[str, str]) -> None:
        try:
            statuses[(await client.post(url, content=_mebibytes(100), headers=headers)).status_code] += 1
        except httpx.TransportError:  # the answer came before the body was sent, and the connection was closed
            statuses[0] += 1

    with running_services(consul_agent, tmp_path) as services:
        async with running_edge(consul_agent, tmp_path, *NAMES) as edge:
            direct = {name: f"http://{instance.address}:{instance.port}" for name, (instance, _) in services.items()}
            urls = [base + path for name, path in paths.items() for base in (edge.url(name), direct[name])]
            before = {name: process.memory_info().rss for name, (_, process) in services.items()}
            victims = [failures(f"{edge.url(name)}/health", "127.0.0.3", 3.0) for name in NAMES]
            *found, _ = await asyncio.gather(
                *victims, asyncio.gather(*(post(url, headers) for url in urls for headers in kinds))
            )
            grown = {
                name: (process.memory_info().rss - before[name]) // 2**20 for name, (_, process) in services.items()
            }
    sys.stderr.write(f"\nstatuses {dict(statuses)}, grown by MiB {grown}; victims' calls and failures: {found}\n")
    assert statuses.keys() <= {0, 413}
    assert statuses[413]
    assert max(grown.values()) < 40
    assert [failed for _, failed in found] == [[], [], []]
