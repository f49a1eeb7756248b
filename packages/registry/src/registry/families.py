"""The metrics that there are: their names, labels and meaning. `registry.metrics` fills them in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["BUCKETS", "FAMILIES", "METHODS", "MOST_INSTANCES", "OTHER", "Family", "Histogram", "Series"]

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Seconds. Source: https://opentelemetry.io/docs/specs/semconv/http/http-metrics/"""

METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
OTHER = "_OTHER"
"""Stands for every other method. Source: the same page."""

MOST_INSTANCES = 1_000
"""So many instances of a service are counted one by one; the others are only in the figures of their service."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric; the table in docs/reference/metrics.md is made of these."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


FAMILIES = (
    Family(
        "http_client_request_duration_seconds",
        "histogram",
        ("server_address", "http_request_method", "http_response_status_code", "error_type"),
        "Duration of each attempt; server_address is the service's name; by status, or by error if there was none",
    ),
    Family(
        "registry_call_duration_seconds",
        "histogram",
        ("service", "outcome"),
        "Duration of each call, all its attempts and the waits between them included",
    ),
    Family(
        "registry_attempts_total",
        "counter",
        ("service", "instance", "outcome"),
        "Attempts at each instance by what they came to",
    ),
    Family(
        "registry_retries_total",
        "counter",
        ("service", "reason"),
        "Attempts that followed a failed one; reason is the outcome of that one",
    ),
    Family(
        "registry_retry_budget_exhausted_total",
        "counter",
        ("service",),
        "Calls that were not retried for want of budget",
    ),
    Family(
        "registry_hedges_total",
        "counter",
        ("service", "won"),
        "Second attempts, sent since the first took long, by whether theirs was the answer",
    ),
    Family(
        "registry_zone_picks_total",
        "counter",
        ("service", "zone"),
        "How often an instance of the caller's own zone was picked, or of another (own, other); none without a zone",
    ),
    Family(
        "registry_ejections_total",
        "counter",
        ("service", "instance", "reason"),
        "How often an instance was left out; reason is the outcome of the attempt that decided it",
    ),
    Family(
        "registry_endpoints",
        "gauge",
        ("service", "state"),
        "Instances that the process knows: live, ejected, or gone: no longer listed, asked when nobody else is left",
    ),
    Family(
        "registry_endpoints_omitted",
        "gauge",
        ("service",),
        f"Instances beyond {MOST_INSTANCES:,}, which have no series of their own",
    ),
    Family("registry_in_flight", "gauge", ("service",), "Attempts under way"),
    Family(
        "registry_failing_fast", "gauge", ("service",), "1 while calls are turned away because every instance fails"
    ),
    Family(
        "registry_view_age_seconds",
        "gauge",
        ("service",),
        "Time since the registry last answered without an error; +Inf: it never has",
    ),
    Family("registry_watch_errors_total", "counter", ("service",), "Queries that the registry has not answered"),
    Family(
        "registry_shed_total",
        "counter",
        ("reason",),
        "Requests to this service that were declined and not executed: lag, in-flight (503), or rate (429)",
    ),
    Family("registry_registered", "gauge", (), "1 while this service is registered"),
    Family("registry_registrations_total", "counter", ("reason",), "How often this service registered, and why"),
)


class Histogram:
    """One series. A client has one event loop, so that no lock is needed; that is what makes it cheap."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0


Series: TypeAlias = Mapping[tuple[str, ...], float | Histogram]
"""Labels, in the order of the family's → the value."""
