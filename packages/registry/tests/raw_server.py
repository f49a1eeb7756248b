"""Raw servers, which do what a test says with every byte, and attempts on them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from registry import Instance
from registry.discovery.options import ConnectionOptions
from registry.discovery.sender import H11Sender, Sender

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Handler = Callable[["RawServer", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class RawServer:
    """What a socket saw: every request's bytes, and how many connections came and stand."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.accepted = 0
        self.open = 0
        self.instance: Instance

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        """One request without a body; raises IncompleteReadError when the client has left."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head)
        return head

    async def has_open(self, connections: int) -> None:
        """Returns when so many connections stand."""
        await until(lambda: self.open == connections)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


@asynccontextmanager
async def raw_server(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[RawServer]:
    """A server that does with each connection what ``handler`` says, and closes it at its end."""
    seen = RawServer()
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        seen.accepted += 1
        seen.open += 1
        try:
            await handler(seen, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            seen.open -= 1
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    seen.instance = Instance("cards-1", "cards", host, server.sockets[0].getsockname()[1])
    try:
        yield seen
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answering(answer: bytes) -> Handler:
    """Gives this answer to every request, over connections that it keeps."""

    async def handler(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await seen.read(reader)
            writer.write(answer)

    return handler


def breaking_off(answer: bytes) -> Handler:
    """Sends this much and closes the connection."""

    async def handler(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await seen.read(reader)
        writer.write(answer)

    return handler


def stalling(answer: bytes) -> Handler:
    """Sends this much and then nothing, until the client leaves."""

    async def handler(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await seen.read(reader)
        writer.write(answer)
        await reader.read()

    return handler


@asynccontextmanager
async def open_sender(options: ConnectionOptions | None = None) -> AsyncIterator[H11Sender]:
    sender = H11Sender(options)
    try:
        yield sender
    finally:
        await sender.aclose()


def request(
    method: str = "GET",
    path: str = "/x",
    *,
    connect: float = 2.0,
    read: float = 5.0,
    write: float = 5.0,
    pool: float = 5.0,
    **kw: Any,
) -> httpx.Request:
    timeout = {"connect": connect, "read": read, "write": write, "pool": pool}
    return httpx.Request(method, f"http://cards{path}", extensions={"timeout": timeout}, **kw)


async def attempt(
    sender: Sender,
    server: RawServer | Instance,
    sent: httpx.Request | None = None,
    limit: float | None = 5.0,
    *,
    read: bool,
) -> httpx.Response:
    """One attempt, its body read one way or the other."""
    instance = server if isinstance(server, Instance) else server.instance
    response = await sender.send(sent or request(), instance, {}, limit, read=read)
    if not read:
        try:
            await response.aread()
        except BaseException:
            await response.aclose()  # as httpx's client does
            raise
    return response


both_ways = pytest.mark.parametrize("read", [True, False], ids=["read", "stream"])
