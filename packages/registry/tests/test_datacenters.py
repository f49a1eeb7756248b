"""Other datacenters as a last resort: two real Consul servers that know each other, and instances in both."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from pydantic import ValidationError

from registry import (
    ConsulResolver,
    ConsulSettings,
    InvalidInputError,
    NoHealthyInstanceError,
    RegistryUnavailableError,
    RetryPolicy,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
)
from registry.consul.datacenters import most_telling
from registry.testing.agent import running_agent
from registry.testing.fixtures import ConsulAgent, Instances, RunningInstance


class Pair(NamedTuple):
    """Agents of dc1, which callers ask, and of dc2."""

    one: ConsulAgent
    two: ConsulAgent


@contextmanager
def joined(binary: Path) -> Iterator[Pair]:
    """Both, once each answers about the other's."""
    with (
        running_agent(binary=binary, in_memory=True) as one,
        running_agent(binary=binary, in_memory=True, datacenter="dc2", joins=one) as two,
    ):
        deadline = time.monotonic() + 30
        while not (answers(one, "dc2") and answers(two, "dc1")):
            assert time.monotonic() < deadline, two.log_tail()
            time.sleep(0.05)
        yield Pair(one, two)


def answers(agent: ConsulAgent, datacenter: str) -> bool:
    """Whether it knows the servers of that one."""
    asked = httpx.get(f"{agent.url}/v1/health/service/consul", params={"dc": datacenter}, trust_env=False)
    return asked.is_success and bool(asked.json())


@pytest.fixture(scope="module")
def shared(consul_binary: Path) -> Iterator[Pair]:
    """For tests that leave them running."""
    with joined(consul_binary) as pair:
        yield pair


@pytest.fixture
def pair(consul_binary: Path) -> Iterator[Pair]:
    """For a test that kills one."""
    with joined(consul_binary) as pair:
        yield pair


@asynccontextmanager
async def caller(
    agent: ConsulAgent, *datacenters: str, upstreams: tuple[str, ...] = (), idle_timeout: float = 300.0
) -> AsyncIterator[tuple[ServiceDiscoveryClient, ConsulResolver]]:
    """A client that looks in these, by this agent; does not repeat, so that a call tells who was asked."""
    settings = ConsulSettings(host="127.0.0.1", port=agent.http_port, token=None)
    resolver = ConsulResolver(settings, upstreams=upstreams, idle_timeout=idle_timeout, datacenters=datacenters)
    await resolver.start()
    async with ServiceDiscoveryClient(resolver, retry=RetryPolicy(max_retries=1)) as client:
        yield client, resolver


async def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        await asyncio.sleep(0.01)


async def answered_by(client: ServiceDiscoveryClient, service: str) -> str:
    """The instance that a call reaches."""
    answer = await client.get(service, "/")
    return answer.headers["X-Service-Instance"]


async def until_answered_by(client: ServiceDiscoveryClient, service: str, one: RunningInstance) -> None:
    """Calls until this one answers; not one call fails on the way."""
    deadline = time.monotonic() + 15
    while await answered_by(client, service) != one.instance.id:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def watches() -> set[asyncio.Task[object]]:
    """The watches of this event loop."""
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("registry watch")}


async def test_the_next_one_serves_while_nobody_passes_in_the_first(
    shared: Pair, instances: Instances, service_name: str
) -> None:
    """Nobody in dc1: calls go to dc2, from the first on. One registers there: they return; it leaves: dc2 again."""
    (far,) = instances(service_name, consul=shared.two)
    async with caller(shared.one, "dc1", "dc2") as (client, resolver):
        assert await answered_by(client, service_name) == far.instance.id
        assert client.explain(service_name).view.datacenter == "dc2"
        (near,) = instances(service_name, consul=shared.one)
        await until_answered_by(client, service_name, near)
        before = far.stats().requests
        for _ in range(20):
            assert await answered_by(client, service_name) == near.instance.id
        assert far.stats().requests == before
        view = client.explain(service_name).view
        assert view.datacenter == "dc1"
        assert [(left.id, left.kind) for left in view.left_out] == [(far.instance.id, "elsewhere")]
        near.deregister()
        await until_answered_by(client, service_name, far)
        assert resolver.view(service_name).datacenter == "dc2"


async def test_the_next_one_is_asked_only_while_it_is_needed(
    shared: Pair, instances: Instances, service_name: str
) -> None:
    """One question is parked while dc1 has somebody; a second while it has nobody, and for ``idle_timeout`` after."""
    (near,) = instances(service_name, consul=shared.one)
    (far,) = instances(service_name, consul=shared.two)
    async with caller(shared.one, "dc1", "dc2", upstreams=(service_name,), idle_timeout=0.3) as (client, resolver):
        assert await answered_by(client, service_name) == near.instance.id
        assert len(watches()) == 1
        near.deregister()
        await until_answered_by(client, service_name, far)
        assert len(watches()) == 2
        near.register()
        await until_answered_by(client, service_name, near)
        await asyncio.sleep(0.3)
        far.deregister()  # ends the wait of what is parked there
        await wait_until(lambda: len(watches()) == 1)
        assert resolver.resolve(service_name)


async def test_one_that_can_not_be_reached_takes_nobody_away(
    pair: Pair, instances: Instances, service_name: str
) -> None:
    """dc2's only server dies while its instances serve: who knows them calls on; who does not is told of an outage."""
    far = instances(service_name, 2, consul=pair.two)
    async with caller(pair.one, "dc1", "dc2") as (client, resolver):
        await answered_by(client, service_name)
        await wait_until(lambda: len(client.explain(service_name).endpoints) == 2)
        pair.two.kill()
        async with caller(pair.one, "dc1", "dc2") as (late, _):
            with pytest.raises(RegistryUnavailableError):
                await late.get(service_name, "/")
        found = {await answered_by(client, service_name) for _ in range(40)}
        assert found <= {each.instance.id for each in far}
        assert len(client.explain(service_name).endpoints) == 2
        (near,) = instances(service_name, consul=pair.one)
        await until_answered_by(client, service_name, near)
        assert resolver.view(service_name).error is None


async def test_an_unknown_one_is_an_outage_and_not_a_missing_service(
    shared: Pair, instances: Instances, service_name: str
) -> None:
    """A service that dc1 does not have may be in dc9, which can't be asked; in dc1 and dc2 there is none for sure.

    While dc1 has it, the unknown one does not matter, and its lost instances are a last resort as ever.
    """
    async with caller(shared.one, "dc1", "dc9") as (client, _):
        with pytest.raises(RegistryUnavailableError, match="No path to datacenter"):
            await client.get(service_name, "/")
        (near,) = instances(service_name, consul=shared.one, check_interval=None)
        await until_answered_by_or_fails(client, service_name, near)
        fail_check(shared.one, near)
        await wait_until(lambda: not [each for each in client.explain(service_name).endpoints if each.listed])
        assert await answered_by(client, service_name) == near.instance.id
    async with caller(shared.one, "dc1", "dc2") as (client, _):
        with pytest.raises(ServiceNotFoundError):
            await client.get(f"{service_name}-nobody", "/")


async def until_answered_by_or_fails(client: ServiceDiscoveryClient, service: str, one: RunningInstance) -> None:
    """Calls until this one answers."""
    deadline = time.monotonic() + 15
    while True:
        try:
            return await until_answered_by(client, service, one)
        except RegistryUnavailableError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


def fail_check(agent: ConsulAgent, one: RunningInstance) -> None:
    """From now on it is critical, by a check that nobody runs."""
    body = {"Name": "test", "ID": f"test-{one.instance.id}", "ServiceID": one.instance.id, "TTL": "1h"}
    put(agent, "/v1/agent/check/register", body)


def put(agent: ConsulAgent, path: str, body: object = None) -> None:
    """Tells the agent."""
    httpx.put(f"{agent.url}{path}", json=body, trust_env=False).raise_for_status()


async def test_an_order_in_the_first_is_obeyed_while_the_next_one_serves(
    shared: Pair, instances: Instances, service_name: str
) -> None:
    """dc1's only instance turns critical, dc2 serves, and the former is put in maintenance: it is no last resort."""
    (near,) = instances(service_name, consul=shared.one, check_interval=None)
    (far,) = instances(service_name, consul=shared.two, check_interval=None)
    async with caller(shared.one, "dc1", "dc2") as (client, _):
        await until_answered_by(client, service_name, near)
        fail_check(shared.one, near)
        await until_answered_by(client, service_name, far)
        assert [each.listed for each in client.explain(service_name).endpoints] == [True, False]
        put(shared.one, f"/v1/agent/service/maintenance/{near.instance.id}?enable=true")
        await wait_until(lambda: len(client.explain(service_name).endpoints) == 1)
        fail_check(shared.two, far)
        await wait_until(lambda: not any(each.listed for each in client.explain(service_name).endpoints))
        assert await answered_by(client, service_name) == far.instance.id


def test_the_most_telling_error_is_raised() -> None:
    """That instances fail says more than that Consul is silent, and that more than that there are none."""
    nobody, away, sick = ServiceNotFoundError("x"), RegistryUnavailableError("away"), NoHealthyInstanceError("x", 2)
    assert most_telling([nobody, away, sick]) is sick
    assert most_telling([nobody, away]) is away
    assert most_telling([nobody, ServiceNotFoundError("x")]) is nobody


def test_they_can_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONSUL_DATACENTERS, separated by commas, in lower case as Consul has them; arguments take precedence."""
    monkeypatch.setenv("CONSUL_DATACENTERS", " DC1, dc2 ,")
    assert ConsulSettings().datacenters == ("dc1", "dc2")
    assert ConsulSettings(datacenters=("dc3",)).datacenters == ("dc3",)
    assert ConsulResolver()._datacenters == ("dc1", "dc2")
    assert ConsulResolver(datacenters=["dc3"])._datacenters == ("dc3",)
    assert ConsulResolver(datacenters=[])._datacenters == (None,)
    monkeypatch.setenv("CONSUL_DATACENTERS", "dc1,d c")
    with pytest.raises(ValidationError, match="not a datacenter"):
        ConsulSettings()
    with pytest.raises(InvalidInputError, match="not a datacenter"):
        ConsulResolver(ConsulSettings(datacenters=()), datacenters=["dc 1"])
