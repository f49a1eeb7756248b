"""Servers on raw sockets that do exactly what a test says, and keep each request's bytes."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from registry import Instance

__all__ = ["OK", "Handler", "RawServer", "raw_servers"]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[bool]]
"""Gets a whole request, answers it, and says whether to keep the connection."""


class RawServer:
    """A server and what it received."""

    def __init__(self, handler: Handler) -> None:
        self.requests: list[bytes] = []
        """Those that came whole."""
        self.begun = 0
        """How many began to come."""
        self.instance: Instance
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def paths(self) -> list[str]:
        """The path of each request, with its query."""
        return [request.split()[1].decode() for request in self.requests]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    self.begun += 1
                    request = head + await read_body(reader, head)
                    self.requests.append(request)
                    if not await self._handler(request, writer):
                        break
        finally:
            self._tasks.discard(task)
            writer.close()
            with suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def stop(self) -> None:
        """Ends what still runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The body that belongs to the head, as it came."""
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    if re.search(rb"(?i)\r\ntransfer-encoding:", head):
        return await reader.readuntil(b"0\r\n\r\n")
    return await reader.readexactly(int(length[1])) if length else b""


@asynccontextmanager
async def raw_servers(*handlers: Handler, service: str = "cards") -> AsyncIterator[list[RawServer]]:
    """A server per handler, each an instance of the service."""
    async with AsyncExitStack() as stack:
        found = []
        for number, handler in enumerate(handlers, start=1):
            server = RawServer(handler)
            listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 20)
            address, port = listener.sockets[0].getsockname()
            server.instance = Instance(f"{service}-{number}", service, address, port)
            stack.push_async_callback(server.stop)
            stack.callback(listener.close)
            found.append(server)
        yield found
