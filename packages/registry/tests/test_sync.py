"""``httpx.Client`` over the same engine: what a blocking caller sees, on real sockets."""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from registry import (
    ConnectionOptions,
    Instance,
    InvalidInputError,
    RegistryError,
    RetryPolicy,
    ServiceNotFoundError,
    ServiceRegistry,
    StaticResolver,
    SyncDiscoveryTransport,
)
from registry.discovery import context
from tests.support.raw import OK, Handler, RawServer, raw_servers
from tests.support.server import Answer, RecordingServer, Serve


def transport_to(*servers: RecordingServer | RawServer, **options: Any) -> SyncDiscoveryTransport:
    """To these as the instances of ``cards``."""
    instances = [server.of("cards") if isinstance(server, RecordingServer) else server.instance for server in servers]
    return SyncDiscoveryTransport(StaticResolver({"cards": instances}), **options)


@contextmanager
def client_of(*servers: RecordingServer | RawServer, timeout: float = 5.0, **options: Any) -> Iterator[httpx.Client]:
    with httpx.Client(transport=transport_to(*servers, **options), base_url="http://cards", timeout=timeout) as client:
        yield client


@contextmanager
def raw(*handlers: Handler) -> Iterator[list[RawServer]]:
    """Raw servers on an event loop in a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = raw_servers(*handlers)
    try:
        yield asyncio.run_coroutine_threadsafe(servers.__aenter__(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(servers.__aexit__(None, None, None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def answering(answer: bytes) -> Handler:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer)
        return True

    return handle


async def hang(head: bytes, writer: asyncio.StreamWriter) -> bool:
    await asyncio.sleep(60)
    return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def endpoint_of(client: httpx.Client) -> Any:
    """How the only instance stands."""
    transport: Any = client._transport
    return transport._engine.explain("cards").endpoints[0]


def sockets_to_others() -> set[Any]:
    """The connections that this process opened or accepted and has not closed."""
    return {connection.laddr for connection in psutil.Process().net_connections() if connection.raddr}


async def by_connection(head: bytes, writer: asyncio.StreamWriter) -> bool:
    """Says which connection it is; of ``/late``, the last byte comes later."""
    if b" /late " in head:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
        await asyncio.sleep(0.5)
        writer.write(b"k")
        return True
    body = str(writer.get_extra_info("peername")[1]).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    return True


def fork(work: Callable[[], bool]) -> int:
    """The process id of a child that does this and exits with 0 if it is true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads.
        child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            status = 0 if work() else 1
        os._exit(status)
    return child


SHAPES: dict[str, Callable[[], dict[str, Any]]] = {
    "get": lambda: {"method": "GET", "url": "/a%2Fb?q=ü", "params": {"q": "a b"}},
    "head": lambda: {"method": "HEAD", "url": "/"},
    "json": lambda: {"method": "POST", "url": "/", "json": {"title": "Ünïcode"}},
    "a form": lambda: {"method": "PUT", "url": "/", "data": {"a": ["1", "x y"]}},
    "bytes": lambda: {"method": "PATCH", "url": "/", "content": b"\x00\xff", "headers": [("X-A", "1"), ("x-a", "2")]},
    "pieces": lambda: {"method": "POST", "url": "/", "content": iter([b"one", b"", b"two"])},
    "a file": lambda: {"method": "POST", "url": "/", "content": io.BytesIO(b"data" * 50_000)},
    "counted pieces": lambda: {
        "method": "POST",
        "url": "/",
        "content": iter([b"ab"]),
        "headers": {"Content-Length": "2"},
    },
    "multipart": lambda: {
        "method": "POST",
        "url": "/",
        "files": {"f": ("a.txt", io.BytesIO(b"data"))},
        "data": {"k": "v"},
        "headers": {"Content-Type": "multipart/form-data; boundary=b"},
    },
}
CHUNKED = b"HTTP/1.1 201 Made\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a=1\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


@pytest.mark.parametrize("answer", [OK, CHUNKED], ids=["counted", "chunked"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bytes_are_those_of_httpx(shape: Callable[[], dict[str, Any]], answer: bytes) -> None:
    """The server receives what plain httpx sends but for ``Host``, and the caller gets what plain httpx gives."""
    with raw(answering(answer if shape()["method"] != "HEAD" else OK[:-2])) as [server], client_of(server) as client:
        instance = server.instance
        with httpx.Client(base_url=f"http://{instance.netloc}", trust_env=False) as plain:
            expected, got = plain.request(**shape()), client.request(**shape())
        sent, ours = server.requests
    assert ours == sent.replace(instance.netloc.encode(), b"cards", 1)
    assert got.status_code == expected.status_code
    assert got.reason_phrase == expected.reason_phrase
    assert got.headers.raw == expected.headers.raw
    assert got.content == expected.content
    assert got.http_version == expected.http_version
    assert got.cookies == expected.cookies


def test_fails_over_when_an_instance_of_consuls_dies(
    service_registry: ServiceRegistry, service_name: str, serve: Serve
) -> None:
    """Discovered in Consul, one of two killed in between: no call fails."""
    servers = [serve(), serve()]
    for server in servers:
        service_registry.register_service(service_name, "127.0.0.1", server.port, health_check_interval="1s")
    wait_until(lambda: len(service_registry.discover_service(service_name)) == 2)
    transport = SyncDiscoveryTransport(service_registry.resolver())
    with httpx.Client(transport=transport, base_url=f"http://{service_name}") as client:
        for number in range(60):
            if number == 20:
                servers[0].die()
            assert client.get("/").status_code == 200
        asked = [sum(request.target == "/" for request in server.requests) for server in servers]
        assert min(asked) > 0
        assert max(asked) >= 40
        with pytest.raises(ServiceNotFoundError):
            client.get(f"http://{service_name}-not/")


def test_extensions_mean_the_same(serve: Serve) -> None:
    """``tag`` chooses, ``idempotent`` lets a POST be repeated; without it the answer says what was tried."""
    failing, well = serve(lambda _: Answer(503)), serve()
    resolver = StaticResolver({"cards": [failing.of("cards", "a", ("a",)), well.of("cards", "b", ("b",))]})
    transport = SyncDiscoveryTransport(resolver, policy=lambda candidates, now: candidates[0])
    with httpx.Client(transport=transport, base_url="http://cards") as client:
        assert client.get("/", extensions={"tag": "b"}).status_code == 200
        answer = client.post("/", extensions={"tag": "a"})
        assert answer.status_code == 503
        assert len(answer.extensions["attempts"]) == 1
        assert client.post("/", extensions={"idempotent": True}).status_code == 200
        assert len(failing.requests) == 2


def test_errors_come_with_their_notes_in_the_calling_thread(serve: Serve) -> None:
    """Nobody listens: the last error, one note per attempt; a bad host: before anything is sent."""
    server = serve()
    with client_of(server, retry=RetryPolicy(2, 0.01)) as client:
        server.die()
        with pytest.raises(httpx.ConnectError) as failure:
            client.get("/")
        assert len(failure.value.__notes__) == 2
        assert str(failure.value.request.url) == "http://cards/"
        with pytest.raises(InvalidInputError, match="names a port"):
            client.get("http://cards:8080/")


def test_time_outs_and_deadline_hold(serve: Serve) -> None:
    """A silent instance: the client's own time-out, or the transport's deadline, ends the call."""
    with raw(hang) as [server]:
        for timeout, options in ((0.2, {"retry": RetryPolicy(1)}), (5.0, {"deadline": 0.2})):
            with client_of(server, timeout=timeout, **options) as client:
                started = time.monotonic()
                with pytest.raises(httpx.ReadTimeout):
                    client.get("/")
                assert 0.2 <= time.monotonic() - started < 2.0


def test_obeys_the_deadline_of_the_request_being_served(serve: Serve) -> None:
    """What a synchronous endpoint calls inherits the deadline of its request, as what is awaited does."""
    server = serve()
    with client_of(server) as client:
        token = context.inherited.set(context.Inherited(time.time() + 9, True))
        try:
            client.get("/")
        finally:
            context.inherited.reset(token)
        client.get("/")
    assert "left=" in server.requests[0].headers["x-request-deadline"]
    assert "x-request-deadline" not in server.requests[1].headers


def test_body_is_read_in_the_calling_thread_as_it_is_sent() -> None:
    """An instance that reads nothing stops the source: it is not read ahead, and the write time-out holds."""
    threads: list[int] = []

    def source() -> Iterator[bytes]:
        for _ in range(1_000):
            threads.append(threading.get_ident())
            yield b"x" * 65_536

    with socket.create_server(("127.0.0.1", 0)) as listener:
        instance = Instance("cards-1", "cards", *listener.getsockname())
        transport = SyncDiscoveryTransport(StaticResolver({"cards": [instance]}))
        with httpx.Client(transport=transport, timeout=0.3) as client, pytest.raises(httpx.WriteTimeout):
            client.post("http://cards/", content=source())
    assert set(threads) == {threading.get_ident()}
    assert len(threads) < 300


def test_error_of_the_source_is_raised_as_it_is(serve: Serve) -> None:
    """What the caller's own iterator raises is the same object, counts against nobody, and is not tried again."""
    server, error, read = serve(), ValueError("no more"), []

    def source() -> Iterator[bytes]:
        read.append(1)
        yield b"one"
        raise error

    with client_of(server) as client:
        for _ in range(7):
            with pytest.raises(ValueError, match="no more") as failure:
                client.put("/", content=source())
            assert failure.value is error
        assert len(read) == 7
        assert (endpoint_of(client).failures, endpoint_of(client).ejected_for) == (0, 0.0)
        assert client.get("/").status_code == 200


def test_answer_before_the_body_is_sent() -> None:
    """An answer whose head comes early is there early; the rest of the body is sent while the answer is read."""
    early = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            while lines.readline() != b"\r\n":
                pass
            connection.sendall(OK[:-2])
            early.wait(10)
            while lines.readline() != b"0\r\n":
                pass
            connection.sendall(b"ok")

    def source() -> Iterator[bytes]:
        yield b"a"
        while not early.is_set():
            yield b"b"
            time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=[listener])
        server.start()
        instance = Instance("cards-1", "cards", *listener.getsockname())
        transport = SyncDiscoveryTransport(StaticResolver({"cards": [instance]}))
        with (
            httpx.Client(transport=transport) as client,
            client.stream("POST", "http://cards/", content=source()) as got,
        ):
            early.set()
            assert got.read() == b"ok"
        server.join()


def test_answer_is_streamed_piece_by_piece() -> None:
    """Each piece is there before the next is sent; a stream that is closed early releases its connection."""
    gates = [threading.Event(), threading.Event(), threading.Event()]

    async def pieces(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for gate in gates:
            await asyncio.to_thread(gate.wait, 10)
            writer.write(b"3\r\nabc\r\n")
        writer.write(b"0\r\n\r\n")
        return True

    with raw(pieces) as [server], client_of(server, connections=ConnectionOptions(max_connections=1)) as client:
        with client.stream("GET", "/") as answer:
            stream = answer.iter_raw()
            for gate in gates[:2]:
                gate.set()
                assert next(stream) == b"abc"
        gates[2].set()
        assert client.get("/", timeout=2.0).content == b"abcabcabc"


def test_slow_reader_is_not_timed_out() -> None:
    """The read time-out counts while the caller waits, not while it is busy with the last piece."""

    async def slow(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na")
        await asyncio.sleep(0.6)
        writer.write(b"b")
        return True

    with raw(slow) as [server], client_of(server, timeout=0.4) as client, client.stream("GET", "/") as answer:
        stream = answer.iter_raw()
        assert next(stream) == b"a"
        time.sleep(0.8)
        assert next(stream) == b"b"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nno size\r\n",
    ],
    ids=["cut off", "ill framed"],
)
def test_broken_answer_is_an_error_of_httpx(answer: bytes) -> None:
    """A body that breaks off or is badly framed: what came is given, then the error, and the connection goes."""

    async def breaking(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer)
        return b"/stay" in head

    with raw(breaking) as [server], client_of(server, connections=ConnectionOptions(max_connections=1)) as client:
        for path in ("/stay" if b"chunked" in answer else "/", "/"):
            with client.stream("GET", path, timeout=2.0) as got:
                pieces = got.iter_raw()
                assert next(pieces) == b"half"
                with pytest.raises(httpx.RemoteProtocolError) as failure:
                    next(pieces)
                assert failure.value.request.url.path == path


def test_interrupt_cancels_the_call() -> None:
    """Ctrl-C while an answer is waited for: KeyboardInterrupt at once, the connection given back, nobody blamed."""

    async def hang_or_answer(head: bytes, writer: asyncio.StreamWriter) -> bool:
        return await (hang if b"/hang" in head else answering(OK))(head, writer)

    with (
        raw(hang_or_answer) as [server],
        client_of(server, timeout=30.0, connections=ConnectionOptions(max_connections=1)) as client,
    ):
        timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            client.get("/hang")
        assert time.monotonic() - started < 2
        timer.join()
        assert client.get("/", timeout=2.0).text == "ok"
        assert (endpoint_of(client).failures, endpoint_of(client).in_flight) == (0, 0)


def test_many_threads_share_one_transport_and_one_loop(serve: Serve) -> None:
    """32 threads, each gets its own answers; behind all of them there is one thread."""
    servers = [serve(lambda request: Answer(body=request.target.encode() + request.body)) for _ in range(2)]

    def calls(thread: int) -> None:
        for number in range(20):
            body = f" {thread} {number}".encode()
            assert client.post(f"/{thread}/{number}", content=iter([body])).content == b"/%d/%d%s" % (
                thread,
                number,
                body,
            )

    with client_of(*servers, timeout=30.0) as client, ThreadPoolExecutor(32) as threads:
        list(threads.map(calls, range(32)))
    assert sum(len(server.requests) for server in servers) == 640
    assert [thread.name for thread in threading.enumerate()].count("registry") == 1


async def test_call_in_a_coroutine_blocks_and_ends(serve: Serve) -> None:
    """On a thread that runs an event loop itself, a call blocks that loop, and no more."""
    with client_of(serve()) as client:
        assert client.get("/").status_code == 200


def test_call_on_the_loop_itself_is_an_error(serve: Serve) -> None:
    """A policy that calls through the transport would wait for itself: it is told so."""

    def policy(candidates: Any, now: float) -> Any:
        return client.get("http://cards/")

    with client_of(serve(), policy=policy) as client, pytest.raises(RegistryError, match="wait for itself"):
        client.get("/")


def test_close_leaves_nothing(service_registry: ServiceRegistry, service_name: str, serve: Serve) -> None:
    """Closed, a client has no socket left, neither to instances nor to Consul, and can be closed again."""
    service_registry.register_service(service_name, "127.0.0.1", serve().port, health_check_interval="1s")
    wait_until(lambda: bool(service_registry.discover_service(service_name)))
    service_registry.close()
    before = sockets_to_others()
    transport = SyncDiscoveryTransport(service_registry.resolver())
    transport.close()
    client = httpx.Client(transport=transport, base_url=f"http://{service_name}")
    assert client.get("/").status_code == 200
    assert len(sockets_to_others()) >= len(before) + 2
    client.close()
    transport.close()
    wait_until(lambda: sockets_to_others() <= before)


FORK = """
import os, sys, time
import httpx
from registry import ServiceRegistry, SyncDiscoveryTransport

port, service, again = int(sys.argv[1]), sys.argv[2], sys.argv[3]
transport = SyncDiscoveryTransport(ServiceRegistry("127.0.0.1", port).resolver())
client = httpx.Client(transport=transport, base_url=f"http://{service}")

def ports():
    return {client.get("/").text for _ in range(20)}

first, stream = client.get("/").text, client.stream("GET", "/late")
begun = stream.__enter__()
child = os.fork()
if child == 0:
    try:
        begun.read()
        print("read what is the parent's", flush=True)
    except httpx.ReadError as error:
        assert "before a fork" in str(error)
    stream.__exit__(None, None, None)
    mine = client.get("/").text
    print("another connection" if mine != first else "the same connection", flush=True)
    # The watch is the child's own: what Consul learns from now on arrives.
    ServiceRegistry("127.0.0.1", port).register_service(service, "127.0.0.1", int(again), health_check_interval="1s")
    deadline = time.monotonic() + 20
    while "again" not in ports():
        assert time.monotonic() < deadline
    print("heard of another instance", flush=True)
    if "exit" in sys.argv:
        sys.exit()
    client.close()
    os._exit(0)
assert begun.read() == b"ok"
stream.__exit__(None, None, None)
assert os.waitpid(child, 0)[1] == 0
assert client.get("/").text
client.close()
"""


@pytest.mark.parametrize("how", ["closed", "exit"])
def test_fork(service_registry: ServiceRegistry, service_name: str, serve: Serve, tmp_path: Path, how: str) -> None:
    """Parent and child go on with the same client, each over connections, a loop and a watch of its own."""
    with raw(by_connection) as [server]:
        again = serve(lambda _: Answer(body=b"again"))
        service_registry.register_service(service_name, "127.0.0.1", server.instance.port, health_check_interval="1s")
        wait_until(lambda: bool(service_registry.discover_service(service_name)))
        port = str(service_registry.settings.port)
        done = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, port, service_name, str(again.port), how],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["another connection", "heard of another instance"]


@pytest.mark.real
def test_forked_child_does_not_hold_the_parents_connections(serve: Serve) -> None:
    """What the parent closes is closed, although a child that was forked before lives on and has never called."""
    server = serve()
    reading, writing = os.pipe()
    with client_of(server) as client:
        client.get("/")
        assert len(server.connections) == 1

        def live_on() -> bool:
            os.close(writing)
            return os.read(reading, 1) == b""

        child = fork(live_on)
    try:
        wait_until(lambda: not server.connections)
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


@pytest.mark.real
def test_forked_child_counts_anew() -> None:
    """A call that the parent was waiting for when it forked does not weigh on the instance in the child."""

    async def hang_or_answer(head: bytes, writer: asyncio.StreamWriter) -> bool:
        return await (hang if b"/hang" in head else answering(OK))(head, writer)

    with raw(hang_or_answer) as [server], client_of(server, timeout=60.0, retry=RetryPolicy(1)) as client:

        def wait() -> None:
            with pytest.raises(httpx.ReadTimeout):
                client.get("/hang", timeout=1.0)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: len(server.requests) == 1)
        child = fork(lambda: client.get("/").text == "ok" and endpoint_of(client).in_flight == 0)
        assert os.waitpid(child, 0)[1] == 0
        waiting.join()


@pytest.mark.real
def test_exit_without_close_is_quiet(serve: Serve) -> None:
    """A script that ends without closing anything prints nothing and does not hang."""
    script = (
        "import httpx, sys\n"
        "from registry import Instance, StaticResolver, SyncDiscoveryTransport\n"
        "resolver = StaticResolver({'cards': [Instance('1', 'cards', '127.0.0.1', int(sys.argv[1]))]})\n"
        "client = httpx.Client(transport=SyncDiscoveryTransport(resolver))\n"
        "client.get('http://cards/').raise_for_status()\n"
    )
    command = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", script, str(serve().port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
