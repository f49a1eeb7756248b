"""What it costs to be seen, in µs of CPU: a call that is counted, measured or traced, and a request to a service.

Small against what else a call takes, so nothing of it goes over a network: an answer is there at once, and what is
compared takes turns a few calls long.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from starlette.types import Message, Scope

from benchmarks.clients import Target
from registry import (
    ConsulResolver,
    Instance,
    RetryPolicy,
    ServiceDiscoveryClient,
    ServiceSettings,
    StaticResolver,
    SyncDiscoveryTransport,
)
from registry.discovery.attempt import Attempt
from registry.discovery.call import Call, Terms
from registry.discovery.context import DEADLINE_HEADER, said
from registry.discovery.pool import Pool
from registry.discovery.upstream import Upstream
from registry.fastapi import RegistryMiddleware
from registry.metrics import Metrics
from registry.shedding import Shedding
from registry.telemetry import Observer
from registry.tracing import TracingObserver

__all__ = ["PROMISED", "overheads", "sync_microseconds"]

PROMISED = {"none": 1.0, "metrics": 5.0, "unsampled": 45.0, "sampled": 130.0, "middleware": 20.0}
"""What is measured → how many µs it may take."""
FLEET = [Instance(f"bench-{number}", "bench", f"10.0.0.{number}", 80) for number in range(1, 4)]
TURN = 50
"""Calls."""


def overheads(turns: int) -> dict[str, float]:
    """What is measured → µs of CPU beyond the same without it, from so many turns."""
    return {
        "none": _counting(turns * TURN),
        **asyncio.run(_observers(turns)),
        **asyncio.run(_requests(turns)),
    }


def _counting(times: int) -> float:
    """Without an observer: one attempt and its call are counted, which nobody is told of."""
    upstream = Upstream(StaticResolver({"bench": FLEET}), Pool("bench"), None, RetryPolicy())
    call = Call(httpx.Request("GET", "http://bench/"), upstream, Terms())
    attempt = Attempt(call, asyncio.run(_picked(upstream)))
    answer = httpx.Response(200)

    def count() -> None:
        attempt._count("ok", answer, 0.001)  # noqa: SLF001
        call.end(answer)

    def nothing() -> None: ...

    taken = []
    for _ in range(20):
        taken.append(_cpu(count, times) - _cpu(nothing, times))
    return median(taken)


async def _picked(upstream: Upstream) -> Any:
    return await upstream.pick((), safe=True)


def _cpu(work: Callable[[], None], times: int) -> float:
    began = time.process_time_ns()
    for _ in range(times):
        work()
    return (time.process_time_ns() - began) / times / 1e3


class _AtOnce(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b"{}", request=request)


async def _observers(turns: int) -> dict[str, float]:
    async with AsyncExitStack() as stack:

        async def opened(observe: Callable[[ServiceDiscoveryClient], Observer | None]) -> Callable[[], Awaitable[Any]]:
            client = ServiceDiscoveryClient(StaticResolver({"bench": FLEET}), transport=_AtOnce())
            await stack.enter_async_context(client)
            if (observer := observe(client)) is not None:
                client.observe(observer)
            return lambda: client.get("bench", "/api/cards/1")

        ways = {"": await opened(lambda client: None), "metrics": await opened(lambda c: Metrics(c.explain_all))}
        for name, provider in _providers().items():
            stack.callback(provider.shutdown)
            tracing = TracingObserver(provider)
            ways[name] = await opened(lambda client, tracing=tracing: tracing)  # type: ignore[misc]
        return await _compare(ways, turns)


def _providers() -> Mapping[str, TracerProvider]:
    """With the SDK's own sampler; what is sampled is batched, as ever, and then dropped."""

    class Nowhere(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    sampled = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    sampled.add_span_processor(BatchSpanProcessor(Nowhere()))
    unsampled = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    return {"unsampled": unsampled, "sampled": sampled}


async def _requests(turns: int) -> dict[str, float]:
    """A GET that carries a deadline, as callers here send it; and a POST with a body."""
    shedding = _app(bare=False)
    limits = ServiceSettings(name="bench", port=80, shed_lag=0.1, max_in_flight=1_000, caller_rate={"bench": 1e9})
    shedding.state.shedding = Shedding(limits)
    async with _started(_app(bare=True)) as bare, _started(_app(bare=False)) as ours, _started(shedding):
        ways = {
            "": lambda: _request(bare, "GET"),
            "middleware": lambda: _request(ours, "GET"),
            "middleware that sheds": lambda: _request(shedding, "GET"),
        }
        get = await _compare(ways, turns)
        post = await _compare(
            {"": lambda: _request(bare, "POST"), "middleware, with a body": lambda: _request(ours, "POST")}, turns
        )
        return get | post


def _app(*, bare: bool) -> FastAPI:
    app = FastAPI()

    @app.get("/api/cards/1")
    async def read() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/api/cards/1")
    async def write(card: dict[str, str]) -> dict[str, str]:
        return card

    if not bare:
        app.add_middleware(RegistryMiddleware)
        app.state.registrar = SimpleNamespace(instance_id="bench-1", leaving=False)
    return app


@asynccontextmanager
async def _started(app: FastAPI) -> AsyncIterator[FastAPI]:
    """The middleware takes its outer place when the server starts the app."""
    started, ended = asyncio.Event(), asyncio.Event()
    news = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        if started.is_set():
            await ended.wait()
        return {"type": next(news)}

    async def send(message: Message) -> None:
        started.set()

    running = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send))
    await started.wait()
    try:
        yield app
    finally:
        ended.set()
        await running


async def _request(app: FastAPI, method: str) -> None:
    body = b'{"title": "a card"}' if method == "POST" else b""
    headers = [(b"host", b"bench"), (b"accept", b"*/*"), (b"user-agent", b"python-httpx")]
    headers.append((DEADLINE_HEADER.lower().encode(), said(time.time() + 30.0).encode()))
    if body:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": "/api/cards/1",
        "raw_path": b"/api/cards/1",
        "query_string": b"",
        "root_path": "",
        "state": {"caller": "bench"},
        "headers": headers,
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8002),
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"that was not the app's answer: {message}")

    await app(scope, receive, send)


async def _compare(ways: Mapping[str, Callable[[], Awaitable[Any]]], turns: int) -> dict[str, float]:
    """Of each but the one without a name: µs of this thread beyond that one, in the turns that others disturb least."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, call in ways.items():
            began = time.thread_time_ns()
            for _ in range(TURN):
                await call()
            taken[name].append((time.thread_time_ns() - began) / TURN / 1e3)
            await asyncio.sleep(0)
    undisturbed = {name: sorted(each)[len(each) // 10] for name, each in taken.items()}
    base = undisturbed.pop("")
    return {name: micros - base for name, micros in undisturbed.items()}


def sync_microseconds(target: Target, calls: int) -> dict[str, float]:
    """µs of CPU of a blocking call over real connections: through ours, and with a bare client; these take turns."""
    transport = SyncDiscoveryTransport(ConsulResolver(target.consul))
    with httpx.Client(trust_env=False) as bare, httpx.Client(transport=transport) as ours:
        taken: dict[str, list[float]] = {"bare `httpx.Client`": [], "over `SyncDiscoveryTransport`": []}
        urls = (f"{target.urls[0]}/api/cards/1", f"http://{target.service}/api/cards/1")
        for client, url in zip((bare, ours), urls, strict=True):
            client.get(url).raise_for_status()
        for _ in range(max(1, calls // TURN)):
            for name, client, url in zip(taken, (bare, ours), urls, strict=True):
                began = time.process_time_ns()
                for _ in range(TURN):
                    client.get(url).raise_for_status()
                taken[name].append((time.process_time_ns() - began) / TURN / 1e3)
    return {name: median(each) for name, each in taken.items()}
