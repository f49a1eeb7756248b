"""Whom an outcome speaks against: the table row by row, and that nothing of a caller's own making ejects anybody."""

import asyncio
import errno
import itertools
import re
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import ConnectionOptions, ResponseTooLargeError, ServiceDiscoveryClient, StaticResolver
from registry.discovery import blame
from registry.discovery.blame import Blame, Failure, judge
from registry.discovery.peers import NoCertificateError, PeerError, RejectedError
from tests.support.raw import OK, Handler, raw_servers

NOT_SENT, SENT, FINAL = Failure.NOT_SENT, Failure.SENT, Failure.FINAL
INSTANCE, CALLER, NOBODY = Blame.INSTANCE, Blame.CALLER, Blame.NOBODY


def caused(error: Exception, *causes: Exception) -> Exception:
    """The error as an inner transport raises it: wrapped once or several times."""
    chain = [error, *causes]
    for outer, inner in itertools.pairwise(chain):
        outer.__cause__ = inner
    return error


def alert(reason: str) -> ssl.SSLError:
    """As OpenSSL raises it."""
    error = ssl.SSLError(1, f"[SSL: {reason}]")
    error.reason = reason
    return error


OUTCOMES = [
    (httpx.ConnectError("why"), NOT_SENT, INSTANCE),
    (caused(httpx.ConnectError("why"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")), NOT_SENT, INSTANCE),
    (caused(httpx.ConnectError("why"), OSError(errno.EHOSTUNREACH, "no route")), NOT_SENT, INSTANCE),
    (caused(httpx.ConnectError("why"), socket.gaierror(socket.EAI_NONAME, "no such host")), NOT_SENT, INSTANCE),
    (caused(httpx.ConnectError("why"), socket.gaierror(socket.EAI_AGAIN, "try again")), NOT_SENT, CALLER),
    (caused(httpx.ConnectError("why"), OSError(errno.EMFILE, "too many")), NOT_SENT, CALLER),
    (caused(httpx.ConnectError("why"), OSError(), OSError(errno.EADDRNOTAVAIL, "no port")), NOT_SENT, CALLER),
    (caused(httpx.ConnectError("why"), ExceptionGroup("all", [OSError(errno.EMFILE, "")])), NOT_SENT, CALLER),
    (caused(httpx.ConnectError("why"), ssl.SSLError(1, "wrong version number")), NOT_SENT, NOBODY),
    (caused(httpx.ConnectError("why"), OSError(), ssl.SSLCertVerificationError(1, "who is that?")), NOT_SENT, NOBODY),
    (httpx.ConnectTimeout("why"), NOT_SENT, INSTANCE),
    (caused(httpx.ConnectTimeout("why"), ssl.SSLError("handshake")), NOT_SENT, NOBODY),
    (caused(httpx.ConnectError("why"), PeerError("another service")), NOT_SENT, INSTANCE),
    (caused(httpx.ConnectError("why"), NoCertificateError("not yet")), NOT_SENT, NOBODY),
    (caused(httpx.ConnectError("why"), RejectedError("unknown CA")), NOT_SENT, NOBODY),
    (httpx.PoolTimeout("why"), NOT_SENT, CALLER),
    (httpx.ReadError("why"), SENT, INSTANCE),
    (httpx.ReadTimeout("why"), SENT, INSTANCE),
    (httpx.WriteError("why"), SENT, INSTANCE),
    (httpx.WriteTimeout("why"), SENT, INSTANCE),
    (httpx.CloseError("why"), SENT, INSTANCE),
    (httpx.RemoteProtocolError("why"), SENT, INSTANCE),
    (httpx.DecodingError("why"), SENT, INSTANCE),
    (httpx.LocalProtocolError("why"), FINAL, CALLER),
    (httpx.UnsupportedProtocol("why"), FINAL, CALLER),
    (httpx.ProxyError("why"), FINAL, NOBODY),
    (httpx.TooManyRedirects("why"), FINAL, NOBODY),
    (ResponseTooLargeError("why", "max_headers", 1), FINAL, NOBODY),
    (RuntimeError("why"), FINAL, NOBODY),
    (TimeoutError(), FINAL, NOBODY),
]


@pytest.mark.parametrize(("error", "failure", "against"), OUTCOMES, ids=lambda value: repr(value)[:50])
def test_errors_are_judged(error: Exception, failure: Failure, against: Blame) -> None:
    """Only what comes before the connection is not sent; only what shows a fault of the instance speaks against it."""
    assert judge(error) == (failure, against)


TLS_OUTCOMES = [
    (PeerError("another service"), INSTANCE),
    (caused(PeerError("an unknown CA"), ssl.SSLCertVerificationError(1, "who is that?")), INSTANCE),
    (ssl.SSLError(1, "it broke off"), INSTANCE),
    (ssl.SSLCertVerificationError(1, "who is that?"), NOBODY),
    (NoCertificateError("not yet"), NOBODY),
    (RejectedError("unknown CA"), NOBODY),
    (caused(PeerError("it broke off"), alert("TLSV1_ALERT_UNKNOWN_CA")), NOBODY),
    (alert("SSLV3_ALERT_BAD_CERTIFICATE"), NOBODY),
    (alert("SSLV3_ALERT_CERTIFICATE_EXPIRED"), NOBODY),
    (alert("TLSV13_ALERT_CERTIFICATE_REQUIRED"), NOBODY),
    (alert("TLSV1_ALERT_INTERNAL_ERROR"), INSTANCE),
    (alert("WRONG_VERSION_NUMBER"), INSTANCE),
]


@pytest.mark.parametrize(("cause", "against"), TLS_OUTCOMES, ids=repr)
def test_handshakes_are_judged(cause: Exception, against: Blame) -> None:
    """Whoever proves to be another speaks against the instance; our own certificate, missing or refused, does not."""
    assert judge(caused(httpx.ConnectError("why"), cause), tls=True) == (NOT_SENT, against)


def test_every_transport_error_is_judged_by_this_test() -> None:
    """httpx has no transport error that the rows above forgot."""

    def leaves(kind: type[Exception]) -> set[type[Exception]]:
        below = {each for each in kind.__subclasses__() if each.__module__.partition(".")[0] == httpx.__name__}
        return set().union(*map(leaves, below)) if below else {kind}

    # httpx2 has one more, for an event stream that is read after the call.
    elsewhere = {getattr(httpx, "SSEError", None)}
    assert leaves(httpx.TransportError) - elsewhere <= {type(error) for error, *_ in OUTCOMES}


def test_unrelated_errors_are_no_causes() -> None:
    """A call made while another error is being handled is not judged by that one."""
    error = httpx.ConnectError("why")
    error.__context__ = ssl.SSLError(1, "somebody else's")
    assert judge(error) == (NOT_SENT, INSTANCE)


@pytest.mark.parametrize("status", [500, 501, 502, 503, 504, 599])
def test_server_errors_speak_against_the_instance(status: int) -> None:
    """Every 5xx is a failure of a request that was sent, and may have had an effect."""
    assert judge(httpx.Response(status)) == (SENT, INSTANCE)


@pytest.mark.parametrize("status", [200, 201, 204, 304, 302, 400, 404, 409, 422, 429, 499])
def test_other_answers_are_no_failures(status: int) -> None:
    """Anything below 500 is the answer: another instance would say the same."""
    assert judge(httpx.Response(status)) == (None, NOBODY)


def test_docstring_names_every_error() -> None:
    """The rule that readers see has a row for each kind of error that is judged, and no other kind."""
    named = set(re.findall(r"``(\w+(?:Error|Timeout|Protocol))``", blame.__doc__ or ""))
    judged = {type(error).__name__ for error, _, against in OUTCOMES}
    assert named == judged - {"CloseError", "ProxyError", "TooManyRedirects", "RuntimeError", "TimeoutError"}


# -- on real sockets ---------------------------------------------------------------------------------------------------


class UploadFailedError(Exception):
    """What an upload's source raises."""


async def healthy(request: bytes, writer: asyncio.StreamWriter) -> bool:
    """Does all it is asked: ``/slow`` takes 50 ms, ``/large`` is large, ``/404`` is the caller's fault."""
    path, answer = request.split()[1], OK
    if path == b"/slow":
        await asyncio.sleep(0.05)
    elif path == b"/large":
        answer = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9_000 + b"\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9_000
    elif path == b"/many":
        answer = b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 50 + b"Content-Length: 2\r\n\r\nok"
    elif path == b"/404":
        answer = OK.replace(b"200 OK", b"404 Not Found")
    elif path == b"/302":
        answer = OK.replace(b"200 OK\r\n", b"302 X\r\nLocation: https://elsewhere/\r\n")
    writer.write(answer)
    return True


@asynccontextmanager
async def client_of(*handlers: Handler, **options: Any) -> AsyncIterator[ServiceDiscoveryClient]:
    async with raw_servers(*handlers) as servers:
        resolver = StaticResolver({"cards": [server.instance for server in servers]})
        async with ServiceDiscoveryClient(resolver, **{"retry_delay": 0.0} | options) as client:
            yield client


async def failing_source(error: Exception) -> AsyncIterator[bytes]:
    yield b"half of it"
    raise error


Doing = Callable[[ServiceDiscoveryClient], Any]

MISTAKES: dict[str, Doing] = {
    "its upload fails": lambda client: client.post("cards", "/", content=failing_source(UploadFailedError())),
    "its upload fails like a transport": lambda client: client.put(
        "cards", "/", content=failing_source(httpx.ReadError("upstream"))
    ),
    "its upload times out": lambda client: client.put("cards", "/", content=failing_source(TimeoutError())),
    "too short a length": lambda client: client.post("cards", "/", json={}, headers={"Content-Length": "1"}),
    "a stream longer than it says": lambda client: client.post(
        "cards", "/", content=failing_source(UploadFailedError()), headers={"Content-Length": "3"}
    ),
    "a header that is none": lambda client: client.get("cards", "/", headers={"X-A": " x"}),
    "too short a time-out": lambda client: client.get("cards", "/slow", timeout=0.01),
    "too short a time-out of httpx": lambda client: client.get("cards", "/slow", timeout=httpx.Timeout(0.01)),
    "cancelled": lambda client: asyncio.wait_for(client.get("cards", "/slow"), 0.01),
    "a large head": lambda client: client.get("cards", "/large"),
    "many headers": lambda client: client.get("cards", "/many"),
    "not found": lambda client: client.get("cards", "/404"),
    "a redirect to nowhere": lambda client: client.get("cards", "/302"),
    "TLS asked of a plain port": lambda client: client.http.get("https://cards/", timeout=0.05),
    "a WebSocket": lambda client: client.get("cards", "/", headers={"Upgrade": "websocket", "Connection": "Upgrade"}),
    "all connections in use": lambda client: asyncio.gather(
        *(client.get("cards", "/slow", timeout=httpx.Timeout(1.0, pool=0.005)) for _ in range(20)),
        return_exceptions=True,
    ),
    "a stream left early": lambda client: leave_early(client),
}


async def leave_early(client: ServiceDiscoveryClient) -> None:
    async with client.http.stream("GET", "http://cards/large"):
        pass


async def make(client: ServiceDiscoveryClient, mistake: str) -> None:
    with suppress(Exception):
        await MISTAKES[mistake](client)


OPTIONS = ConnectionOptions(max_connections=4, max_header_size=4_096, max_headers=20)


@pytest.mark.real
@pytest.mark.parametrize("mistake", MISTAKES)
async def test_callers_mistake_ejects_nobody(mistake: str) -> None:
    """Made twenty times in a row, it costs the instances nothing: all are there for the next caller."""
    async with client_of(*[healthy] * 3, connections=OPTIONS) as client:
        for _ in range(3):
            await client.get("cards", "/")
        for _ in range(20):
            await make(client, mistake)
        states = client.explain("cards").endpoints
        assert [(each.ejected_for, each.failures, each.in_flight) for each in states] == [(0.0, 0, 0)] * 3
        assert (await client.get("cards", "/")).text == "ok"


async def test_own_errors_are_raised_as_they_are() -> None:
    """What the source of an upload raises is what the call raises, whatever its type, and it is raised at once."""
    async with client_of(healthy, healthy) as client:
        for error in (UploadFailedError("tab closed"), httpx.ReadError("upstream"), TimeoutError("late")):
            with pytest.raises(type(error)) as raised:
                await client.put("cards", "/", content=failing_source(error), idempotent=True)
            assert raised.value is error
            assert not hasattr(error, "__notes__")


played: Counter[str] = Counter()


@pytest.mark.real
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(sorted(MISTAKES)), min_size=5, max_size=30),
    st.integers(1, 4),
    st.booleans(),
)
def test_no_sequence_of_mistakes_ejects_anybody(row: list[str], instances: int, at_once: bool) -> None:
    """Whatever callers do wrong, in whatever order, one after the other or all at once: never an ejection."""

    async def play() -> None:
        async with client_of(*[healthy] * instances, connections=OPTIONS) as client:
            if at_once:
                await asyncio.gather(*(make(client, mistake) for mistake in row))
            else:
                for mistake in row:
                    await make(client, mistake)
            played.update(row)
            assert {each.ejected_for for each in client.explain("cards").endpoints} <= {0.0}
            assert (await client.get("cards", "/")).text == "ok"

    asyncio.run(play())


@pytest.mark.real
def test_mistakes_were_played(capsys: pytest.CaptureFixture[str]) -> None:
    """The test above made each mistake many times."""
    with capsys.disabled():
        print(f"\n{played.total()} mistakes of {len(played)} kinds, 0 ejections")  # noqa: T201
    assert set(played) == set(MISTAKES)


async def test_silence_longer_than_usual_is_a_failure() -> None:
    """A time-out of the caller's own counts once it is longer than answers take: instances that hang are found out."""

    async def hang(request: bytes, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(3600)
        return False

    async with client_of(healthy, hang, policy="round_robin") as client:
        for _ in range(4):
            await client.get("cards", "/", timeout=0.3)
        assert client.explain("cards").endpoints[1].failures >= 1
