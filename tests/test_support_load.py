"""The load generator that failover tests and benchmarks count with: nothing lost, nothing made up."""

import asyncio
import time

import httpx
import pytest

from tests.support.load import Load


async def test_counts_every_outcome_once() -> None:
    """Answers, bad statuses and exceptions are told apart, with who answered, under ids of their own."""
    ids: list[str] = []

    async def call(request_id: str) -> httpx.Response:
        ids.append(request_id)
        match len(ids) % 4:
            case 0:
                error = httpx.ReadError("cut")
                error.add_note("attempt 1 on b")
                raise error
            case 1:
                return httpx.Response(200, headers={"X-Service-Instance": "a"})
            case 2:
                return httpx.Response(200, json={"instance": "b"})
        return httpx.Response(503, text="no json")

    report = await Load(call, callers=3, calls=100).run()
    assert report.calls == 100
    assert len(set(ids)) == 100
    assert {outcome.id for outcome in report.outcomes} == set(ids)
    assert report.errors == {"HTTP 503": 25, "ReadError": 25}
    assert report.shares == {"a": 0.5, "b": 0.5}
    assert {outcome.message for outcome in report.failures} == {"", "cut; attempt 1 on b"}


async def test_callers_wait_for_their_answer_and_a_rate_does_not() -> None:
    """So many callers are so many calls at a time; at a rate calls begin when due, however many hang."""
    under_way = most = 0
    released = asyncio.Event()

    async def call(request_id: str) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await released.wait()
        under_way -= 1
        return httpx.Response(200)

    async with Load(call, callers=4) as load:
        await load.until(lambda: under_way == 4)
        released.set()
        await load.reached(50)
    assert (most, under_way) == (4, 0)

    released.clear()
    async with Load(call, rate=200) as load:
        await load.until(lambda: under_way >= 60)
        assert load.now >= 0.3
        assert load.calls == 0
        released.set()
    assert under_way == 0
    assert load.report.latency(1.0) >= 0.2


async def test_windows_and_waits() -> None:
    """A report can be cut by time, slow calls counted, and a wait that comes to nothing says how far it came."""

    async def call(request_id: str) -> httpx.Response:
        await asyncio.sleep(0.02)
        return httpx.Response(200)

    async with Load(call, callers=1) as load:
        await load.reached(5)
        since = load.now
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"pigs fly: not within 0\.1 s; \d+ of \d+ calls have ended, failed: {}"):
            await load.until(lambda: False, 0.1, what="pigs fly")
        assert time.monotonic() - started >= 0.1
    report = load.report
    assert 4 <= report.between(0, since).calls < report.calls
    assert report.between(0, since).calls + report.between(since).calls == report.calls
    assert report.slower_than(0.01) == report.calls
    assert report.slower_than(60) == 0
    assert 0.02 <= report.latency(0.5) <= report.latency(1.0)
