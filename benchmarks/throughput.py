"""Calls per second, latency and CPU per call of every client, in interleaved rounds."""

import asyncio
import gc
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles

from benchmarks.clients import CLIENTS, Call, Client, Target
from benchmarks.server import BODY, running_servers
from registry import ConsulSettings
from registry.testing.agent import ConsulAgent

__all__ = ["Sample", "measure", "targets"]

WARM_UP = 0.15
"""Seconds, and at least two calls for every instance, so that the connections are there."""


@dataclass(frozen=True)
class Sample:
    """One client under one load in one round."""

    client: str
    callers: int
    instances: int
    round: int
    calls_per_second: float
    cpu: float
    """Microseconds of this process's CPU per call: steadier than calls per second where others use the machine too."""
    p50: float
    """Milliseconds."""
    p99: float


async def measure(found: Sequence[Target], callers: Sequence[int], rounds: int, seconds: float) -> list[Sample]:
    """Every client against every target under every number of callers, all of them once before any of them again."""
    samples = []
    for turn in range(1, rounds + 1):
        for target in found:
            for count in callers:
                for client in CLIENTS if turn == 1 else [client for client in CLIENTS if not client.slow]:
                    samples.append(await _sample(client, target, count, turn, seconds))
                    _say(samples[-1], rounds)
    return samples


async def _sample(client: Client, target: Target, callers: int, turn: int, seconds: float) -> Sample:
    async with client.open(target) as call:
        if not client.slow:
            await _load(call, callers, min(WARM_UP, seconds), 2 * target.instances)
        gc.collect()
        began, cpu = time.perf_counter(), time.process_time()
        latencies = await _load(call, callers, seconds)
        cpu, took = time.process_time() - cpu, time.perf_counter() - began
    percentiles = quantiles(latencies, n=100, method="inclusive") if len(latencies) > 1 else latencies * 99
    return Sample(
        client=client.name,
        callers=callers,
        instances=target.instances,
        round=turn,
        calls_per_second=len(latencies) / took,
        cpu=cpu / len(latencies) * 1e6,
        p50=percentiles[49] * 1e3,
        p99=percentiles[98] * 1e3,
    )


async def _load(call: Call, callers: int, seconds: float, calls: int = 0) -> list[float]:
    """The seconds that each call took: until the time is over, with at least one per caller and ``calls`` in all."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def caller() -> None:
        now = time.perf_counter()
        while True:
            started = now
            if await call() != (200, BODY):
                raise RuntimeError("that was not the server's answer")
            now = time.perf_counter()
            latencies.append(now - started)
            if now >= end and len(latencies) >= calls:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return latencies


def _say(sample: Sample, rounds: int) -> None:
    print(
        f"round {sample.round}/{rounds}  {sample.instances:>5} instances  {sample.callers:>3} callers  "
        f"{sample.client:<14} {sample.calls_per_second:>7.0f} calls/s  {sample.cpu:>6.0f} µs CPU  "
        f"p50 {sample.p50:.2f} ms  p99 {sample.p99:.2f} ms",
        flush=True,
    )


@contextmanager
def targets(agent: ConsulAgent, sizes: Sequence[int]) -> Iterator[list[Target]]:
    """Services with so many registrations each, all of them served by at most three processes.

    Each registration has a loopback address of its own, so that clients keep connections to each, as to real ones.
    """
    with running_servers(min(3, max(sizes))) as ports:
        found = []
        for size in sizes:
            places = [
                (f"127.1.{number // 250}.{number % 250 + 1}", ports[number % len(ports)]) for number in range(size)
            ]
            service = f"bench-{size}"
            for address, port in places:
                _register(agent, service, address, port)
            settings = ConsulSettings(host="127.0.0.1", port=agent.http_port)
            found.append(Target(service, [f"http://{address}:{port}" for address, port in places], settings))
        yield found


def _register(agent: ConsulAgent, service: str, address: str, port: int) -> None:
    """Without a check: it passes for ever, and no check's traffic stands between the figures."""
    registration = {"ID": f"{service}-{address}-{port}", "Name": service, "Address": address, "Port": port}
    request = urllib.request.Request(
        f"{agent.url}/v1/agent/service/register", json.dumps(registration).encode(), method="PUT"
    )
    urllib.request.urlopen(request).close()
