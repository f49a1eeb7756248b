"""Metrics for Prometheus, at ``/metrics`` of the service's own port. Needs ``registry[metrics]``.

What attempts have come to is counted by the client itself, in plain integers that are read when Prometheus asks; a call
only moves two histograms on. No label ever holds a path, a tag or a text from outside.
"""

import math
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from itertools import accumulate
from os import environ
from typing import TypeAlias

from fastapi import APIRouter, FastAPI, Request, Response

from registry.discovery.explanation import Explanation
from registry.extras import extra
from registry.families import BUCKETS, FAMILIES, METHODS, MOST_INSTANCES, OTHER, Family, Histogram, Series
from registry.presence.health import find_state
from registry.presence.registrar import Registrar
from registry.shedding import Shedding
from registry.telemetry import ObservedAttempt, ObservedCall, Observer

with extra("metrics"):
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

__all__ = ["Metrics", "metrics_router"]

MOST_SERIES = 1_000
"""So many series a histogram has at most; whatever else comes is added to one of which each label is ``_OTHER``."""


Values: TypeAlias = dict[tuple[str, ...], float]
"""Labels, in the order of the family's → the value."""


class Metrics(Observer, Collector):
    """What Prometheus reads of one client, and of this service's presence: hears of calls, and is asked at a scrape.

    ``metrics_router`` makes one for its app. Elsewhere: ``client.observe(metrics := Metrics(client.explain_all))`` and
    ``prometheus_client.REGISTRY.register(metrics)``.
    """

    def __init__(
        self,
        explain_all: Callable[[], Iterable[Explanation]],
        registrar: Registrar | None = None,
        shedding: Shedding | None = None,
    ) -> None:
        self._explain_all = explain_all
        self._registrar = registrar
        self._shedding = shedding
        self.service = registrar.standing.service if registrar else "unknown_service"
        """Which one this is."""
        self._attempts = _Histograms()
        self._calls = _Histograms()
        self._shown: dict[str, set[str]] = {}

    def attempt_ended(self, attempt: ObservedAttempt) -> None:
        """Adds its duration."""
        call, error, seconds = attempt.call, attempt.error, attempt.seconds or 0.0
        key = (call.service, call.method, attempt.status if error is None else type(error).__name__)
        series = self._attempts.get(key) or self._attempts.of(key)
        series.counts[bisect_left(BUCKETS, seconds)] += 1
        series.sum += seconds

    def call_ended(self, call: ObservedCall) -> None:
        """Adds its duration."""
        key, seconds = (call.service, call.outcome), call.seconds or 0.0
        series = self._calls.get(key) or self._calls.of(key)
        series.counts[bisect_left(BUCKETS, seconds)] += 1
        series.sum += seconds

    def collect(self) -> Iterator[Metric]:
        """What ``read`` says, for Prometheus."""
        for family, series in self.read():
            yield _metric(family, series)

    def read(self) -> list[tuple[Family, Series]]:
        """Every family, with the values of this moment. To be called where the client runs: on its event loop."""
        services: dict[str, list[Explanation]] = {}
        for explanation in self._explain_all():
            services.setdefault(explanation.service, []).append(explanation)
        self._shown = {service: shown for service, shown in self._shown.items() if service in services}
        values: dict[str, Values] = {family.name: {} for family in FAMILIES}
        for service, upstreams in services.items():
            self._count(values, service, upstreams)
            self._measure(values, service, upstreams)
        if self._registrar is not None:
            standing = self._registrar.standing
            values["registry_registered"][()] = int(standing.registered)
            for reason, times in standing.registrations.items():
                values["registry_registrations_total"][reason,] = times
        for reason, times in self._shedding.counts.items() if self._shedding else ():
            values["registry_shed_total"][reason,] = times
        histograms = {
            "http_client_request_duration_seconds": self._attempts.labelled(services, _status_or_error),
            "registry_call_duration_seconds": self._calls.labelled(services, lambda outcome: (str(outcome),)),
        }
        return [(family, histograms.get(family.name, values[family.name])) for family in FAMILIES]

    def _count(self, values: dict[str, Values], service: str, upstreams: Sequence[Explanation]) -> None:
        """What only grows. One service may be several upstreams: one for each tag that it is called with."""
        retries, hedges = values["registry_retries_total"], values["registry_hedges_total"]
        for upstream in upstreams:
            _add(values["registry_retry_budget_exhausted_total"], upstream.budget_exhausted, service)
            _add(values["registry_watch_errors_total"], upstream.view.errors, service)
            if upstream.zones:
                _add(values["registry_zone_picks_total"], upstream.zones.own_picks, service, "own")
                _add(values["registry_zone_picks_total"], upstream.zones.other_picks, service, "other")
            for reason, times in upstream.retries.items():
                _add(retries, times, service, reason)
            for end, times in upstream.hedges.items():
                _add(hedges, times, service, "true" if end == "won" else "false")
        endpoints = [endpoint for upstream in upstreams for endpoint in upstream.endpoints]
        asked = [(endpoint.id, endpoint.outcomes) for endpoint in endpoints]
        asked += [departed for upstream in upstreams for departed in upstream.departed.items()]
        shown = self._show(service, [id_ for id_, _ in asked])
        for id_, outcomes in asked:
            for outcome, times in outcomes.items() if id_ in shown else ():
                _add(values["registry_attempts_total"], times, service, id_, outcome)
        for endpoint in endpoints:
            for outcome, times in endpoint.ejections.items() if endpoint.id in shown else ():
                _add(values["registry_ejections_total"], times, service, endpoint.id, outcome)
        values["registry_endpoints_omitted"][service,] = len({endpoint.id for endpoint in endpoints} - shown)

    def _show(self, service: str, ids: Iterable[str]) -> set[str]:
        """Those that have series: who has one keeps it, or a counter would go back and forth."""
        present = dict.fromkeys(ids)
        shown = self._shown.setdefault(service, set())
        shown.intersection_update(present)
        for id_ in present:
            if len(shown) >= MOST_INSTANCES:
                break
            shown.add(id_)
        return shown

    def _measure(self, values: dict[str, Values], service: str, upstreams: Sequence[Explanation]) -> None:
        """What goes up and down."""
        endpoints = [endpoint for upstream in upstreams for endpoint in upstream.endpoints]
        listed = {endpoint.id for endpoint in endpoints if endpoint.listed}
        ejected = {endpoint.id for endpoint in endpoints if endpoint.listed and endpoint.ejected_for}
        states = values["registry_endpoints"]
        states[service, "live"] = len(listed - ejected)
        states[service, "ejected"] = len(ejected)
        states[service, "gone"] = len({endpoint.id for endpoint in endpoints} - listed)
        ages = [math.inf if upstream.view.age is None else upstream.view.age for upstream in upstreams]
        values["registry_view_age_seconds"][service,] = max(ages)
        values["registry_in_flight"][service,] = sum(endpoint.in_flight for endpoint in endpoints)
        values["registry_failing_fast"][service,] = int(any(upstream.failing_fast_for for upstream in upstreams))


class _Histograms(dict[tuple[object, ...], Histogram]):
    """The series of one family: by service, perhaps by method, and by how it ended."""

    def of(self, key: tuple[object, ...]) -> Histogram:
        """A new one, unless that would be for an unknown method, or one too many."""
        service, *method, end = key
        key = (service, *(each if each in METHODS else OTHER for each in method), end)
        if key not in self and len(self) >= MOST_SERIES:
            key = (OTHER,) * len(key)
        return self.setdefault(key, Histogram())

    def labelled(self, services: Iterable[str], last: Callable[[object], tuple[str, ...]]) -> Series:
        """Without the series of services that are no longer known, which are dropped."""
        for key in [key for key in self if str(key[0]) not in services and key[0] != OTHER]:
            del self[key]
        return {(*map(str, key[:-1]), *last(key[-1])): series for key, series in self.items()}


def _status_or_error(what: object) -> tuple[str, str]:
    if isinstance(what, int):
        return str(what), str(what) if what >= 400 else ""
    return "", str(what)


def _metric(family: Family, series: Series) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, each in series.items():
            assert isinstance(each, Histogram)
            counts = accumulate(each.counts)
            histogram.add_metric(labels, list(zip([*map(str, BUCKETS), "+Inf"], counts, strict=True)), each.sum)
        return histogram
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = make(family.name, family.help, labels=family.labels)
    for labels, value in series.items():
        assert not isinstance(value, Histogram)
        metric.add_metric(labels, value)
    return metric


def _add(values: Values, by: float, *labels: str) -> None:
    values[labels] = values.get(labels, 0) + by


def _pushed(metrics: Metrics | None) -> AbstractAsyncContextManager[None]:
    """Pushes them, too, while it is open, if the environment asks for it."""
    exporter = environ.get("OTEL_METRICS_EXPORTER", "")
    asked = exporter == "otlp" or (not exporter and "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT" in environ)
    if metrics is None or not asked or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return nullcontext()
    from registry.otlp import pushing

    return pushing(metrics.read, metrics.service)


def metrics_router() -> APIRouter:
    """A router with ``GET /metrics``: ``app.include_router(metrics_router())``, in the app that has the lifespan.

    Beside the families of this module it serves what is registered with ``prometheus_client`` itself: the process, the
    garbage collector, and the app's own. The format is what the ``Accept`` header asks for: Prometheus or OpenMetrics.
    With ``OTEL_METRICS_EXPORTER=otlp``, or an ``OTEL_EXPORTER_OTLP_METRICS_ENDPOINT``, the families are pushed as well.

    Raises, when the app starts: ValueError, if a metric of the same name is already registered there.
    """

    @asynccontextmanager
    async def observing(app: FastAPI) -> AsyncIterator[None]:
        registry = CollectorRegistry(auto_describe=True)
        registry.register(REGISTRY)
        client, metrics = getattr(app.state, "discovery_client", None), None
        if client is not None:
            metrics = Metrics(client.explain_all, app.state.registrar, app.state.shedding)
            registry.register(metrics)
            client.observe(metrics)
        app.state.metrics = registry
        async with _pushed(metrics):
            yield
        del app.state.metrics

    router = APIRouter(lifespan=observing)

    @router.get("/metrics", name="registry_metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        registry = find_state(request.scope, "metrics")
        if registry is None:
            raise RuntimeError(
                "no metrics: include metrics_router() in the app that is started, not in one mounted there"
            )
        encode, content_type = choose_encoder(",".join(request.headers.getlist("accept")))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return router
