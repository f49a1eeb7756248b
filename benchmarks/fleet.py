"""Consul with many instances: one server, one agent, and registrations that nobody is behind."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil

from registry.testing.agent import ConsulAgent, find_consul, running_agent
from registry.testing.ports import free_ports
from tests.support.command import wait_until

__all__ = ["Cpu", "Site", "health", "joins", "leaves", "running_site"]

PER_NODE = 100
"""Instances on one node of Consul."""
PER_TRANSACTION = 60
"""Operations; Consul takes 64."""


@dataclass(frozen=True)
class Cpu:
    """Milliseconds of CPU: of Consul's server, of the agent that is asked, and of whoever asks."""

    server: float
    agent: float
    caller: float


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
            operations += joins(service, number)
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


def joins(service: str, number: int) -> list[dict[str, object]]:
    """An instance registers, as this package would have it, on a node that has no agent."""
    node, address = _place(number)
    found = {"ID": f"{service}-{address}-8002", "Service": service, "Address": address, "Port": 8002}
    detail = {**found, "Meta": {"version": "1.0.0", "python": "3.11.7", "weight": "1"}}
    operations: list[dict[str, object]] = []
    if number % PER_NODE == 0:
        operations.append({"Node": {"Verb": "set", "Node": {"Node": node, "Address": address}}})
    operations.append({"Service": {"Verb": "set", "Node": node, "Service": detail}})
    return [*operations, health(node, found["ID"], "passing")]


def leaves(service: str, number: int) -> dict[str, object]:
    """It is deregistered."""
    node, address = _place(number)
    found = {"ID": f"{service}-{address}-8002", "Service": service}
    return {"Service": {"Verb": "delete", "Node": node, "Service": found}}


def _place(number: int) -> tuple[str, str]:
    return f"host-{number // PER_NODE}", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def health(node: str, service_id: object, status: str) -> dict[str, object]:
    """Its check finds that."""
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
                agent.kill()  # it would wait 5 s for others to hear that it leaves


def _has_joined(port: int) -> bool:
    """Whether the agent's server knows it."""
    try:
        nodes = httpx.get(f"http://127.0.0.1:{port}/v1/catalog/nodes", trust_env=False)
    except httpx.TransportError:
        return False
    return nodes.is_success and any(node["Node"] == "agent" for node in nodes.json())
