"""Spans, as an observer makes them that is told by hand of calls and attempts."""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import SpanKind, StatusCode, TraceState

from registry.background import background_context
from registry.model import Instance
from registry.telemetry import (
    AttemptOutcome,
    CallOutcome,
    Event,
    ObservedAttempt,
    ObservedCall,
)
from registry.tracing import TracingObserver

ONE = Instance("stock-1", "stock-api", "10.0.0.1", 8001)
TWO = Instance("stock-2", "stock-api", "10.0.0.2", 8001)


class Traced:
    """An observer whose spans are kept."""

    def __init__(self, sampled: bool = True) -> None:
        self.provider = TracerProvider(sampler=ALWAYS_ON if sampled else ALWAYS_OFF, shutdown_on_exit=False)
        self.exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.observer = TracingObserver(self.provider)

    def begin(self, method: str = "GET") -> ObservedCall:
        call = ObservedCall("stock-api", method, "http://stock-api/stock")
        self.observer.call_begun(call)
        return call

    def attempt(self, call: ObservedCall, instance: Instance = ONE, *, hedge: bool = False) -> ObservedAttempt:
        headers = {"x-request-deadline": "1"}
        attempt = ObservedAttempt(call, call.attempts + 1, instance, "p2c_cost", headers, hedge=hedge)
        self.observer.attempt_begun(attempt)
        return attempt

    def end_attempt(
        self,
        attempt: ObservedAttempt,
        outcome: AttemptOutcome,
        status: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        attempt.outcome, attempt.status, attempt.error = outcome, status, error
        self.observer.attempt_ended(attempt)

    def end(
        self, call: ObservedCall, outcome: CallOutcome, status: int | None = None, error: BaseException | None = None
    ) -> None:
        call.outcome, call.status, call.error = outcome, status, error
        self.observer.call_ended(call)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()


@pytest.fixture
def traced() -> Iterator[Traced]:
    """Leaves the context as it was, or fails."""
    before = context.get_current()
    yield Traced()
    assert context.get_current() == before


def about(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


def test_a_call_and_its_attempt_are_two_spans(traced: Traced) -> None:
    """The call without anything of HTTP, the attempt with what the conventions ask for, and why it went there."""
    call = traced.begin()
    traced.end_attempt(traced.attempt(call), "ok", 200)
    traced.end(call, "ok", 200)
    attempt, whole = traced.spans
    assert whole.name == "call stock-api"
    assert whole.kind is SpanKind.INTERNAL
    assert about(whole) == {"service.peer.name": "stock-api", "registry.attempts": 1, "registry.outcome": "ok"}
    assert attempt.name == "GET"
    assert attempt.kind is SpanKind.CLIENT
    assert attempt.parent is not None
    assert attempt.parent.span_id == whole.context.span_id
    assert about(attempt) == {
        "http.request.method": "GET",
        "url.full": "http://stock-api/stock",
        "server.address": "stock-api",
        "network.peer.address": "10.0.0.1",
        "network.peer.port": 8001,
        "registry.instance.id": "stock-1",
        "registry.pick.reason": "p2c_cost",
        "registry.outcome": "ok",
        "http.response.status_code": 200,
    }
    assert {span.status.status_code for span in traced.spans} == {StatusCode.UNSET}


def test_the_parent_is_what_is_current_where_the_call_is_made(traced: Traced) -> None:
    with traced.provider.get_tracer("test").start_as_current_span("request") as request:
        call = traced.begin()
        traced.end_attempt(traced.attempt(call), "ok", 200)
        traced.end(call, "ok", 200)
    assert {span.context.trace_id for span in traced.spans} == {request.get_span_context().trace_id}
    assert traced.spans[1].parent == request.get_span_context()


def test_each_resend_is_counted_and_each_failure_named(traced: Traced) -> None:
    call = traced.begin("POST")
    traced.end_attempt(traced.attempt(call), "refused", error=ConnectionRefusedError("nobody listens"))
    traced.end_attempt(traced.attempt(call, TWO), "status", 503)
    traced.end_attempt(traced.attempt(call), "ok", 404)
    traced.end(call, "status", 404)
    refused, busy, missing, whole = traced.spans
    assert [about(span).get("http.request.resend_count") for span in traced.spans] == [None, 1, 2, None]
    assert about(refused)["error.type"] == "ConnectionRefusedError"
    assert refused.status.description == "nobody listens"
    assert about(busy)["error.type"] == "503"
    assert about(missing)["error.type"] == "404"
    assert about(whole)["error.type"] == "404"
    assert {span.status.status_code for span in traced.spans} == {StatusCode.ERROR}


@pytest.mark.parametrize(
    ("outcome", "error", "kind"),
    [
        ("deadline", TimeoutError("late"), "TimeoutError"),
        ("no_instance", LookupError("nobody"), "LookupError"),
        ("failing_fast", None, "failing_fast"),
        ("cancelled", asyncio.CancelledError(), None),
    ],
)
def test_calls_that_no_instance_was_asked_for(
    traced: Traced, outcome: CallOutcome, error: BaseException | None, kind: str | None
) -> None:
    """They are spans, too; that the caller gave up is no error."""
    traced.end(traced.begin(), outcome, error=error)
    (whole,) = traced.spans
    assert about(whole)["registry.outcome"] == outcome
    assert about(whole)["registry.attempts"] == 0
    assert about(whole).get("error.type") == kind
    assert whole.status.status_code is (StatusCode.UNSET if kind is None else StatusCode.ERROR)


async def test_a_lost_hedge_is_no_error(traced: Traced) -> None:
    """Two attempts at a time, each in a task of its own: each has its own context, and the loser's span is unset."""
    call = traced.begin()

    async def send(instance: Instance, outcome: AttemptOutcome, *, hedge: bool) -> None:
        attempt = traced.attempt(call, instance, hedge=hedge)
        await asyncio.sleep(0)
        traced.end_attempt(attempt, outcome, 200 if outcome == "ok" else None)

    await asyncio.gather(send(ONE, "cancelled", hedge=False), send(TWO, "ok", hedge=True))
    traced.end(call, "ok", 200)
    lost, won, _ = traced.spans
    assert about(lost)["registry.outcome"] == "cancelled"
    assert "error.type" not in about(lost)
    assert about(won)["registry.hedge"] is True
    assert {span.status.status_code for span in traced.spans} == {StatusCode.UNSET}


def test_each_attempt_carries_its_own_traceparent(traced: Traced) -> None:
    """With the state and the baggage of where the call is made."""
    state = TraceState([("vendor", "7")])
    remote = trace.SpanContext(
        trace_id=7, span_id=8, is_remote=True, trace_flags=trace.TraceFlags(1), trace_state=state
    )
    within = baggage.set_baggage("tenant", "blue", trace.set_span_in_context(trace.NonRecordingSpan(remote)))
    token = context.attach(within)
    call = traced.begin()
    first, second = traced.attempt(call), traced.attempt(call, TWO)
    traced.end_attempt(second, "ok", 200)
    traced.end_attempt(first, "cancelled")
    context.detach(token)
    for attempt, span in zip((second, first), traced.spans, strict=True):
        assert attempt.headers == {
            "x-request-deadline": "1",
            "traceparent": f"00-{7:032x}-{span.context.span_id:016x}-01",
            "tracestate": "vendor=7",
            "baggage": "tenant=blue",
        }


def test_unsampled_it_still_says_so_to_the_instance() -> None:
    """Or the instance would begin a trace of its own."""
    traced = Traced(sampled=False)
    call = traced.begin()
    attempt = traced.attempt(call)
    traced.end_attempt(attempt, "ok", 200)
    assert int(attempt.headers["traceparent"][-2:], 16) & trace.TraceFlags.SAMPLED == 0
    traced.end(call, "ok", 200)
    assert traced.spans == ()


def test_a_method_of_somebodys_own_is_no_name(traced: Traced) -> None:
    """Source: https://opentelemetry.io/docs/specs/semconv/http/http-spans/#name."""
    call = traced.begin("BREW")
    traced.end_attempt(traced.attempt(call), "ok", 200)
    traced.end(call, "ok", 200)
    assert traced.spans[0].name == "HTTP"
    assert about(traced.spans[0])["http.request.method"] == "_OTHER"
    assert about(traced.spans[0])["http.request.method_original"] == "BREW"


def test_what_began_before_anybody_observed_is_left_out(traced: Traced) -> None:
    call = ObservedCall("stock-api", "GET", "http://stock-api/stock")
    attempt = traced.attempt(call)
    traced.end_attempt(attempt, "ok", 200)
    traced.end(call, "ok", 200)
    assert traced.spans == ()
    assert "traceparent" not in attempt.headers


def test_nothing_is_kept_of_what_has_ended(traced: Traced) -> None:
    for _ in range(3):
        call = traced.begin()
        traced.end_attempt(traced.attempt(call), "ok", 200)
        traced.end(call, "ok", 200)
    assert not traced.observer._calls
    assert not traced.observer._attempts


def test_background_tasks_are_not_traced_by_others(traced: Traced) -> None:
    """Whatever instruments httpx: Consul's long polls are no traces."""
    assert is_http_instrumentation_enabled()
    assert not background_context().run(is_http_instrumentation_enabled)
    call = traced.begin()
    assert is_http_instrumentation_enabled()
    attempt = traced.attempt(call)
    assert not is_http_instrumentation_enabled()
    traced.end_attempt(attempt, "ok", 200)
    assert is_http_instrumentation_enabled()
    traced.end(call, "ok", 200)


def test_a_request_names_the_instance_that_serves_it(traced: Traced) -> None:
    """From its registration on; no other span does."""
    tracer = traced.provider.get_tracer("test")
    tracer.start_span("GET /early", kind=SpanKind.SERVER).end()
    traced.observer.happened(Event("registered", "stock-api", "stock-1", "started"))
    tracer.start_span("GET /stock", kind=SpanKind.SERVER).end()
    tracer.start_span("anything").end()
    assert [about(span).get("registry.instance.id") for span in traced.spans] == [None, "stock-1", None]


@pytest.mark.real
async def test_the_end_waits_for_a_collector_no_longer_than_two_seconds(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    class Away(SpanProcessor):
        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return released.wait(timeout_millis)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Away())
    async with TracingObserver(provider):
        began = time.monotonic()
    assert 1.9 < time.monotonic() - began < 3
    assert "does not answer" in caplog.text
    released.set()
