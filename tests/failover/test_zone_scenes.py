"""Three zones of real instances, a caller in each, and what happens to one zone: on real processes, a real Consul.

Where everybody runs is said by SERVICE_ZONE. `pytest -s` shows what was counted.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from fastapi import FastAPI

from registry import ConsulSettings, ServiceDiscoveryClient, ServiceSettings, ZoneState
from registry.fastapi import lifespan
from registry.testing.fixtures import ConsulAgent
from registry.testing.instances import RunningInstance, received, running_instances
from registry.testing.ports import free_ports
from tests.failover.scenes import Method
from tests.support.load import Call, Load, Report

ZONES = "abc"
RATE = 60.0
"""Calls per second of each caller."""
WORK = 0.005
"""Seconds that each takes: less than what processes on few cores wait for each other says nothing of a zone."""


@dataclass
class Scene:
    """Two instances in each zone, and the clients of a caller in each."""

    service: str
    instances: dict[str, list[RunningInstance]]
    callers: dict[str, ServiceDiscoveryClient]
    loads: list[Load]

    @property
    def everybody(self) -> list[RunningInstance]:
        """All instances."""
        return [each for zone in self.instances.values() for each in zone]

    def zones(self, zone: str) -> ZoneState:
        """What the caller there says of its zone."""
        zones = self.callers[zone].explain(self.service).zones
        assert zones is not None
        return zones

    def report(self, since: float = 0.0) -> Report:
        """What calls came to that began then or later, of all callers."""
        return Report(tuple(outcome for load in self.loads for outcome in load.report.between(since).outcomes))

    def stayed(self, zone: str, since: float) -> float:
        """The part of the calls of the caller there that were answered there."""
        shares = self.loads[ZONES.index(zone)].report.between(since).shares
        return sum(shares.get(each.instance.id, 0.0) for each in self.instances[zone])

    async def go_on(self, seconds: float) -> float:
        """Returns after so long, with the time since the load began."""
        until = self.loads[0].now + seconds
        await self.loads[0].until(lambda: self.loads[0].now > until)
        return until


@asynccontextmanager
async def three_zones(
    agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch, method: Method = "GET"
) -> AsyncIterator[Scene]:
    """Calls from each zone while the context is open, in which all six instances were found."""
    service = f"zoned-{uuid.uuid4().hex[:10]}"
    consul = ConsulSettings.model_validate({"host": "127.0.0.1", "port": agent.http_port, "token": agent.token})
    with ExitStack() as processes:
        instances: dict[str, list[RunningInstance]] = {}
        async with AsyncExitStack() as callers:
            clients = {}
            for zone in ZONES:
                monkeypatch.setenv("SERVICE_ZONE", zone)
                instances[zone] = processes.enter_context(
                    running_instances(service, 2, consul=agent, registers_itself=True, running=False)
                )
                settings = ServiceSettings(
                    name=f"{service}-{zone}", port=free_ports(1)[0], address="127.0.0.1", drain_seconds=0
                )
                app = FastAPI()
                await callers.enter_async_context(lifespan(settings, upstreams=[service], consul=consul)(app))
                clients[zone] = app.state.discovery_client
            scene = Scene(service, instances, clients, [])
            await asyncio.to_thread(_start, scene.everybody)
            await _until_all_are_known(scene)
            for client in clients.values():
                scene.loads.append(
                    await callers.enter_async_context(Load(_calling(client, service, method), rate=RATE))
                )
            yield scene


def _start(instances: Sequence[RunningInstance]) -> None:
    for each in instances:
        each.start(wait=False)
    for each in instances:
        each.wait_until_ready()
        each.set(delay=WORK)


def _calling(client: ServiceDiscoveryClient, service: str, method: Method) -> Call:
    async def call(request_id: str) -> httpx.Response:
        return await client.call_service(service, "/work", method, headers={"X-Request-Id": request_id})

    return call


async def _until_all_are_known(scene: Scene) -> None:
    deadline = time.monotonic() + 20
    while any(len(client.explain(scene.service).endpoints) < 6 for client in scene.callers.values()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def within_a_fifth(report: Report, instances: Sequence[RunningInstance]) -> bool:
    """Whether these were all that answered, each within 20 % of an equal load."""
    shares = {id_: share * len(instances) for id_, share in report.shares.items() if id_ is not None}
    print(report.calls, shares)  # noqa: T201
    return shares.keys() == {each.instance.id for each in instances} and all(
        0.8 < each < 1.2 for each in shares.values()
    )


async def test_a_zone_lost_fails_no_call(consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of a zone, whose caller lives: no GET fails, and after 2 s the others are within 20 % of equally busy.

    Before and after, most calls stay in their zone: one in three would without zones.
    """
    async with three_zones(consul_agent, monkeypatch) as scene:
        await scene.go_on(2.0)
        assert all(scene.stayed(zone, 0.5) > 0.5 for zone in ZONES)
        for each in scene.instances["c"]:
            each.kill()
        since = await scene.go_on(2.0)
        await scene.go_on(5.0)
        left = [*scene.instances["a"], *scene.instances["b"]]
        assert scene.report().errors == {}
        assert within_a_fifth(scene.report(since), left)
        assert all(scene.stayed(zone, since) > 0.5 for zone in "ab")
        assert (scene.zones("c").own, scene.zones("c").kept) == ("c", 0.0)
        assert scene.zones("c").spilled == {"zone_few": 1.0}


async def test_draining_in_one_zone_fails_no_call(consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two instances of a zone gets SIGTERM: no POST fails or arrives twice, and its zone keeps three fifths.

    That leaves all five equally busy.
    """
    async with three_zones(consul_agent, monkeypatch, "POST") as scene:
        await scene.go_on(2.0)
        await asyncio.to_thread(scene.instances["b"][0].terminate)
        since = await scene.go_on(2.0)
        await scene.go_on(5.0)
        left = [each for each in scene.everybody if each is not scene.instances["b"][0]]
        assert scene.report().errors == {}
        assert received(scene.everybody).duplicated == {}
        assert within_a_fifth(scene.report(since), left)
        assert 0.4 < scene.stayed("b", since) < 0.72
        assert scene.zones("b").spilled["zone_few"] == pytest.approx(0.4)
