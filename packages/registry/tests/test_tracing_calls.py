"""The spans of real calls over real sockets, and what of them goes over the wire."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from registry import (
    DiscoveryTransport,
    Instance,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
    StaticResolver,
    SyncDiscoveryTransport,
)
from registry.testing.ports import free_ports
from registry.tracing import TracingObserver
from tests.support.policies import in_order
from tests.support.raw import OK, Handler, RawServer, raw_servers

OWN = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


async def ok(request: bytes, writer: asyncio.StreamWriter) -> bool:
    writer.write(OK)
    return True


async def busy(request: bytes, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n")
    return True


async def silent(request: bytes, writer: asyncio.StreamWriter) -> bool:
    await asyncio.sleep(30)
    return False


async def slash(request: bytes, writer: asyncio.StreamWriter) -> bool:
    if request.split()[1] == b"/items":
        writer.write(b"HTTP/1.1 307 X\r\nLocation: /items/\r\nContent-Length: 0\r\n\r\n")
        return True
    return await ok(request, writer)


def after_warm_up(later: Handler, calls: int = 20) -> Handler:
    """Answers at once until it is known how long answers take; then as ``later`` does."""
    seen = 0

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> bool:
        nonlocal seen
        seen += 1
        return await (later if seen > calls else ok)(request, writer)

    return handler


@dataclass
class Scene:
    """A client whose calls are traced, and what it calls."""

    client: ServiceDiscoveryClient
    servers: list[RawServer]
    provider: TracerProvider
    exporter: InMemorySpanExporter

    async def request(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Calls within a span, as an app does within that of a request; forgets what was before."""
        self.exporter.clear()
        with self.provider.get_tracer("test").start_as_current_span("request"):
            return await call()

    def tree(self) -> list[str]:
        """Each span on a line, below its parent and indented, in the order of their beginning."""
        spans = sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        assert len({span.context.trace_id for span in spans}) == 1
        return [line for span in spans if span.parent is None for line in _lines(span, spans, "")]

    def traceparents(self) -> list[str]:
        """What each request said, in no order; it said it once."""
        found = []
        for request in (request for server in self.servers for request in server.requests):
            head = request.partition(b"\r\n\r\n")[0].decode()
            [value] = re.findall(r"(?im)^traceparent: *(\S+)\r?$", head)
            found.append(value)
        return found

    def attempts(self) -> list[str]:
        """The ``traceparent`` of each attempt that has a span."""
        return [
            f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"
            for span in self.exporter.get_finished_spans()
            if span.kind.name == "CLIENT"
        ]


def _lines(span: ReadableSpan, spans: list[ReadableSpan], indent: str) -> list[str]:
    of = dict(span.attributes or {})
    said = [
        of.get("registry.instance.id"),
        of.get("registry.attempts"),
        of.get("registry.outcome"),
        of.get("http.response.status_code"),
        of.get("error.type"),
        f"resend {of['http.request.resend_count']}" if "http.request.resend_count" in of else None,
        "hedge" if of.get("registry.hedge") else None,
        "!" if span.status.status_code is StatusCode.ERROR else None,
    ]
    line = " ".join(str(part) for part in (span.name, *said) if part is not None)
    below = [each for each in spans if each.parent is not None and each.parent.span_id == span.context.span_id]
    return [indent + line, *(found for each in below for found in _lines(each, spans, indent + "  "))]


@asynccontextmanager
async def scene(*handlers: Handler, dead: bool = False, **options: Any) -> AsyncIterator[Scene]:
    """Servers ``cards-1`` and so on, picked in this order; ``dead``: before them, one that refuses."""
    async with raw_servers(*handlers) as servers:
        instances = [server.instance for server in servers]
        if dead:
            instances.append(Instance("cards-0", "cards", "127.0.0.1", free_ports(1)[0]))
        provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        resolver = StaticResolver({"cards": instances})
        chosen: dict[str, Any] = {
            "retry_delay": 0.0,
            "policy": in_order,
            "observer": TracingObserver(provider),
        } | options
        async with ServiceDiscoveryClient(resolver, **chosen) as client:
            yield Scene(client, servers, provider, exporter)


async def test_ok() -> None:
    async with scene(ok) as seen:
        await seen.request(lambda: seen.client.get("cards", "/a?secret=1"))
        assert seen.tree() == ["request", "  call cards 1 ok", "    GET cards-1 ok 200"]
        attempt = seen.exporter.get_finished_spans()[0]
        assert attempt.attributes is not None
        assert attempt.attributes["url.full"] == "http://cards/a"
        assert attempt.attributes["registry.pick.reason"] == "only"


async def test_failover() -> None:
    """One refuses, one is busy, one answers: three attempts of one call."""
    async with scene(busy, ok, dead=True) as seen:
        await seen.request(lambda: seen.client.put("cards", "/a"))
        assert seen.tree() == [
            "request",
            "  call cards 3 ok",
            "    PUT cards-0 refused ConnectError !",
            "    PUT cards-1 status 503 503 resend 1 !",
            "    PUT cards-2 ok 200 resend 2",
        ]


async def test_failure() -> None:
    """The last answer is the call's, and its failure, too."""
    async with scene(busy, max_retries=1) as seen:
        with pytest.raises(httpx.HTTPStatusError):
            await seen.request(lambda: seen.client.get("cards", "/a"))
        assert seen.tree()[1:] == ["  call cards 1 status 503 !", "    GET cards-1 status 503 503 !"]


async def test_hedge_that_wins() -> None:
    """The second answers; the first is cancelled, and no error."""
    async with scene(after_warm_up(silent), ok, hedge=True) as seen:
        for _ in range(20):
            await seen.client.get("cards", "/a")
        await seen.request(lambda: seen.client.get("cards", "/a"))
        assert seen.tree() == [
            "request",
            "  call cards 2 ok",
            "    GET cards-1 cancelled",
            "    GET cards-2 ok 200 resend 1 hedge",
        ]


async def test_hedge_that_loses() -> None:
    """The first answers after all, when the second is on its way: that one is cancelled, and no error."""
    on_its_way = asyncio.Event()

    async def late(request: bytes, writer: asyncio.StreamWriter) -> bool:
        await on_its_way.wait()
        return await ok(request, writer)

    async def hedge(request: bytes, writer: asyncio.StreamWriter) -> bool:
        on_its_way.set()
        return await silent(request, writer)

    async with scene(after_warm_up(late), hedge, hedge=True) as seen:
        for _ in range(20):
            await seen.client.get("cards", "/a")
        await seen.request(lambda: seen.client.get("cards", "/a"))
        assert seen.tree() == [
            "request",
            "  call cards 2 ok",
            "    GET cards-1 ok 200",
            "    GET cards-2 cancelled resend 1 hedge",
        ]


async def test_stream_ends_at_its_headers() -> None:
    more = asyncio.Event()

    async def slowly(request: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await more.wait()
        writer.write(b"ok")
        return True

    async with scene(slowly) as seen:
        async with seen.client.http.stream("GET", "http://cards/a") as response:
            assert seen.tree() == ["call cards 1 ok", "  GET cards-1 ok 200"]
            more.set()
            assert await response.aread() == b"ok"
        assert len(seen.exporter.get_finished_spans()) == 2


async def test_redirect() -> None:
    """Within the service it is a call of its own."""
    async with scene(slash) as seen:
        await seen.request(lambda: seen.client.get("cards", "/items"))
        assert seen.tree() == [
            "request",
            "  call cards 1 ok",
            "    GET cards-1 ok 307",
            "  call cards 1 ok",
            "    GET cards-1 ok 200",
        ]


async def test_cancelled() -> None:
    """The caller gave up: nobody's error."""
    async with scene(silent) as seen:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await seen.request(lambda: seen.client.get("cards", "/a"))
        assert seen.tree()[1:] == ["  call cards 1 cancelled", "    GET cards-1 cancelled"]


async def test_no_instance() -> None:
    async with scene() as seen:
        with pytest.raises(ServiceNotFoundError):
            await seen.request(lambda: seen.client.get("cards", "/a"))
        assert seen.tree()[1:] == ["  call cards 0 no_instance ServiceNotFoundError !"]


async def test_deadline_passed() -> None:
    """While an instance was silent."""
    async with scene(silent, deadline=0.2) as seen:
        with pytest.raises(httpx.ReadTimeout):
            await seen.request(lambda: seen.client.get("cards", "/a"))
        assert seen.tree()[1:] == ["  call cards 1 deadline ReadTimeout !", "    GET cards-1 timeout ReadTimeout !"]


async def test_deadline_passed_before() -> None:
    """Nothing was sent: a call without an attempt."""
    async with scene(ok, deadline=1e-9) as seen:
        with pytest.raises(httpx.ConnectTimeout):
            await seen.request(lambda: seen.client.get("cards", "/a"))
        assert seen.tree()[1:] == ["  call cards 0 deadline ConnectTimeout !"]


@pytest.mark.parametrize("own", [None, "traceparent", "Traceparent"])
@pytest.mark.parametrize("transport", [None, httpx.AsyncHTTPTransport], ids=["h11", "httpx"])
async def test_one_traceparent_on_the_wire(transport: Callable[[], Any] | None, own: str | None) -> None:
    """Each attempt says its own, once, whatever the caller said itself; so do retries, hedges, redirects, uploads."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"piece"

    headers = {} if own is None else {own: OWN}
    options = {"hedge": True, "transport": transport and transport()}
    async with scene(after_warm_up(silent, 25), slash, dead=True, **options) as seen:
        for _ in range(20):
            await seen.client.get("cards", "/a", headers=headers)
        for path in ("/a", "/items"):
            await seen.client.get("cards", path, headers=headers)
        await seen.client.http.get("http://cards/a", headers=headers)
        await seen.client.post("cards", "/a", json={}, headers=headers)
        await seen.client.post("cards", "/a", content=pieces(), headers=headers)
        await seen.client.get("cards", "/a", headers=headers)
        await seen.client.get("cards", "/items", headers=headers)
        said = seen.traceparents()
        assert OWN not in said
        assert len(set(said)) == len(said) > 27
        assert set(said) < set(seen.attempts())  # those that were refused said nothing


@pytest.mark.parametrize("transport", [None, httpx.AsyncHTTPTransport], ids=["h11", "httpx"])
async def test_httpx_that_is_instrumented_adds_nothing(transport: Callable[[], Any] | None) -> None:
    """Neither a second traceparent nor a second span of the same attempt."""
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    HTTPXClientInstrumentor().instrument(tracer_provider=provider)
    try:
        async with scene(ok, transport=transport and transport()) as seen:
            await seen.client.get("cards", "/a")
            await seen.client.http.get("http://cards/a")
            assert sorted(seen.traceparents()) == sorted(seen.attempts())
            assert exporter.get_finished_spans() == ()
            # It is instrumented: a request of the app's own is seen.
            async with httpx.AsyncClient() as other:
                await other.get(f"http://{seen.servers[0].instance.netloc}/b")
            assert len(exporter.get_finished_spans()) == 1
    finally:
        HTTPXClientInstrumentor().uninstrument()


async def test_any_httpx_client_is_traced() -> None:
    """The transport alone takes an observer, too."""
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with raw_servers(ok) as [server]:
        transport = DiscoveryTransport(StaticResolver({"cards": [server.instance]}), observer=TracingObserver(provider))
        async with httpx.AsyncClient(transport=transport) as client:
            await client.get("http://cards/a")
    assert [span.name for span in exporter.get_finished_spans()] == ["GET", "call cards"]


async def test_a_call_that_blocks_belongs_to_the_span_of_its_thread() -> None:
    """Although it is made by the event loop of another."""
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with raw_servers(ok) as [server]:
        resolver = StaticResolver({"cards": [server.instance]})

        def call() -> None:
            transport = SyncDiscoveryTransport(resolver, observer=TracingObserver(provider))
            with provider.get_tracer("test").start_as_current_span("job"), httpx.Client(transport=transport) as client:
                client.get("http://cards/a")

        await asyncio.to_thread(call)
    attempt, whole, job = exporter.get_finished_spans()
    assert (attempt.parent, whole.parent) == (whole.context, job.context)
