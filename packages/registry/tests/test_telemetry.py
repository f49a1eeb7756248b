"""What an observer is told: every call and attempt with its outcome, every pick with its reason, and what happened."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import httpx
import pytest

from registry import (
    DiscoveryTransport,
    EjectionPolicy,
    Event,
    Instance,
    ObservedAttempt,
    ObservedCall,
    Observer,
    Observers,
    Policy,
    RegistryError,
    RetryPolicy,
    StaticResolver,
)
from registry.background import background_context, prepare_background
from registry.telemetry import Journal
from tests.support.policies import in_order
from tests.support.raw import OK, raw_servers

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


class Witness(Observer):
    """Writes everything down; what has begun and not ended is open."""

    def __init__(self) -> None:
        self.calls: list[ObservedCall] = []
        self.attempts: list[ObservedAttempt] = []
        self.events: list[Event] = []
        self.open: list[object] = []

    def call_begun(self, call: ObservedCall) -> None:
        self.open.append(call)

    def call_ended(self, call: ObservedCall) -> None:
        self.open.remove(call)
        self.calls.append(call)

    def attempt_begun(self, attempt: ObservedAttempt) -> None:
        assert attempt.call in self.open
        self.open.append(attempt)
        attempt.headers["X-Trace"] = f"{attempt.call.attempts}/{attempt.number}"

    def attempt_ended(self, attempt: ObservedAttempt) -> None:
        self.open.remove(attempt)
        self.attempts.append(attempt)

    def happened(self, event: Event) -> None:
        self.events.append(event)

    @property
    def told(self) -> tuple[list[str | None], list[tuple[str, str | None]]]:
        """Outcomes of the calls, and of the attempts by instance; all that began has ended."""
        assert not self.open
        assert None not in [call.seconds for call in self.calls] + [each.seconds for each in self.attempts]
        return [call.outcome for call in self.calls], [(each.instance.id, each.outcome) for each in self.attempts]


class Fleet(httpx.AsyncBaseTransport):
    """Instances a, b and c of ``cards``, asked in this order unless a policy is given."""

    def __init__(self, names: str = "abc", **options: Any) -> None:
        self.instances = [Instance(name, "cards", f"10.0.0.{n}", 8000) for n, name in enumerate(names, 1)]
        self.does: dict[str, Handler] = {}
        self.witness = Witness()
        self.sent: list[httpx.Request] = []
        options.setdefault("policy", in_order)
        resolver = options.pop("resolver", StaticResolver({"cards": self.instances}))
        self.transport = DiscoveryTransport(resolver, transport=self, observer=self.witness, **options)
        self.http = httpx.AsyncClient(transport=self.transport, base_url="http://cards")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        name = next(each.id for each in self.instances if each.address == request.url.host)
        return await self.does[name](request) if name in self.does else httpx.Response(200)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what a test waits for has no event
            await asyncio.sleep(0)


def answers(code: int) -> Handler:
    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(code)

    return answer


def fails(error: type[Exception]) -> Handler:
    async def fail(request: httpx.Request) -> httpx.Response:
        raise error("broken")

    return fail


async def hangs(request: httpx.Request) -> httpx.Response:
    await asyncio.sleep(60)
    raise AssertionError


async def test_call_and_attempt_are_told_with_what_they_are() -> None:
    fleet = Fleet()
    await fleet.http.post("/cards?secret=1", content=b"x")
    assert fleet.witness.told == (["ok"], [("a", "ok")])
    call, attempt = fleet.witness.calls[0], fleet.witness.attempts[0]
    assert (call.service, call.method, call.url, call.attempts, call.status, call.error) == (
        *("cards", "POST", "http://cards/cards"),
        *(1, 200, None),
    )
    assert (attempt.call, attempt.number, attempt.reason, attempt.status, attempt.hedge) == (
        *(call, 1, "policy"),
        *(200, False),
    )


@pytest.mark.parametrize(
    ("does", "outcome"),
    [
        (answers(500), "status"),
        (fails(httpx.ConnectError), "refused"),
        (fails(httpx.ConnectTimeout), "not_sent"),  # so soon, it is the caller's own limit
        (fails(httpx.ReadTimeout), "timeout"),
        (fails(httpx.RemoteProtocolError), "broken"),
        (fails(httpx.PoolTimeout), "not_sent"),
    ],
)
async def test_failed_attempt_and_the_one_after_it_are_told(does: Handler, outcome: str) -> None:
    fleet = Fleet()
    fleet.does["a"] = does
    await fleet.http.get("/")
    assert fleet.witness.told == (["ok"], [("a", outcome), ("b", "ok")])
    explanation = fleet.transport.explain("cards")
    assert dict(explanation.retries) == {outcome: 1}
    assert dict(explanation.calls) == {"ok": 1}
    assert [dict(each.outcomes) for each in explanation.endpoints] == [{outcome: 1}, {"ok": 1}, {}]


@pytest.mark.parametrize(
    ("code", "call", "attempt"), [(404, "status", "ok"), (302, "ok", "ok"), (503, "status", "status")]
)
async def test_answers_are_told_apart(code: int, call: str, attempt: str) -> None:
    fleet = Fleet(retry=RetryPolicy(max_retries=1))
    fleet.does["a"] = answers(code)
    await fleet.http.get("/")
    assert fleet.witness.told == ([call], [("a", attempt)])


async def test_unknown_error_and_the_bodys_own_are_told() -> None:
    fleet = Fleet()
    fleet.does["a"] = fails(ValueError)
    with pytest.raises(ValueError, match="broken"):
        await fleet.http.get("/")

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise OSError("the file is gone")

    async def reads(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=await request.aread())

    fleet.does["a"] = reads
    with pytest.raises(OSError, match="gone"):
        await fleet.http.post("/", content=body())
    assert fleet.witness.told == (["error", "error"], [("a", "error"), ("a", "error")])


async def test_nobody_and_failing_fast_are_told() -> None:
    fleet = Fleet("a", retry=RetryPolicy(max_retries=1))
    with pytest.raises(RegistryError):
        await fleet.transport.handle_async_request(httpx.Request("GET", "http://nobody/"))
    fleet.does["a"] = fails(httpx.ConnectError)
    for _ in range(3):
        with pytest.raises((httpx.ConnectError, RegistryError)):
            await fleet.http.get("/")
    assert fleet.witness.told[0] == ["no_instance", "error", "error", "failing_fast"]
    assert [event.kind for event in fleet.witness.events] == ["joined", "ejected", "failing_fast"]
    ejected = fleet.witness.events[1]
    assert (ejected.instance, ejected.reason, ejected.detail) == ("a", "refused", "ConnectError('broken')")
    assert ejected.seconds == pytest.approx(0.1, abs=0.01)


async def test_deadline_and_cancellation_are_told() -> None:
    fleet = Fleet(deadline=0.1)
    fleet.does = dict.fromkeys("abc", hangs)
    with pytest.raises(httpx.ReadTimeout):
        await fleet.http.get("/")
    call = asyncio.create_task(fleet.http.get("/"))
    await until(lambda: len(fleet.witness.open) > 1)
    call.cancel()
    await asyncio.wait({call})
    assert fleet.witness.told == (["deadline", "cancelled"], [("a", "timeout"), ("a", "cancelled")])


@pytest.mark.parametrize("won", [True, False])
async def test_hedge_and_its_loser_are_told(won: bool) -> None:
    fleet = Fleet("ab")
    for _ in range(20):
        await fleet.http.get("/")
    slow = asyncio.Event()

    async def late(request: httpx.Request) -> httpx.Response:
        await slow.wait()
        return httpx.Response(200)

    async def lets_the_other_win(request: httpx.Request) -> httpx.Response:
        slow.set()
        return await hangs(request)

    fleet.does = {"a": hangs} if won else {"a": late, "b": lets_the_other_win}
    await fleet.http.get("/", extensions={"hedge": True})
    first, second = sorted(fleet.witness.attempts[20:], key=lambda attempt: attempt.number)
    assert (first.outcome, second.outcome) == (("cancelled", "ok") if won else ("ok", "cancelled"))
    assert (first.hedge, second.hedge, first.call, second.call.attempts) == (False, True, second.call, 2)
    assert fleet.witness.told[0] == ["ok"] * 21
    assert dict(fleet.transport.explain("cards").hedges) == {"won" if won else "lost": 1}


async def test_headers_of_an_observer_go_out_in_place_of_the_callers() -> None:
    fleet = Fleet()
    fleet.does["a"] = fails(httpx.ConnectError)
    await fleet.http.get("/", headers={"x-trace": "mine"})
    assert [request.headers.get_list("x-trace") for request in fleet.sent] == [["1/1"], ["2/2"]]


async def test_headers_of_an_observer_go_over_the_wire_once() -> None:
    """Through our own connections: in the short cut, and through h11, which sees to a body of unknown length."""

    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        return True

    async with raw_servers(answer) as (server,):
        transport = DiscoveryTransport(StaticResolver({"cards": [server.instance]}), observer=Witness())
        async with httpx.AsyncClient(transport=transport, base_url="http://cards") as http:
            await http.get("/", headers={"x-trace": "mine"})
            await http.post("/", headers={"x-trace": "mine"}, content=body())
        lines = [line for request in server.requests for line in request.lower().split(b"\r\n")]
    assert [line for line in lines if line.startswith(b"x-trace")] == [b"x-trace: 1/1"] * 2


@pytest.mark.parametrize(
    ("policy", "names", "reasons"),
    [
        ("p2c", "ab", {"p2c_turn", "p2c_cost"}),
        ("p2c", "a", {"only"}),
        ("random", "ab", {"policy"}),
        (in_order, "ab", {"policy"}),
    ],
)
async def test_pick_leaves_its_reason(policy: Policy, names: str, reasons: set[str]) -> None:
    fleet = Fleet(names, policy=policy)
    for _ in range(4):
        await fleet.http.get("/")
    assert {attempt.reason for attempt in fleet.witness.attempts} <= reasons
    counted: dict[str, int] = {}
    for each in fleet.transport.explain("cards").endpoints:
        for reason, count in each.picked.items():
            counted[reason] = counted.get(reason, 0) + count
    assert sum(counted.values()) == 4
    assert counted.keys() <= reasons


async def test_the_cheaper_of_two_is_picked_for_its_cost() -> None:
    fleet = Fleet("ab", policy="p2c")
    fleet.does["a"] = hangs
    calls = [asyncio.create_task(fleet.http.get("/")) for _ in range(20)]
    await until(lambda: sum(call.done() for call in calls) >= 10)
    for _ in range(5):
        await fleet.http.get("/")
    assert fleet.witness.attempts[-1].reason == "p2c_cost"
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


async def test_probe_and_half_open_are_told_and_so_is_the_return() -> None:
    policy = EjectionPolicy(refused=0.05, max_refused=0.05, probe_interval=0.01)
    fleet = Fleet("ab", ejection=policy)
    fleet.does["a"] = fails(httpx.ConnectError)
    await fleet.http.get("/")
    del fleet.does["a"]
    async with asyncio.timeout(5):
        while fleet.witness.attempts[-1].instance.id != "a":
            await asyncio.sleep(0.01)
            await fleet.http.get("/")
    assert fleet.witness.attempts[-1].reason == "probe"
    assert [event.kind for event in fleet.witness.events][2:] == ["ejected", "probed", "reinstated"]
    state = fleet.transport.explain("cards").endpoints[0]
    assert (dict(state.ejections), state.ejected_because, state.last_failure and state.last_failure.outcome) == (
        *({"refused": 1}, None),
        "refused",
    )
    fleet.does = dict.fromkeys("ab", fails(httpx.ConnectError))
    with pytest.raises(httpx.ConnectError):
        await fleet.http.get("/")
    fleet.does = {}
    async with asyncio.timeout(5):
        while True:
            await asyncio.sleep(0.01)
            try:
                await fleet.http.get("/")
            except RegistryError:
                continue
            break
    assert fleet.witness.attempts[-1].reason in {"probe", "half_open"}
    assert {"failing_fast", "recovered"} <= {event.kind for event in fleet.witness.events}


async def test_suspect_is_passed_over_for_what_cannot_be_repeated() -> None:
    fleet = Fleet("abc")
    fleet.does["a"] = answers(500)
    await fleet.http.get("/")
    await fleet.http.post("/")
    assert (fleet.witness.attempts[-1].instance.id, fleet.witness.attempts[-1].reason) == ("b", "trusted")


async def test_observer_that_fails_harms_no_call_and_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def call_begun(self, call: ObservedCall) -> None:
            raise RuntimeError("I am broken")

    fleet = Fleet()
    fleet.transport.observers.add(Broken())
    late = Witness()
    fleet.transport.observers.add(late)
    with caplog.at_level(logging.ERROR, "registry"):
        assert (await fleet.http.get("/")).status_code == 200
    assert "an observer failed, and was ignored" in caplog.text
    assert late.told == fleet.witness.told == (["ok"], [("a", "ok")])


async def test_who_only_hears_of_events_costs_no_call_anything() -> None:
    journal = Journal(2)
    several = Observers(Observers(journal, None), journal)
    assert (several.each, several.of_calls, several.of_events) == ([journal], False, True)
    several.happened(Event("probed", "cards", "0"))  # there may be ten a second: they would leave nothing else
    for number in range(3):
        several.happened(Event("joined", "cards", str(number)))
    assert [(number, event.instance) for number, event in journal] == [(2, "1"), (3, "2")]


def test_background_tasks_begin_in_a_prepared_context() -> None:
    mark: ContextVar[str] = ContextVar("mark")

    def prepare() -> None:
        mark.set("prepared")

    prepare_background(prepare)
    mark.set("a request's own")
    assert background_context().get(mark) == "prepared"
