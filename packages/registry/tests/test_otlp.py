"""Metrics pushed by OTLP: what a collector receives over HTTP is what a scrape would have."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi import FastAPI
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from registry import ConsulSettings, Instance, ServiceDiscoveryClient, ServiceSettings, StaticResolver
from registry.fastapi import lifespan
from registry.metrics import metrics_router
from registry.testing.instances import running_instance
from registry.testing.ports import free_ports

pytestmark = pytest.mark.real

Received = list[dict[str, Any]]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    """What was sent to one, as the environment asks for it."""
    received: Received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/metrics"
            request = ExportMetricsServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            received.append(MessageToDict(request))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield received
        server.shutdown()
        thread.join()


def app_of(*instances: Instance) -> FastAPI:
    """An app that calls these, and can't register."""
    settings = ServiceSettings(name="caller", address="127.0.0.1", port=free_ports(1)[0])
    consul = ConsulSettings(host="127.0.0.1", port=free_ports(1)[0])
    resolver = StaticResolver({"cards": list(instances)})
    app = FastAPI(lifespan=lifespan(settings, consul=consul, client=lambda _: ServiceDiscoveryClient(resolver)))
    app.include_router(metrics_router())
    return app


def points(received: dict[str, Any], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each data point with its attributes, and the metric's data."""
    [resource] = received["resourceMetrics"]
    [scope] = resource["scopeMetrics"]
    [metric] = [metric for metric in scope["metrics"] if metric["name"] == name]
    data: dict[str, Any] = next(metric[kind] for kind in ("sum", "gauge", "histogram") if kind in metric)
    return [(attributes(point), point | data) for point in data["dataPoints"]]


def attributes(of: dict[str, Any]) -> dict[str, Any]:
    return {each["key"]: next(iter(each["value"].values())) for each in of.get("attributes", ())}


async def test_what_is_counted_is_pushed(collector: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every interval, under the names of the conventions, with the process named."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    with running_instance("cards") as one:
        app = app_of(one.instance)
        async with app.router.lifespan_context(app):
            for _ in range(3):
                await app.state.discovery_client.get("cards", "/work")
            count = len(collector)
            async with asyncio.timeout(10):
                while len(collector) < count + 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    last = collector[-1]
    about = attributes(last["resourceMetrics"][0]["resource"])
    assert about["service.name"] == "caller"
    assert about["service.instance.id"]
    [(labels, attempts)] = points(last, "registry_attempts")
    assert labels == {"service": "cards", "instance": one.instance.id, "outcome": "ok"}
    assert (attempts["asDouble" if "asDouble" in attempts else "asInt"], attempts["isMonotonic"]) == ("3", True)
    [(labels, duration)] = points(last, "http.client.request.duration")
    assert labels == {"server.address": "cards", "http.request.method": "GET", "http.response.status_code": "200"}
    assert (duration["count"], sum(map(int, duration["bucketCounts"]))) == ("3", 3)
    assert duration["aggregationTemporality"] == "AGGREGATION_TEMPORALITY_CUMULATIVE"
    assert "min" not in duration
    assert points(last, "registry_registered")[0][1]["dataPoints"]


async def test_the_last_are_pushed_at_the_end(collector: Received) -> None:
    """What happened since the last interval is not lost, and two processes are told apart."""
    for _ in range(2):
        with running_instance("cards") as one:
            app = app_of(one.instance)
            async with app.router.lifespan_context(app):
                await app.state.discovery_client.get("cards", "/work")
    assert [points(each, "registry_call_duration")[0][1]["count"] for each in collector] == ["1", "1"]
    ids = {attributes(each["resourceMetrics"][0]["resource"])["service.instance.id"] for each in collector}
    assert len(ids) == 2


async def test_a_silent_collector_delays_the_end_by_two_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/metrics"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", url)
        app = app_of()
        async with app.router.lifespan_context(app):
            ending = time.monotonic()
        # The registrar may take as long again: Consul is away, too.
        assert 1.9 < time.monotonic() - ending < 5
    assert "the last ones are lost" in caplog.text


async def test_nothing_is_pushed_unless_asked(collector: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint for traces alone is not asking."""
    monkeypatch.delenv("OTEL_METRICS_EXPORTER")
    app = app_of()
    async with app.router.lifespan_context(app):
        pass
    assert collector == []
