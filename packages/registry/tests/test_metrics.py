"""What Prometheus reads: text made from the client's own counts, bounded whatever is called, and cheap."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY as DEFAULT
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from registry import (
    ConnectionOptions,
    ConsulSettings,
    Instance,
    RegistryUnavailableError,
    ServiceDiscoveryClient,
    ServiceSettings,
    Snapshot,
    StaticResolver,
    View,
)
from registry.discovery import ledger
from registry.families import FAMILIES, MOST_INSTANCES, OTHER
from registry.fastapi import RegistryMiddleware, health_router, lifespan
from registry.metrics import MOST_SERIES, Metrics, metrics_router
from registry.testing.ports import free_ports

EVERYBODY = ConnectionOptions(max_instances=10_000)
"""Figures of a caller that knows all that there are."""


class Fleet:
    """A resolver whose instances the test changes."""

    def __init__(self, *names: str) -> None:
        self.snapshot: Snapshot = ()
        self.change(*names)

    def change(self, *names: str) -> None:
        self.snapshot = tuple(
            Instance(name, "cards", "10.0.0.1", 8000 + number, ("blue",)) for number, name in enumerate(sorted(names))
        )

    def resolve(self, service: str, tag: str | None = None) -> Snapshot | None:
        return self.snapshot

    async def ready(self, service: str, tag: str | None = None) -> None: ...

    def view(self, service: str, tag: str | None = None) -> View:
        return View("a test", 0.5, 1.0, len(self.snapshot), None, lost=frozenset(), errors=2)

    async def aclose(self) -> None: ...


class Answers(httpx.AsyncBaseTransport):
    """Answers at once with the status that the path ends in, else 200; ``refuse``: ports where nobody listens."""

    def __init__(self) -> None:
        self.refuse: set[int] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.port in self.refuse:
            raise httpx.ConnectError("refused", request=request)
        last = request.url.path.rpartition("/")[2]
        return httpx.Response(int(last) if last.isdigit() else 200, request=request)


@asynccontextmanager
async def observed(
    fleet: Fleet | StaticResolver, answers: Answers | None = None, **options: object
) -> AsyncIterator[tuple[ServiceDiscoveryClient, CollectorRegistry]]:
    """A client, and what Prometheus would read of it."""
    told: dict[str, Any] = {"transport": answers or Answers(), "connections": EVERYBODY, **options}
    async with ServiceDiscoveryClient(fleet, retry_delay=0.01, **told) as client:
        metrics, registry = Metrics(client.explain_all), CollectorRegistry()
        client.observe(metrics)
        registry.register(metrics)
        yield client, registry


def read(registry: CollectorRegistry) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample → the values of its labels, in the order of their names → value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in parse(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            series = found.setdefault(sample.name, {})
            assert labels not in series, f"{sample.name}{labels} is there twice"
            series[labels] = sample.value
    return found


def parse(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


async def test_counts_are_those_of_the_client() -> None:
    """What attempts, calls, retries and ejections came to, and what is there now."""
    fleet, answers = Fleet("a", "b"), Answers()
    answers.refuse = {8000}
    async with observed(fleet, answers) as (client, registry):
        for _ in range(20):
            await client.get("cards", "/ok")
        for status in (404, 503):
            with pytest.raises(httpx.HTTPStatusError):
                await client.post("cards", f"/{status}")
        found = read(registry)
    refused = found["registry_attempts_total"]["a", "refused", "cards"]
    assert refused >= 1
    assert found["registry_attempts_total"]["b", "ok", "cards"] == 21
    assert found["registry_attempts_total"]["b", "status", "cards"] == 1
    assert found["registry_retries_total"] == {("refused", "cards"): refused}
    assert found["registry_ejections_total"] == {("a", "refused", "cards"): refused}
    assert found["registry_endpoints"] == {
        ("cards", "live"): 1,
        ("cards", "ejected"): 1,
        ("cards", "gone"): 0,
    }
    assert found["registry_call_duration_seconds_count"] == {("ok", "cards"): 20, ("status", "cards"): 2}
    assert found["http_client_request_duration_seconds_count"] == {
        ("", "GET", "200", "cards"): 20,
        ("404", "POST", "404", "cards"): 1,
        ("503", "POST", "503", "cards"): 1,
        ("ConnectError", "GET", "", "cards"): refused,
    }
    for name in ("registry_in_flight", "registry_failing_fast", "registry_retry_budget_exhausted_total"):
        assert found[name] == {("cards",): 0}
    assert found["registry_view_age_seconds"] == {("cards",): 0.5}
    assert found["registry_watch_errors_total"] == {("cards",): 2}


async def test_picks_are_counted_by_zone() -> None:
    """In the own one or in another, added up over the tags; two series for a service, however many zones there are."""
    zones = ["a", "b", "c", None]
    fleet = StaticResolver(
        {"cards": [Instance(f"i{zone}", "cards", "10.0.0.1", 8000, ("blue",), zone=zone) for zone in zones]}
    )
    async with observed(fleet, zone="a") as (client, registry):
        for tag in (None, "blue"):
            for _ in range(200):
                await client.get("cards", "/ok", tag=tag)
        picks = read(registry)["registry_zone_picks_total"]
        attempts = read(registry)["registry_attempts_total"]
        own = attempts["ia", "ok", "cards"]
        assert picks == {("cards", "own"): own, ("cards", "other"): 400 - own}
        assert own > 200
    async with observed(fleet) as (client, registry):
        await client.get("cards", "/ok")
        assert "registry_zone_picks_total" not in read(registry)


async def test_hedges_are_counted() -> None:
    """By whether the second attempt gave the answer."""

    class Slow(Answers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == "/slow" and request.url.port == 8000:
                await asyncio.sleep(10)
            return await super().handle_async_request(request)

    async with observed(Fleet("a", "b"), Slow()) as (client, registry):
        for _ in range(30):
            await client.get("cards", "/ok")
        while not (found := read(registry)).get("registry_hedges_total"):
            await client.get("cards", "/slow", hedge=True)
    assert found["registry_hedges_total"] == {("cards", "true"): 1}
    assert found["registry_attempts_total"]["a", "cancelled", "cards"] == 1


async def test_no_label_holds_what_a_caller_says() -> None:
    """Neither path, query, tag, header nor an unknown method becomes a label, and so no series of its own."""
    async with observed(Fleet("a")) as (client, registry):
        before = 0
        for turn in range(3):
            for method in ("GET", "BREW" + "ABC"[turn]):
                await client.call_service(
                    "cards", f"/secret/{turn}/x", method, tag="blue", params={"secret": turn}, headers={"X": "secret"}
                )
            text = generate_latest(registry).decode()
            series = sum(len(family.samples) for family in parse(text))
            assert before in {0, series}
            before = series
    values = {value for family in parse(text) for sample in family.samples for value in sample.labels.values()}
    assert not [value for value in values if "/" in value or "secret" in value or "BREW" in value or "blue" in value]
    assert f'http_request_method="{OTHER}"' in text


async def test_tags_are_added_up() -> None:
    """A service that is called with several tags is one service, and its instances are each counted once."""
    async with observed(Fleet("a", "b")) as (client, registry):
        for tag in (None, "blue", "green"):
            for _ in range(4):
                await client.get("cards", "/ok", tag=tag)
        found = read(registry)
    assert sum(found["registry_attempts_total"].values()) == 12
    assert found["registry_endpoints"]["cards", "live"] == 2
    assert found["registry_watch_errors_total"] == {("cards",): 6}


async def test_who_left_is_counted_to_the_end_and_then_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that has left is still read for a while, goes on counting if it returns, and then has no series."""
    fleet = Fleet("a")
    async with observed(fleet) as (client, registry):
        await client.get("cards", "/ok")
        fleet.change()
        assert read(registry)["registry_attempts_total"] == {("a", "ok", "cards"): 1}
        assert read(registry)["registry_endpoints"]["cards", "gone"] == 0
        fleet.change("a")
        await client.get("cards", "/ok")
        assert read(registry)["registry_attempts_total"] == {("a", "ok", "cards"): 2}
        fleet.change("b")
        assert ("a", "ok", "cards") in read(registry)["registry_attempts_total"]
        monkeypatch.setattr(ledger, "KEEP", -1.0)
        assert "registry_attempts_total" not in read(registry)


@pytest.mark.real
async def test_10_000_instances_come_and_go() -> None:
    """However many there have been, the series are those of who is there, and of the last who left."""
    fleet = Fleet()
    async with observed(fleet) as (client, registry):
        for turn in range(200):
            fleet.change(*(f"cards-{turn * 50 + number}" for number in range(50)))
            for _ in range(50):
                await client.get("cards", "/ok")
        found = read(registry)
    series = sum(map(len, found.values()))
    assert len(found["registry_attempts_total"]) <= ledger.MOST + 50
    assert series <= ledger.MOST + 50 + 100


async def test_a_crowd_is_measured_as_a_service() -> None:
    """Of more than 1,000 instances at a time, those beyond have no series, and it says how many; one keeps its own."""
    fleet = Fleet(*(f"z-{number}" for number in range(MOST_INSTANCES)))
    async with observed(fleet, policy="round_robin") as (client, registry):
        for _ in range(MOST_INSTANCES):
            await client.get("cards", "/ok")
        first = read(registry)["registry_attempts_total"]
        fleet.change(*(f"{letter}-{number}" for letter in "az" for number in range(MOST_INSTANCES)))
        for _ in range(2 * MOST_INSTANCES):
            await client.get("cards", "/ok")
        found = read(registry)
    assert found["registry_attempts_total"].keys() == first.keys()
    assert found["registry_endpoints_omitted"] == {("cards",): MOST_INSTANCES}
    assert found["registry_endpoints"]["cards", "live"] == 2 * MOST_INSTANCES


async def test_unknown_names_are_bounded() -> None:
    """Calls of services that nobody knows have at most 1,000 series, and none once they are forgotten."""
    async with observed(StaticResolver({"cards": [Instance("a", "cards", "10.0.0.1", 80)]})) as (client, registry):
        for number in range(MOST_SERIES + 100):
            with pytest.raises(ValueError, match="not found"):
                await client.get(f"unknown-{number}", "/")
        await client.get("cards", "/ok")
        found = read(registry)["registry_call_duration_seconds_count"]
    assert found == {(OTHER, OTHER): 101}


async def test_a_scrape_of_1_000_instances_takes_a_moment() -> None:
    """It runs on the event loop, between calls."""
    fleet = Fleet(*(f"cards-api-10.0.0.{number}-8000" for number in range(1_000)))
    async with observed(fleet, policy="round_robin") as (client, registry):
        for _ in range(1_000):
            await client.get("cards", "/ok")
        took = []
        for _ in range(7):
            began = time.process_time()
            text = generate_latest(registry)
            took.append(time.process_time() - began)
    print(f"{min(took) * 1e3:.1f} ms, {len(text)} bytes")  # noqa: T201
    assert min(took) < 0.1


class Settings(ServiceSettings):
    name: str = "cards"
    address: str | None = "127.0.0.1"


def app_of(consul: ConsulSettings, **options: str) -> FastAPI:
    app = FastAPI(lifespan=lifespan(Settings(port=free_ports(1)[0]), upstreams=["cards"], consul=consul))
    app.add_middleware(RegistryMiddleware)
    app.include_router(health_router())
    app.include_router(metrics_router(), **options)  # type: ignore[arg-type]
    return app


async def scrape(app: FastAPI, path: str = "/metrics", accept: str = "") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        return (await client.get(path, headers={"Accept": accept})).raise_for_status()


@pytest.fixture
def consul() -> ConsulSettings:
    """Nobody is there."""
    return ConsulSettings(host="127.0.0.1", port=free_ports(1)[0])


async def test_the_router_is_all_it_takes(consul: ConsulSettings) -> None:
    """It serves the families, with the types that the table says, the process's own, and the app's."""
    own = Counter("own_things", "What the app counts itself")
    own.inc(3)
    try:
        app = app_of(consul)
        async with app.router.lifespan_context(app):
            answer = await scrape(app)
    finally:
        DEFAULT.unregister(own)
    families = {family.name: family for family in parse(answer.text)}
    for family in FAMILIES:
        assert families[family.name.removesuffix("_total")].type == family.kind
    assert [sample.value for sample in families["registry_registered"].samples] == [0]
    assert [sample.value for sample in families["own_things"].samples if sample.name == "own_things_total"] == [3]
    assert "process_cpu_seconds" in families
    assert "python_gc_collections" in families
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_the_format_is_what_prometheus_asks_for(consul: ConsulSettings) -> None:
    """OpenMetrics, if the Accept header has it; its strict parser reads every family."""
    app = app_of(consul)
    async with app.router.lifespan_context(app):
        answer = await scrape(app, accept="application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in openmetrics.text_string_to_metric_families(answer.text)}  # type: ignore[no-untyped-call]
    assert names >= {family.name.removesuffix("_total") for family in FAMILIES}


async def test_apps_of_one_process_have_figures_of_their_own(consul: ConsulSettings) -> None:
    """Two at a time, and one that starts again; under a prefix, too."""
    one, two = app_of(consul), app_of(consul, prefix="/internal")
    for _ in range(2):
        async with one.router.lifespan_context(one), two.router.lifespan_context(two):
            with pytest.raises(RegistryUnavailableError):
                await one.state.discovery_client.get("cards", "/", timeout=0.1)
            assert "registry_call_duration_seconds_count{" in (await scrape(one)).text
            assert "registry_call_duration_seconds_count{" not in (await scrape(two, "/internal/metrics")).text


async def test_without_its_lifespan_it_says_what_is_missing() -> None:
    """A router in a mounted app, which nobody starts, is a mistake that the first scrape shows."""
    app = FastAPI()
    app.include_router(metrics_router())
    with pytest.raises(RuntimeError, match="mounted"):
        await scrape(app)


async def test_an_app_without_a_client_has_its_process(consul: ConsulSettings) -> None:
    """The router needs no lifespan of ours for what the app itself counts."""
    app = FastAPI()
    app.include_router(metrics_router())
    async with app.router.lifespan_context(app):
        assert "process_cpu_seconds_total" in (await scrape(app)).text
