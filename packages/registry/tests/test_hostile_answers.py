"""An instance that answers anything at all, beside a good one: what it costs callers, in attempts, memory and time."""

import asyncio
import gzip
import resource
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from registry import ConnectionOptions, ResponseTooLargeError, ServiceDiscoveryClient, StaticResolver
from registry.discovery.balancing import Candidates
from registry.discovery.endpoint import Endpoint
from tests.support.raw import OK, RawServer, raw_servers

OPTIONS = ConnectionOptions(max_response_size=2_000_000)
TIMEOUT = 0.5
HEAD = b"HTTP/1.1 200 OK\r\n"


def packed(coding: str, body: bytes) -> bytes:
    return HEAD + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s" % (coding.encode(), len(body), body)


BOMB = gzip.compress(bytes(100_000_000))

BROKEN = {
    "nothing": b"",
    "half a head": HEAD + b"Content-Le",
    "half a body": HEAD + b"Content-Length: 9\r\n\r\nhalf",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "zeros": bytes(5_000),
    "status 000": b"HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n",
    "status 099": b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n",
    "status 1000": b"HTTP/1.1 1000 X\r\nContent-Length: 0\r\n\r\n",
    "a status in letters": b"HTTP/1.1 abc X\r\nContent-Length: 0\r\n\r\n",
    "switching unasked": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nok",
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\n",
    "a length of letters": HEAD + b"Content-Length: ten\r\n\r\n",
    "a length without end": HEAD + b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n",
    "another transfer": HEAD + b"Transfer-Encoding: gzip\r\n\r\nok",
    "a chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nok\r\n0\r\n\r\n",
    "a chunk without end": HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nok",
    "a header without a name": HEAD + b": x\r\nContent-Length: 0\r\n\r\n",
    "a NUL in a header": HEAD + b"X-A: a\0b\r\nContent-Length: 0\r\n\r\n",
    "gzip that is none": packed("gzip", b"no gzip"),
    "gzip cut off": packed("gzip", gzip.compress(b"cards" * 99)[:-9]),
    "deflate that is none": packed("deflate", b"no deflate"),
    "gzip twice, once": packed("gzip, gzip", gzip.compress(b"cards")),
    "packed nine times": packed(", ".join(["gzip"] * 9), b"x"),
}
TOO_LARGE = {
    "a head without end": HEAD + b"X: " + b"x" * 100_000,
    "too many headers": HEAD + b"X: 1\r\n" * 2_000 + b"Content-Length: 0\r\n\r\n",
    "a body without end": HEAD + b"\r\n" + bytes(3_000_000),
    "too long a body": HEAD + b"Content-Length: 3000000\r\n\r\n" + bytes(3_000_000),
    "chunks without end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + bytes(65_536) + b"\r\n") * 40,
    "a bomb": packed("gzip", BOMB),
    "a bomb in a bomb": packed("gzip, gzip", gzip.compress(BOMB)),
    "a bomb of deflate": packed("deflate", zlib.compress(bytes(50_000_000))),
}
SILENT = {
    "silence": None,
    "a head that trickles": HEAD,
    "a body that trickles": HEAD + b"Content-Length: 1000\r\n\r\n",
}


def first_hostile(candidates: Candidates, now: float) -> Endpoint:
    """A policy that asks the hostile one whenever it may."""
    return max(candidates, key=lambda endpoint: endpoint.instance.id)


async def good(request: bytes, writer: asyncio.StreamWriter) -> bool:
    writer.write(OK)
    return True


@asynccontextmanager
async def beside_a_good_one(
    answer: bytes | None, *, trickle: bool = False, policy: Callable[[Candidates, float], Endpoint] | str = "p2c"
) -> AsyncIterator[tuple[ServiceDiscoveryClient, list[RawServer]]]:
    async def hostile(request: bytes, writer: asyncio.StreamWriter) -> bool:
        if answer is not None:
            writer.write(answer)
        while trickle and not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.01)
        if answer is None:
            await asyncio.sleep(3600)
        return False

    async with raw_servers(good, hostile) as servers:
        resolver = StaticResolver({"cards": [server.instance for server in servers]})
        options = {"timeout": TIMEOUT, "retry_delay": 0.0, "connections": OPTIONS, "policy": policy}
        async with ServiceDiscoveryClient(resolver, **options) as client:  # type: ignore[arg-type]
            yield client, servers


async def get(client: ServiceDiscoveryClient) -> str:
    """What came of a call, which must have been in time."""
    started = time.monotonic()
    try:
        outcome = (await client.get("cards", "/")).text
    except ResponseTooLargeError:
        outcome = "too large"
    assert time.monotonic() - started < 4 * TIMEOUT
    return outcome


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
async def test_broken_answer_costs_one_attempt(answer: bytes) -> None:
    """Every call succeeds with at most one attempt at the broken instance, which is soon not asked any more."""
    async with beside_a_good_one(answer, policy=first_hostile) as (client, (well, hostile)):
        for number in range(1, 41):
            assert await get(client) == "ok"
            assert len(well.requests) == number
        assert 1 <= hostile.begun <= 6
        assert client.explain("cards").endpoints[1].ejected_for > 0


@pytest.mark.parametrize("answer", TOO_LARGE.values(), ids=TOO_LARGE)
async def test_too_large_an_answer_is_its_own_calls_only(answer: bytes) -> None:
    """Its call gets a clear error, in time and within the memory that is allowed; the others are served."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with beside_a_good_one(answer) as (client, (well, hostile)):
        outcomes = Counter([await get(client) for _ in range(60)])
        assert set(outcomes) <= {"ok", "too large"}
        assert len(well.requests) == outcomes["ok"]
        assert hostile.begun == outcomes["too large"]
        assert outcomes["too large"] <= 20  # failing quickly attracts no calls
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"{grown:.0f} MB"


@pytest.mark.real
@pytest.mark.parametrize("answer", SILENT.values(), ids=SILENT)
async def test_silence_costs_one_time_out(answer: bytes | None) -> None:
    """An instance that says nothing, or never ends, holds a call for one time-out, and is then avoided."""
    async with beside_a_good_one(answer, trickle=answer is not None, policy=first_hostile) as (client, (_, hostile)):
        assert Counter([await get(client) for _ in range(30)]) == {"ok": 30}
        assert hostile.begun <= 8


tried: Counter[str] = Counter()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(lambda rest: HEAD + rest, st.binary(max_size=200)),
        st.builds(
            lambda answer, at, byte: answer[:at] + bytes([byte]) + answer[at + 1 :],
            st.sampled_from([value for value in BROKEN.values() if value]),
            st.integers(0, 60),
            st.integers(0, 255),
        ),
        st.builds(
            lambda at, byte: OK[:at] + bytes([byte]) + OK[at + 1 :], st.integers(0, len(OK) - 1), st.integers(0, 255)
        ),
    )
)
@example(OK)
def test_any_bytes_cost_one_attempt(answer: bytes) -> None:
    """Whatever an instance sends, each call has an answer, its own or the other's, after at most one attempt more."""

    async def play() -> None:
        async with beside_a_good_one(answer, policy=first_hostile) as (client, (well, hostile)):
            for number in range(1, 9):
                try:
                    await get(client)
                    tried["answered"] += 1
                except httpx.HTTPStatusError:  # so it was an answer after all
                    tried["answered with a status"] += 1
                except httpx.UnsupportedProtocol:
                    tried["switched protocols"] += 1
                assert len(well.requests) + hostile.begun <= number + 6
            assert {each.in_flight for each in client.explain("cards").endpoints} == {0}

    asyncio.run(play())
    tried["answers tried"] += 1


def test_any_bytes_were_many(capsys: pytest.CaptureFixture[str]) -> None:
    """The test above had its examples."""
    with capsys.disabled():
        print(f"\n{dict(tried)}")  # noqa: T201
    assert tried["answers tried"] >= 60
