"""The server that clients are measured against: it answers every request with the same bytes, at next to no cost.

With uvicorn in its place, the server would use as much of a small machine as the fastest client, and hide differences.
"""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from subprocess import PIPE, Popen

__all__ = ["BODY", "running_servers"]

BODY = b'{"status": "ok"}'
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: bench\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


class Answering(asyncio.Protocol):
    """One connection: requests without a body, answered in order."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *heads, self._rest = (self._rest + data).split(b"\r\n\r\n")
        self._transport.write(ANSWER * len(heads))


@contextmanager
def running_servers(count: int) -> Iterator[list[int]]:
    """The ports of so many processes, serving on all addresses of this host. They end with the context, or with us."""
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            with socket.create_server(("0.0.0.0", 0), backlog=1024) as listener:
                arguments = [sys.executable, __file__, str(listener.fileno())]
                process = stack.enter_context(Popen(arguments, stdin=PIPE, pass_fds=[listener.fileno()]))
                stack.callback(process.kill)
                ports.append(listener.getsockname()[1])
        yield ports


async def _serve(listener: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(Answering, sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    # Whoever started us is gone when stdin ends.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1]))))
