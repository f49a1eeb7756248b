"""One attempt on raw sockets: every error in httpx's words, answers as if httpx had read them, no connection lost."""

import asyncio
import gzip
import json
import pickle
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from packages.registry.tests.raw_server import (
    OK,
    RawServer,
    answering,
    attempt,
    both_ways,
    breaking_off,
    open_sender,
    raw_server,
    request,
    stalling,
    until,
)
from registry import DiscoveryTransport, Instance, ServiceDiscoveryClient, StaticResolver
from registry.discovery.blame import Blame, Failure, Verdict, judge
from registry.discovery.options import ConnectionOptions
from registry.discovery.sender import H11Sender, HttpxSender
from registry.errors import ResponseTooLargeError
from registry.testing.ports import free_ports


@both_ways
async def test_refused_connection_is_a_connect_error(read: bool) -> None:
    """Nobody listens: a ConnectError, which may be sent elsewhere whatever the method."""
    instance = Instance("cards-1", "cards", "127.0.0.1", free_ports(1)[0])
    async with open_sender() as sender:
        with pytest.raises(httpx.ConnectError) as raised:
            await attempt(sender, instance, read=read)
    assert raised.value.request.url.host == "cards"


@pytest.mark.parametrize(("connect", "limit"), [(0.2, 5.0), (2.0, 0.2), (0.2, 0.2)])
@both_ways
async def test_full_backlog_is_a_connect_time_out(connect: float, limit: float, read: bool) -> None:
    """A connection that never stands is told from one that does, also when the whole attempt's limit comes first."""
    if not read and limit < connect:
        connect = limit
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        try:
            async with open_sender() as sender:
                instance = Instance("cards-1", "cards", *listener.getsockname())
                with pytest.raises(httpx.ConnectTimeout):
                    await attempt(sender, instance, request("POST", connect=connect), limit, read=read)
        finally:
            for each in waiting:
                each.close()


@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
@both_ways
async def test_closed_after_the_request_is_no_connect_error(method: str, read: bool) -> None:
    """The instance has read the request and hangs up: it may have acted; and nothing sends it again unasked."""
    async with raw_server(breaking_off(b"")) as server, open_sender() as sender:
        with pytest.raises(httpx.RemoteProtocolError):
            await attempt(sender, server, request(method), read=read)
        assert len(server.requests) == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_reset_after_the_request_is_no_connect_error(method: str) -> None:
    """The same with a reset, as when a process is killed with data unread."""

    async def reset(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await seen.read(reader)
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with raw_server(reset) as server, open_sender() as sender:
        with pytest.raises(httpx.ReadError):
            await attempt(sender, server, request(method), read=True)
        assert len(server.requests) == 1


BROKEN = {
    "half a status line": b"HTTP/1.1 20",
    "half the headers": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf",
    "no last chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    "a chunk of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhalf\r\n0\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x00\xa5\x01\x00\x00 what is this?\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
@both_ways
async def test_broken_answer_is_a_transport_error(answer: bytes, read: bool) -> None:
    """Whatever is wrong with an answer, it is an error that httpx knows, and none that claims nothing was sent."""
    async with raw_server(breaking_off(answer)) as server, open_sender() as sender:
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await attempt(sender, server, read=read)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "begun", [b"", b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"]
)
@pytest.mark.parametrize(("read", "limit", "silence"), [(True, 0.2, 5.0), (False, None, 0.2), (True, None, 0.2)])
async def test_silence_is_a_read_time_out(begun: bytes, read: bool, limit: float | None, silence: float) -> None:
    """Whether the attempt's limit or the longest silence ends it, and wherever the answer got stuck."""
    async with raw_server(stalling(begun)) as server, open_sender() as sender:
        with pytest.raises(httpx.ReadTimeout):
            await attempt(sender, server, request(read=silence), limit, read=read)
        await server.has_open(0)


async def test_limit_holds_until_the_headers_of_a_stream() -> None:
    """A stream's headers must come within the limit; its body may take as long as it likes."""

    async def late_body(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await seen.read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await asyncio.sleep(0.4)
        writer.write(b"ok")
        await reader.read()

    async with raw_server(late_body) as server, open_sender() as sender:
        assert (await attempt(sender, server, limit=0.2, read=False)).content == b"ok"
    async with raw_server(stalling(b"")) as server, open_sender() as sender:
        async with asyncio.timeout(3):  # sooner than the silence that is allowed
            with pytest.raises(httpx.ReadTimeout):
                await attempt(sender, server, limit=0.2, read=False)
        await server.has_open(0)


@pytest.mark.parametrize("value", [b"one\r\nX-Two: two", b"one\ntwo", b"one\0two", b" one"])
async def test_header_that_would_be_another_is_not_sent(value: bytes) -> None:
    """A line break, a NUL or outer white space in a header is the caller's fault, in httpx's words."""
    async with raw_server(answering(OK)) as server, open_sender() as sender:
        with pytest.raises(httpx.LocalProtocolError):
            await attempt(sender, server, request(headers=[(b"X-Note", value)]), read=True)
    assert server.requests == []


async def test_other_schemes_are_not_sent() -> None:
    """Nothing but http and https, and no second try."""
    async with raw_server(answering(OK)) as server, open_sender() as sender:
        with pytest.raises(httpx.UnsupportedProtocol):
            await attempt(sender, server, httpx.Request("GET", "ftp://cards/x"), read=True)
    assert server.requests == []


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


ANSWERS = {
    "json": answer(json.dumps({"a": "ä"}).encode(), "Content-Type: application/json"),
    "latin-1": answer("Käse".encode("latin-1"), "Content-Type: text/plain; charset=iso-8859-1"),
    "an unknown charset": answer("Käse".encode(), "Content-Type: text/plain; charset=no-such"),
    "gzip": answer(gzip.compress(b"cards " * 99), "Content-Encoding: gzip", "Content-Type: text/plain"),
    "deflate": answer(zlib.compress(b"cards " * 99), "Content-Encoding: deflate"),
    "an unknown encoding": answer(b"cards", "Content-Encoding: no-such"),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    "empty": answer(b""),
    "no content": b"HTTP/1.1 204 No Content\r\nX-A: 1\r\nX-A: 2\r\n\r\n",
    "teapot": answer(b"no", "Set-Cookie: a=1; Path=/", "Set-Cookie: b=2; Path=/", status="418 I'm a Teapot"),
    "no reason": answer(b"ok", status="200 "),
    "an odd reason": answer(b"ok", status="200 \xfcber \u20ac".encode().decode("latin-1")),
    "server error": answer(b"{}", "Retry-After: 1", status="503 Service Unavailable"),
    "redirect": answer(b"", "Location: http://cards/y", status="307 Temporary Redirect"),
}


async def observed(response: httpx.Response) -> dict[str, object]:
    """Everything that a caller can see of an answer that has been read."""
    copy = pickle.loads(pickle.dumps(response))
    with pytest.raises(httpx.StreamConsumed):
        list(response.iter_raw())
    with pytest.raises(httpx.StreamConsumed):
        [piece async for piece in response.aiter_raw()]
    return {
        "status": response.status_code,
        "headers": response.headers.multi_items(),
        "read": response.read(),
        "aread": await response.aread(),
        "content": response.content,
        "text": response.text,
        "encoding": response.encoding,
        "charset": response.charset_encoding,
        "downloaded": response.num_bytes_downloaded,
        "is_closed": response.is_closed,
        "is_stream_consumed": response.is_stream_consumed,
        "iter_bytes": list(response.iter_bytes(3)),
        "aiter_bytes": [piece async for piece in response.aiter_bytes(3)],
        "iter_text": list(response.iter_text()),
        "aiter_lines": [line async for line in response.aiter_lines()],
        "reason": response.reason_phrase,
        "http_version": response.http_version,
        "cookies": dict(response.cookies),
        "redirect": response.has_redirect_location,
        "url": response.url,
        "copy": (copy.status_code, copy.content, copy.text, copy.headers.multi_items(), copy.is_closed),
    }


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("body", ANSWERS.values(), ids=ANSWERS)
async def test_answer_is_as_if_httpx_had_read_it(body: bytes, method: str) -> None:
    """Content, text, encodings, counters, iterators, state and pickling are those of an answer from httpx itself."""
    head, _, content = body.partition(b"\r\n\r\n")
    sent = head + b"\r\n\r\n" + (content if method == "GET" else b"")
    async with raw_server(breaking_off(sent)) as server, open_sender() as sender, httpx.AsyncHTTPTransport() as plain:
        ours = await attempt(sender, server, request(method), read=True)
        streamed = await attempt(sender, server, request(method), read=False)
        theirs = await attempt(HttpxSender(plain), server, request(method), read=True)
        expected = await observed(theirs)
        assert await observed(ours) == expected
        assert await observed(streamed) == expected
        await ours.aclose()


async def test_answer_that_is_not_what_it_says_is_a_decoding_error() -> None:
    """A body that is no gzip is told as httpx tells it."""
    lie = answer(b"no gzip", "Content-Encoding: gzip")
    async with raw_server(answering(lie)) as server, open_sender() as sender:
        with pytest.raises(httpx.DecodingError):
            await attempt(sender, server, read=True)


async def test_request_is_sent_as_it_is() -> None:
    """No header is added, renamed or lost, the Host stays the service's name, the path stays encoded."""
    headers = [("Host", "cards"), ("X-Id", "1"), ("X-Id", "2"), ("x-UTF-8", "ä".encode())]
    sent = request("POST", "/a%2Fb?q=%20x&q=y", headers=headers, content=b"{}")
    async with raw_server(answering(OK)) as server, open_sender() as sender:
        await sender.send(sent, server.instance, {"X-Extra": "3"}, None, read=True)
    line, *lines = server.requests[0].decode().strip().split("\r\n")
    assert line == "POST /a%2Fb?q=%20x&q=y HTTP/1.1"
    names = [each for each in lines if not each.startswith(("Accept", "User-Agent"))]
    assert names == ["Host: cards", "X-Id: 1", "X-Id: 2", "x-UTF-8: ä", "Content-Length: 2", "X-Extra: 3"]


async def read_chunks(reader: asyncio.StreamReader) -> list[bytes]:
    chunks = []
    while size := int(await reader.readline(), 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readline()
    return chunks


async def test_bodies_stream_both_ways() -> None:
    """A body goes out piece by piece and comes in piece by piece: neither waits for its end."""
    arrived: list[list[bytes]] = []

    async def echo(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await seen.read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while size := int(await reader.readline(), 16):
            chunk = (await reader.readexactly(size + 2))[:-2]
            arrived.append([chunk])
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
        await reader.readline()
        writer.write(b"0\r\n\r\n")
        await reader.read()

    returned: asyncio.Queue[bytes] = asyncio.Queue()

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        # Sent only when the first has come back: neither way is held up until the end of a body.
        yield await returned.get() + b" and two"

    async with raw_server(echo) as server, open_sender() as sender, asyncio.timeout(5):
        response = await sender.send(request("POST", content=body()), server.instance, {}, 5.0, read=False)
        got = []
        async for piece in response.aiter_bytes():
            got.append(piece)
            returned.put_nowait(piece)
        assert b"".join(got) == b"oneone and two"
        assert response.is_closed
        assert server.accepted == 1


async def test_forms_with_files_are_sent() -> None:
    """A multipart body, which httpx streams, arrives whole."""

    async def count(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await seen.read(reader)).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        seen.requests.append(await reader.readexactly(length))
        writer.write(OK)
        await reader.read()

    async with raw_server(count) as server, open_sender() as sender:
        sent = request("POST", files={"card": ("card.txt", b"x" * 100_000)})
        assert (await attempt(sender, server, sent, read=True)).content == b"ok"
    assert b"x" * 100_000 in server.requests[1]


async def test_body_that_breaks_off_is_no_connect_error() -> None:
    """An upload whose source fails is an error with that failure as its cause, and the connection is gone."""

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        raise RuntimeError("source failed")

    async def swallow(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(swallow) as server, open_sender() as sender:
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, RuntimeError)) as raised:
            await attempt(sender, server, request("POST", content=body()), read=True)
        causes = [raised.value, raised.value.__cause__, raised.value.__cause__ and raised.value.__cause__.__cause__]
        assert "source failed" in repr(causes)
        await server.has_open(0)


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"], ids=["headers", "body"])
@both_ways
async def test_cancelling_closes_the_connection(begun: bytes, read: bool) -> None:
    """Nobody works on for a caller that has gone: wherever the attempt is, its connection is closed."""
    async with raw_server(stalling(begun)) as server, open_sender() as sender:
        tasks = [asyncio.create_task(attempt(sender, server, read=read)) for _ in range(5)]
        await server.has_open(5)
        await until(lambda: len(server.requests) == 5)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )
        await server.has_open(0)


async def test_stream_closed_early_closes_its_connection() -> None:
    """The rest of a body that nobody wants is not read."""
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 100_000
    async with raw_server(stalling(long)) as server, open_sender() as sender:
        response = await sender.send(request(), server.instance, {}, 5.0, read=False)
        await response.aclose()
        await server.has_open(0)


@both_ways
async def test_one_connection_serves_all_sequential_calls(read: bool) -> None:
    """A hundred calls, one after the other, one connection."""
    async with raw_server(answering(OK)) as server, open_sender() as sender:
        for _ in range(100):
            await attempt(sender, server, read=read)
        assert (len(server.requests), server.accepted) == (100, 1)


async def test_fifty_at_once_are_fifty_connections_and_no_more() -> None:
    """No limit holds callers up, and what they opened is used again."""

    async def slowly(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await seen.read(reader)
            await asyncio.sleep(0.05)
            writer.write(OK)

    async with raw_server(slowly) as server, open_sender() as sender:
        for _ in range(2):
            await asyncio.gather(*(attempt(sender, server, read=True) for _ in range(50)))
        assert server.accepted == 50


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_connection_closed_while_idle_is_not_used(method: str) -> None:
    """The instance hangs up between two calls: the next one takes a new connection, and arrives once."""

    async def once(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await seen.read(reader)
        writer.write(OK)
        await writer.drain()

    async with raw_server(once) as server, open_sender() as sender:
        for count in range(1, 20):
            await attempt(sender, server, request(method), read=True)
            assert len(server.requests) == server.accepted == count


async def test_closing_the_sender_closes_its_connections() -> None:
    """Nothing is left open, and closing what was never used is fine."""
    async with raw_server(answering(OK)) as server:
        async with open_sender() as sender:
            await attempt(sender, server, read=True)
            await server.has_open(1)
        await server.has_open(0)
    await H11Sender().aclose()


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="this host has no ::1")
async def test_instance_with_an_ipv6_address_is_reached() -> None:
    """The address goes into the URL in brackets."""
    async with raw_server(answering(OK), "::1") as server, open_sender() as sender:
        assert (await attempt(sender, server, read=True)).content == b"ok"
        async with httpx.AsyncHTTPTransport() as plain:
            assert (await attempt(HttpxSender(plain), server, read=True)).content == b"ok"


async def _app(scope: Any, receive: Any, send: Any) -> None:
    asked = Request(scope, receive)
    if asked.url.path == "/slow":
        await asyncio.sleep(5)
    body = {"host": asked.headers["host"], "body": (await asked.body()).decode(), "extra": asked.headers.get("x-extra")}
    response: Response = JSONResponse(body)
    await response(scope, receive, send)


async def test_httpx_sender_sends_to_an_app() -> None:
    """Through httpx.ASGITransport: Host is the service, the extra headers are there, the answer names our request."""
    sender, instance = HttpxSender(httpx.ASGITransport(_app)), Instance("cards-1", "cards", "10.0.0.1", 8000)
    for read in (True, False):
        sent = request("POST", content=b"one")
        response = await sender.send(sent, instance, {"X-Extra": "3"}, 5.0, read=read)
        assert response.is_closed is read
        await response.aread()
        assert response.json() == {"host": "cards", "body": "one", "extra": "3"}
        assert response.request is sent
    with pytest.raises(httpx.ReadTimeout):
        await sender.send(request(path="/slow"), instance, {}, 0.1, read=True)
    await sender.aclose()


@both_ways
async def test_httpx_sender_passes_errors_on(read: bool) -> None:
    """What the transport raises is what the attempt raises; and it never reads ahead of a stream."""
    instance = Instance("cards-1", "cards", "127.0.0.1", free_ports(1)[0])
    async with httpx.AsyncHTTPTransport() as plain:
        with pytest.raises(httpx.ConnectError):
            await attempt(HttpxSender(plain), instance, read=read)
        async with raw_server(breaking_off(BROKEN["half a body"])) as server:
            with pytest.raises(httpx.RemoteProtocolError):
                await attempt(HttpxSender(plain), server, read=read)


BIG = bytes(30_000_000)
"""More than the sockets of both sides hold."""


async def closed(sender: H11Sender) -> None:
    """Returns when the sender has no connection any more."""
    pool = sender._connections
    assert pool
    await until(lambda: not pool._all)


async def pieces(*given: bytes | BaseException) -> AsyncIterator[bytes]:
    """An upload's source that yields this, and raises what is an error."""
    for piece in given:
        await asyncio.sleep(0)
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def big(streamed: bool) -> Any:
    return pieces(*(BIG[:100_000] for _ in range(300))) if streamed else BIG


async def reads_nothing_more(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads a request's head and then neither reads nor answers, until the client leaves."""
    await seen.read(reader)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(30)


both_bodies = pytest.mark.parametrize("streamed", [False, True], ids=["bytes", "streamed body"])


@both_bodies
@pytest.mark.parametrize(("read", "write", "limit"), [(True, 0.2, 5.0), (True, 5.0, 0.2), (False, 0.2, 5.0)])
async def test_instance_that_stops_reading_is_a_write_time_out(
    read: bool, write: float, limit: float, streamed: bool
) -> None:
    """Whichever limit ends it, and however the body comes: WriteTimeout, and the connection is closed."""
    async with raw_server(reads_nothing_more) as server, open_sender() as sender, asyncio.timeout(3):
        with pytest.raises(httpx.WriteTimeout):
            await attempt(sender, server, request("POST", write=write, content=big(streamed)), limit, read=read)
        await closed(sender)


@both_bodies
async def test_write_time_out_holds_for_every_client(streamed: bool) -> None:
    """An httpx client over the transport, and the facade: WriteTimeout, and the request went out once."""
    async with raw_server(reads_nothing_more) as server, asyncio.timeout(5):
        resolver = StaticResolver({"cards": [server.instance]})
        limits = httpx.Timeout(5, write=0.2)
        async with httpx.AsyncClient(transport=DiscoveryTransport(resolver), timeout=limits) as http:
            with pytest.raises(httpx.WriteTimeout):
                await http.post("http://cards/x", content=big(streamed))
        async with ServiceDiscoveryClient(resolver, timeout=0.3) as client:
            with pytest.raises(httpx.WriteTimeout):
                await client.post("cards", "/x", content=big(streamed))
        assert len(server.requests) == 2


@both_bodies
@both_ways
async def test_slow_reader_is_no_write_time_out(read: bool, streamed: bool) -> None:
    """A body that takes longer than the write time-out, of which always something is taken, arrives."""
    taken = 0

    async def slowly(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await seen.read(reader)
        while taken < len(BIG):
            await asyncio.sleep(0.03 if taken < 25_000_000 else 0)
            for _ in range(10):
                if taken < len(BIG):
                    taken += len(await reader.read(1_000_000))
        writer.write(OK)
        await reader.read()

    async with raw_server(slowly) as server, open_sender() as sender:
        started = time.monotonic()
        sent = request("POST", write=0.3, content=big(streamed))
        assert (await attempt(sender, server, sent, None, read=read)).content == b"ok"
        assert time.monotonic() - started > 0.3


@pytest.mark.parametrize("keeps", [True, False], ids=["kept open", "closed"])
@both_bodies
@both_ways
async def test_answer_before_the_end_of_the_request_counts(read: bool, streamed: bool, keeps: bool) -> None:
    """413 to a head whose body nobody reads: it is the answer, the rest is not sent, the connection is closed."""
    early = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\n\r\nlarge"

    async def refuse(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)
        await seen.read(reader)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(early)
        await writer.drain()
        if keeps:
            await asyncio.sleep(30)

    async with raw_server(refuse) as server, open_sender() as sender, asyncio.timeout(10):
        for number in range(1, 11):
            answered = await attempt(sender, server, request("POST", content=big(streamed)), read=read)
            assert (answered.status_code, answered.content) == (413, b"large")
            assert server.accepted == number
            await closed(sender)


async def drain_and_answer(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers what it takes for whole requests of three bytes, and keeps the rest it got."""
    while True:
        await seen.read(reader)
        seen.requests.append(await reader.readexactly(3))
        writer.write(OK)


@pytest.mark.parametrize("body", [(b"ab",), (b"ab", b"cd"), ()], ids=["shorter", "longer", "nothing"])
@both_ways
async def test_stream_must_fit_its_length(body: tuple[bytes, ...], read: bool) -> None:
    """A stream that is not as long as its Content-Length says: the caller's error, on a connection closed at once."""
    async with raw_server(drain_and_answer) as server, open_sender() as sender:
        sent = request("POST", content=pieces(*body), headers={"Content-Length": "3"})
        with pytest.raises(httpx.LocalProtocolError) as raised:
            await attempt(sender, server, sent, read=read)
        assert judge(raised.value) == Verdict(Failure.FINAL, Blame.CALLER)
        await closed(sender)
        sent = request("POST", content=pieces(b"a", b"bc"), headers={"Content-Length": "3"})
        assert (await attempt(sender, server, sent, read=read)).content == b"ok"


@pytest.mark.parametrize(
    "error", [RuntimeError("mine"), TimeoutError("mine"), OSError("mine"), asyncio.CancelledError("mine")]
)
@both_ways
async def test_what_the_source_raises_is_what_the_caller_sees(error: BaseException, read: bool) -> None:
    """Whatever it is, and even if it looks like an error of ours: as it is, at once, with the connection closed."""
    async with raw_server(stalling(b"")) as server, open_sender() as sender:
        call = attempt(sender, server, request("POST", content=pieces(b"a", error)), read=read)
        with pytest.raises(type(error), match="mine"):
            await asyncio.wait_for(call, 2)
        await closed(sender)


async def test_switch_of_protocols_says_what_to_do() -> None:
    """101 to a caller who asked for it: what this client can't; 101 unasked: a broken answer."""
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    async with raw_server(stalling(switch)) as server, open_sender() as sender:
        asked = request(headers={"Upgrade": "websocket", "Connection": "upgrade"})
        with pytest.raises(httpx.UnsupportedProtocol, match="WebSocket client"):
            await attempt(sender, server, asked, read=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await attempt(sender, server, read=True)
        await closed(sender)
    async with raw_server(answering(OK)) as server, open_sender() as sender:
        for _ in range(2):  # refused: an answer like any other
            assert (await attempt(sender, server, asked, read=True)).content == b"ok"


HINTS = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@both_ways
async def test_interim_answers_are_passed_over(method: str, read: bool) -> None:
    """100 and 103 are not the answer; the connection is kept."""
    final = OK[:-2] if method == "HEAD" else OK
    async with raw_server(answering(HINTS + final)) as server, open_sender() as sender:
        for _ in range(3):
            answered = await attempt(sender, server, request(method), read=read)
            assert (answered.status_code, "Link" in answered.headers) == (200, False)
        assert server.accepted == 1


@both_ways
async def test_answer_to_head_has_no_body(read: bool) -> None:
    """Its Content-Length says what GET would give: nothing is waited for, and the connection is kept."""
    sent = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"
    async with raw_server(answering(sent)) as server, open_sender() as sender:
        for _ in range(3):
            answered = await attempt(sender, server, request("HEAD"), read=read)
            assert (answered.headers["Content-Length"], answered.content) == ("99", b"")
        assert server.accepted == 1


SURPLUS = {
    "204": ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\nsurplus"),
    "304": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\nsurplus"),
    "HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nsurplus"),
    "200": ("DELETE", OK + b"surplus"),
    "chunked": ("DELETE", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nsurplus"),
}


@pytest.mark.parametrize(("method", "sent"), SURPLUS.values(), ids=SURPLUS)
async def test_surplus_bytes_close_the_connection_and_nothing_else(method: str, sent: bytes) -> None:
    """The answer counts, arrives once, blames nobody; what came after it is never another call's answer."""
    async with raw_server(answering(sent)) as server:
        resolver = StaticResolver({"cards": [server.instance]})
        async with ServiceDiscoveryClient(resolver) as client:
            for number in range(1, 4):
                answered = await client.http.request(method, "http://cards/x")
                assert answered.status_code == int(sent[9:12])
                assert b"surplus" not in answered.content
                assert len(server.requests) == server.accepted == number
                await server.has_open(0)
            assert client.explain("cards").endpoints[0].failures == 0


OLD = {
    "a length": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.0"),
    "kept, it says": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.0"),
    "until closed": (b"HTTP/1.0 200 OK\r\n\r\nok", "HTTP/1.0"),
    "until closed, 1.1": (b"HTTP/1.1 200 OK\r\n\r\nok", "HTTP/1.1"),
    "1.1 with close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1"),
}


@pytest.mark.parametrize(("sent", "version"), OLD.values(), ids=OLD)
@both_ways
async def test_connection_that_is_not_to_be_kept_is_closed(sent: bytes, version: str, read: bool) -> None:
    """Answers of HTTP/1.0, or to the end of the connection: read whole, and the next call takes another connection."""
    async with raw_server(breaking_off(sent)) as server, open_sender() as sender:
        for number in range(1, 4):
            answered = await attempt(sender, server, read=read)
            assert (answered.content, answered.http_version) == (b"ok", version)
            assert server.accepted == number
            await closed(sender)


@both_ways
async def test_trailers_are_read_and_ignored(read: bool) -> None:
    """They end the answer, are none of its headers, and the connection is kept."""
    sent = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\nX-End: 2\r\n\r\n"
    async with raw_server(answering(sent)) as server, open_sender() as sender:
        for _ in range(3):
            answered = await attempt(sender, server, read=read)
            assert (answered.content, answered.headers.raw) == (b"ok", [(b"Transfer-Encoding", b"chunked")])
        assert server.accepted == 1


def headed(lines: int, size: int) -> bytes:
    return answer(b"ok", *(f"X-{number}: {'x' * size}" for number in range(lines - 1)))


@pytest.mark.parametrize(
    ("sent", "options", "option"),
    [
        (headed(1, 0), ConnectionOptions(), None),
        (headed(1_000, 40), ConnectionOptions(), None),
        (headed(2, 65_000), ConnectionOptions(), None),
        (headed(1_001, 1), ConnectionOptions(), "max_headers=1000"),
        (headed(2, 70_000), ConnectionOptions(), "max_header_size=65536"),
        (headed(900, 100), ConnectionOptions(), "max_header_size=65536"),
        (headed(2, 300_000), ConnectionOptions(max_header_size=400_000), None),
        (headed(5_000, 1), ConnectionOptions(max_headers=5_000), None),
        (headed(11, 1), ConnectionOptions(max_headers=10), "max_headers=10"),
        (headed(3, 100), ConnectionOptions(max_header_size=200), "max_header_size=200"),
    ],
)
@both_ways
async def test_head_of_an_answer_is_limited(
    sent: bytes, options: ConnectionOptions, option: str | None, read: bool
) -> None:
    """64 kB and 1,000 lines, or as the options say: over that an error that names the option and blames nobody."""
    async with raw_server(answering(sent)) as server, open_sender(options) as sender:
        if option is None:
            assert (await attempt(sender, server, read=read)).content == b"ok"
            return
        with pytest.raises(ResponseTooLargeError, match=option) as raised:
            await attempt(sender, server, read=read)
        assert judge(raised.value) == Verdict(Failure.FINAL, Blame.NOBODY)
        assert len(server.requests) == 1


async def test_answer_that_is_read_whole_is_limited_in_size() -> None:
    """The facade refuses more than the option says, once, blaming nobody; a stream may be as long as it likes."""
    options = ConnectionOptions(max_response_size=1_000)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1_001 + b"\r\n0\r\n\r\n"
    for sent, fits in ((answer(b"x" * 1_000), True), (answer(b"x" * 1_001), False), (chunked, False)):
        async with raw_server(answering(sent)) as server:
            resolver = StaticResolver({"cards": [server.instance]})
            async with ServiceDiscoveryClient(resolver, connections=options) as client:
                if fits:
                    assert len((await client.get("cards", "/x")).content) == 1_000
                    continue
                with pytest.raises(ResponseTooLargeError, match="max_response_size=1000"):
                    await client.get("cards", "/x")
                assert len(server.requests) == 1
                assert client.explain("cards").endpoints[0].failures == 0
            async with (
                httpx.AsyncClient(transport=DiscoveryTransport(resolver, connections=options)) as http,
                http.stream("GET", "http://cards/x") as streamed,
            ):
                assert len(await streamed.aread()) == 1_001


@both_ways
async def test_time_out_of_an_inner_transports_own_is_passed_on(read: bool) -> None:
    """Only the attempt's own limit becomes a ReadTimeout."""

    class Impatient(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise TimeoutError("the transport's own")

    instance = Instance("cards-1", "cards", "127.0.0.1", 1)
    with pytest.raises(TimeoutError, match="the transport's own"):
        await attempt(HttpxSender(Impatient()), instance, read=read)


@pytest.mark.parametrize("value", ["Käse".encode(), "Käse".encode("latin-1"), b"\x80\xff", b"a\tb", b""])
@pytest.mark.parametrize("body", [None, b"ab"])
async def test_header_bytes_are_sent_as_they_are(value: bytes, body: bytes | None) -> None:
    """UTF-8, latin-1 or neither: the server gets those bytes."""
    async with raw_server(stalling(OK)) as server, open_sender() as sender:
        await attempt(sender, server, request("POST", headers=[(b"X-Name", value)], content=body), read=True)
        assert b"\r\nX-Name: %s\r\n" % value in server.requests[0]


class _InThreads(socketserver.BaseRequestHandler):
    """Answers after a moment, also while the test's event loop stands still."""

    def handle(self) -> None:
        while self.request.recv(65_536):
            time.sleep(0.1)
            self.request.sendall(OK)


async def test_time_out_beside_the_answer_is_not_the_next_calls() -> None:
    """The answer and the end of the time for it in the same turn of the event loop: the answer counts, and is all."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _InThreads) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        instance = Instance("cards-1", "cards", "127.0.0.1", server.server_address[1])
        async with open_sender() as sender:
            await attempt(sender, instance, read=True)
            call = asyncio.create_task(attempt(sender, instance, request(read=0.2), read=False))
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(time.sleep, 0.3)
            assert (await call).content == b"ok"
            assert (await attempt(sender, instance, request("POST", read=0.2), read=False)).content == b"ok"
        server.shutdown()


async def test_failed_unpacking_leaves_the_connection_to_the_next_call() -> None:
    """A connection is given back once: while one body is unpacked and refused, another call has it for its own."""
    packed = gzip.compress(bytes(20_000_000))[:-1]

    async def handler(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            if b"/packed" in await seen.read(reader):
                writer.write(answer(packed, "Content-Encoding: gzip"))
            else:
                await asyncio.sleep(0.2)  # longer than the unpacking
                writer.write(OK)

    async with raw_server(handler) as server, open_sender(ConnectionOptions(max_connections=1)) as sender:
        first = asyncio.create_task(attempt(sender, server, request(path="/packed"), read=True))
        await until(lambda: len(server.requests) == 1)
        assert (await attempt(sender, server, request("POST", "/other"), 2.0, read=True)).content == b"ok"
        with pytest.raises(httpx.DecodingError):
            await first
        assert server.accepted == 1


async def test_server_that_closes_or_speaks_first_is_a_broken_one() -> None:
    """What a client meets that expects an answer: an error at once, not silence until a time-out."""
    for greeting in (b"", b"220 mail ready\r\n"):

        async def greet(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(greeting)  # noqa: B023

        async with raw_server(greet) as server, open_sender() as sender, asyncio.timeout(3):
            for _ in range(5):
                with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                    await attempt(sender, server, read=True)
            await closed(sender)
