"""What a call pays for discovery: the time of a pick, and requests to Consul."""

import asyncio
import time
from collections import deque
from statistics import median

import httpx

from benchmarks.clients import PATH, Target
from registry import ConsulResolver, ConsulSettings, Instance, ServiceDiscoveryClient, StaticResolver
from registry.discovery.balancing import power_of_two_choices
from registry.discovery.endpoint import Endpoint
from registry.discovery.pool import Pool
from registry.discovery.upstream import Upstream
from tests.support.server import Answer, Request, recording_server

__all__ = ["consul_requests", "pick_microseconds"]

CALLERS = 32


async def pick_microseconds(instances: int, picks: int) -> float:
    """Median µs from a service's name to an instance, while so many calls as there are callers are under way."""
    fleet = [Instance(f"i-{number}", "bench", f"10.0.{number >> 8}.{number & 255}", 80) for number in range(instances)]
    upstream = Upstream(StaticResolver({"bench": fleet}), Pool("bench", power_of_two_choices), None)
    under_way: deque[tuple[int, Endpoint]] = deque()
    taken = []
    for number in range(picks):
        started = time.perf_counter_ns()
        endpoint = await upstream.pick((), safe=True)
        taken.append(time.perf_counter_ns() - started)
        assert endpoint
        # As the transport reports it: an attempt begins, and 32 later it succeeds.
        endpoint.started[number] = time.monotonic()
        under_way.append((number, endpoint))
        if len(under_way) > CALLERS:
            key, done = under_way.popleft()
            upstream.pool.succeeded(done, time.monotonic() - done.started.pop(key))
    return median(taken) / 1e3


async def consul_requests(target: Target, calls: int) -> int:
    """How many requests Consul gets during so many calls in steady state: all that come, the watch's own too."""

    def forward(request: Request) -> Answer:
        # A parked query waits here as long as it waits at the agent.
        answer = httpx.get(f"{target.consul.url}{request.target}", timeout=60.0, trust_env=False)
        return Answer(
            answer.status_code, answer.content, {k: v for k, v in answer.headers.items() if k.startswith("x-consul-")}
        )

    with recording_server(forward) as consul:
        resolver = ConsulResolver(ConsulSettings(host="127.0.0.1", port=consul.port), upstreams=[target.service])
        async with ServiceDiscoveryClient(resolver) as client:
            await resolver.start()
            await client.get(target.service, PATH)
            async with asyncio.timeout(10):
                while len(consul.requests) < 2:  # noqa: ASYNC110  # the first answer, and the query that parks
                    await asyncio.sleep(0.01)
            left = iter(range(calls))

            async def caller() -> None:
                for _ in left:
                    await client.get(target.service, PATH)

            await asyncio.gather(*(caller() for _ in range(CALLERS)))
            return len(consul.requests) - 2
