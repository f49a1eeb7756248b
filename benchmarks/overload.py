"""Three times of what a service can do is asked of it: what it still does in time, with shedding and without."""

import asyncio
import math
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from registry import ConsulResolver, ConsulSettings, Explanation, ServiceDiscoveryClient
from registry.testing.agent import ConsulAgent, running_agent
from tests.support.command import running_service, wait_until
from tests.support.load import Load, Report

__all__ = ["CALLERS", "GOODPUT", "PATIENCE", "Overload", "overload"]

GOODPUT = 0.7
"""Promised with shedding, as a share of the capacity."""
FACTOR = 3
PATIENCE = 1.0
"""Seconds after which a caller has no use for an answer any more: its deadline."""
BACKEND = "backend-api"
INSTANCES = 2
CALLERS = 16
"""As many as keep the instances busy, and wait for nothing but their turn."""
CARDS = 200
SHEDDING = {"": {}, "SERVICE_SHED_LAG=0.1": {"SERVICE_SHED_LAG": "0.1"}}
"""How it is told → the variables."""


@dataclass(frozen=True)
class Overload:
    """One run. Rates are calls per second."""

    shedding: str
    """What was set; empty: nothing."""
    capacity: float
    """Answered to callers that wait for each other."""
    offered: float
    goodput: float
    """Answered in time, as a share of the capacity."""
    p50: float
    """Milliseconds, of what was answered in time."""
    p99: float
    declined: int
    """Attempts that were not executed."""
    ejections: int
    failing_fast: int
    """Calls that were turned away because every instance was ejected."""
    errors: Mapping[str, int]
    """What the other calls came to."""


def overload(quick: bool) -> list[Overload]:
    """Each with instances and a Consul of its own; ``quick``: with shedding only, for a moment."""
    seconds = 0.5 if quick else 10.0
    runs = []
    for name, variables in list(SHEDDING.items())[-1:] if quick else SHEDDING.items():
        with running_agent(in_memory=True) as agent, ExitStack() as stack:
            # The caller keeps to other cores than the instances, or it would take from them what it asks for.
            cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
            stack.callback(_keep_to, cores)
            _keep_to(cores[:1])
            stack.enter_context(_backends(agent, variables))
            _keep_to(cores[1:])
            runs.append(asyncio.run(_run(agent, name, seconds)))
        print(f"overload, {name or 'no shedding'}: {runs[-1]}", flush=True)
    return runs


def _keep_to(cores: Sequence[int]) -> None:
    """This process, and those that it starts from now on."""
    if cores:
        os.sched_setaffinity(0, cores)


@contextmanager
def _backends(agent: ConsulAgent, variables: Mapping[str, str]) -> Iterator[None]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overload-")))
        env = {"DATABASE_URL": f"sqlite:///{folder}/cards.db", "LOG_LEVEL": "ERROR", **variables}
        options = ("--no-access-log", "--loop=asyncio", "--http=h11")
        started = [
            stack.enter_context(running_service("backend.main:app", BACKEND, *options, consul=agent, env=env))
            for _ in range(INSTANCES)
        ]
        for each in started:
            wait_until(each.is_found, 30.0)
        yield


@asynccontextmanager
async def _client(agent: ConsulAgent) -> AsyncIterator[ServiceDiscoveryClient]:
    settings = ConsulSettings(host="127.0.0.1", port=agent.http_port)
    resolver = ConsulResolver(settings, upstreams=[BACKEND])
    async with ServiceDiscoveryClient(resolver, timeout=PATIENCE, deadline=PATIENCE) as client:
        await resolver.start()
        yield client


async def _run(agent: ConsulAgent, name: str, seconds: float) -> Overload:
    async with _client(agent) as client:

        async def call(request_id: str) -> httpx.Response:
            """A search, and now and then a card."""
            if request_id.endswith("0"):
                return await client.post(BACKEND, "/api/publish", json={"title": request_id, "content": "more work"})
            return await client.get(BACKEND, "/api/cards", params={"q": "more", "limit": 5})

        await Load(call, callers=CALLERS, calls=CARDS).run()
        alone = await _ended(Load(call, callers=CALLERS), seconds)
        capacity = alone.calls / seconds
        before = client.explain(BACKEND)
        busy = await _ended(Load(call, rate=FACTOR * capacity), seconds)
        after = client.explain(BACKEND)
    answered = Report(tuple(each for each in busy.outcomes if each.error is None))
    return Overload(
        shedding=name,
        capacity=capacity,
        offered=busy.calls / seconds,
        goodput=answered.calls / alone.calls if alone.calls else math.nan,
        p50=answered.latency(0.5) * 1e3,
        p99=answered.latency(0.99) * 1e3,
        declined=_attempts(after, "shed") - _attempts(before, "shed"),
        ejections=sum(sum(each.ejections.values()) for each in after.endpoints),
        failing_fast=after.calls.get("failing_fast", 0),
        errors=dict(busy.errors),
    )


async def _ended(load: Load, seconds: float) -> Report:
    """The calls that ended within so many seconds, once those are through that began before anything was slow."""
    async with load:
        await load.until(lambda: load.now >= PATIENCE)
        before = load.calls
        await load.until(lambda: load.now >= PATIENCE + seconds, seconds + 60.0)
        return load.last(load.calls - before)


def _attempts(explained: Explanation, outcome: str) -> int:
    return sum(dict(each.outcomes).get(outcome, 0) for each in explained.endpoints)  # type: ignore[call-overload]
