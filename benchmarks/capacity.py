"""What many instances and many services cost server, agent and caller: ``python -m benchmarks.capacity [--quick]``."""

import argparse
import asyncio
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.capacity_page import Capacity, Change, Cpu, Idle, write
from benchmarks.results import environment
from registry import ConsulResolver, ConsulSettings, ServiceRegistry
from registry.discovery.pool import Pool
from registry.discovery.upstream import Upstream
from registry.telemetry import Event, Observer
from registry.testing.agent import ConsulAgent, find_consul, running_agent
from registry.testing.ports import free_ports
from tests.support.command import wait_until
from tests.support.server import Answer, recording_server

__all__ = ["main"]

PER_NODE = 100
"""Instances on one node of Consul."""
PER_TRANSACTION = 60
"""Operations; Consul takes 64."""
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
        upstreams = [Upstream(resolver, Pool(service), None) for service in services]
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


class Site:
    """A server, and an agent that is a client of it, as on each host of a real system."""

    def __init__(self, server: ConsulAgent, port: int, pid: int) -> None:
        self.server = server
        self.port = port
        self.pids = server.pid, pid
        self.http = httpx.Client(base_url=server.url, trust_env=False, timeout=30)

    def fill(self, service: str, instances: int) -> None:
        """Registers so many, as this package would have, on nodes that have no agent."""
        operations: list[dict[str, object]] = []
        for number in range(instances):
            node, address = f"host-{number // PER_NODE}", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            if number % PER_NODE == 0:
                operations.append({"Node": {"Verb": "set", "Node": {"Node": node, "Address": address}}})
            found = {"ID": f"{service}-{address}-8002", "Service": service, "Address": address, "Port": 8002}
            detail = {**found, "Meta": {"version": "1.0.0", "python": "3.11.7", "weight": "1"}}
            operations.append({"Service": {"Verb": "set", "Node": node, "Service": detail}})
            operations.append(_health(node, found["ID"], "passing"))
        for start in range(0, len(operations), PER_TRANSACTION):
            self.transact(operations[start : start + PER_TRANSACTION])

    def transact(self, operations: list[dict[str, object]]) -> None:
        """All at once, on the server."""
        self.http.put("/v1/txn", json=operations).raise_for_status()

    def cpu(self, caller: int | None = None) -> list[float]:
        """Seconds of CPU so far: of the server, the agent, the caller."""
        times = [psutil.Process(pid).cpu_times() for pid in (*self.pids, *([caller] if caller else []))]
        return [each.user + each.system for each in times]

    def cost(self, work: Callable[[], object], times: float, caller: int | None = None) -> Cpu:
        """Of the work, by so many times."""
        before = self.cpu(caller)
        work()
        spent = [1000 * (after - once) / times for once, after in zip(before, self.cpu(caller), strict=True)]
        return Cpu(spent[0], spent[1], spent[2] if caller else 0.0)


def _health(node: str, service_id: object, status: str) -> dict[str, object]:
    check = {"Node": node, "CheckID": f"service:{service_id}", "ServiceID": service_id, "Name": "GET /health"}
    return {"Check": {"Verb": "set", "Check": {**check, "Status": status, "Output": "HTTP GET /health: 200 OK"}}}


@contextmanager
def running_site() -> Iterator[Site]:
    """On loopback, with ports of its own; ends with the context."""
    with running_agent() as server, tempfile.TemporaryDirectory(prefix="agent-") as data:
        http, serf = free_ports(2)
        lan = httpx.get(f"{server.url}/v1/agent/self", trust_env=False).json()["DebugConfig"]["SerfPortLAN"]
        ports = f"ports {{ dns = -1, grpc = -1, grpc_tls = -1, serf_lan = {serf} }}"
        command = [str(find_consul()), "agent", "-node=agent", "-bind=127.0.0.1", f"-data-dir={data}", f"-hcl={ports}"]
        with subprocess.Popen(
            [*command, f"-http-port={http}", f"-retry-join=127.0.0.1:{lan}"], stdout=subprocess.DEVNULL
        ) as agent:
            try:
                wait_until(lambda: _has_joined(http), 30)
                yield Site(server, http, agent.pid)
            finally:
                agent.terminate()


def _has_joined(port: int) -> bool:
    """Whether the agent's server knows it."""
    try:
        nodes = httpx.get(f"http://127.0.0.1:{port}/v1/catalog/nodes", trust_env=False)
    except httpx.TransportError:
        return False
    return nodes.is_success and any(node["Node"] == "agent" for node in nodes.json())


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
                site.transact([_health("host-0", victim, "passing" if number % 2 else "critical")])
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
