"""A real HTTP server inside the test's process: it keeps whole requests and answers as a function says.

For what arrives and how often. For load, hanging and dying processes there is registry.testing.instances.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from registry.model import Instance

__all__ = ["Answer", "RecordingServer", "Request", "Serve", "recording_server"]


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    target: str
    """Path and query, undecoded."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(frozen=True)
class Answer:
    """One answer. A ``body`` that is no bytes is sent chunk by chunk, as the iterable yields.

    A ``Content-Length`` among the headers is sent as it is, and the connection closed after the body: too large a one
    makes half an answer.
    """

    status: int = 200
    body: bytes | Iterable[bytes] = b"{}"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


class RecordingServer:
    """A server in threads of its own; made by `recording_server`. Safe to command from any thread."""

    def __init__(self, answer: Callable[[Request], Answer | None]) -> None:
        """Binds a port of its own; nothing is served before the context is entered."""
        self.answer = answer
        """What the next requests get: an answer, or None: the connection is closed without one."""
        self.requests: list[Request] = []
        """Everything that arrived, in order."""
        self.connections: set[socket.socket] = set()
        """Those that are open now."""
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.port: int = self._server.server_address[1]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def of(self, service: str, id: str | None = None, tags: tuple[str, ...] = ()) -> Instance:  # noqa: A002
        """This server as an instance of a service, for a StaticResolver."""
        return Instance(id or f"{service}-127.0.0.1-{self.port}", service, "127.0.0.1", self.port, tags)

    def serve(self) -> None:
        """Begins to answer, in the background."""
        self._thread.start()

    def die(self) -> None:
        """Cuts all connections and refuses new ones, as after a kill; no-op when it is dead."""
        self._server.shutdown()
        self._server.server_close()
        for connection in tuple(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


Serve = Callable[..., RecordingServer]
"""A fixture's type: takes what `recording_server` takes, and ends what it started after the test."""


class _Server(ThreadingHTTPServer):
    block_on_close = False
    request_queue_size = 128

    def __init__(self, instance: RecordingServer) -> None:
        self.instance = instance
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is what tests are about: no traceback on stderr."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.instance.connections.add(self.connection)

    def finish(self) -> None:
        self.server.instance.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests read `requests` instead."""

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = (
            self._chunks() if "transfer-encoding" in headers else self.rfile.read(int(headers.get("content-length", 0)))
        )
        request = Request(self.command, self.path, headers, body)
        self.server.instance.requests.append(request)
        answer = self.server.instance.answer(request)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if isinstance(answer.body, bytes):
            if "Content-Length" in answer.headers:
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in answer.body:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve  # noqa: N815


@contextmanager
def recording_server(answer: Callable[[Request], Answer | None] | None = None) -> Iterator[RecordingServer]:
    """A server that gives every request this answer, by default 200 with ``{}``; gone when the context ends."""
    instance = RecordingServer(answer or (lambda _: Answer()))
    instance.serve()
    try:
        yield instance
    finally:
        instance.die()
