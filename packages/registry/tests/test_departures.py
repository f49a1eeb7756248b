"""Who is not offered any more: an order is obeyed at once, a loss is doubted, and `explain` says which it was."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing

import httpx
import pytest

from registry import (
    ConsulResolver,
    ConsulSettings,
    NoHealthyInstanceError,
    RegistryError,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
)
from registry.consul.departures import KEEP, MAX_WITHDRAWN, Departures
from registry.consul.health import Listing
from registry.consul.reading import parse_listing
from registry.consul.watch import SETTLE
from registry.testing.fixtures import ConsulAgent
from tests.support.server import RecordingServer, Serve


class Scene:
    """Two instances without checks that answer for ever, and a client that has called them."""

    def __init__(self, agent: ConsulAgent, service: str, servers: dict[str, RecordingServer]) -> None:
        self.agent, self.service, self.servers = agent, service, servers
        self.consul = httpx.Client(base_url=agent.url, trust_env=False)
        self.client: ServiceDiscoveryClient

    def put(self, path: str, body: object = None) -> None:
        self.consul.put(path, json=body).raise_for_status()

    def register(self, id_: str) -> None:
        body = {"Name": self.service, "ID": id_, "Address": "127.0.0.1", "Port": self.servers[id_].port}
        self.put("/v1/agent/service/register", body)

    def deregister(self, id_: str) -> None:
        self.put(f"/v1/agent/service/deregister/{id_}")

    def maintain(self, id_: str, *, enable: bool = True) -> None:
        self.put(f"/v1/agent/service/maintenance/{id_}?enable={str(enable).lower()}&reason=new+disks")

    def fail(self, id_: str) -> None:
        check = {"Name": f"{id_}-ttl", "ID": f"{id_}-ttl", "ServiceID": id_, "TTL": "10m", "Status": "critical"}
        self.put("/v1/agent/check/register", check)

    def asked(self) -> int:
        return sum(len(server.requests) for server in self.servers.values())

    def listed(self) -> set[str]:
        return {each.id for each in self.client.explain(self.service).endpoints if each.listed}

    def reasons(self) -> dict[str, str]:
        return {each.id: each.reason for each in self.client.explain(self.service).left_out}

    async def call(self) -> str:
        """The id of who answered."""
        before = {id_: len(server.requests) for id_, server in self.servers.items()}
        assert (await self.client.get(self.service, "/")).status_code == 200
        (answered,) = (id_ for id_, server in self.servers.items() if len(server.requests) > before[id_])
        return answered

    async def refused(self, seconds: float = 3.0) -> RegistryError:
        """The first error, within so long; from then on nobody is asked, whatever the instances would say."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                await self.call()
            except RegistryError as error:
                first = error
                break
            assert time.monotonic() < deadline, "calls go on"
        asked = self.asked()
        for _ in range(20):
            with pytest.raises(type(first)):
                await self.client.get(self.service, "/")
        assert self.asked() == asked
        return first


async def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def scene_at(agent: ConsulAgent, service: str, serve: Serve) -> AsyncIterator[Scene]:
    """Registered, called, and gone from Consul at the end."""
    scene = Scene(agent, service, {f"{service}-{number}": serve() for number in (1, 2)})
    for id_ in scene.servers:
        scene.register(id_)
    resolver = ConsulResolver(ConsulSettings.model_validate({"host": "127.0.0.1", "port": agent.http_port}))
    with closing(scene.consul):
        try:
            async with ServiceDiscoveryClient(resolver, retry_delay=0.01) as scene.client:
                await scene.call()
                await wait_until(lambda: scene.listed() == scene.servers.keys())
                yield scene
        finally:
            for id_ in scene.servers:
                scene.consul.put(f"/v1/agent/service/deregister/{id_}")


async def test_maintenance_of_all_is_obeyed_and_explained(
    consul_agent: ConsulAgent, service_name: str, serve: Serve
) -> None:
    """Running callers stop at once, though the instances would answer, and go on as soon as it is over."""
    async with scene_at(consul_agent, service_name, serve) as scene:
        for id_ in scene.servers:
            scene.maintain(id_)
        error = await scene.refused()
        assert isinstance(error, NoHealthyInstanceError)
        await wait_until(lambda: not scene.listed())
        assert str(await scene.refused()).endswith("has no healthy instance (2 registered, 2 in maintenance)")
        assert scene.reasons() == dict.fromkeys(scene.servers, "in maintenance: new disks")
        assert scene.client.explain(service_name).endpoints == ()
        one, _ = scene.servers
        scene.maintain(one, enable=False)
        await wait_until(lambda: scene.listed() == {one})
        assert await scene.call() == one


async def test_maintenance_of_the_node_is_obeyed(
    fresh_consul_agent: ConsulAgent, service_name: str, serve: Serve
) -> None:
    """It takes all instances of a host out together."""
    async with scene_at(fresh_consul_agent, service_name, serve) as scene:
        scene.put("/v1/agent/maintenance?enable=true&reason=new+disks")
        assert isinstance(await scene.refused(), NoHealthyInstanceError)
        assert scene.reasons() == dict.fromkeys(scene.servers, "in maintenance: new disks")
        scene.put("/v1/agent/maintenance?enable=false")
        await wait_until(lambda: scene.listed() == scene.servers.keys())
        await scene.call()


async def test_one_in_maintenance_is_no_last_resort(consul_agent: ConsulAgent, service_name: str, serve: Serve) -> None:
    """When the other one fails, the call fails: an operator has said that this one is not to be asked."""
    async with scene_at(consul_agent, service_name, serve) as scene:
        one, two = scene.servers
        scene.maintain(one)
        await wait_until(lambda: scene.listed() == {two})
        scene.fail(two)
        await wait_until(lambda: not scene.listed())
        asked = len(scene.servers[one].requests)
        assert {await scene.call() for _ in range(20)} == {two}
        assert len(scene.servers[one].requests) == asked
        assert scene.reasons() == {one: "in maintenance: new disks", two: f"check '{two}-ttl' is critical"}


async def test_all_deregistered_is_believed_at_once(consul_agent: ConsulAgent, service_name: str, serve: Serve) -> None:
    """Whoever withdraws while Consul goes on is not asked any more, the last one neither."""
    async with scene_at(consul_agent, service_name, serve) as scene:
        one, two = scene.servers
        scene.deregister(one)
        await wait_until(lambda: scene.listed() == {two})
        assert {await scene.call() for _ in range(20)} == {two}
        scene.deregister(two)
        error = await scene.refused()
        assert type(error) is ServiceNotFoundError
        assert scene.reasons() == dict.fromkeys(scene.servers, "deregistered")
        scene.register(two)
        await wait_until(lambda: scene.listed() == {two})
        assert await scene.call() == two
        assert scene.reasons() == {one: "deregistered"}


async def test_who_lost_the_tag_is_not_asked_for_it(consul_agent: ConsulAgent, service_name: str, serve: Serve) -> None:
    """A tag that is taken off is an order, too: calls that want it find nobody, others go on."""
    async with scene_at(consul_agent, service_name, serve) as scene:
        one, _ = scene.servers
        body = {"Name": service_name, "ID": one, "Address": "127.0.0.1", "Port": scene.servers[one].port}
        scene.put("/v1/agent/service/register", {**body, "Tags": ["blue"]})
        await wait_until(lambda: scene.listed() == scene.servers.keys())
        assert (await scene.client.get(service_name, "/", tag="blue")).status_code == 200
        scene.put("/v1/agent/service/register", body)
        await wait_until(lambda: scene.client.explain(service_name, "blue").endpoints == ())
        with pytest.raises(ServiceNotFoundError):
            await scene.client.get(service_name, "/", tag="blue")
        (left_out,) = scene.client.explain(service_name, "blue").left_out
        assert left_out.reason == "deregistered, or registered without the tag 'blue'"
        await scene.call()


async def test_failing_checks_are_doubted(consul_agent: ConsulAgent, service_name: str, serve: Serve) -> None:
    """When every instance is critical they are asked all the same, as long as they answer."""
    async with scene_at(consul_agent, service_name, serve) as scene:
        for id_ in scene.servers:
            scene.fail(id_)
        await wait_until(lambda: not scene.listed())
        assert {await scene.call() for _ in range(50)} <= scene.servers.keys()
        assert scene.reasons() == {id_: f"check '{id_}-ttl' is critical" for id_ in scene.servers}
        assert {each.listed for each in scene.client.explain(service_name).endpoints} == {False}


async def test_a_consul_that_forgot_is_doubted(
    fresh_consul_agent: ConsulAgent, service_name: str, serve: Serve
) -> None:
    """Back without its data it knows nobody, and calls go on; who was in maintenance before stays out."""
    async with scene_at(fresh_consul_agent, service_name, serve) as scene:
        one, two = scene.servers
        scene.maintain(one)
        await wait_until(lambda: scene.listed() == {two})
        await asyncio.to_thread(fresh_consul_agent.restart, keep_data=False)
        await wait_until(lambda: not scene.listed())
        assert {await scene.call() for _ in range(20)} == {two}
        assert scene.reasons() == {two: "Consul lost it: asked while nobody else is left"}


async def test_a_node_that_leaves_takes_nobody_out(consul_agent: ConsulAgent, service_name: str, serve: Serve) -> None:
    """An agent that stops takes its registrations along, not the instances: they are asked while nobody else is left.

    One of them that is deregistered from a node that stays is gone for good.
    """
    async with scene_at(consul_agent, service_name, serve) as scene:
        one, two = scene.servers
        node = f"node-{service_name}"
        for id_ in (one, two):
            scene.deregister(id_)
            port, weights = scene.servers[id_].port, {"Passing": 2, "Warning": 1}
            where = {"ID": id_, "Service": service_name, "Address": "127.0.0.1", "Port": port, "Weights": weights}
            scene.put("/v1/catalog/register", {"Node": node, "Address": "127.0.0.1", "Service": where})
        # Their ids were listed before, from the agent's node.
        await wait_until(lambda: {each.weight for each in scene.client.explain(service_name).endpoints} == {2})
        assert scene.listed() == {one, two}
        scene.put("/v1/catalog/deregister", {"Node": node, "ServiceID": one})
        await wait_until(lambda: scene.listed() == {two})
        scene.put("/v1/catalog/deregister", {"Node": node})
        await wait_until(lambda: not scene.listed())
        assert {await scene.call() for _ in range(20)} == {two}
        assert scene.reasons() == {one: "deregistered", two: "Consul lost it: asked while nobody else is left"}


async def test_registering_anew_is_no_departure(consul_agent: ConsulAgent, service_name: str, serve: Serve) -> None:
    """The only instance is deregistered and registered again, as each does that takes over an id: no call fails."""
    async with scene_at(consul_agent, service_name, serve) as scene:
        one, two = scene.servers
        scene.deregister(two)
        await wait_until(lambda: scene.listed() == {one})

        def anew() -> None:
            scene.deregister(one)
            scene.register(one)

        for _ in range(5):
            registering = asyncio.ensure_future(asyncio.to_thread(anew))
            # Until well after Consul was asked once more.
            until = time.monotonic() + 3 * SETTLE
            while time.monotonic() < until or not registering.done():
                assert await scene.call() == one
            await registering


# -- what is remembered ------------------------------------------------------------------------------------------------


def listing(*numbers: int, status: str = "passing") -> Listing:
    """These instances, all with this status."""
    entries = [
        {
            "Node": {"Node": "n1", "Address": "10.0.0.1"},
            "Service": {"ID": f"cards-{number}", "Service": "cards", "Address": "", "Port": number},
            "Checks": [{"CheckID": "health", "Status": status}],
        }
        for number in numbers
    ]
    return parse_listing(json.dumps(entries).encode())


def ids(departures: Departures) -> set[str] | None:
    """Who is worth a try."""
    return None if departures.lost is None else {key[0] for key in departures.lost}


def test_nothing_is_said_before_anybody_was_listed() -> None:
    """A view that began after a restart can't tell who left: others may know them from before."""
    departures = Departures()
    departures.update(listing(), continuous=True)
    assert departures.lost is None
    departures.update(listing(1), continuous=True)
    assert departures.lost == frozenset()


def test_who_was_never_offered_is_not_lost() -> None:
    """An instance that registers as critical changes nothing for those who derive something from the lost."""
    departures = Departures()
    departures.update(listing(1), continuous=True)
    lost = departures.lost
    both = listing()
    departures.update(both, continuous=True)
    assert departures.lost is lost
    departures.update(listing(2, status="critical"), continuous=True)
    assert departures.lost is lost


def test_the_lost_are_kept_while_nobody_else_serves() -> None:
    """For an hour, if need be; a minute after others serve they are forgotten."""
    now = 0.0
    departures = Departures(clock=lambda: now)
    departures.update(listing(1, 2), continuous=True)
    departures.update(listing(), continuous=False)
    now = 3600.0
    departures.update(listing(), continuous=True)
    assert ids(departures) == {"cards-1", "cards-2"}
    departures.update(listing(1), continuous=True)
    assert ids(departures) == set()
    departures.update(listing(), continuous=False)
    now += KEEP - 1
    departures.update(listing(3), continuous=True)
    assert ids(departures) == {"cards-1"}
    now += 2
    departures.update(listing(3), continuous=True)
    assert ids(departures) == set()


def test_critical_and_then_removed_is_an_order() -> None:
    """Consul removes what has been critical for as long as its registration says: that one is not asked any more."""
    departures = Departures()
    departures.update(listing(1), continuous=True)
    departures.update(listing(1, status="critical"), continuous=True)
    assert ids(departures) == {"cards-1"}
    departures.update(listing(), continuous=True)
    assert ids(departures) == set()


def test_what_is_remembered_is_bounded() -> None:
    """A thousand deployments leave no more than was meant to be."""
    now = 0.0
    departures = Departures(clock=lambda: now)
    for number in range(1, 1_000):
        now += 0.01
        departures.update(listing(number), continuous=True)
    assert len(departures.left_out) == MAX_WITHDRAWN
    assert departures.left_out[-1].id == "cards-998"
    now += KEEP + 1
    departures.update(listing(999), continuous=True)
    assert departures.left_out == ()
