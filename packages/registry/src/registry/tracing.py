"""Traces, by OpenTelemetry: a span for each call, one for each of its attempts, and what sets that up in a service.

Needs the extra: ``pip install "registry[tracing]"``. Names follow OpenTelemetry's conventions for HTTP.
Source: https://opentelemetry.io/docs/specs/semconv/http/http-spans/#http-client-span
"""

import asyncio
import logging
import os
from contextvars import Token
from functools import cache
from importlib.metadata import entry_points
from typing import Self, TypeAlias

from registry.background import prepare_background
from registry.errors import InvalidInputError
from registry.extras import extra
from registry.families import METHODS, OTHER
from registry.logs import POLLED, set_fields
from registry.settings import ServiceSettings
from registry.telemetry import Event, ObservedAttempt, ObservedCall, Observer
from registry.threads import in_daemon_thread

with extra("tracing"):
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry import context as contexts
    from opentelemetry import propagate, trace
    from opentelemetry.context import _SUPPRESS_HTTP_INSTRUMENTATION_KEY as NO_HTTP_SPANS
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY as NO_SPANS
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import Span as RecordedSpan
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import ProxyTracerProvider, Span, SpanKind, StatusCode

__all__ = ["TracingObserver", "server_telemetry", "set_up_tracing"]

logger = logging.getLogger("registry")

_Attributes: TypeAlias = dict[str, str | int | bool]

_FLUSH = 2.0
"""Seconds that a collector which does not answer may delay the end of a service."""


class TracingObserver(Observer):
    """Makes an INTERNAL span of each call and a CLIENT span of each attempt, and tells the instance which trace it is.

    The spans' parent is the span that is current where the call is made. Each attempt carries ``traceparent``,
    ``tracestate`` and ``baggage`` of its own, or what else ``OTEL_PROPAGATORS`` names, once. What instruments httpx
    makes no second span of it. It is an asynchronous context manager, too, which exports the last spans at its end;
    ``lifespan`` enters it.
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        """``provider``: by default the global one, set now or later."""
        self._provider = trace.get_tracer_provider() if provider is None else provider
        self._tracer = self._provider.get_tracer("registry")
        self._calls: dict[ObservedCall, tuple[Span, Context]] = {}
        self._attempts: dict[ObservedAttempt, tuple[Span, Token[Context]]] = {}
        self.instance_id: str | None = None
        """This process's own, from its first registration on."""
        if isinstance(self._provider, TracerProvider):
            self._provider.add_span_processor(_InstanceId(self))
        _keep_background_silent()

    def call_begun(self, call: ObservedCall) -> None:
        current = contexts.get_current()
        span = self._tracer.start_span(
            f"call {call.service}", current, SpanKind.INTERNAL, {"service.peer.name": call.service}
        )
        # Here and not for each attempt: every change of a context copies it.
        within = contexts.set_value(NO_HTTP_SPANS, True, trace.set_span_in_context(span, current))
        self._calls[call] = span, within

    def call_ended(self, call: ObservedCall) -> None:
        span, _ = self._calls.pop(call, (None, None))
        if span is not None and span.is_recording():
            said: _Attributes = {"registry.attempts": call.attempts, "registry.outcome": call.outcome or "error"}
            failed = call.outcome not in {"ok", "cancelled"}
            _end(span, said, call.status, call.error, failed=failed)

    def attempt_begun(self, attempt: ObservedAttempt) -> None:
        if attempt.call not in self._calls:  # It began before anybody observed it.
            return
        whole, within = self._calls[attempt.call]
        if not whole.is_recording():
            # Nor would the attempt be: what identifies the call will do, and costs half as much.
            propagate.inject(attempt.headers, within)
            self._attempts[attempt] = whole, contexts.attach(within)
            return
        method, instance = attempt.call.method, attempt.instance
        known = method in METHODS
        attributes: _Attributes = {
            "http.request.method": method if known else OTHER,
            "server.address": attempt.call.service,
            "url.full": attempt.call.url,
            "network.peer.address": instance.address,
            "network.peer.port": instance.port,
            "registry.instance.id": instance.id,
            "registry.pick.reason": attempt.reason,
        }
        if not known:
            attributes["http.request.method_original"] = method
        if attempt.number > 1:
            attributes["http.request.resend_count"] = attempt.number - 1
        if attempt.hedge:
            attributes["registry.hedge"] = True
        span = self._tracer.start_span(method if known else "HTTP", within, SpanKind.CLIENT, attributes)
        current = trace.set_span_in_context(span, within)
        propagate.inject(attempt.headers, current)
        self._attempts[attempt] = span, contexts.attach(current)

    def attempt_ended(self, attempt: ObservedAttempt) -> None:
        span, token = self._attempts.pop(attempt, (None, None))
        if span is None or token is None:
            return
        contexts.detach(token)
        if span.is_recording():
            said: _Attributes = {"registry.outcome": attempt.outcome or "error"}
            if attempt.status is not None:
                said["http.response.status_code"] = attempt.status
            # "SHOULD be set to Error" for a client's 4xx, too, whatever the retry policy makes of it.
            failed = attempt.outcome not in {"ok", "cancelled"} or (attempt.status or 0) >= 400
            _end(span, said, attempt.status, attempt.error, failed=failed)

    def happened(self, event: Event) -> None:
        if event.kind == "registered":
            self.instance_id = event.instance

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Exports what has ended, for at most 2 s. Spans may follow, as when an app starts anew."""
        flush = getattr(self._provider, "force_flush", None)
        if flush is None:
            return
        try:
            async with asyncio.timeout(_FLUSH):  # The SDK heeds no limit.
                await in_daemon_thread(flush, "registry-traces")
        except TimeoutError:
            logger.warning("the collector of traces does not answer: the last ones are lost")


def _end(span: Span, said: _Attributes, status: int | None, error: BaseException | None, *, failed: bool) -> None:
    if failed:
        said["error.type"] = str(status or said["registry.outcome"]) if error is None else type(error).__name__
        span.set_status(StatusCode.ERROR, None if error is None else str(error))
    span.set_attributes(said)  # At once: each call of it takes a lock.
    span.end()


@cache
def _keep_background_silent() -> None:
    """From now on, whatever instruments httpx makes no trace of each of Consul's long polls."""
    prepare_background(lambda: contexts.attach(contexts.set_value(NO_SPANS, True)))


class _InstanceId(SpanProcessor):
    """Says on the span of each request which instance serves it, once that is registered."""

    def __init__(self, observer: TracingObserver) -> None:
        self._observer = observer

    def on_start(self, span: RecordedSpan, parent_context: Context | None = None) -> None:
        if span.kind is SpanKind.SERVER and self._observer.instance_id is not None:
            span.set_attribute("registry.instance.id", self._observer.instance_id)


def server_telemetry(settings: ServiceSettings) -> TelemetryConfig:
    """For ``FastAPI(telemetry=...)``: a span for each request, none within it, and none for what only machines ask."""
    untraced = POLLED | {settings.health_check_path}
    return {"operation_spans": False, "auto_configure": False, "exclude": lambda scope: scope["path"] in untraced}


def set_up_tracing(settings: ServiceSettings) -> TracingObserver | None:
    """For ``lifespan(observer=...)``: what the variables ``OTEL_*`` ask for; None: they ask for nothing.

    Nothing is exported unless ``OTEL_TRACES_EXPORTER`` or an ``OTEL_EXPORTER_OTLP_*ENDPOINT`` is set. With the exporter
    ``none``, traces are passed on but not exported. A global provider that was set before is used as it is.

    Raises: InvalidInputError, for an exporter that is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        exporters = _exporters()
        if exporters is None:
            return None
        about = {SERVICE_NAME: settings.name} | ({SERVICE_VERSION: settings.version} if settings.version else {})
        given = OTELResourceDetector().detect().attributes
        # uvicorn ends by a signal, so that nothing runs at exit; elsewhere that could wait for a collector.
        provider = TracerProvider(resource=Resource.create({**about, **given}), shutdown_on_exit=False)
        for exporter in exporters:
            provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
    set_fields("trace", _current_ids)
    return TracingObserver()


def _current_ids() -> dict[str, str]:
    """For the records of logs that are written within a span."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


def _exporters() -> list[SpanExporter] | None:
    """Those that the environment names; None: it asks for no traces."""
    names = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not names.strip():
        if not any(os.environ.get(name) for name in endpoints):
            return None
        names = "otlp"
    return [_exporter(name) for name in map(str.strip, names.split(",")) if name not in {"", "none"}]


def _exporter(name: str) -> SpanExporter:
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    if name == "otlp":
        protocol = next(filter(None, map(os.environ.get, protocols)), "http/protobuf")
        name = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}.get(protocol, protocol)
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        exporter: SpanExporter = found.load()()
        return exporter
    raise InvalidInputError(
        f"the exporter of traces {name!r} is not installed: see OTEL_TRACES_EXPORTER and {protocols[1]}"
    )
