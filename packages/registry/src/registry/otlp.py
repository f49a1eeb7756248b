"""Metrics pushed by OTLP, for processes that nobody can scrape one by one: several workers on one port.

Needs ``registry[metrics,tracing]``. ``registry.metrics.metrics_router`` begins it if the environment asks for it.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from os import environ
from typing import TypeAlias

from registry import families
from registry.extras import extra
from registry.families import BUCKETS, Family, Series
from registry.threads import in_daemon_thread

with extra("tracing"):
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import (
        AggregationTemporality,
        Gauge,
        Histogram,
        HistogramDataPoint,
        Metric,
        MetricsData,
        NumberDataPoint,
        ResourceMetrics,
        ScopeMetrics,
        Sum,
    )
    from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

__all__ = ["pushing"]

logger = logging.getLogger("registry")

Read: TypeAlias = Callable[[], Iterable[tuple[Family, Series]]]

_LAST = 2.0
"""Seconds that a collector which does not answer may delay the end of a service."""
_CUMULATIVE = AggregationTemporality.CUMULATIVE
_CONVENTIONAL = {
    "http_client_request_duration_seconds": "http.client.request.duration",
    "server_address": "server.address",
    "http_request_method": "http.request.method",
    "http_response_status_code": "http.response.status_code",
    "error_type": "error.type",
}
"""Prometheus' names → OpenTelemetry's."""


@asynccontextmanager
async def pushing(read: Read, service: str) -> AsyncIterator[None]:
    """Exports what ``read`` says every ``OTEL_METRIC_EXPORT_INTERVAL`` ms (60 s), and a last time at the end.

    ``read`` is called on this event loop. What OTLP needs to know is read from ``OTEL_EXPORTER_OTLP_*``.
    """
    # By the conventions the id of an instance is one process's own, unlike the one in Consul, which workers share.
    about = {SERVICE_NAME: service, SERVICE_INSTANCE_ID: str(uuid.uuid4())}
    resource = Resource.create({**about, **OTELResourceDetector().detect().attributes})
    exporter, began = OTLPMetricExporter(), time.time_ns()
    interval = float(environ.get("OTEL_METRIC_EXPORT_INTERVAL") or 60_000) / 1e3

    async def push() -> None:
        await in_daemon_thread(partial(exporter.export, _data(read(), resource, began)), "registry-metrics")

    async def keep_pushing() -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                await push()
            except Exception:
                logger.exception("metrics were not pushed")

    task = asyncio.create_task(keep_pushing(), name="registry metrics")
    try:
        yield
    finally:
        task.cancel()
        try:
            async with asyncio.timeout(_LAST):
                await push()
        except TimeoutError:
            logger.warning("the collector of metrics does not answer: the last ones are lost")
        exporter.shutdown()


def _data(found: Iterable[tuple[Family, Series]], resource: Resource, began: int) -> MetricsData:
    now = time.time_ns()
    metrics = [_metric(family, series, began, now) for family, series in found if series]
    scope = ScopeMetrics(InstrumentationScope("registry"), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(family: Family, series: Series, began: int, now: int) -> Metric:
    """Without the endings for unit and kind that Prometheus wants in a name, and adds by itself."""
    seconds = family.name.endswith("_seconds")
    name = _CONVENTIONAL.get(family.name, family.name.removesuffix("_total").removesuffix("_seconds"))
    data: Sum | Gauge | Histogram
    if family.kind == "histogram":
        data = Histogram([*_histograms(family, series, began, now)], _CUMULATIVE)
    else:
        points = [
            NumberDataPoint(_attributes(family, labels), began, now, value)
            for labels, value in series.items()
            if not isinstance(value, families.Histogram)
        ]
        data = Sum(points, _CUMULATIVE, is_monotonic=True) if family.kind == "counter" else Gauge(points)
    return Metric(name, family.help, "s" if seconds else "", data)


def _histograms(family: Family, series: Series, began: int, now: int) -> Iterable[HistogramDataPoint]:
    for labels, each in series.items():
        if isinstance(each, families.Histogram):
            attributes, counts = _attributes(family, labels), [*each.counts]
            # Least and most are optional in OTLP, and not known here.
            yield HistogramDataPoint(attributes, began, now, sum(counts), each.sum, counts, BUCKETS, None, None)  # type: ignore[arg-type]


def _attributes(family: Family, labels: tuple[str, ...]) -> Mapping[str, str | int]:
    named = zip(family.labels, labels, strict=True)
    return {
        _CONVENTIONAL.get(label, label): int(value) if label == "http_response_status_code" else value
        for label, value in named
        if value
    }
