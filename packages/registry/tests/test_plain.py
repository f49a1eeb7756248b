"""The plain shapes are h11's own: what is sent and read without it, it would send and read in the same way."""

from collections import Counter
from contextlib import suppress
from time import process_time

import h11
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.discovery.plain import Answer, plain_answer, plain_request

ROUNDS = 3_000

Pairs = list[tuple[bytes, bytes]]

NAMES = [b"X-A", b"x-a", b"Cookie", b"Accept", b"Expect", b"Connection"]
ODD_NAMES = [b"Content-Length", b"Host", b"host", b"HOST", b"content-length", b"Transfer-Encoding", b"Upgrade"]
ODD_NAMES += [b"", b"X A", b"X:A", b"X\xe4", b"X-A\r\n", b" X"]
VALUES = [b"", b"a", b"0", b"1", b"2", b"a b", b"a\tb", b"keep-alive", b"100-continue", b"\xc3\xa4", b"\xe4"]
ODD_VALUES = [b"2, 2", b"02", b"+2", b"-1", b"2 ", b" a", b"a ", b"\t", b"9" * 21, b"chunked", b"gzip", b"Keep-Alive"]
ODD_VALUES += [b"close", b"websocket", b"a\r\nX-B: b", b"a\nb", b"a\0b", b"\x01", b"\x7f", b"a\x0b"]
OWN = ["", "a", "a b", " a", "a ", "\t", "a\tb", "a\r\nX-B: b", "a\0b", "a\x7f", "k=v,k2=%20;p"]
TARGETS = st.sampled_from(["/", "/x", "/a%2Fb?q=%20x&q", "/?", "/~!*'()"]) | st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x2FF, exclude_categories=["Cc"]), max_size=6
).map("/".__add__)
METHODS = st.sampled_from([*["GET", "POST", "PUT", "PATCH", "DELETE"] * 3, "HEAD", "OPTIONS", "G T", "get", "", "GÉT"])
BODIES = st.sampled_from([b"", b"a", b"ab", b"GET / HTTP/1.1\r\n\r\n"])


def by_h11(request: httpx.Request, extra: dict[str, str]) -> tuple[bytes, bool]:
    """The bytes that h11 makes of the request, and whether another may follow. Raises: h11.LocalProtocolError."""
    connection = h11.Connection(h11.CLIENT)
    headers = [*request.headers.raw, *((name.encode("ascii"), value.encode("ascii")) for name, value in extra.items())]
    head = h11.Request(method=request.method.encode("ascii"), target=request.url.raw_path, headers=headers)
    sent = connection.send(head) or b""
    if body := request.read():
        sent += connection.send(h11.Data(data=body)) or b""
    sent += connection.send(h11.EndOfMessage()) or b""
    return sent, connection.our_state is h11.DONE


@pytest.mark.real
def test_request_is_what_h11_sends() -> None:
    """Whatever is sent without h11, h11 sends byte for byte; and what it refuses is never sent."""
    count: Counter[str] = Counter()

    @settings(max_examples=ROUNDS, deadline=None, database=None)
    @given(
        METHODS,
        TARGETS,
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=4),
        st.lists(st.tuples(st.sampled_from(NAMES + ODD_NAMES), st.sampled_from(VALUES + ODD_VALUES)), max_size=1),
        st.integers(0, 6),
        BODIES,
        st.sampled_from([{}, {"X-Request-Deadline": "1.5"}, *({"X-Own": value} for value in OWN), {"X Own": "a"}]),
    )
    def compare(
        method: str, path: str, given: Pairs, odd: Pairs, shape: int, body: bytes, extra: dict[str, str]
    ) -> None:
        headers = odd + given if shape % 2 else given + odd
        if shape:  # most heads are nearly right, or nothing would ever be sent
            headers.insert(0, (b"Host", b"cards"))
        if shape > 2:
            headers.append((b"Content-Length", b"%d" % len(body)))
        request = httpx.Request(method, f"http://cards{path}", headers=headers, stream=httpx.ByteStream(body))
        request.headers = httpx.Headers(headers)  # without what httpx adds
        theirs = ours = None
        with suppress(h11.LocalProtocolError, UnicodeError):
            theirs = by_h11(request, extra)
        with suppress(h11.LocalProtocolError, UnicodeError):
            ours = plain_request(request, extra)
        if ours is not None:
            assert (ours, True) == theirs
        count["sent plainly" if ours is not None else "left to h11" if theirs is not None else "refused"] += 1

    compare()
    print(f"requests: {dict(count)}")  # noqa: T201
    assert min(count[each] for each in ("sent plainly", "left to h11", "refused")) > ROUNDS / 20, count


STATUS = [b"HTTP/1.1 200 OK", b"HTTP/1.1 404 Not  Found", b"HTTP/1.1 200 ", b"HTTP/1.1 503 a b", b"HTTP/1.1 299 x"]
ODD_STATUS = [b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 N", b"HTTP/1.1 100 Continue"]
ODD_STATUS += [b"HTTP/1.1 200", b"HTTP/1.1 2000 OK", b"HTTP/1.1  200 OK", b"http/1.1 200 OK", b"HTTP/1.1 200 \xc3\xa4"]
ODD_STATUS += [b"HTTP/1.1 200 a\tb", b"HTTP/1.1 101 Switching Protocols", b"", b"HTTP/2 200 OK", b"HTTP/1.1 200 \x7f"]
LINES = [
    b"Date: Fri, 27 Nov 2026 11:11:11 GMT",
    b"server:uvicorn",
    b"X-A:",
    b"X-A:  ",
    b"x-a: \t b  c\t ",
    b"Set-Cookie: a",
]
LINES += [b"Keep-Alive: timeout=5", b"X: a:b"]
ODD_LINES = [b"Connection: close", b"Connection: keep-alive", b"Transfer-Encoding: chunked", b"Upgrade: h2c"]
ODD_LINES += [b" folded", b"X A: b", b"X\xe4: b", b"X-A : b", b": b", b"X-A", b"X-A: \xe4", b"X-A: \0", b"X-A: a\rb"]
ODD_LINES += [b"X-A: \x0b", b"X-A: \x7f", b"Content-Length: 2", b"Content-Length: 3", b"content-length: 2, 2", b""]
LENGTHS = [b"%d", b"0%d", b"%d ", b"\t%d", b" 000000000000000000%d", b" 00000000000000000000%d", b"+%d", b"%d.", b"1%d"]
LENGTHS += [b"0" * 5_000 + b"%d", b"0x%d", b"%d\x0b", b"\xb2%d"]


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Heads and bodies near to HTTP: mostly right, with a few faults, cuts and surplus bytes."""
    odd = draw(st.integers(0, 3)) == 0
    lines = draw(st.lists(st.sampled_from(LINES + ODD_LINES if odd else LINES), max_size=4))
    body = draw(st.sampled_from([b"", b"ok", b"{}\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]))
    length = draw(st.sampled_from(LENGTHS)) if draw(st.integers(0, 3)) == 0 else LENGTHS[0]
    name = draw(st.sampled_from([b"Content-Length: ", b"content-length:"]))
    if draw(st.integers(0, 9)):
        lines.insert(draw(st.integers(0, len(lines))), name + length % len(body))
    status = draw(st.sampled_from(STATUS + ODD_STATUS if odd else STATUS))
    end = b"\n" if draw(st.integers(0, 19)) == 0 else b"\r\n"
    data = end.join([status, *lines, b"", b""]) + body
    match draw(st.integers(0, 9)):
        case 0:
            data = data[: len(data) - min(draw(st.integers(1, 40)), len(body) or 40)]
        case 1:
            data += draw(st.sampled_from([b"x", b"\r\n", b"HTTP/1.1 200 OK\r\n"]))
        case 2:
            at = draw(st.integers(0, len(data) - 1))
            data = data[:at] + draw(st.binary(max_size=2)) + data[at + draw(st.integers(0, 2)) :]
    return data


def read_by_h11(received: bytes) -> tuple[Answer, bool] | None:
    """The answer as h11 reads it and whether the connection may be kept; None: it is not whole, or none at all."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "cards")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(received)
    head, body = None, b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return None
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            kept = connection.their_state is h11.DONE and not connection.trailing_data[0]
            read = Answer(head.status_code, head.reason, head.headers.raw_items(), head.http_version, body)
            return read, kept
        elif not isinstance(event, h11.InformationalResponse):
            return None


@pytest.mark.real
def test_answer_is_what_h11_reads() -> None:
    """Whatever is read without h11, h11 reads the same and would keep the connection; what may become one can."""
    count: Counter[str] = Counter()

    @settings(max_examples=ROUNDS, deadline=None, database=None)
    @given(answers())
    def compare(received: bytes) -> None:
        ours, theirs = plain_answer(received), read_by_h11(received)
        if isinstance(ours, Answer):
            assert theirs == (ours, True)
        elif ours:
            longer = received
            while plain_answer(longer) is True:
                assert len(longer) < len(received) + 70_000
                longer += b"x"
            assert (plain_answer(longer), True) == read_by_h11(longer)
            assert theirs is None
        count["read plainly" if isinstance(ours, Answer) else "may become one" if ours else "left to h11"] += 1
        count["whole to h11"] += theirs is not None

    compare()
    print(f"answers: {dict(count)}")  # noqa: T201
    assert min(count[each] for each in ("read plainly", "left to h11")) > ROUNDS / 10, count
    assert count["may become one"] > ROUNDS / 100, count


@pytest.mark.parametrize("digits", [20, 21, 5_000])
def test_length_has_no_more_digits_than_h11_takes(digits: int) -> None:
    """A number that is too long to be one is no length here either, and no error of Python's."""
    received = b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\nok" % b"2".zfill(digits)
    assert isinstance(plain_answer(received), Answer) is (digits == 20)
    assert (read_by_h11(received) is not None) is (digits == 20)


def test_head_is_looked_through_once() -> None:
    """A line of blanks without end costs no more time than its bytes: the event loop is not held up."""
    started = process_time()
    assert plain_answer(b"HTTP/1.1 200 OK\r\nX-A:" + b" " * 100_000) is False
    assert process_time() - started < 0.5
