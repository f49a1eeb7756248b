"""What an answer unpacks to is what httpx makes of it, within limits of memory and time that httpx does not know."""

import asyncio
import gzip
import importlib
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packages.registry.tests.raw_server import answering, attempt, open_sender, raw_server
from registry import ServiceDiscoveryClient, StaticResolver
from registry.discovery.decoding import unpacked
from registry.discovery.options import ConnectionOptions
from registry.errors import ResponseTooLargeError
from registry.model import Instance

TEXT = b"cards " * 50_000
MEGABYTE = 1_048_576

Pack = Callable[[bytes], bytes]


def deflate_raw(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, Pack] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "raw deflate": deflate_raw,
    "identity": bytes,
}


def _add_foreign(coding: str, module: str) -> None:
    """Codings that httpx knows where their library is installed: no dependency of ours."""
    try:
        PACKERS[coding] = importlib.import_module(module).compress
    except ImportError:
        return


_add_foreign("br", "brotli")
_add_foreign("zstd", "zstandard")


def response(codings: str) -> httpx.Response:
    return httpx.Response(200, headers={"Content-Encoding": codings})


def by_httpx(codings: str, packed: bytes) -> bytes:
    return httpx.Response(200, headers={"Content-Encoding": codings}, content=packed).content


CODINGS = ["gzip", "deflate", "raw deflate", "identity", "gzip, gzip", "deflate, gzip", "gzip, identity, raw deflate"]
CODINGS += ["GZip", "no-such", "no-such, gzip", "", " , gzip ,", "gzip, gzip, gzip, gzip"]
CODINGS += [each for each in PACKERS if each not in CODINGS]


def packed_as(codings: str, data: bytes) -> tuple[str, bytes]:
    """The header's value, and the data packed in that order."""
    for coding in codings.split(","):
        data = PACKERS.get(coding.strip().lower(), bytes)(data)
    return codings.replace("raw ", ""), data


@pytest.mark.parametrize("content", [b"", b"x", TEXT], ids=["empty", "byte", "text"])
@pytest.mark.parametrize("codings", CODINGS)
async def test_content_is_what_httpx_unpacks(codings: str, content: bytes) -> None:
    """Every coding, in any case, alone and on top of others; what is unknown stays as it is."""
    header, packed = packed_as(codings, content)
    assert await unpacked(response(header), packed, MEGABYTE) == by_httpx(header, packed) == content


@pytest.mark.parametrize(
    "rest", [b"\0", b"x" * 100_000, gzip.compress(b"another member")], ids=["zero", "long", "member"]
)
async def test_what_follows_the_end_is_nothing(rest: bytes) -> None:
    """Like httpx, which knows one member only."""
    packed = gzip.compress(TEXT) + rest
    assert await unpacked(response("gzip"), packed, MEGABYTE) == by_httpx("gzip", packed) == TEXT


@pytest.mark.real
def test_what_is_unpacked_is_never_other_than_httpx_says() -> None:
    """Damaged at any place: refused where httpx refuses, cut where httpx takes half for all, otherwise the same."""
    count: Counter[str] = Counter()

    @settings(max_examples=2_000, deadline=None, database=None)
    @given(
        st.sampled_from(["gzip", "deflate", "raw deflate", "gzip, gzip", "deflate, gzip"]),
        st.binary(max_size=300),
        st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=2), st.integers(0, 2)), max_size=2),
        st.floats(0, 1),
        st.booleans(),
    )
    @example("gzip", b"abc", [], 0.999, True)
    def compare(
        codings: str, content: bytes, damages: list[tuple[float, bytes, int]], end: float, is_cut: bool
    ) -> None:
        header, packed = packed_as(codings, content)
        for place, inserted, removed in damages:
            at = int(place * len(packed))
            packed = packed[:at] + inserted + packed[at + removed :]
        if is_cut:
            packed = packed[: int(end * len(packed))]
        try:
            theirs = by_httpx(header, packed)
        except httpx.DecodingError:
            theirs = None
        ours: bytes | None
        try:
            ours = asyncio.run(unpacked(response(header), packed, MEGABYTE))
        except httpx.DecodingError as error:
            ours, cut = None, "cut off" in str(error)
            count["refused" if theirs is None else "cut"] += 1
        else:
            cut = False
            count["the same"] += 1
        assert cut or ours == theirs

    compare()
    print(f"packed bodies: {dict(count)}")  # noqa: T201
    assert min(count[each] for each in ("refused", "cut", "the same")) > 50, count


async def test_more_than_four_layers_are_refused() -> None:
    """Each layer multiplies: five of them would let some bytes stand for any number."""
    with pytest.raises(httpx.DecodingError, match="5 times"):
        await unpacked(response("gzip, gzip, gzip, gzip, gzip"), b"x", MEGABYTE)


def bomb(before: bytes = b"", megabytes: int = 4_096) -> bytes:
    """A gzip without end of what is given and that many zeros: a block that refers to none before, over and over."""
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    head = packer.compress(before) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(16 * MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (megabytes // 16)


BOMBS = {"gzip": bomb(megabytes=256), "gzip, gzip": gzip.compress(bomb()), "deflate, gzip": zlib.compress(bomb())}
BOMBS["deflate, gzip"] = gzip.compress(zlib.compress(bytes(64 * MEGABYTE)))
BOMBS |= {coding: PACKERS[coding](bytes(256 * MEGABYTE)) for coding in ("br", "zstd") if coding in PACKERS}


@pytest.mark.parametrize("codings", BOMBS)
async def test_bomb_is_refused_within_the_limits_memory(codings: str) -> None:
    """Some kilobytes that stand for gigabytes: an error that names the option, and no more memory than allowed."""
    tracemalloc.start()
    try:
        with pytest.raises(ResponseTooLargeError, match="max_response_size=1048576"):
            await unpacked(response(codings), BOMBS[codings], MEGABYTE)
        most = 40 if codings in {"br", "zstd"} else 2  # Their libraries know no limit for what they give at a time.
        assert tracemalloc.get_traced_memory()[1] < most * MEGABYTE
    finally:
        tracemalloc.stop()


async def longest_pause(work: Callable[[], Awaitable[Any]]) -> float:
    """Seconds for which the event loop did not turn, at most, while this was done."""
    pauses, last = [0.0], time.monotonic()

    async def tick() -> None:
        nonlocal last
        while True:
            await asyncio.sleep(0.001)
            pauses.append(time.monotonic() - last)
            last = time.monotonic()

    ticker = asyncio.create_task(tick())
    try:
        await work()
    finally:
        pauses.append(time.monotonic() - last)
        ticker.cancel()
    return max(pauses)


@pytest.mark.parametrize(
    ("codings", "packed"),
    [("gzip", bomb()), ("gzip, gzip", bomb(gzip.compress(b"short")))],
    ids=["one layer", "after the end of an inner one"],
)
async def test_long_unpacking_stops_with_the_time_limit(codings: str, packed: bytes) -> None:
    """Gigabytes that no size limit stops: the time limit does, and the event loop turns all the while."""
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n"
    options = ConnectionOptions(max_response_size=100_000 * MEGABYTE)
    async with (
        raw_server(answering(head % (codings.encode(), len(packed)) + packed)) as server,
        open_sender(options) as sender,
    ):

        async def late() -> None:
            with pytest.raises(httpx.ReadTimeout):
                await attempt(sender, server, limit=0.3, read=True)

        started = time.monotonic()
        assert await longest_pause(late) < 0.5
        assert time.monotonic() - started < 2


class _Doubling:
    """What httpx asks of a decoder: gives every byte a thousand times, and some more at the end."""

    def decode(self, data: bytes) -> Any:
        return self._given(data * 1_000)

    def flush(self) -> Any:
        return self._given(b"end")

    def _given(self, data: bytes) -> Any:
        return data if httpx.__name__ == "httpx" else iter([data])


async def test_decoders_without_a_limit_are_fed_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a coding that httpx knows by a library no piece is large, and the sum is limited."""
    monkeypatch.setitem(httpx._decoders.SUPPORTED_DECODERS, "br", _Doubling)
    assert await unpacked(response("br"), b"ab", MEGABYTE) == by_httpx("br", b"ab") == b"ab" * 1_000 + b"end"
    tracemalloc.start()
    try:
        with pytest.raises(ResponseTooLargeError):
            await unpacked(response("br"), bytes(MEGABYTE), MEGABYTE)
        assert tracemalloc.get_traced_memory()[1] < 3 * MEGABYTE
    finally:
        tracemalloc.stop()


def packed_answer(packed: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(packed), packed)


@pytest.mark.parametrize("packed", [gzip.compress(TEXT)[:-9], b"no gzip at all"], ids=["cut", "lying"])
async def test_broken_packing_is_a_broken_answer(packed: bytes) -> None:
    """A GET goes on to the next instance, a POST does not; it counts against the instance, the connection is good."""
    async with (
        raw_server(answering(packed_answer(packed))) as broken,
        raw_server(answering(packed_answer(gzip.compress(TEXT)))) as good,
    ):
        instances = [
            Instance(f"cards-{number}", "cards", "127.0.0.1", server.instance.port)
            for number, server in enumerate([broken, good])
        ]
        resolver = StaticResolver({"cards": instances})
        async with ServiceDiscoveryClient(resolver, policy="round_robin") as client:
            answers = [await client.get("cards", "/x") for _ in range(4)]
            assert [answer.content for answer in answers] == [TEXT] * 4
            assert broken.requests
            assert broken.accepted == 1
            assert {each.id: each.failures > 0 for each in client.explain("cards").endpoints} == {
                "cards-0": True,
                "cards-1": False,
            }
        async with ServiceDiscoveryClient(StaticResolver({"cards": instances[:1]})) as client:
            before = len(broken.requests)
            with pytest.raises(httpx.DecodingError):
                await client.post("cards", "/x")
            assert len(broken.requests) == before + 1
