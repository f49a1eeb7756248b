"""Prometheus and Jaeger over the system under test, brought up as the documentation says, and what they know."""

import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from deploy.compose.images import choose_images
from deploy.compose.stack import HERE, Stack, compose_command
from registry.testing.ports import free_ports
from tests.e2e.system import BACKENDS, PROJECT, System
from tests.pages import Shell, blocks
from tools.services import ROOT, SERVICES

PAGE = ROOT / "docs/howto/collectors.md"
ADDRESSES = {"prometheus": 9090, "jaeger": 16686}
UP_SECONDS = 180.0
VOLUME = f"{PROJECT}_prometheus-data"


@dataclass
class Span:
    """One of Jaeger's."""

    id: str
    parent: str | None
    service: str
    name: str
    started: float
    """Seconds since the epoch."""
    tags: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``server``, ``client`` or ``internal``."""
        return str(self.tags.get("span.kind", "internal"))


@dataclass
class Collectors:
    """Where both answer."""

    http: httpx.Client
    prometheus: str
    jaeger: str
    up_at: float = field(default_factory=time.monotonic)
    """When Compose was done."""
    seen_after: float = float("inf")
    """Seconds from when Consul had all backends to when Prometheus had figures of each."""
    seen_after_up: float = float("inf")
    """Seconds to then from when Compose was done."""

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series, now."""
        answer = self.http.get(f"{self.prometheus}/api/v1/query", params={"query": expression})
        answer.raise_for_status()
        return [(series["metric"], float(series["value"][1])) for series in answer.json()["data"]["result"]]

    def number(self, expression: str) -> float:
        """The value of an expression that has one series; 0: it has none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return found[0][1] if found else 0.0

    def measured(self, job: str) -> set[str]:
        """The instances of a service that Prometheus gets figures of."""
        return {labels["instance"] for labels, _ in self.query(f'up{{job="{job}"}} == 1')}

    def targets(self, job: str) -> set[str]:
        """The instances of a service that Prometheus asks for figures, whether they answer or not."""
        found = self.http.get(f"{self.prometheus}/api/v1/targets", params={"state": "active"}).json()
        labels = [target["labels"] for target in found["data"]["activeTargets"]]
        return {each["instance"] for each in labels if each["job"] == job}

    def traces(self, service: str, since: float) -> list[list[Span]]:
        """Traces in which this service took part, and that began after that, newest first."""
        limits: dict[str, str | int] = {"start": int(since * 1e6), "end": int((time.time() + 60) * 1e6), "limit": 500}
        answer = self.http.get(f"{self.jaeger}/api/traces", params={"service": service, **limits})
        answer.raise_for_status()
        return [list(map(_reader(trace), trace["spans"])) for trace in answer.json()["data"]]


def _reader(trace: Mapping[str, Any]) -> Any:
    processes = trace["processes"]

    def read(span: Mapping[str, Any]) -> Span:
        parents = [reference["spanID"] for reference in span["references"] if reference["refType"] == "CHILD_OF"]
        return Span(
            id=span["spanID"],
            parent=parents[0] if parents else None,
            service=processes[span["processID"]]["serviceName"],
            name=span["operationName"],
            started=span["startTime"] / 1e6,
            tags={tag["key"]: tag["value"] for tag in span["tags"]},
        )

    return read


@contextmanager
def collectors(system: System) -> Iterator[Collectors]:
    """Both are up inside, and every service is traced; after, nothing of them is left."""
    bare, ports = system.stack, [str(port) for port in free_ports(len(ADDRESSES))]
    published = {f"{name.upper()}_PORT": port for name, port in zip(ADDRESSES, ports, strict=True)}
    overlay = str((HERE / "docker-compose.observe.yml").relative_to(ROOT))
    files = f"{bare.variables['COMPOSE_FILE']}:{overlay}"
    images = choose_images(print, observe=True)
    # Whoever scales the system meanwhile keeps the overlay.
    system.stack = Stack({**bare.variables, **images, **published, "COMPOSE_FILE": files})
    try:
        _type_what_the_page_says(system.stack, files.split(":"))
        prometheus, jaeger = (f"http://{system.stack.address(name, port)}" for name, port in ADDRESSES.items())
        with httpx.Client(timeout=10.0, trust_env=False) as http:
            yield Collectors(http, prometheus, jaeger)
    except BaseException:
        system.keep_logs("with the collectors")
        raise
    finally:
        system.stack.compose("rm", "--stop", "--force", *ADDRESSES)
        system.stack = bare
        system.stack.compose("up", "-d", "--scale", f"backend={BACKENDS}", *(service.folder for service in SERVICES))
        for volume in system.engine.volumes.list(filters={"name": VOLUME}):
            volume.remove()


def _type_what_the_page_says(stack: Stack, files: list[str]) -> None:
    (block,) = [block for block in blocks(PAGE.read_text()) if block.options == "observed"]
    named = " ".join(f"-f {file}" for file in files)
    shell = Shell(ROOT, stack.environment())
    try:
        shell.type(f'docker-compose() {{ {shlex.join(compose_command())} "$@"; }}')
        shell.type(re.sub(r"-f \S+docker-compose.yml -f \S+observe.yml", named, block.code), UP_SECONDS)
    finally:
        shell.close()
