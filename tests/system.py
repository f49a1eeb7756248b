"""The five processes of the smallest whole system: real services, a real Consul, and nothing but names between them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.testing.agent import ConsulAgent
from registry.testing.ports import free_ports

START_SECONDS = 120.0


def answers(port: int) -> bool:
    """Whether something serves there. Consul alone can't tell: it notices a kill only at its next check."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, verify=False).is_success
    except httpx.TransportError:
        return False


@dataclass
class System:
    """A running system: backends on one SQLite file, one research-api, one front door."""

    consul: ConsulAgent
    directory: Path
    front: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What every process is told besides where Consul is, and its own port."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, module: str, port: int) -> str:
        """Starts a service and returns its instance id."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CONSUL_", "SERVICE_", "DATABASE_"))
        }
        instance_id = f"{module}-api-127.0.0.1-{port}"
        with (self.directory / f"{instance_id}.log").open("ab") as log:
            self.processes[instance_id] = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", f"{module}.main:app", "--port", str(port)],
                # No address of another service: only where Consul is, and the own port.
                env=environment
                | self.consul.env()
                | {"SERVICE_PORT": str(port), "SERVICE_DRAIN_SECONDS": "0.5"}
                | dict(self.variables),
                cwd=self.directory,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return instance_id

    def passing(self, service: str) -> set[str]:
        """The ids of the healthy instances, as Consul has them."""
        answer = httpx.get(f"{self.consul.url}/v1/health/service/{service}?passing", trust_env=False, verify=False)
        return {entry["Service"]["ID"] for entry in answer.json()}

    def is_checked(self, instance_id: str) -> bool:
        """Whether Consul has asked it. One that was killed before fails its first check, and one is enough then."""
        path = f"/v1/agent/health/service/id/{instance_id}"
        answer = httpx.get(f"{self.consul.url}{path}", trust_env=False, verify=False)
        return all(check["Output"] for check in answer.json()["Checks"])

    @contextmanager
    def without(self, instance_id: str, number: signal.Signals) -> Iterator[None]:
        """The process has ended inside, by the signal; after, it is back under the same id."""
        module, port = instance_id.split("-")[0], int(instance_id.split("-")[-1])
        self.processes[instance_id].send_signal(number)
        self.processes[instance_id].wait(20)
        try:
            yield
        finally:
            self.start(module, port)
            self.until(lambda: answers(port) and instance_id in self.passing(f"{module}-api"), f"{instance_id} back")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Returns as soon as the condition holds; fails with the end of every log after a deadline."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in self.directory.glob("*.log"))
                pytest.fail(f"waited in vain: {what}\n{logs}")
            time.sleep(0.02)

    def post(self, path: str, json: Any, **headers: str) -> httpx.Response:
        """A POST to the front door."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{self.front}{path}", json=json, headers=named, timeout=20, trust_env=False, verify=False)

    def get(self, path: str) -> httpx.Response:
        """A GET to the front door."""
        return httpx.get(f"{self.front}{path}", timeout=20, trust_env=False, verify=False)


@contextmanager
def running_system(
    consul: ConsulAgent, directory: Path, backends: int = 3, variables: Mapping[str, str] | None = None
) -> Iterator[System]:
    """All processes, each found by Consul; ended whatever happens."""
    system = System(consul, directory, variables=variables or {})
    ports = free_ports(backends + 2)
    try:
        for module, port in zip((*("backend",) * backends, "research", "orchestrator"), ports, strict=True):
            system.start(module, port)
        system.front = f"http://127.0.0.1:{ports[-1]}"
        expected = {"backend-api": backends, "research-api": 1, "orchestrator-api": 1}
        for service, count in expected.items():
            system.until(lambda: len(system.passing(service)) == count, f"{count} × {service} passing")  # noqa: B023
        yield system
    finally:
        for process in system.processes.values():
            process.terminate()
        for process in system.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
