"""`nox -s up`: build and start the system in containers with three backends, wait until it works, show that it does."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live

from deploy.compose.images import choose_images
from deploy.compose.reach import consul_of
from deploy.compose.stack import Stack, StackError, check_engine, check_password, overlaid
from deploy.compose.view import Row, rows, table
from registry import ServiceRegistry
from registry.testing.agent import ConsulNotFoundError
from tools.services import SERVICES

_START_SECONDS = 120.0
_PAUSE = 0.2
"""Seconds between two looks."""
_COLLECTORS = {"Prometheus": 9090, "Jaeger": 16686}
"""Name → the container's port."""
_HOW_TO_ENTER = """\
  Its UI asks for a token, which may read and nothing else. To see it: docker-compose exec consul cat /secrets/token
  orchestrator-api asks callers for a token; one for an hour:   docker-compose run --rm -T keeper pass --subject you
  Your browser does not know who signed for it. To see who did:       docker-compose exec consul cat /secrets/ca.pem"""
_CARD = {
    "title": "Consul knows who is healthy",
    "content": "Every service registers with Consul, which checks its health and forgets it when it fails.",
    "tags": ["consul", "health"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the system and leaves it running; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s up --", description=__doc__)
    parser.add_argument("--backends", type=int, default=3, help="how many replicas of backend-api (default: 3)")
    parser.add_argument("--observe", action="store_true", help="with Prometheus and Jaeger")
    parser.add_argument("--locked", action="store_true", help="with tokens, TLS and three servers of Consul")
    options = parser.parse_args(arguments)
    if options.locked and options.observe:
        parser.error("--observe and --locked: Prometheus has no token yet; take one of them")
    console = Console()
    try:
        check_password()
        check_engine()
        images = choose_images(console.print, observe=options.observe)
        overlays = [name for name in ("observe", "locked") if getattr(options, name)]
        _up(Stack(images | overlaid(*overlays)), options, console)
    except (StackError, ConsulNotFoundError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _up(stack: Stack, options: argparse.Namespace, console: Console) -> None:
    observe: bool = options.observe
    begun = time.monotonic()
    stack.compose("up", "-d", "--build", "--remove-orphans", "--scale", f"backend={options.backends}")
    consul = stack.address("consul", 8500)
    edge = {service.name: stack.address("edge", service.port) for service in SERVICES}
    with (
        consul_of(stack, locked=options.locked) as registry,
        httpx.Client(timeout=5.0, trust_env=False) as http,
        Live(console=console, refresh_per_second=4) as live,
    ):
        start = Start(stack, registry, http, edge, live)
        start.wait_until_passing()
        start.wait_for_edge()
        addresses = {name: stack.address(name.lower(), port) for name, port in _COLLECTORS.items()} if observe else {}
        if observe:
            start.wait_for_prometheus(addresses["Prometheus"])
        if options.locked:
            http.headers["Authorization"] = f"Bearer {stack.pass_of('up')}"
        card = start.publish()
        start.call_backend(10)
    if not console.is_terminal:
        console.line()  # which Live leaves out there
    console.print(f"Published through the edge: card {card['id']}, {card['title']!r}.", soft_wrap=True)
    for service, address in edge.items():
        console.print(f"{service:<17} http://{address}/docs", soft_wrap=True)
    console.print(f"{'Consul':<17} {'https' if options.locked else 'http'}://{consul}/ui", soft_wrap=True)
    if options.locked:
        console.print(_HOW_TO_ENTER, soft_wrap=True, highlight=False)
    console.print(f"{'Topology':<17} http://{stack.address('edge', 8090)}/", soft_wrap=True)
    for name, address in addresses.items():
        console.print(f"{name:<17} http://{address}", soft_wrap=True)
    console.print(f"Up in {time.monotonic() - begun:.0f} s, and it runs on: `nox -s down` ends it.", soft_wrap=True)


@dataclass
class Start:
    """The wait until a started stack works, and the first calls through its edge. Every method blocks."""

    stack: Stack
    registry: ServiceRegistry
    http: httpx.Client
    edge: dict[str, str]
    live: Live
    answered: Counter[str] = field(default_factory=Counter)
    _deadline: float = field(default_factory=lambda: time.monotonic() + _START_SECONDS)

    def wait_until_passing(self) -> None:
        """Returns when every container does its work. Raises: StackError, when one ended or the time is over."""
        while True:
            found = self._show("waiting until every container is healthy and every instance passing")
            if found and all(row.ready for row in found):
                return
            for row in found:
                if row.container.state in {"exited", "dead", "restarting"}:
                    raise StackError(
                        f"{row.container.name} has ended. Its last words:\n{self.stack.logs(row.container)}"
                    )
            self._check_time(", ".join(row.container.name for row in found if not row.ready))

    def wait_for_edge(self) -> None:
        """Returns when the edge has found every instance that Consul says is passing. Raises: StackError."""
        missing = {row.instance for row in self._show("waiting until the edge knows every instance") if row.instance}
        while missing:
            for address in self.edge.values():
                missing.discard(self._who(address))
            if missing:
                self._check_time(f"the edge, which does not know {', '.join(sorted(missing))} yet")

    def wait_for_prometheus(self, address: str) -> None:
        """Returns when Prometheus has figures of every instance that Consul says is passing. Raises: StackError."""
        while True:
            expected = {row.instance for row in self._show("waiting for figures of every instance") if row.instance}
            if not (missing := expected - self._measured(address)):
                return
            self._check_time(f"Prometheus, which has no figures of {', '.join(sorted(missing))} yet")

    def publish(self) -> dict[str, Any]:
        """A card, published through orchestrator-api. Raises: StackError."""
        answer = self.http.post(f"http://{self.edge['orchestrator-api']}/api/publish", json=_CARD)
        if not answer.is_success:
            raise StackError(f"Publishing through the edge was answered with {answer.status_code}: {answer.text[:500]}")
        card: dict[str, Any] = answer.json()
        return card

    def call_backend(self, calls: int) -> None:
        """Calls backend-api through the edge, and shows who answered."""
        self.answered.update(self._who(self.edge["backend-api"]) for _ in range(calls))
        self._show("")

    def _who(self, address: str) -> str:
        try:
            answer = self.http.get(f"http://{address}/health")
        except httpx.TransportError:
            return "nobody"
        return answer.headers.get("X-Service-Instance", "nobody") if answer.is_success else "nobody"

    def _measured(self, prometheus: str) -> set[str]:
        try:
            answer = self.http.get(f"http://{prometheus}/api/v1/query", params={"query": "up == 1"})
        except httpx.TransportError:
            return set()
        return (
            {series["metric"]["instance"] for series in answer.json()["data"]["result"]} if answer.is_success else set()
        )

    def _show(self, caption: str) -> list[Row]:
        found = rows(self.stack, self.registry)
        self.live.update(table(found, self.answered, caption))
        return found

    def _check_time(self, waiting: str) -> None:
        if time.monotonic() > self._deadline:
            raise StackError(f"Not up after {_START_SECONDS:.0f} s. Still waiting for {waiting}. It is left as it is.")
        time.sleep(_PAUSE)


if __name__ == "__main__":
    sys.exit(main())
