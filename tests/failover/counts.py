"""What a client has counted of a scene, beside what its callers saw and its instances received."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.load import Report

__all__ = ["Metrics", "miscounted_by", "read_metrics"]


@dataclass(frozen=True)
class Metrics:
    """What Prometheus would read of a client."""

    attempts: Mapping[str, Mapping[str, int]]
    """Instance → outcome → how many, as in ``registry_attempts_total``."""
    measured: int
    """The attempts of which ``http_client_request_duration_seconds`` has the duration."""
    calls: Mapping[str, int]
    """Outcome → how many, as in ``registry_call_duration_seconds``."""


def read_metrics(registry: CollectorRegistry) -> Metrics:
    """Read from the text that a scrape would get."""
    text = generate_latest(registry).decode()
    families = {each.name: each.samples for each in text_string_to_metric_families(text)}
    attempts: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for sample in families["registry_attempts"]:
        attempts[sample.labels["instance"]][sample.labels["outcome"]] = int(sample.value)
    counts = {
        name: [each for each in families[name] if each.name == f"{name}_count"]
        for name in ("http_client_request_duration_seconds", "registry_call_duration_seconds")
    }
    return Metrics(
        attempts,
        measured=sum(int(each.value) for each in counts["http_client_request_duration_seconds"]),
        calls={each.labels["outcome"]: int(each.value) for each in counts["registry_call_duration_seconds"]},
    )


def miscounted_by(metrics: Metrics, report: Report, received: Mapping[str, int]) -> Iterator[str]:
    """What has not been counted right. Of an attempt without an answer nobody knows whether the instance saw it."""
    for id_ in received.keys() | metrics.attempts.keys():
        outcomes, seen = Counter(metrics.attempts.get(id_, {})), received.get(id_, 0)
        answered = sum(outcomes[outcome] for outcome in ("ok", "status"))
        perhaps = sum(outcomes[outcome] for outcome in ("timeout", "broken", "cancelled", "error"))
        if not answered <= seen <= answered + perhaps:
            yield f"{id_} received {seen}, and was asked {dict(outcomes)}"
    attempts = sum(sum(outcomes.values()) for outcomes in metrics.attempts.values())
    if metrics.measured != attempts:
        yield f"{attempts} attempts were counted, and {metrics.measured} measured"
    ok, calls = metrics.calls.get("ok", 0), sum(metrics.calls.values())
    if (ok, calls) != (report.calls - len(report.failures), report.calls):
        yield f"{report.calls} calls, {len(report.failures)} of them failed, were counted as {dict(metrics.calls)}"
