"""What many instances and many services cost server, agent and caller: ``python -m benchmarks.capacity [--quick]``."""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.capacity_page import Capacity, Change, Idle, write
from benchmarks.fleet import Cpu, Site, health, running_site
from benchmarks.results import environment
from registry import ConnectionOptions, ConsulResolver, ConsulSettings, ServiceRegistry
from registry.discovery.pool import Pool
from registry.discovery.roster import Roster
from registry.discovery.upstream import Upstream
from registry.telemetry import Event, Observer
from tests.support.server import Answer, recording_server

__all__ = ["main"]

PER_SERVICE = 10
"""Instances of each service, where services are many."""
PAGE = Path(__file__).parents[1] / "docs/explanation/scale.md"


class _Told(Observer):
    def __init__(self) -> None:
        self.changed = asyncio.Event()

    def happened(self, event: Event) -> None:
        if event.kind == "watch_changed":
            self.changed.set()


def _caller(port: int, services: list[str], pipe: Connection) -> None:
    """A process of its own: says how much memory it takes, then "heard" whenever it picks by a new list."""

    async def run() -> None:
        told = _Told()
        before = psutil.Process().memory_info().rss
        resolver = ConsulResolver(
            ConsulSettings(host="127.0.0.1", port=port), upstreams=services, max_watches=len(services), observer=told
        )
        await resolver.start()
        upstreams = [Upstream(resolver, _pool(service), None) for service in services]
        for upstream in upstreams:
            await upstream.pick((), safe=True)
        told.changed.clear()
        pipe.send(psutil.Process().memory_info().rss - before)
        while True:
            await told.changed.wait()
            told.changed.clear()
            await upstreams[0].pick((), safe=True)
            pipe.send("heard")

    asyncio.run(run())


def _pool(service: str) -> Pool:
    """As a client has it."""
    return Pool(service, roster=Roster(size=ConnectionOptions().max_instances))


@contextmanager
def _calling(port: int, services: list[str]) -> Iterator[tuple[int, Connection, float]]:
    """A caller's process id, its pipe, and its memory in MiB."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_caller, args=(port, services, theirs), daemon=True)
    process.start()
    try:
        assert process.pid is not None
        yield process.pid, ours, _receive(ours) / 2**20
    finally:
        process.terminate()
        process.join()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(60):
        raise TimeoutError("the caller heard nothing for 60 s")
    return pipe.recv()


def change(site: Site, instances: int, changes: int) -> Change:
    """One instance of so many changes its state, so many times."""
    service = f"fleet-{instances}"
    site.fill(service, instances)
    victim = f"{service}-10.0.0.0-8002"
    waited: list[float] = []
    with _calling(site.port, [service]) as (pid, pipe, memory):
        answer = httpx.get(f"http://127.0.0.1:{site.port}/v1/health/service/{service}", trust_env=False, timeout=30)

        def work() -> None:
            for number in range(changes):
                begun = time.monotonic()
                site.transact([health("host-0", victim, "passing" if number % 2 else "critical")])
                assert _receive(pipe) == "heard"
                waited.append(time.monotonic() - begun)

        cost = site.cost(work, changes, pid)
    return Change(instances, len(answer.content), cost, median(waited), memory)


def idle(site: Site, services: int, seconds: float) -> Idle:
    """So many services are watched, and nothing happens."""
    names = [f"quiet-{services}-{number}" for number in range(services)]
    for name in names:
        site.fill(name, PER_SERVICE)
    with _calling(site.port, names) as (pid, _, memory):
        cost = site.cost(lambda: time.sleep(seconds), seconds / 60, pid)
    return Idle(services, cost, memory)


def registrations(site: Site, count: int, checks: int, seconds: float) -> tuple[Cpu, float, Cpu]:
    """A registration's CPU and seconds; a check's CPU, with ``checks`` of them once a second."""
    waited: list[float] = []
    with recording_server(lambda _: Answer()) as server, ServiceRegistry("127.0.0.1", site.port) as registry:

        def register() -> None:
            for number in range(count):
                begun = time.monotonic()
                registry.register_service("newcomer", "127.0.0.1", 9000 + number, health_check_interval="1h")
                waited.append(time.monotonic() - begun)

        once = site.cost(register, count)
        took = median(waited)
        for number in range(checks):
            registry.register_service(f"checked-{number}", "127.0.0.1", server.port, health_check_interval="1s")
        time.sleep(2)  # until each has been found well, which is a change
        asked = len(server.requests)
        cost = site.cost(lambda: time.sleep(seconds), 1)
        done = len(server.requests) - asked
        return once, took, Cpu(cost.server / done, cost.agent / done, 0.0)


def run(quick: bool) -> Capacity:
    """Everything, in six minutes; ``quick``: a little of everything, to see that it runs."""
    sizes, services = ((10, 100), (0, 3)) if quick else ((10, 100, 1_000, 10_000), (0, 1, 10, 100))
    with running_site() as site:
        where = environment(site.http.get("/v1/agent/self").json()["Config"]["Version"])
        idling = [idle(site, number, 2.0 if quick else 60.0) for number in services]
        changes = [change(site, size, 4 if quick else 100 if size <= 1_000 else 20) for size in sizes]
        # Last, for their checks go on.
        once, took, check = registrations(site, *((5, 2, 2.0) if quick else (200, 100, 20.0)))
    return Capacity(where, changes, idling, once, took, check)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="capacity", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short run, which is printed only")
    parser.add_argument(
        "--output", type=Path, help="whose figures are replaced, docs/explanation/scale.md unless given"
    )
    options = parser.parse_args()
    write(run(options.quick), options.output or (None if options.quick else PAGE))


if __name__ == "__main__":
    main()
