"""A collector of traces inside this process: keeps the spans that are exported to it by OTLP over HTTP."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

__all__ = ["Collector", "Span", "running_collector"]


@dataclass(frozen=True)
class Span:
    """One span, and which service sent it."""

    service: str
    name: str
    kind: str
    """``SERVER``, ``CLIENT`` or ``INTERNAL``."""
    trace: str
    id: str
    parent: str
    """Empty: it is a root."""
    began: int
    """Nanoseconds since the epoch."""
    seconds: float
    attributes: Mapping[str, str | int | bool]
    failed: bool


class Collector:
    """Where to export to, and what came."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.endpoint = ""

    def environment(self, delay: float = 0.2) -> dict[str, str]:
        """For a process whose spans shall come here, this many seconds after their end."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": str(int(delay * 1000))}

    def receive(self, body: bytes) -> None:
        """Keeps the spans of one export."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = str(_plain(resource.resource.attributes).get("service.name"))
            self.spans += [_span(service, span) for scope in resource.scope_spans for span in scope.spans]

    def traces(self) -> dict[str, list[Span]]:
        """The spans of each trace, in the order of their beginning."""
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: span.began):
            found.setdefault(span.trace, []).append(span)
        return found


def _span(service: str, span: trace_pb2.Span) -> Span:
    return Span(
        service=service,
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        began=span.start_time_unix_nano,
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        attributes=_plain(span.attributes),
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
    )


def _plain(attributes: Iterable[KeyValue]) -> dict[str, str | int | bool]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in attributes}


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Listens until the end of the context."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.receive(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        collector.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
