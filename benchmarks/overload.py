"""Three times of what a service can do is asked of it: what it still does in time, with shedding and without."""

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from registry import ConsulResolver, ConsulSettings, ServiceDiscoveryClient
from registry.testing.agent import ConsulAgent, running_agent
from tests.support.command import ServiceProcess, running_service, wait_until
from tests.support.load import Load, Report

__all__ = ["CALLERS", "GOODPUT", "IN_FLIGHT", "LAG", "PATIENCE", "Overload", "overload"]

GOODPUT = 0.7
"""Promised with shedding, as a share of the capacity."""
FACTOR = 3
PATIENCE = 1.0
"""Seconds after which a caller has no use for an answer any more: its deadline."""
INSTANCES = 2
CALLERS = 16
"""As many as keep the instances busy, and wait for nothing but their turn."""
CARDS = 100
"""That a search finds: enough work for the caller not to be what has too much to do."""
ROUNDS = 5
SECONDS = 5.0
"""Of each load."""
START_SECONDS = 60.0
LAG, IN_FLIGHT = {"SERVICE_SHED_LAG": "0.1"}, {"SERVICE_MAX_IN_FLIGHT": "8"}
WAYS: dict[str, dict[str, str]] = {"": {}, "lag": LAG, "lag and in flight": LAG | IN_FLIGHT}
"""What is limited → the variables. The last is what is promised of: here requests queue for the database, too."""


@dataclass
class Overload:
    """One way of running the instances. A list has a figure for each round; rates are calls per second."""

    shedding: str
    """What was limited; empty: nothing."""
    capacity: list[float] = field(default_factory=list)
    """Answered to callers that wait for each other."""
    offered: list[float] = field(default_factory=list)
    goodput: list[float] = field(default_factory=list)
    """Answered in time, as a share of the capacity just before."""
    p50: list[float] = field(default_factory=list)
    """Milliseconds, of what was answered in time."""
    p99: list[float] = field(default_factory=list)
    declined: int = 0
    """Attempts that were not executed, in all rounds."""
    ejections: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """What the other calls came to."""


def overload(quick: bool) -> list[Overload]:
    """Each way in turn; processes and Consul are the same in all rounds. ``quick``: shedding only, for a moment."""
    rounds, seconds = (1, 0.5) if quick else (ROUNDS, SECONDS)
    ways = dict(list(WAYS.items())[-1:]) if quick else WAYS
    with running_agent(in_memory=True) as agent, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overload-")))
        services = {f"bench-{number}": variables for number, variables in enumerate(ways.values())}
        started = [
            stack.enter_context(_backend(agent, folder, *each)) for each in services.items() for _ in range(INSTANCES)
        ]
        for each in started:
            wait_until(each.is_found, START_SECONDS)
        # The caller keeps to other cores than the instances, or it would take from them what it asks for.
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        stack.callback(_keep_to, cores, os.getpid())
        _keep_to(cores[1:], os.getpid())
        for each in started:
            _keep_to(cores[:1], each.process.pid)
        found = [Overload(way) for way in ways]
        for _ in range(rounds):
            for way, service in zip(found, services, strict=True):
                asyncio.run(_sample(way, agent, service, seconds))
                print(f"overload, {way.shedding or 'no shedding'}: goodput {way.goodput[-1]:.2f}", flush=True)
    return found


def _keep_to(cores: Sequence[int], pid: int) -> None:
    """The process's threads, and those that they start from now on."""
    for thread in Path(f"/proc/{pid}/task").iterdir() if cores else ():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


@contextmanager
def _backend(agent: ConsulAgent, folder: Path, service: str, variables: Mapping[str, str]) -> Iterator[ServiceProcess]:
    """Starting; all of a service share one database."""
    env = {"DATABASE_URL": f"sqlite:///{folder}/{service}.db", "LOG_LEVEL": "ERROR", **variables}
    with running_service("backend.main:app", service, "--no-access-log", consul=agent, env=env, wait=False) as started:
        yield started


@asynccontextmanager
async def _client(agent: ConsulAgent, service: str) -> AsyncIterator[ServiceDiscoveryClient]:
    settings = ConsulSettings(host="127.0.0.1", port=agent.http_port)
    resolver = ConsulResolver(settings, upstreams=[service])
    async with ServiceDiscoveryClient(resolver, timeout=PATIENCE, deadline=PATIENCE) as client:
        await resolver.start()
        yield client


async def _sample(way: Overload, agent: ConsulAgent, service: str, seconds: float) -> None:
    async with _client(agent, service) as client:

        async def publish(request_id: str) -> httpx.Response:
            return await client.post(service, "/api/publish", json={"title": request_id, "content": "more work"})

        async def call(request_id: str) -> httpx.Response:
            """A search, and now and then a card."""
            if request_id.endswith("0"):
                return await publish(request_id)
            return await client.get(service, "/api/cards", params={"q": "more", "limit": CARDS})

        await Load(publish, callers=2, calls=0 if way.goodput else CARDS).run()
        await Load(call, callers=CALLERS, calls=2 * CALLERS).run()
        alone = (await _ended(Load(call, callers=CALLERS), seconds)).calls / seconds
        before = dict(_outcomes(client, service))
        busy = await _ended(Load(call, rate=FACTOR * alone), seconds)
        outcomes = _outcomes(client, service)
        endpoints = client.explain(service).endpoints
    answered = Report(tuple(each for each in busy.outcomes if each.error is None))
    way.capacity.append(alone)
    way.offered.append(busy.calls / seconds)
    way.goodput.append(answered.calls / seconds / alone)
    way.p50.append(answered.latency(0.5) * 1e3)
    way.p99.append(answered.latency(0.99) * 1e3)
    way.declined += outcomes["shed"] - before.get("shed", 0)
    way.ejections += sum(sum(each.ejections.values()) for each in endpoints)
    way.errors = dict(Counter(way.errors) + Counter(busy.errors))


async def _ended(load: Load, seconds: float) -> Report:
    """The calls that ended within so many seconds, once those are through that began before anything was slow."""
    async with load:
        await load.until(lambda: load.now >= PATIENCE)
        before = load.calls
        await load.until(lambda: load.now >= PATIENCE + seconds, seconds + 60.0)
        return load.last(max(1, load.calls - before))


def _outcomes(client: ServiceDiscoveryClient, service: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for each in client.explain(service).endpoints:
        found.update(each.outcomes)
    return found
