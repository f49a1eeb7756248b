"""The transport's core: whom a call asks next, when it hedges and when it gives up, and that nothing stays behind."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import httpx
import pytest

from registry import (
    DiscoveryTransport,
    Instance,
    InvalidInputError,
    NoHealthyInstanceError,
    RetryPolicy,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
    StaticResolver,
)
from registry.discovery import context
from registry.discovery.blame import Failure
from registry.model import Snapshot
from tests.support.policies import in_order
from tests.support.server import Answer, Request, Serve

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


class Fleet(httpx.AsyncBaseTransport):
    """Instances a, b, c, ... of ``cards`` behind a fake inner transport: each does what a test says, all is counted."""

    def __init__(self, names: str = "abc") -> None:
        self.instances = [Instance(name, "cards", f"10.0.0.{n}", 8000) for n, name in enumerate(names, 1)]
        self.does: dict[str, Handler] = {}
        self.asked: list[str] = []
        """Whom attempts were sent to, in order."""
        self.requests: list[httpx.Request] = []
        self.cancelled: list[str] = []
        self.closed: list[str] = []
        """Whose answers were closed."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = next(each.id for each in self.instances if each.address == request.url.host)
        self.asked.append(name)
        self.requests.append(request)
        try:
            response = await self.does.get(name, ok)(request)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        stream = _Counted(response.content, lambda: self.closed.append(name))
        return httpx.Response(response.status_code, headers=response.headers, stream=stream)

    @property
    def markers(self) -> list[str | None]:
        return [request.headers.get(context.RETRY_HEADER) for request in self.requests]

    def transport(self, *, retry: RetryPolicy | None = None, deadline: float | None = None) -> DiscoveryTransport:
        resolver = StaticResolver({"cards": self.instances})
        return DiscoveryTransport(resolver, policy=in_order, transport=self, retry=retry, deadline=deadline)

    def client(self, *, retry: RetryPolicy | None = None, deadline: float | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=self.transport(retry=retry, deadline=deadline), base_url="http://cards")


class _Counted(httpx.AsyncByteStream):
    def __init__(self, content: bytes, closed: Callable[[], None]) -> None:
        self._content = content
        self._closed = closed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content

    async def aclose(self) -> None:
        self._closed()


async def ok(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"ok": True})


def status(code: int, headers: Mapping[str, str] | None = None) -> Handler:
    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(code, headers=headers, content=b"no")

    return answer


def failing(error: type[httpx.TransportError]) -> Handler:
    async def fail(request: httpx.Request) -> httpx.Response:
        raise error("broken", request=request)

    return fail


def after(seconds: float, then: Handler = ok) -> Handler:
    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(seconds)
        return await then(request)

    return answer


async def never(request: httpx.Request) -> httpx.Response:
    await asyncio.sleep(3600)
    raise AssertionError


def quick(attempts: int = 3) -> RetryPolicy:
    return RetryPolicy(attempts, retry_delay=0.001)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


def in_flight(transport: DiscoveryTransport) -> int:
    return sum(endpoint.in_flight for endpoint in transport.explain("cards").endpoints)


# -- whom a call asks next ---------------------------------------------------------------------------------------------


async def test_instances_already_asked_are_left_out() -> None:
    """Each attempt goes to another instance, at once, while there is one."""
    fleet = Fleet("abcd")
    fleet.does = dict.fromkeys("abc", status(503))
    async with fleet.client(retry=RetryPolicy(4, retry_delay=60.0)) as client:
        assert (await client.get("/")).status_code == 200
    assert fleet.asked == ["a", "b", "c", "d"]


async def test_back_off_comes_once_all_were_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two instances, five attempts: both, a pause, both, a longer pause, one; each pause drawn from what may be."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr("registry.discovery.transport.asyncio.sleep", note)
    fleet = Fleet("ab")
    fleet.does = dict.fromkeys("ab", status(503))
    async with fleet.client(retry=RetryPolicy(5, retry_delay=1.0)) as client:
        assert (await client.get("/")).status_code == 503
    assert fleet.asked == ["a", "b", "a", "b", "a"]
    assert len(slept) == 2
    assert 0 <= slept[0] <= 2.0
    assert 0 <= slept[1] <= 8.0


async def test_error_tells_every_attempt() -> None:
    """The last error is raised, with a note per attempt: which, where, and what came of it."""
    fleet = Fleet("abc")
    fleet.does = {"a": status(500), "b": failing(httpx.ConnectError), "c": failing(httpx.ReadTimeout)}
    async with fleet.client(retry=quick()) as client:
        with pytest.raises(httpx.ReadTimeout) as raised:
            await client.get("/")
    assert raised.value.__notes__ == [
        "attempt 1 on a (10.0.0.1:8000): HTTP 500",
        "attempt 2 on b (10.0.0.2:8000): ConnectError('broken')",
        "attempt 3 on c (10.0.0.3:8000): ReadTimeout('broken')",
    ]


async def test_last_5xx_is_an_answer_that_can_be_read() -> None:
    """It comes with its body and the notes; those before it were closed, one by one."""
    fleet = Fleet("ab")
    fleet.does = dict.fromkeys("ab", status(503))
    async with fleet.client(retry=quick(2)) as client, client.stream("GET", "/") as response:
        assert fleet.closed == ["a"]
        assert await response.aread() == b"no"
        assert response.extensions["attempts"] == [
            "attempt 1 on a (10.0.0.1:8000): HTTP 503",
            "attempt 2 on b (10.0.0.2:8000): HTTP 503",
        ]
    assert fleet.closed == ["a", "b"]


async def test_answer_given_up_on_can_be_read() -> None:
    """One whose Retry-After lies beyond the deadline is the call's answer, and was not closed for a retry."""
    fleet = Fleet("a")
    fleet.does["a"] = status(503, {"Retry-After": "30"})
    async with fleet.client(deadline=5.0) as client:
        response = await client.get("/")
        assert (response.status_code, response.content) == (503, b"no")
    assert fleet.asked == ["a"]


async def test_without_a_deadline_retry_after_has_a_bound() -> None:
    """Nobody waits a year because an instance says so."""
    fleet = Fleet("a")
    fleet.does["a"] = status(503, {"Retry-After": "31536000"})
    async with fleet.client() as client, asyncio.timeout(1):
        assert (await client.get("/")).status_code == 503


async def test_retry_after_is_no_reason_to_spare_the_others() -> None:
    """Another instance is asked at once: it did not ask for a pause."""
    fleet = Fleet("ab")
    fleet.does["a"] = status(503, {"Retry-After": "30"})
    async with fleet.client() as client, asyncio.timeout(1):
        assert (await client.get("/")).status_code == 200


async def test_exhausted_budget_ends_the_retries() -> None:
    """An outage is not multiplied: beyond ten retries a second and a fifth of the calls, a failure is the call's."""
    fleet, turn = Fleet("ab"), 0

    async def every_other(request: httpx.Request) -> httpx.Response:
        nonlocal turn
        turn += 1
        return httpx.Response(503 if turn % 2 else 200)

    fleet.does["a"] = every_other
    transport = fleet.transport(retry=quick())
    transport.explain("cards")
    (upstream,) = transport._upstreams.values()
    now = 0.0
    upstream.budget.clock = lambda: now
    upstream.budget._updated = now
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        answers = [(await client.get("/")).status_code for _ in range(100)]
        assert fleet.asked.count("b") == pytest.approx(10 + 20, abs=1)
        assert answers.count(503) == 50 - fleet.asked.count("b")
        now = 1.0
        for _ in range(100):
            await client.get("/")
        assert fleet.asked.count("b") == pytest.approx(20 + 40, abs=2)


async def test_everything_dead_fails_fast() -> None:
    """Once all have refused, a call is turned away unsent, and the error says when the next try is due."""
    fleet = Fleet("ab")
    fleet.does = dict.fromkeys("ab", failing(httpx.ConnectError))
    async with fleet.client(retry=quick(2)) as client:
        for _ in range(2):
            with pytest.raises(httpx.ConnectError):
                await client.get("/")
        asked = len(fleet.asked)
        with pytest.raises(NoHealthyInstanceError, match=r"every one of its 2 instances fails; next try in 0\.\d s"):
            await client.get("/")
        assert len(fleet.asked) == asked
        fleet.does.clear()
        async with asyncio.timeout(2):
            while True:
                try:
                    assert (await client.get("/")).status_code == 200
                    break
                except NoHealthyInstanceError:
                    await asyncio.sleep(0.01)


async def test_probing_call_fails_without_a_back_off() -> None:
    """While everything is dead, the call that is let through tries all and is told at once, not after a pause."""
    fleet = Fleet("ab")
    fleet.does = dict.fromkeys("ab", failing(httpx.ConnectError))
    transport = fleet.transport(retry=RetryPolicy(5, retry_delay=60.0))
    transport.explain("cards")
    (upstream,) = transport._upstreams.values()
    upstream.pool.update(tuple(fleet.instances))
    for endpoint in [*upstream.pool.endpoints.values()] * 2:
        upstream.pool.failed(endpoint, Failure.NOT_SENT, 0.0)
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client, asyncio.timeout(2):
        while not fleet.asked:
            with pytest.raises((NoHealthyInstanceError, httpx.ConnectError)):
                await client.get("/")
    assert sorted(fleet.asked) == ["a", "b"]


async def test_failing_fast_leaves_the_event_loop_to_others() -> None:
    """A caller that loops on "nobody there" does not starve whoever could bring better news."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    async with httpx.AsyncClient(transport=DiscoveryTransport(StaticResolver({})), base_url="http://cards") as client:
        for _ in range(50):
            with pytest.raises(ServiceNotFoundError):
                await client.get("/")
    task.cancel()
    assert turns >= 50


class Changing(StaticResolver):
    """A resolver whose answer a test changes."""

    snapshot: Snapshot = ()

    def resolve(self, service: str, tag: str | None = None) -> Snapshot:
        if not self.snapshot:
            raise ServiceNotFoundError(service)
        return self.snapshot


async def test_service_that_vanishes_meanwhile_is_told_as_what_happened() -> None:
    """When there is nobody left to ask after the back-off, the last error says more than "not found"."""
    fleet = Fleet("a")
    resolver = Changing({})
    resolver.snapshot = (fleet.instances[0],)

    async def vanish(request: httpx.Request) -> httpx.Response:
        resolver.snapshot = ()
        raise httpx.ConnectError("broken", request=request)

    fleet.does["a"] = vanish
    transport = DiscoveryTransport(resolver, transport=fleet, retry=quick())
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        with pytest.raises(httpx.ConnectError) as raised:
            await client.get("/")
        assert len(raised.value.__notes__) == len(fleet.asked)
        with pytest.raises(ServiceNotFoundError):
            await client.get("/")


async def test_gone_instance_that_answers_is_used_while_nobody_else_is_known() -> None:
    """The registry lost everybody: those it knew serve on, until they refuse."""
    fleet = Fleet("ab")
    resolver = Changing({})
    resolver.snapshot = tuple(fleet.instances)
    transport = DiscoveryTransport(resolver, transport=fleet, policy=in_order, retry=quick())
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        await client.get("/")
        resolver.snapshot = ()
        for _ in range(3):
            assert (await client.get("/")).status_code == 200
        assert [endpoint.listed for endpoint in transport.explain("cards").endpoints] == [False, False]
        fleet.does = dict.fromkeys("ab", failing(httpx.ConnectError))
        with pytest.raises(httpx.ConnectError):
            await client.get("/")
        with pytest.raises(ServiceNotFoundError):
            await client.get("/")


async def test_port_is_refused() -> None:
    """A URL that names a port would go around the registry: a clear error before a byte is sent."""
    fleet = Fleet()
    async with fleet.client() as client:
        with pytest.raises(InvalidInputError, match="names a port"):
            await client.get("http://cards:8080/")
        with pytest.raises(InvalidInputError):
            await client.get("http://10.0.0.1/")
    assert fleet.asked == []


# -- deadline and retry marker -----------------------------------------------------------------------------------------


async def test_deadline_covers_all_attempts() -> None:
    """Three attempts of a call with 0.3 s: no later than that, each told the same moment."""
    fleet = Fleet("abc")
    fleet.does = dict.fromkeys("abc", after(0.12, status(503)))
    started = time.time()
    async with fleet.client(deadline=0.3) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/")
    assert time.time() - started < 1.0
    stamps = {float(request.headers[context.DEADLINE_HEADER].partition(";")[0]) for request in fleet.requests}
    assert 2 <= len(fleet.requests) <= 3
    assert [*stamps] == [pytest.approx(started + 0.3, abs=0.1)]


async def test_inherited_deadline_holds_when_it_is_nearer() -> None:
    """A call made while serving a request has no more time than that request, and passes the nearer one on."""
    fleet = Fleet("a")
    async with fleet.client(deadline=10.0) as client:
        for inherited, expected in ((5.0, 5.0), (60.0, 10.0)):
            now = time.time()
            token = context.inherited.set(context.Inherited(now + inherited, False))
            await client.get("/")
            context.inherited.reset(token)
            assert float(fleet.requests[-1].headers[context.DEADLINE_HEADER].partition(";")[0]) == pytest.approx(
                now + expected, abs=0.5
            )


async def test_passed_deadline_sends_nothing() -> None:
    """What nobody waits for any more is not begun."""
    fleet = Fleet("a")
    async with fleet.client() as client:
        token = context.inherited.set(context.Inherited(time.time() - 0.001, False))
        with pytest.raises(httpx.ConnectTimeout, match="deadline"):
            await client.get("/")
        context.inherited.reset(token)
    assert fleet.asked == []


async def test_no_deadline_no_header() -> None:
    """Without a deadline nothing is claimed, and a first attempt is no retry."""
    fleet = Fleet("a")
    async with fleet.client() as client:
        await client.get("/")
    assert context.DEADLINE_HEADER not in fleet.requests[0].headers
    assert fleet.markers == [None]


async def test_retry_is_marked_once_an_attempt_may_have_been_seen() -> None:
    """After a refused connection the next attempt is still the first that counts; after a 5xx it is a retry."""
    fleet = Fleet("abcd")
    fleet.does = {"a": failing(httpx.ConnectError), "b": status(503), "c": failing(httpx.ReadError)}
    async with fleet.client(retry=quick(4)) as client:
        await client.get("/")
    assert fleet.markers == [None, None, "3", "4"]


async def test_call_on_behalf_of_a_retry_is_not_retried_itself() -> None:
    """Whoever retried above will do so again; but what was never sent may go elsewhere, for it multiplies nothing."""
    fleet = Fleet("abc")
    fleet.does = {"a": failing(httpx.ConnectError), "b": status(503)}
    async with fleet.client(retry=quick()) as client:
        token = context.inherited.set(context.Inherited(None, True))
        assert (await client.get("/")).status_code == 503
        context.inherited.reset(token)
    assert fleet.asked == ["a", "b"]


# -- hedging -----------------------------------------------------------------------------------------------------------


async def warm(client: httpx.AsyncClient, calls: int = 40) -> None:
    for _ in range(calls):
        await client.get("/")


HEDGE = {"hedge": True}


async def test_slow_answer_is_hedged_and_the_loser_cancelled() -> None:
    """Slower than 95 % of the last: another instance is asked too, its answer is taken, the first is cancelled."""
    fleet = Fleet("ab")
    transport = fleet.transport()
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        await warm(client)
        fleet.asked.clear()
        fleet.requests.clear()
        fleet.does["a"] = never
        async with asyncio.timeout(2):
            assert (await client.get("/", extensions=HEDGE)).status_code == 200
        assert fleet.asked == ["a", "b"]
        assert fleet.cancelled == ["a"]
        assert fleet.markers == [None, "2"]
        assert in_flight(transport) == 0


async def test_fast_answers_are_not_hedged() -> None:
    """One request each, as long as nothing is slow."""
    fleet = Fleet("ab")
    fleet.does["a"] = after(0.01)
    async with fleet.client() as client:
        await warm(client, 20)
        fleet.does["a"] = ok
        for _ in range(20):
            await client.get("/", extensions=HEDGE)
    assert fleet.asked == ["a"] * 40


async def test_nothing_is_hedged_before_it_is_known_what_is_slow() -> None:
    """Fewer than twenty answers say nothing about 95 %."""
    fleet = Fleet("ab")
    async with fleet.client() as client:
        await warm(client, 19)
        fleet.does["a"] = after(0.1)
        await client.get("/", extensions=HEDGE)
    assert "b" not in fleet.asked


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("POST", {"extensions": HEDGE}),
        ("GET", {"extensions": HEDGE | {"idempotent": False}}),
        ("PUT", {"extensions": HEDGE, "content": "stream"}),
        ("GET", {}),
    ],
    ids=["POST", "not idempotent", "a stream", "not asked for"],
)
async def test_only_what_may_be_sent_twice_is_hedged(method: str, options: dict[str, Any]) -> None:
    """A POST, a body that can't be replayed, or a call that did not opt in waits for its one answer."""

    async def stream() -> AsyncIterator[bytes]:
        yield b"one"

    if options.get("content"):
        options = options | {"content": stream()}
    fleet = Fleet("ab")
    async with fleet.client() as client:
        await warm(client)
        fleet.does["a"] = after(0.1)
        await client.request(method, "/", **options)
    assert "b" not in fleet.asked


async def test_idempotent_post_is_hedged() -> None:
    """The caller's word, or an Idempotency-Key, opens it."""
    fleet = Fleet("ab")
    async with fleet.client() as client:
        await warm(client)
        fleet.does["a"] = never
        async with asyncio.timeout(2):
            await client.post("/", headers={"Idempotency-Key": "1"}, json={}, extensions=HEDGE)
    assert fleet.asked[-2:] == ["a", "b"]
    assert fleet.requests[-1].headers["Idempotency-Key"] == "1"


async def test_hedging_can_be_the_clients_default() -> None:
    """``hedge=True`` of the facade holds for each of its calls, and a call may say no."""
    fleet = Fleet("ab")
    resolver = StaticResolver({"cards": fleet.instances})
    async with ServiceDiscoveryClient(resolver, policy=in_order, hedge=True, transport=fleet) as client:
        for _ in range(40):
            await client.get("cards", "/")
        fleet.does["a"] = after(0.1)
        await client.get("cards", "/", hedge=False)
        assert "b" not in fleet.asked
        await client.get("cards", "/")
        assert fleet.asked[-1] == "b"


@pytest.mark.parametrize("first", [after(0.05, status(503)), after(0.05, failing(httpx.ReadError))])
async def test_failure_of_one_waits_for_the_other(first: Handler) -> None:
    """The first attempt fails while the second is still under way: its answer decides."""
    fleet = Fleet("ab")
    async with fleet.client(retry=quick(2)) as client:
        await warm(client)
        fleet.does = {"a": first, "b": after(0.2)}
        assert (await client.get("/", extensions=HEDGE)).status_code == 200
    assert fleet.asked[-2:] == ["a", "b"]


async def test_both_hedged_attempts_may_fail() -> None:
    """Then a third attempt follows, as after any failure."""
    fleet = Fleet("abc")
    async with fleet.client(retry=quick(3)) as client:
        await warm(client)
        fleet.does = {"a": after(0.05, status(503)), "b": after(0.05, failing(httpx.ReadError))}
        assert (await client.get("/", extensions=HEDGE)).status_code == 200
    assert fleet.asked[-3:] == ["a", "b", "c"]


async def test_success_wins_when_both_end_at_once() -> None:
    """An answer is not lost to a failure of the same moment; and of two answers the other is closed."""
    for other in (status(503), ok):
        fleet = Fleet("ab")
        async with fleet.client(retry=quick(2)) as client:
            await warm(client)
            gate = asyncio.Event()

            def gated(then: Handler, gate: asyncio.Event = gate) -> Handler:
                async def answer(request: httpx.Request) -> httpx.Response:
                    await gate.wait()
                    return await then(request)

                return answer

            fleet.does = {"a": gated(other), "b": gated(ok)}
            fleet.closed.clear()
            call = asyncio.create_task(client.get("/", extensions=HEDGE))
            await until(lambda fleet=fleet: fleet.asked[-1] == "b")  # type: ignore[misc]
            gate.set()
            assert (await call).status_code == 200
        assert sorted(fleet.closed) == ["a", "b"]


async def test_hedges_are_paid_from_the_retry_budget() -> None:
    """A slow service is not asked twice as much: beyond the budget a call waits for its one answer."""
    fleet = Fleet("ab")
    transport = fleet.transport()
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        await warm(client, 250)  # five slow answers do not change what is slow
        (upstream,) = transport._upstreams.values()
        upstream.budget.ratio, upstream.budget._balance = 0.0, 2.0
        upstream.budget.clock = lambda: upstream.budget._updated
        fleet.asked.clear()
        fleet.does = dict.fromkeys("ab", after(0.05))
        for _ in range(5):
            await client.get("/", extensions=HEDGE)
    assert sorted(fleet.asked) == ["a"] * 5 + ["b"] * 2


async def test_hedging_counts_as_an_attempt() -> None:
    """One attempt in total means one request, slow or not."""
    fleet = Fleet("ab")
    async with fleet.client(retry=quick(1)) as client:
        await warm(client)
        fleet.does["a"] = after(0.1)
        await client.get("/", extensions=HEDGE)
    assert "b" not in fleet.asked


async def test_call_on_behalf_of_a_retry_is_not_hedged() -> None:
    """What is being repeated above is not multiplied below."""
    fleet = Fleet("ab")
    async with fleet.client() as client:
        await warm(client)
        fleet.does["a"] = after(0.1)
        token = context.inherited.set(context.Inherited(None, True))
        await client.get("/", extensions=HEDGE)
        context.inherited.reset(token)
    assert "b" not in fleet.asked


async def test_what_was_cut_off_counts_as_slow() -> None:
    """Were only winners counted, p95 would sink with each hedge until every call were hedged."""
    fleet = Fleet("ab")
    transport = fleet.transport()
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        await warm(client)
        (upstream,) = transport._upstreams.values()
        slow, counted = upstream.p95(), len(upstream.latencies)
        assert slow is not None
        fleet.does["a"] = never
        async with asyncio.timeout(2):
            await client.get("/", extensions=HEDGE)
        assert len(upstream.latencies) == counted + 2
        assert max(list(upstream.latencies)[-2:]) >= slow


# -- nothing stays behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hedge", [False, True])
async def test_cancelled_calls_leave_no_load(hedge: bool) -> None:
    """Whatever a call is waiting for: cancelled, it is off every instance's count."""
    fleet = Fleet("ab")
    transport = fleet.transport()
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        await warm(client)
        fleet.does = dict.fromkeys("ab", never)
        calls = [asyncio.create_task(client.get("/", extensions={"hedge": hedge})) for _ in range(10)]
        await until(lambda: in_flight(transport) == (20 if hedge else 10))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert all(call.cancelled() for call in calls)
        assert in_flight(transport) == 0
        assert len(fleet.cancelled) == (20 if hedge else 10)


async def test_call_cancelled_in_its_back_off_closes_the_last_answer() -> None:
    """An answer that was kept for the case that nothing better comes is not forgotten open."""
    fleet = Fleet("a")
    fleet.does["a"] = status(503, {"Retry-After": "5"})
    transport = fleet.transport()
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        call = asyncio.create_task(client.get("/"))
        await until(lambda: bool(fleet.asked) and in_flight(transport) == 0)
        assert fleet.closed == []
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert fleet.closed == ["a"]


async def test_errors_of_no_transport_leave_no_load() -> None:
    """A defect in the inner transport is raised as it is, and the attempt is over."""

    async def defect(request: httpx.Request) -> httpx.Response:
        raise KeyError("defect")

    fleet = Fleet("a")
    fleet.does["a"] = defect
    transport = fleet.transport()
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        with pytest.raises(KeyError):
            await client.get("/")
    assert in_flight(transport) == 0


async def test_unknown_names_leave_nothing() -> None:
    """A thousand names that nobody runs, and no more is kept than for one."""
    fleet = Fleet("a")
    transport = fleet.transport()
    async with httpx.AsyncClient(transport=transport) as client:
        await client.get("http://cards/")
        for n in range(1_000):
            with pytest.raises(ServiceNotFoundError):
                await client.get(f"http://nobody-{n}/")
    assert len(transport._upstreams) <= 2


# -- as any httpx transport --------------------------------------------------------------------------------------------


class GeneratedClient:
    """As a generator writes it: knows httpx only."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def get_card(self, card_id: str) -> dict[str, Any]:
        response = await self._client.request("GET", f"/api/cards/{card_id}", params={"full": "1"})
        response.raise_for_status()
        found: dict[str, Any] = response.json()
        return found


async def test_generated_client_works_over_the_transport(serve: Serve) -> None:
    """One that takes an httpx.AsyncClient needs to know nothing of discovery."""
    servers = [serve(lambda _: Answer(200, b'{"id": "7"}')) for _ in range(2)]
    resolver = StaticResolver({"cards": [server.of("cards") for server in servers]})
    async with httpx.AsyncClient(transport=DiscoveryTransport(resolver), base_url="http://cards") as http:
        for _ in range(10):
            assert await GeneratedClient(http).get_card("7") == {"id": "7"}
    assert all(request.target == "/api/cards/7?full=1" for server in servers for request in server.requests)
    assert all(server.requests for server in servers)


async def test_hooks_and_auth_of_the_client_hold_for_the_facade(serve: Serve) -> None:
    """What is set on ``client.http`` as hooks or auth is obeyed by every call, as its docstring says."""
    seen: list[str] = []

    async def asked(request: httpx.Request) -> None:
        seen.append(f"asked {request.url.path}")

    async def answered(response: httpx.Response) -> None:
        seen.append(f"answered {response.status_code}")

    server = serve()
    resolver = StaticResolver({"cards": [server.of("cards")]})
    async with ServiceDiscoveryClient(resolver) as client:
        client.http.event_hooks = {"request": [asked], "response": [answered]}
        client.http.auth = httpx.BasicAuth("user", "secret")
        await client.get("cards", "/one")
        client.http.event_hooks = {"request": [], "response": []}
        await client.get("cards", "/two")
        client.http.auth = None  # type: ignore[assignment]  # the property's setter takes it
        await client.get("cards", "/three")
    assert seen == ["asked /one", "answered 200"]
    assert ["authorization" in request.headers for request in server.requests] == [True, True, False]


async def test_digest_auth_takes_its_two_requests(serve: Serve) -> None:
    """An auth flow of several requests works, each balanced by itself."""

    def answer(request: Request) -> Answer:
        if "authorization" in request.headers:
            return Answer()
        return Answer(401, b"", {"WWW-Authenticate": 'Digest realm="cards", nonce="1", qop="auth", algorithm=MD5'})

    servers = [serve(answer), serve(answer)]
    resolver = StaticResolver({"cards": [server.of("cards") for server in servers]})
    async with ServiceDiscoveryClient(resolver) as client:
        response = await client.get("cards", "/", auth=httpx.DigestAuth("user", "secret"))
        assert response.status_code == 200
    assert sum(len(server.requests) for server in servers) == 2


async def test_cookies_of_the_http_client_are_kept(serve: Serve) -> None:
    """``client.http`` is an ordinary client: what one answer sets, the next request of that service carries."""

    def answer(request: Request) -> Answer:
        return Answer(200, request.headers.get("cookie", "").encode(), {"Set-Cookie": "session=1; Path=/"})

    server = serve(answer)
    async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]})) as client:
        assert (await client.http.get("http://cards/")).text == ""
        assert (await client.http.get("http://cards/")).text == "session=1"


async def test_streams_of_the_http_client_arrive_piece_by_piece(serve: Serve) -> None:
    """An endless answer can be read as it comes and left at any time; the load is counted until its headers."""

    def endless() -> Any:
        while True:
            yield b"x" * 1000

    server = serve(lambda _: Answer(200, endless()))
    async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]})) as client:
        async with client.http.stream("GET", "http://cards/") as response, asyncio.timeout(5):
            async for piece in response.aiter_bytes():
                assert piece.strip(b"x") == b""
                break
        assert sum(endpoint.in_flight for endpoint in client.explain("cards").endpoints) == 0


async def test_redirects_are_followed_within_the_service(serve: Serve) -> None:
    """A relative or an absolute redirect to the service's own name is balanced again, history and all."""

    def answer(request: Request) -> Answer:
        if request.target == "/cards":
            return Answer(307, b"", {"Location": "http://cards/cards/"})
        return Answer(200, request.body)

    server = serve(answer)
    async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]})) as client:
        for response in (
            await client.post("cards", "/cards", json={"a": 1}),
            await client.http.post("http://cards/cards", json={"a": 1}),
        ):
            assert json.loads(response.content) == {"a": 1}
            assert [before.status_code for before in response.history] == [307]


async def test_answers_tell_how_long_they_took(serve: Serve) -> None:
    """``elapsed`` is there on both ways, as httpx has it."""

    def answer(request: Request) -> Answer:
        time.sleep(0.05)
        return Answer()

    server = serve(answer)
    async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]})) as client:
        for response in (await client.get("cards", "/"), await client.http.get("http://cards/")):
            assert 0.05 <= response.elapsed.total_seconds() < 2.0


async def test_explain_says_why() -> None:
    """Instances with weight, load, latency, picks and ejection; how fresh the list is; how long calls fail fast."""
    fleet = Fleet("ab")
    fleet.does["a"] = failing(httpx.ConnectError)
    resolver = StaticResolver({"cards": [*fleet.instances, Instance("c", "cards", "10.0.0.3", 8000, weight=5)]})
    async with ServiceDiscoveryClient(resolver, policy=in_order, transport=fleet) as client:
        cold = client.explain("cards")
        assert (cold.service, {each.picks for each in cold.endpoints}, cold.view.source) == ("cards", {0}, "static")
        await client.get("cards", "/")
        explanation = client.explain("cards")
        a, b, c = explanation.endpoints
        assert (a.id, a.netloc, a.weight, a.in_flight, a.picks, a.listed) == ("a", "10.0.0.1:8000", 1, 0, 1, True)
        assert 0 < a.ejected_for <= 0.1
        assert (b.picks, b.ejected_for, b.failures) == (1, 0.0, 0)
        assert (c.picks, c.weight, c.latency) == (0, 5, 0.0)
        assert explanation.failing_fast_for == 0.0
        assert (explanation.view.registered, explanation.view.age, explanation.view.error) == (3, 0.0, None)


async def test_transport_closes_what_it_was_given() -> None:
    """Closing the client closes the resolver and the inner transport."""
    closed = []

    class Closing(StaticResolver):
        async def aclose(self) -> None:
            closed.append("resolver")

    class Inner(Fleet):
        async def aclose(self) -> None:
            closed.append("inner")

    async with httpx.AsyncClient(transport=DiscoveryTransport(Closing({}), transport=Inner())):
        pass
    assert sorted(closed) == ["inner", "resolver"]
