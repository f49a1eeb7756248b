"""What the demo shows: a card published through the front door, ten calls by name, and what happens from then on."""

import asyncio
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.table import Table

from demo.processes import DemoError
from demo.system import System
from demo.traces import find_trace, tree
from registry import RegistryError, ServiceDiscoveryClient

__all__ = ["show_tour", "stay"]

_CARDS = [
    {
        "title": "Consul knows who is healthy",
        "content": "Every service registers with Consul, which checks its health and forgets it when it fails.",
        "tags": ["consul", "health"],
    },
    {
        "title": "Calling a service by name",
        "content": "A service asks Consul who is healthy and calls another service by name, never by address.",
        "tags": ["discovery"],
    },
]
_PAUSE = 0.5
"""Seconds between two calls, and between two looks at Consul, while the demo stays up."""


async def show_tour(system: System, console: Console) -> str:
    """Publishes and enriches a card through orchestrator-api, calls backend-api ten times by name; the card's path.

    In between, orchestrator-api calls every other service by its name, whichever there are. Shows a publish as a trace.

    Raises: DemoError, when a call fails.
    """
    base_url = f"http://localhost:{system.ports.services['orchestrator-api']}"
    async with httpx.AsyncClient(base_url=base_url, timeout=10.0, trust_env=False) as front_door:
        *_, card = [await _ask(front_door, "POST", "/api/publish", draft) for draft in _CARDS]
        enriched = await _ask(front_door, "POST", "/api/enrich", {"content": card["content"]})
        called = Table(
            "service", "answered by", "is", title="Called by name from orchestrator-api", title_justify="left"
        )
        for name in sorted(system.ports.services.keys() - {"orchestrator-api"}):
            health = await _ask(front_door, "GET", f"/api/health/{name}")
            called.add_row(name, health["instance"], health["status"])
    console.print(_card_table(card, enriched))
    console.print(called)
    path = f"/api/cards/{card['id']}"
    calls = Table("call", "answered by", title="Ten calls by name", title_justify="left")
    async with ServiceDiscoveryClient(system.registry, policy="round_robin") as client:
        for number in range(1, 11):
            calls.add_row(f"{number}", await _call(client, path, system))
    console.print(calls)
    if spans := await find_trace(system.collector, "POST /api/publish"):
        console.print("One publish, as a trace", style="italic")
        console.print(tree(spans), soft_wrap=True, highlight=False)
    return path


async def stay(system: System, path: str, live: Live) -> None:
    """Calls on, and shows who answers and how everything stands, until it is cancelled."""
    async with ServiceDiscoveryClient(system.registry) as client:
        while True:
            try:
                await _call(client, path, system)
            except DemoError:
                system.failed += 1
            rows = await asyncio.to_thread(system.rows)
            live.update(
                system.table(rows, f"{system.failed} of {system.answered.total() + system.failed} calls failed")
            )
            await asyncio.sleep(_PAUSE)


async def _call(client: ServiceDiscoveryClient, path: str, system: System) -> str:
    try:
        answer = await client.get("backend-api", path, timeout=2.0)
    except (RegistryError, httpx.HTTPError) as error:
        raise DemoError(f"GET {path} of backend-api failed: {error!r}") from error
    instance = answer.headers["X-Service-Instance"]
    system.answered[instance] += 1
    return instance


async def _ask(client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
    try:
        answer = await client.request(method, path, json=body)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise DemoError(f"{method} {path} of orchestrator-api failed: {error!r}") from error
    found: dict[str, Any] = answer.json()
    return found


def _card_table(card: dict[str, Any], enriched: dict[str, Any]) -> Table:
    table = Table(title="Published through orchestrator-api", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("card", f"{card['id']}: {card['title']}")
    table.add_row("content", card["content"])
    table.add_row("tags", ", ".join(card["tags"]))
    for heading, suggestions in (("suggested when published", card), ("POST /api/enrich says", enriched)):
        table.add_row(heading, "; ".join(f"{found['kind']} {found['value']!r}" for found in suggestions["suggestions"]))
    return table
