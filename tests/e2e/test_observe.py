"""What Prometheus and Jaeger say of the system is what happened in it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.e2e.collectors import Collectors, Span, collectors
from tests.e2e.report import Row
from tests.e2e.system import BACKEND, BACKENDS, System, wait_until
from tests.e2e.traffic import now
from tools.services import SERVICES

CARD = {"title": "Consul knows who is healthy", "content": "Every service registers with Consul.", "tags": ["consul"]}
SEEN_SECONDS = 5.0
FOLLOW_SECONDS = 15.0
"""When much changes, Prometheus collects the changes of up to 7.5 s; then it looks again, and asks who is new."""
EXPORT_SECONDS = 20.0
CALLS = 150
ORCHESTRATOR = "orchestrator-api"


@pytest.fixture(scope="module")
def observed(system: System, request: pytest.FixtureRequest) -> Iterator[Collectors]:
    """Prometheus and Jaeger, over a system without what earlier scenes left; shows progress despite capture."""
    system.settle()
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        context = collectors(system)
        entered = context.__enter__()
    try:
        entered.seen_after = seen_after(system, entered)
        entered.seen_after_up = time.monotonic() - entered.up_at
        yield entered
    finally:
        with capture.global_and_fixture_disabled():
            context.__exit__(None, None, None)


def instances(system: System) -> set[str]:
    """The ids of all backends that there are."""
    return {replica.instance for replica in system.replicas()}


def publish(system: System, **headers: str) -> httpx.Response:
    """A card, through the front door."""
    return system.http.post(f"{system.edge[ORCHESTRATOR]}/api/publish", json=CARD, headers=headers)


def seen_after(system: System, observed: Collectors) -> float:
    """Returns when Prometheus has figures of every backend and asks nobody else, with the seconds since Consul has."""
    wait_until(lambda: system.passing() == instances(system), 60, "every backend passes")
    expected = instances(system)
    return wait_until(
        lambda: observed.measured(BACKEND.name) == expected == observed.targets(BACKEND.name),
        30,
        "Prometheus has every backend",
        lambda: (expected, observed.targets(BACKEND.name), observed.measured(BACKEND.name)),
    )


def test_everyone_is_measured(observed: Collectors, system: System, scene: Row) -> None:
    """Prometheus has all three backends, and every other service."""
    scene.saw(
        f"Prometheus had all {BACKENDS} {observed.seen_after_up:.1f} s after `docker-compose up` was done, "
        f"{observed.seen_after:.1f} s after Consul had"
    )
    assert observed.seen_after < SEEN_SECONDS
    for service in SERVICES:
        assert observed.measured(service.name) == {replica.instance for replica in system.replicas(service)}


def test_prometheus_follows_scaling(observed: Collectors, system: System, scene: Row) -> None:
    """Prometheus follows backend scaling 3 → 1 → 5 → 1."""
    took = []
    for backends in (1, 5, 1):
        system.scale(backends)
        took.append(seen_after(system, observed))
        assert len(observed.measured(BACKEND.name)) == backends
    scene.saw(f"Prometheus had everyone, and nobody else, {max(took):.1f} s after Consul at the latest")
    assert max(took) < FOLLOW_SECONDS


ATTEMPTS = f'registry_attempts_total{{job="{ORCHESTRATOR}", service="{BACKEND.name}"}}'
CALLED = f'sum(registry_call_duration_seconds_count{{job="{ORCHESTRATOR}", service="{BACKEND.name}"}})'
SENT = f'sum(http_client_request_duration_seconds_count{{job="{ORCHESTRATOR}", server_address="{BACKEND.name}"}})'
RETRIED = f'sum(registry_retries_total{{job="{ORCHESTRATOR}", service="{BACKEND.name}"}})'


def by_instance(observed: Collectors, outcome: str) -> Counter[str]:
    """Attempts of orchestrator-api that came to this, by the instance that they went to."""
    found = observed.query(f"sum by (exported_instance) ({ATTEMPTS.replace('}', f', outcome={outcome!r}}}')})")
    return Counter({labels["exported_instance"]: int(value) for labels, value in found if value})


def test_figures_are_those_of_the_load(observed: Collectors, system: System, scene: Row) -> None:
    """Prometheus' figures equal the load's own, one of three answering 500."""
    ill = system.replicas()[1]
    ill.command(status=500)
    before_ok, before = by_instance(observed, "ok"), observed.number(f"sum({ATTEMPTS})")
    before_called, before_sent, before_retried = map(observed.number, (CALLED, SENT, RETRIED))
    answered: Counter[str] = Counter()
    for _ in range(CALLS):
        answer = publish(system)
        answer.raise_for_status()
        answered[answer.headers["X-Upstream-Instance"]] += 1
    ill.command()
    wait_until(
        lambda: by_instance(observed, "ok") - before_ok == answered,
        10,
        "the attempts that succeeded are the answers",
        lambda: (by_instance(observed, "ok") - before_ok, answered),
    )
    retried = observed.number(RETRIED) - before_retried
    assert answered[ill.instance] == 0
    assert retried > 0
    assert observed.number(CALLED) - before_called == CALLS
    assert observed.number(f"sum({ATTEMPTS})") - before == CALLS + retried
    assert observed.number(SENT) - before_sent == CALLS + retried
    scene.saw(f"{CALLS} calls, {retried:.0f} repeated: the same in Prometheus, per instance")


def is_whole(spans: list[Span]) -> bool:
    """Whether every service has told all that it has to tell of this publish."""
    ids, parents = {span.id for span in spans}, [span.parent for span in spans]
    answered = {span.id for span in spans if span.kind == "client" and "http.response.status_code" in span.tags}
    return (
        {span.service for span in spans} == {service.name for service in SERVICES}
        and sum(parent not in ids for parent in parents) == 1
        and answered <= set(parents)
    )


def find(observed: Collectors, since: float, wanted: Callable[[Span], bool]) -> list[Span]:
    """The spans of a publish of this time, of which one is wanted. Raises: TimeoutError."""
    found: list[list[Span]] = []

    def look() -> bool:
        traces = observed.traces(ORCHESTRATOR, since)
        found[:] = [spans for spans in traces if is_whole(spans) and any(map(wanted, spans))]
        return bool(found)

    wait_until(look, EXPORT_SECONDS, "a whole trace with that span", lambda: observed.traces(ORCHESTRATOR, since))
    return found[0]


def test_a_publish_is_one_trace(observed: Collectors, system: System, scene: Row) -> None:
    """Jaeger has a publish as one trace of three services."""
    since = now()
    publish(system).raise_for_status()
    spans = find(observed, since, lambda span: span.kind == "server")
    known = {span.id: span for span in spans}
    roots = [span for span in spans if span.parent not in known]
    assert [(root.service, root.kind) for root in roots] == [(ORCHESTRATOR, "server")]
    for span in spans:
        if span.kind == "server" and span is not roots[0]:
            attempt = known[span.parent or ""]
            call = known[attempt.parent or ""]
            assert (attempt.kind, call.kind) == ("client", "internal")
            assert attempt.tags["server.address"] == span.service == call.tags["service.peer.name"]
            assert attempt.tags["registry.instance.id"].startswith(span.service)
    assert not [span for span in spans if "health" in span.name or "/v1/" in str(span.tags.get("url.full", ""))]
    scene.saw(f"{len(spans)} spans of {len({span.service for span in spans})} services")


def test_a_failed_attempt_is_in_the_trace(observed: Collectors, system: System, scene: Row) -> None:
    """kill -9 of one of three: the trace has the failed attempt and the resend."""
    instance = publish(system).headers["X-Upstream-Instance"]  # one that is not left out for what it did before
    [hit] = [replica for replica in system.replicas() if replica.instance == instance]
    since = now()
    hit.container.kill()
    for _ in range(20):
        publish(system).raise_for_status()

    def failed_there(span: Span) -> bool:
        return "error.type" in span.tags and resends(span) == 0 and span.tags.get("registry.instance.id") == instance

    spans = find(observed, since, failed_there)
    failed = next(filter(failed_there, spans))
    attempts = sorted((span for span in spans if span.parent == failed.parent), key=resends)
    assert {span.kind for span in attempts} == {"client"}
    assert [resends(span) for span in attempts] == list(range(len(attempts)))
    assert attempts[1].tags["registry.instance.id"] != instance
    assert "error.type" not in attempts[-1].tags
    scene.saw(f"error.type={failed.tags['error.type']}, then resend 1 to another instance")


def resends(attempt: Span) -> int:
    """How often the request had been sent before."""
    return int(attempt.tags.get("http.request.resend_count", 0))
