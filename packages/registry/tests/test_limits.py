"""Slow bodies, sent byte by byte to apps that a real uvicorn server runs in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.fastapi import RegistryMiddleware, add_problem_handlers
from registry.limits import SlowBodyMiddleware
from registry.testing.ports import free_ports
from tests.support.command import wait_until


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[int]:
    """The port on which uvicorn serves it."""
    [port] = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve())
    await asyncio.to_thread(wait_until, lambda: server.started or running.done())
    try:
        yield port
    finally:
        server.should_exit = True
        await running


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends, be it by a reset: the server does not read what still comes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := await reader.read(65_536):
            received += piece
    return received


async def trickle(port: int, head: str, chunk: bytes, gap: float, count: int = 1_000) -> tuple[bytes, float]:
    """What is answered to a body that comes a chunk at a time, and after how many seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = asyncio.get_running_loop().time()
    answer = asyncio.create_task(everything(reader))
    try:
        writer.write(f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n\r\n".encode())
        for _ in range(count):
            writer.write(chunk)
            await asyncio.wait([answer], timeout=gap)
            if answer.done():
                break
        async with asyncio.timeout(10):
            return await answer, asyncio.get_running_loop().time() - begun
    finally:
        writer.close()


def fastapi_app() -> ASGIApp:
    app = FastAPI()
    add_problem_handlers(app)

    @app.post("/")
    async def take(body: dict[str, Any]) -> int:
        return len(body)

    return app


async def plain_app(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(len(await Request(scope, receive).body()))(scope, receive, send)


@pytest.mark.real
@pytest.mark.parametrize("app", [fastapi_app(), plain_app], ids=["FastAPI", "plain ASGI"])
@pytest.mark.parametrize(
    ("head", "chunk"),
    [
        ("Content-Type: application/json\r\nContent-Length: 50000", b" "),
        ("Content-Type: application/json\r\nTransfer-Encoding: chunked", b"1\r\n \r\n"),
    ],
    ids=["length", "chunked"],
)
async def test_a_slow_body_is_408(app: ASGIApp, head: str, chunk: bytes) -> None:
    """A byte now and then is answered 408 in words once the time is over, and the connection is closed."""
    async with serving(SlowBodyMiddleware(app, grace=0.3)) as port:
        answer, seconds = await trickle(port, head, chunk, 0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\ncontent-type: application/problem+json\r\n" in answer
    assert b"less than 500 bytes a second" in answer
    assert 0.3 <= seconds < 5


@pytest.mark.real
async def test_a_body_that_keeps_coming_is_taken() -> None:
    """A body that is fast enough may take longer than the grace; one second buys as many bytes as the rate."""
    async with serving(SlowBodyMiddleware(plain_app, grace=0.2, rate=100)) as port:
        answer, seconds = await trickle(port, "Content-Length: 1000", b"x" * 50, 0.05, count=20)
    assert answer.endswith(b"\r\n\r\n1000")
    assert seconds > 0.9


async def test_an_answer_may_take_longer_than_the_body() -> None:
    """Once the body is complete, waiting for the caller to leave is no slow body."""

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await receive()
        await JSONResponse("done")(scope, receive, send)

    async with serving(SlowBodyMiddleware(waits, grace=0.1)) as port:
        answer, _ = await trickle(port, "Content-Length: 1", b"x", 0.0, count=1)
    assert answer.endswith(b'"done"')


async def test_the_middleware_of_every_service_has_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who adds RegistryMiddleware needs nothing else."""
    monkeypatch.setattr(SlowBodyMiddleware.__init__, "__defaults__", (0.2, 500.0))
    app = FastAPI()
    app.add_middleware(RegistryMiddleware)

    @app.post("/")
    async def take(body: dict[str, Any]) -> int:
        return len(body)

    async with serving(app) as port:
        answer, _ = await trickle(port, "Content-Type: application/json\r\nContent-Length: 50000", b" ", 0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("wrapped", [False, True], ids=["coroutine", "future"])
async def test_waiting_for_a_body_can_be_cancelled(wrapped: bool) -> None:
    """What waits for a piece goes on with it when it comes, and hears of a cancellation."""
    pieces: asyncio.Queue[str] = asyncio.Queue()
    heard: list[str] = []

    async def receive() -> Message:
        try:
            await pieces.get()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            heard.append("cancelled")
            raise
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            heard.append((await receive())["type"])

    async def send(message: Message) -> None: ...

    scope: Scope = {"type": "http", "http_version": "1.1", "headers": [(b"transfer-encoding", b"chunked")]}
    as_future = lambda: asyncio.ensure_future(receive())  # noqa: E731
    task = asyncio.create_task(SlowBodyMiddleware(app)(scope, as_future if wrapped else receive, send))
    for count in (1, 2):
        pieces.put_nowait("x")
        while len(heard) < count:  # noqa: ASYNC110
            await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert heard == ["http.request", "http.request", "cancelled"]


async def test_a_body_of_http_2_needs_no_header() -> None:
    """Without a header, too, it may come slowly; in HTTP/1 there is none then, and nothing is timed."""
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(0.2)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    for version in ("2", "1.1"):
        scope: Scope = {"type": "http", "http_version": version, "headers": []}
        await SlowBodyMiddleware(plain_app, grace=0.05)(scope, receive, send)
    assert [message["status"] for message in sent if "status" in message] == [408, 200]
