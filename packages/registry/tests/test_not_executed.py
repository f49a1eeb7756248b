"""Answers that say the request was not executed, and those that say when to come again: where a call goes then."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx
import pytest

from registry import (
    AttemptOutcome,
    DiscoveryTransport,
    EjectionPolicy,
    EndpointState,
    Instance,
    RetryPolicy,
    ServiceDiscoveryClient,
    StaticResolver,
    SyncDiscoveryTransport,
)
from registry.discovery import context
from registry.discovery.advice import NOT_EXECUTED_HEADER, why_declined
from registry.discovery.blame import Blame, Failure, judge
from tests.support.policies import in_order
from tests.support.server import Answer, Request, Serve

SHED = {NOT_EXECUTED_HEADER: "lag", "Retry-After": "0"}


class Fleet(httpx.AsyncBaseTransport):
    """Instances a, b, … of ``cards`` that answer as a test says, 200 unless it does; all requests are kept."""

    def __init__(self, **answers: tuple[int, Mapping[str, str]]) -> None:
        self.answers = answers
        self.only_once = False
        """Whether each says so only the first time."""
        self.asked: list[str] = []
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = chr(ord("a") + int(request.url.host.rpartition(".")[2]))
        self.asked.append(name)
        self.requests.append(request)
        status, headers = self.answers.get(name, (200, {}))
        if self.only_once:
            self.answers.pop(name, None)
        return httpx.Response(status, headers=headers, content=b"x")

    def client(self, names: str = "abc", **options: Any) -> ServiceDiscoveryClient:
        instances = [Instance(name, "cards", f"10.0.0.{number}", 80) for number, name in enumerate(names)]
        options = {"policy": in_order, "retry_delay": 0.001, **options}
        return ServiceDiscoveryClient(StaticResolver({"cards": instances}), transport=self, **options)


def outcomes(client: ServiceDiscoveryClient) -> dict[str, Mapping[AttemptOutcome, int]]:
    return {each.id: each.outcomes for each in client.explain("cards").endpoints}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
async def test_not_executed_goes_to_the_next_instance(method: str, status: int) -> None:
    """Whatever the method, the next instance is asked at once, and is told of no earlier attempt."""
    fleet = Fleet(a=(status, SHED | {"Retry-After": "60"}), b=(status, SHED | {"Retry-After": "60"}))
    async with fleet.client() as client:
        assert (await client.call_service("cards", "/", method, content=b"body")).status_code == 200
        assert outcomes(client) == {"a": {"shed": 1}, "b": {"shed": 1}, "c": {"ok": 1}}
        assert client.explain("cards").retries == {"shed": 2}
    assert fleet.asked == ["a", "b", "c"]
    assert [await request.aread() for request in fleet.requests] == [b"body"] * 3
    assert [context.RETRY_HEADER in request.headers for request in fleet.requests] == [False] * 3


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_not_executed_ejects_nobody(method: str) -> None:
    """An instance that sheds for a long time stays in, without a failure: the very next call may ask it again."""
    fleet = Fleet(a=(503, SHED))
    async with fleet.client(retry=RetryPolicy(budget_per_second=1_000.0)) as client:
        for _ in range(50):
            assert (await client.call_service("cards", "/", method)).status_code == 200
        shedding = client.explain("cards").endpoints[0]
    assert (shedding.outcomes, shedding.failures, shedding.ejected_for) == ({"shed": 50}, 0, 0.0)
    assert (dict(shedding.ejections), shedding.last_failure) == ({}, None)


async def test_one_that_sheds_is_there() -> None:
    """An ejected instance that declines what it is tried with is back, on probation: one failure ejects it again."""
    fleet = Fleet(a=(500, {}))
    ejection = EjectionPolicy(failures=3, seconds=0.05, probe_interval=0.001)
    async with fleet.client("abc", ejection=ejection, retry=RetryPolicy(budget_per_second=1_000.0)) as client:

        async def until(condition: Callable[[EndpointState], bool]) -> EndpointState:
            async with asyncio.timeout(10):
                while not condition(state := client.explain("cards").endpoints[0]):
                    assert (await client.get("cards", "/")).status_code == 200
                    await asyncio.sleep(0.001)
            return state

        await until(lambda a: a.ejections == {"status": 1})
        fleet.answers = {"a": (503, SHED)}
        back = await until(lambda a: "shed" in a.outcomes)
        assert back.ejected_because is None
        fleet.answers = {"a": (500, {})}
        again = await until(lambda a: a.ejections == {"status": 2})
        assert again.outcomes["status"] == back.outcomes["status"] + 1


async def test_one_that_sheds_is_picked_less() -> None:
    """By the default policy it is a less likely choice for a moment, as whoever fails for no known reason is."""
    fleet = Fleet(a=(503, SHED))
    async with fleet.client("ab", policy="p2c") as client:
        while "a" not in fleet.asked:
            await client.post("cards", "/")
        asked = len(fleet.asked)
        for _ in range(20):
            await client.post("cards", "/")
    assert fleet.asked[asked:].count("a") <= 2


@pytest.mark.parametrize("status", [200, 404, 500, 502, 504])
async def test_other_statuses_mean_what_they_say(status: int) -> None:
    """The header is ignored but with 503 and 429: a POST that was answered otherwise is not sent twice."""
    fleet = Fleet(a=(status, SHED))
    async with fleet.client() as client:
        await client.http.post("http://cards/")
    assert fleet.asked == ["a"]
    assert why_declined(httpx.Response(status, headers=SHED)) is None


async def test_a_503_without_the_header_is_sent() -> None:
    """As before: no POST is repeated, and it counts against the instance."""
    fleet = Fleet(a=(503, {"Retry-After": "0"}))
    async with fleet.client() as client:
        with pytest.raises(httpx.HTTPStatusError):
            await client.post("cards", "/")
        assert client.explain("cards").endpoints[0].failures == 1
    assert fleet.asked == ["a"]


async def test_when_all_shed_the_caller_gets_their_answer() -> None:
    """After the last attempt the 503 itself is raised, with a note on each attempt; and nobody is ejected."""
    fleet = Fleet(**dict.fromkeys("ab", (503, SHED)))
    async with fleet.client("ab", max_retries=3) as client:
        with pytest.raises(httpx.HTTPStatusError) as raised:
            await client.post("cards", "/")
        endpoints = client.explain("cards").endpoints
    assert raised.value.response.status_code == 503
    assert raised.value.__notes__ == [
        "attempt 1 on a (10.0.0.0:80): HTTP 503, not executed: lag",
        "attempt 2 on b (10.0.0.1:80): HTTP 503, not executed: lag",
        "attempt 3 on a (10.0.0.0:80): HTTP 503, not executed: lag",
    ]
    assert [(each.failures, each.ejected_for) for each in endpoints] == [(0, 0.0)] * 2


async def test_all_shed_within_the_deadline() -> None:
    """Once all were asked, one more attempt waits as long as the answer asks to; if that is too long, none is made."""
    fleet = Fleet(**dict.fromkeys("ab", (503, SHED | {"Retry-After": "60"})))
    async with fleet.client("ab", deadline=5.0) as client:
        began = time.monotonic()
        with pytest.raises(httpx.HTTPStatusError):
            await client.post("cards", "/")
        assert time.monotonic() - began < 3.0
    assert fleet.asked == ["a", "b"]


async def test_the_budget_holds() -> None:
    """What is shed everywhere is not multiplied: a fifth of the calls, and the few that the budget allows at once."""
    fleet = Fleet(**dict.fromkeys("abc", (503, SHED)))
    retry = RetryPolicy(retry_delay=0.0, budget_per_second=0.001)
    async with fleet.client(retry=retry) as client:
        for _ in range(100):
            await client.http.post("http://cards/")
        assert client.explain("cards").budget_exhausted >= 80
    assert len(fleet.asked) <= 121


async def test_on_behalf_of_a_retry_too() -> None:
    """A call made for a request that is a retry itself goes on as well: nothing was executed, nothing multiplies."""
    fleet = Fleet(a=(503, SHED))
    before = context.inherited.set(context.Inherited(None, is_retry=True))
    try:
        async with fleet.client() as client:
            assert (await client.post("cards", "/")).status_code == 200
    finally:
        context.inherited.reset(before)


async def test_a_body_that_was_read_is_not_sent_again() -> None:
    """A stream can't be replayed, not even to an instance that has done nothing: the caller gets the 503."""

    async def source() -> AsyncIterator[bytes]:
        yield b"once"

    class Reading(Fleet):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await request.aread()
            return await super().handle_async_request(request)

    fleet = Reading(a=(503, SHED))
    async with fleet.client() as client:
        assert (await client.http.post("http://cards/", content=source())).status_code == 503
    assert fleet.asked == ["a"]


def test_words_are_cut() -> None:
    """Whatever an instance gives as its reason, a note stays a line."""
    assert why_declined(httpx.Response(503, headers={NOT_EXECUTED_HEADER: "x" * 1_000})) == "x" * 40


@pytest.mark.parametrize("way", ["facade", "transport", "blocking"])
async def test_every_way_of_calling(serve: Serve, way: str) -> None:
    """Over real sockets: the facade, a plain httpx client over the transport, and one that blocks."""
    seen: Counter[str] = Counter()

    def shed(request: Request) -> Answer:
        seen["shed"] += 1
        return Answer(503, b"busy", SHED)

    def execute(request: Request) -> Answer:
        seen["executed"] += 1
        return Answer(201, b"done", {})

    resolver = StaticResolver({"cards": [serve(shed).of("cards", "a"), serve(execute).of("cards", "b")]})
    retry = RetryPolicy(budget_per_second=1_000.0)
    statuses = []
    if way == "facade":
        async with ServiceDiscoveryClient(resolver, policy="round_robin", retry=retry) as facade:
            statuses += [(await facade.post("cards", "/", json={})).status_code for _ in range(8)]
    elif way == "transport":
        transport = DiscoveryTransport(resolver, policy="round_robin", retry=retry)
        async with httpx.AsyncClient(transport=transport) as client:
            statuses += [(await client.post("http://cards/", json={})).status_code for _ in range(8)]
    else:

        def call() -> list[int]:
            blocking = SyncDiscoveryTransport(resolver, policy="round_robin", retry=retry)
            with httpx.Client(transport=blocking) as plain:
                return [plain.post("http://cards/", json={}).status_code for _ in range(8)]

        statuses += await asyncio.to_thread(call)
    assert statuses == [201] * 8
    assert seen["executed"] == 8
    assert seen["shed"] >= 3


# -- a 429 that says when to come again --------------------------------------------------------------------------------


def test_too_early_counts_against_nobody() -> None:
    """A 429 with a time is a failure that may be repeated; without one, or with nonsense, it is the answer."""
    assert judge(httpx.Response(429, headers={"Retry-After": "1"})) == (Failure.TOO_EARLY, Blame.NOBODY)
    assert judge(httpx.Response(429, headers={"Retry-After": "soon"})) == (None, Blame.NOBODY)
    assert judge(httpx.Response(429)) == (None, Blame.NOBODY)


@pytest.mark.parametrize(
    ("method", "options"),
    [("GET", {}), ("POST", {"idempotent": True}), ("POST", {"headers": {"Idempotency-Key": "1"}})],
)
async def test_too_early_is_waited_for(method: str, options: dict[str, Any]) -> None:
    """A call that may be repeated waits as long as it was asked to, though there is another instance; then it works."""
    fleet = Fleet(a=(429, {"Retry-After": "1"}))
    fleet.only_once = True
    async with fleet.client(deadline=30.0) as client:
        began = time.monotonic()
        assert (await client.call_service("cards", "/", method, **options)).status_code == 200
        assert time.monotonic() - began >= 1.0
        assert outcomes(client)["a"] == {"status": 1, "ok": 1}
        assert client.explain("cards").endpoints[0].failures == 0
    assert fleet.asked == ["a", "a"]


async def test_too_early_for_a_post_is_its_answer() -> None:
    """Who can't send it twice gets the 429 at once."""
    fleet = Fleet(a=(429, {"Retry-After": "1"}))
    async with fleet.client() as client:
        with pytest.raises(httpx.HTTPStatusError, match="429"):
            await client.post("cards", "/")
    assert fleet.asked == ["a"]


async def test_too_early_for_the_deadline_is_the_answer() -> None:
    """Nobody waits in vain, and no retry is counted that was never made."""
    fleet = Fleet(a=(429, {"Retry-After": "60"}))
    async with fleet.client(deadline=5.0) as client:
        began = time.monotonic()
        with pytest.raises(httpx.HTTPStatusError, match="429"):
            await client.get("cards", "/")
        assert time.monotonic() - began < 3.0
        assert client.explain("cards").retries == {}
    assert fleet.asked == ["a"]


async def test_a_policy_may_call_429_a_failure() -> None:
    """An operator who counts it among the failures gets those: the next instance at once, and ejection."""
    fleet = Fleet(a=(429, {"Retry-After": "60"}))
    retry = RetryPolicy(failure_statuses={429}, budget_per_second=1_000.0)
    async with fleet.client(retry=retry, ejection=EjectionPolicy(failures=2)) as client:
        for _ in range(2):
            assert (await client.get("cards", "/")).status_code == 200
        assert client.explain("cards").endpoints[0].ejected_for > 0
