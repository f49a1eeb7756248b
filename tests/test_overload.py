"""A service that sheds, as processes: what it declines is done elsewhere, once, and nobody takes it for ill."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import httpx

from registry import ConsulResolver, ConsulSettings, RetryPolicy, ServiceDiscoveryClient
from registry.testing.agent import ConsulAgent
from tests.support.command import ServiceProcess, running_service, wait_until
from tests.support.load import Load

BACKEND = "backend-api"
CALLS = 60


@contextmanager
def running_backends(agent: ConsulAgent, folder: Path) -> Iterator[tuple[ServiceProcess, ServiceProcess]]:
    """Two on one database, of which the first does one thing at a time; both found by Consul."""
    shared = {"DATABASE_URL": f"sqlite:///{folder}/cards.db", "SERVICE_HEALTH_CHECK_INTERVAL": "0.5"}
    limited = {"SERVICE_MAX_IN_FLIGHT": "1"}
    with (
        running_service("backend.main:app", BACKEND, consul=agent, env=shared | limited, wait=False) as first,
        running_service("backend.main:app", BACKEND, consul=agent, env=shared, wait=False) as second,
    ):
        wait_until(lambda: first.is_found() and second.is_found(), 60.0)
        yield first, second


@contextmanager
def kept_busy(service: ServiceProcess) -> Iterator[None]:
    """A request is in progress there whose body does not end; so much has come that the service waits for minutes."""
    with ExitStack() as stack:

        def is_busy() -> bool:
            caller = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            caller.sendall(b"POST /api/publish HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b" " * 99_999)
            return "X-Not-Executed" in service.http.get("/api/cards", timeout=30.0).headers

        wait_until(is_busy, 60.0)
        yield


@asynccontextmanager
async def client(agent: ConsulAgent) -> AsyncIterator[ServiceDiscoveryClient]:
    """One that asks both in turn, and is not held up by its budget."""
    settings = ConsulSettings(host="127.0.0.1", port=agent.http_port)
    resolver = ConsulResolver(settings, upstreams=[BACKEND])
    retry = RetryPolicy(budget_per_second=1_000.0)
    async with ServiceDiscoveryClient(resolver, policy="round_robin", retry=retry) as opened:
        await resolver.start()
        yield opened


async def test_what_one_declines_another_does(fresh_consul_agent: ConsulAgent, tmp_path: Path) -> None:
    """While one of two sheds, every POST succeeds at the other, once; nobody is ejected, and Consul's check passes."""
    with running_backends(fresh_consul_agent, tmp_path) as (first, second):
        async with client(fresh_consul_agent) as caller:

            async def publish(request_id: str) -> httpx.Response:
                card = {"title": request_id, "content": "published while one of two sheds"}
                return await caller.post(BACKEND, "/api/publish", json=card)

            with kept_busy(first):
                report = await Load(publish, callers=4, calls=CALLS).run()
                assert first.http.get("/health", timeout=30.0).status_code == 200
                assert first.is_found()
            found = {each.id: each for each in caller.explain(BACKEND).endpoints}
            assert [outcome.message for outcome in report.failures] == []
            assert set(report.shares) == {second.id}
            assert found[first.id].outcomes.keys() == {"shed"}
            assert found[first.id].outcomes["shed"] >= 5
            assert [(each.failures, each.ejections) for each in found.values()] == [(0, {})] * 2
            published = [title for offset in range(0, CALLS + 100, 100) for title in await titles(caller, offset)]
            assert sorted(published) == sorted(outcome.id for outcome in report.outcomes)

            later = Load(publish, callers=1)
            async with later:
                await later.until(lambda: first.id in later.report.shares, what="an answer of the one that shed")
            assert [outcome.message for outcome in later.report.failures] == []


async def titles(caller: ServiceDiscoveryClient, offset: int) -> list[str]:
    """The titles of a hundred cards."""
    answer = await caller.get(BACKEND, "/api/cards", params={"limit": 100, "offset": offset})
    return [card["title"] for card in answer.json()["items"]]
