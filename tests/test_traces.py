"""A publish is one trace through the three services, as a collector receives it from their processes."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.collector import Collector, Span, running_collector
from registry.testing.agent import running_agent
from tests.system import System, running_system
from tests.test_three_services import card


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def system(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[System]:
    """The three services, told by the environment alone where to export their spans to."""
    with pytest.MonkeyPatch.context() as patch, running_agent(binary=consul_binary) as consul:
        for name, value in collector.environment().items():
            patch.setenv(name, value)
        with running_system(consul, tmp_path_factory.mktemp("traced")) as running:
            yield running


def publish(system: System, collector: Collector) -> list[Span]:
    """The trace of one publish, once every service that took part has exported what it did."""
    before = set(collector.traces())
    assert system.post("/api/publish", card("Traced")).status_code == 201

    def complete() -> list[Span]:
        for trace, spans in collector.traces().items():
            ids, parents = {span.id for span in spans}, {span.parent for span in spans}
            roots = [span.name for span in spans if not span.parent]
            answered = {span.id for span in spans if span.kind == "CLIENT" and not span.failed}
            if (
                trace not in before
                and roots == ["POST /api/publish"]
                and parents - {None, ""} <= ids
                and answered <= parents
            ):
                return spans
        return []

    system.until(lambda: bool(complete()), "the whole trace")
    return complete()


def below(parent: Span, spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.parent == parent.id]


def child(parent: Span, spans: list[Span], **wanted: str) -> Span:
    """The one child that has this name, kind or service."""
    found = [span for span in below(parent, spans) if all(getattr(span, key) == wanted[key] for key in wanted)]
    assert len(found) == 1, f"{wanted} below {parent.name}: {[span.name for span in below(parent, spans)]}"
    return found[0]


def test_a_publish_is_one_trace_through_three_services(system: System, collector: Collector) -> None:
    """Each service's request is a child of the attempt that sent it; each says which instance it is."""
    spans = publish(system, collector)
    [root] = [span for span in spans if not span.parent]
    assert (root.service, root.kind) == ("orchestrator-api", "SERVER")
    assert root.attributes["registry.instance.id"] in system.passing("orchestrator-api")
    call = child(root, spans, name="call backend-api", kind="INTERNAL")
    attempt = child(call, spans, name="POST", kind="CLIENT")
    served = child(attempt, spans, name="POST /api/publish", kind="SERVER", service="backend-api")
    assert served.attributes["registry.instance.id"] == attempt.attributes["registry.instance.id"]
    enriching = child(child(served, spans, name="call research-api"), spans, kind="CLIENT")
    research = child(enriching, spans, name="POST /api/enrich", kind="SERVER", service="research-api")
    for search in below(research, spans):
        assert search.name == "call backend-api"
        assert child(child(search, spans, name="GET"), spans).name == "GET /api/cards"


def test_a_killed_backend_is_a_failed_attempt_of_the_trace(system: System, collector: Collector) -> None:
    """With its error, and the resend beside it that reached another instance."""
    victim = min(system.passing("backend-api"))
    system.processes[victim].send_signal(signal.SIGKILL)
    system.processes[victim].wait(20)
    for _ in range(30):  # Until chance sends one there; it is ejected only then.
        spans = publish(system, collector)
        failed = [span for span in spans if span.failed and span.service == "orchestrator-api"]
        if failed:
            break
    [refused] = failed
    assert refused.attributes["registry.instance.id"] == victim
    assert refused.attributes["error.type"] == "ConnectError"
    assert refused.attributes["registry.outcome"] == "refused"
    [call] = [span for span in spans if span.id == refused.parent]
    assert call.attributes["registry.attempts"] == 2
    assert call.attributes["registry.outcome"] == "ok"
    [resent] = [span for span in below(call, spans) if span is not refused]
    assert resent.attributes["http.request.resend_count"] == 1
    assert child(resent, spans).service == "backend-api"


def test_nothing_else_is_traced(system: System, collector: Collector) -> None:
    """Neither Consul's checks nor the long polls of Consul: every trace begins with somebody's request."""
    publish(system, collector)
    assert {span.name for span in collector.spans if not span.parent} == {"POST /api/publish"}
    assert "health" not in " ".join(span.name for span in collector.spans)
