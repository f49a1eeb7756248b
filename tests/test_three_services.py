"""The three services as a user starts them: real processes, a real Consul, and nothing but names between them."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.testing.agent import ConsulAgent, running_agent
from registry.testing.ports import free_ports

START_SECONDS = 120.0


def answers(port: int) -> bool:
    """Whether something serves there. Consul alone can't tell: it notices a kill only at its next check."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


@dataclass
class System:
    """A running system: three backends on one SQLite file, one research-api, one front door."""

    consul: ConsulAgent
    directory: Path
    front: str = ""
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
                env=environment | self.consul.env() | {"SERVICE_PORT": str(port), "SERVICE_DRAIN_SECONDS": "0.5"},
                cwd=self.directory,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return instance_id

    def passing(self, service: str) -> set[str]:
        """The ids of the healthy instances, as Consul has them."""
        answer = httpx.get(f"{self.consul.url}/v1/health/service/{service}?passing", trust_env=False)
        return {entry["Service"]["ID"] for entry in answer.json()}

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
        return httpx.post(f"{self.front}{path}", json=json, headers=named, timeout=20, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        """A GET to the front door."""
        return httpx.get(f"{self.front}{path}", timeout=20, trust_env=False)


@contextmanager
def running_system(consul: ConsulAgent, directory: Path) -> Iterator[System]:
    """All five processes, each found by Consul; ended whatever happens."""
    system = System(consul, directory)
    ports = free_ports(5)
    try:
        for module, port in zip(("backend", "backend", "backend", "research", "orchestrator"), ports, strict=True):
            system.start(module, port)
        system.front = f"http://127.0.0.1:{ports[-1]}"
        expected = {"backend-api": 3, "research-api": 1, "orchestrator-api": 1}
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


@pytest.fixture(scope="module")
def system(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system for all tests here: starting it is the expensive part. Who stops a process starts it again."""
    with (
        running_agent(binary=consul_binary) as consul,
        running_system(consul, tmp_path_factory.mktemp("system")) as running,
    ):
        yield running


def card(title: str) -> dict[str, Any]:
    return {"title": title, "content": "Services find each other with Consul", "tags": ["registry"]}


def test_publishing_reaches_research_and_backend_by_name(system: System) -> None:
    """A card goes from the front door to backend-api, research-api and back, and comes enriched; all replicas serve."""
    first = system.post("/api/publish", card("First card"))
    assert first.status_code == 201, first.text
    assert first.headers["X-Service-Instance"] in system.passing("orchestrator-api")
    assert first.headers["X-Upstream-Instance"] in system.passing("backend-api")

    second = system.post("/api/publish", card("Second card")).json()
    assert second["enriched"] is True
    assert first.json()["id"] in [found["card_id"] for found in second["suggestions"]]

    enriched = system.post("/api/enrich", {"content": "Who can find services?"})
    assert enriched.json()["complete"] is True
    assert "registry" in [found["value"] for found in enriched.json()["suggestions"]]
    assert enriched.headers["X-Upstream-Instance"] in system.passing("research-api")

    answered = Counter[str]()
    system.until(
        lambda: (
            bool(answered.update([system.post("/api/publish", card("More")).headers["X-Upstream-Instance"]]))
            or answered.keys() == system.passing("backend-api")
        ),
        "an answer from each of three backends",
    )


def test_a_title_and_a_content_are_a_card(system: System) -> None:
    """The shortest card is published, read, replaced, changed and deleted, whichever replica is asked."""
    published = system.post("/api/publish", {"title": "Test Card", "content": "Hello world"})
    assert (published.status_code, published.json()["content"]) == (201, "Hello world")
    path = f"/api/cards/{published.json()['id']}"
    first, second, third = sorted(system.passing("backend-api"))
    with httpx.Client(trust_env=False) as client:

        def ask(instance: str, method: str, body: Any = None) -> httpx.Response:
            port = instance.rsplit("-", 1)[1]
            return client.request(method, f"http://127.0.0.1:{port}{path}", json=body)

        assert ask(first, "GET").json()["content"] == "Hello world"
        assert ask(second, "PUT", {"title": "Test Card", "content": "Hello"}).json()["content"] == "Hello"
        assert ask(third, "PATCH", {"content": "Hello again"}).json()["title"] == "Test Card"
        assert ask(first, "GET").json()["content"] == "Hello again"
        assert ask(second, "DELETE").status_code == 204
        assert ask(third, "GET").status_code == 404


def test_one_key_is_one_card_however_often_it_is_sent(system: System) -> None:
    """The same key through the front door is one card, whichever replica gets it."""
    answers = [system.post("/api/publish", card("Once"), Idempotency_Key="once") for _ in range(10)]
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert [answer.headers.get("Idempotent-Replayed") for answer in answers] == [None, *["true"] * 9]


def test_the_overview_shows_everybody(system: System) -> None:
    """Topology and health through the front door agree with Consul."""
    services = {found["service"]: found for found in system.get("/api/topology").json()["services"]}
    for service in ("backend-api", "research-api", "orchestrator-api"):
        shown = {instance["id"] for instance in services[service]["instances"] if instance["healthy"]}
        assert shown == system.passing(service)
    health = system.get("/api/health")
    assert (health.status_code, health.json()["words"]) == (200, "Everything works")


def test_publishing_goes_on_without_research(system: System) -> None:
    """With research-api gone, cards are published without suggestions, and the front door says what is missing."""
    [research] = system.passing("research-api")
    with system.without(research, signal.SIGTERM):
        assert system.passing("research-api") == set()
        published = system.post("/api/publish", card("Alone"))
        assert (published.status_code, published.json()["enriched"]) == (201, False)
        # The front door may still know it from before: that it refuses is 502, and then nobody is left.
        first, second = (system.post("/api/enrich", {"content": "consul"}) for _ in range(2))
        assert (first.status_code in {502, 503}, first.json()["service"]) == (True, "research-api")
        assert (second.status_code, second.json()["service"]) == (503, "research-api")
        health = system.get("/api/health")
        assert health.status_code == 503
        assert "research-api has no healthy instance" in health.json()["words"]
    assert system.post("/api/publish", card("In company")).json()["enriched"] is True


def test_a_killed_backend_is_not_noticed(system: System) -> None:
    """After kill -9 of one of three backends every card is still published, each once."""
    victim = min(system.passing("backend-api"))
    with system.without(victim, signal.SIGKILL):
        answers = [system.post("/api/publish", card(f"Card {number}")) for number in range(20)]
    assert {answer.status_code for answer in answers} == {201}
    assert victim not in {answer.headers["X-Upstream-Instance"] for answer in answers}
    assert len({answer.json()["id"] for answer in answers}) == 20
