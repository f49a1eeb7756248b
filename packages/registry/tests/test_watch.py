"""The watch loop: which question follows which answer, and that no answer costs what was known before."""

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import httpx
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from registry import (
    ConsulSettings,
    NoHealthyInstanceError,
    RegistryError,
    RegistryUnavailableError,
    ServiceNotFoundError,
)
from registry.consul.connection import AsyncConsul
from registry.consul.watch import WAIT, Watch
from registry.model import Snapshot
from tests.support.server import Answer, Request, Serve


def entry(number: int, status: str = "passing") -> dict[str, Any]:
    """An instance as Consul lists it."""
    service = {"ID": f"cards-{number}", "Service": "cards", "Address": f"10.0.{number // 250}.{number % 250}"}
    return {
        "Node": {"Address": "10.9.9.9"},
        "Service": service | {"Port": 8000, "Tags": [], "Meta": {}, "Weights": {"Passing": 1, "Warning": 1}},
        "Checks": [{"CheckID": "health", "Status": status}],
    }


def said(index: object, entries: object) -> httpx.Response:
    """A good answer, as far as these are good."""
    headers = {} if index is None else {"X-Consul-Index": str(index)}
    body = entries if isinstance(entries, str) else json.dumps(entries)
    return httpx.Response(200, headers={"X-Consul-KnownLeader": "true", **headers}, text=body)


def refused(status: int, text: str = "") -> httpx.Response:
    """An error, signed as Consul signs everything."""
    return httpx.Response(status, headers={"X-Consul-KnownLeader": "true"}, text=text)


class Scripted:
    """A watch on a Consul that says what it is told; sleeps are noted, not slept."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.slept: list[float] = []
        self._next: httpx.Response | Exception = said(1, [])
        consul = AsyncConsul(ConsulSettings(host="127.0.0.1", port=1, token=None, token_file=None))
        consul.http.async_client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        self.watch = Watch(consul, "cards", None, sleep=self._sleep)

    async def hears(self, answer: httpx.Response | Exception) -> dict[str, str]:
        """Takes one step with this answer; returns what had been asked."""
        self._next = answer
        await self.watch.step()
        return self.asked[-1]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(dict(request.url.params))
        if isinstance(self._next, Exception):
            raise self._next
        return self._next

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Pieces(httpx.AsyncByteStream):
    """A body that is there already, in many pieces."""

    def __init__(self, body: bytes, count: int) -> None:
        self._pieces = [body[at : at + len(body) // count] for at in range(0, len(body), len(body) // count)]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


async def test_a_long_answer_leaves_others_their_turns() -> None:
    """Ten thousand instances come packed, and all at once: the loop goes on to others after each piece."""
    scene, turns = Scripted(), 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    whole = said(7, [entry(number) for number in range(100)])
    headers = {name: value for name, value in whole.headers.items() if name.startswith("x-consul")}
    await scene.hears(httpx.Response(200, headers=headers, stream=Pieces(whole.content, 50)))
    other.cancel()
    assert len(scene.watch.snapshot) == 100
    assert turns > 50


FAULTS: list[httpx.Response | Exception] = [
    refused(403, "Permission denied"),
    refused(404),
    refused(429, "Your IP is issuing too many concurrent connections"),
    refused(500, "No cluster leader"),
    refused(503),
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("silent"),
    httpx.RemoteProtocolError("half"),
    said(None, [entry(1)]),
    said("many", [entry(1)]),
    said("", [entry(1)]),
    said("1.5", [entry(1)]),
    said(7, "[{"),
    said(7, ""),
    said(7, "null"),
    said(7, {}),
    said(7, {"a": 1}),
    said(7, [{}]),
    said(7, [None]),
    said(7, [entry(1) | {"Checks": 5}]),
    httpx.Response(200, text="[]"),
]
"""Answers that say nothing about who is there; the last one is not Consul's at all."""


def name_of(fault: httpx.Response | Exception) -> str:
    """For the test's id."""
    if isinstance(fault, Exception):
        return type(fault).__name__
    return f"{fault.status_code} index {fault.headers.get('X-Consul-Index')} {fault.text[:12]!r}"


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_a_fault_keeps_the_view_and_resets_the_index(fault: httpx.Response | Exception) -> None:
    """Whatever goes wrong, the same snapshot serves on, the reason can be read, and the next question is a new one."""
    scripted = Scripted()
    await scripted.hears(said(42, [entry(1)]))
    known = scripted.watch.passing()
    assert (await scripted.hears(fault))["index"] == "42"
    assert scripted.watch.passing() is known
    view = scripted.watch.view()
    assert view.error
    assert "127.0.0.1:1" in view.error
    assert len(view.error) < 500
    assert view.registered == 1
    assert "index" not in await scripted.hears(said(43, [entry(1)]))
    assert scripted.watch.passing() is known
    assert scripted.watch.view().error is None


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_a_fault_at_first_is_an_error_and_no_absence(fault: httpx.Response | Exception) -> None:
    """With nothing known, a fault is never "not found"."""
    scripted = Scripted()
    assert scripted.watch.passing() is None
    await scripted.hears(fault)
    with pytest.raises(RegistryError) as caught:
        scripted.watch.passing()
    assert not isinstance(caught.value, ServiceNotFoundError)
    assert scripted.watch.view().age is None


@pytest.mark.parametrize(
    ("indexes", "asked"),
    [
        ([5, 9], ["5", "9"]),
        ([5, 5], ["5", "5"]),
        ([9, 10], ["9", "10"]),  # as numbers: "10" sorts before "9"
        ([9, 5, 6], ["9", None, "6"]),
        ([0], ["1"]),
        ([7, 0, 0], ["7", None, "1"]),
        ([-3], [None]),
        ([2**53, 2**53 + 1], [str(2**53), str(2**53 + 1)]),
        ([2**64 - 1], [str(2**64 - 1)]),
    ],
)
async def test_the_index_follows_consuls_rules(indexes: Sequence[int], asked: Sequence[str | None]) -> None:
    """The next question carries the last index: reset when it went back, never below 1, exact however big."""
    scripted = Scripted()
    assert "index" not in await scripted.hears(said(indexes[0], []))
    for number, expected in enumerate(asked):
        following = indexes[number + 1] if number + 1 < len(indexes) else 10**30
        question = await scripted.hears(said(following, []))
        assert question.get("index") == expected
        assert question.get("wait") == (None if expected is None else f"{WAIT}s")
        # A server that replays its log answers a fresh question with half a catalog, unless it must be consistent.
        assert ("consistent" in question) == (expected is None)


async def test_an_empty_answer_says_why() -> None:
    """Nobody registered and nobody healthy are different errors."""
    scripted = Scripted()
    await scripted.hears(said(1, []))
    with pytest.raises(ServiceNotFoundError, match="Service 'cards' not found in registry"):
        scripted.watch.passing()
    await scripted.hears(said(2, [entry(1, "critical"), entry(2, "warning")]))
    with pytest.raises(NoHealthyInstanceError, match=r"2 registered"):
        scripted.watch.passing()


async def test_that_all_left_is_believed_only_of_a_new_question() -> None:
    """A parked question hears "nobody" for a lost right too, without the header that would tell: it is asked anew."""
    scripted = Scripted()
    await scripted.hears(said(5, [entry(1)]))
    known = scripted.watch.passing()
    await scripted.hears(said(6, []))
    assert scripted.watch.passing() is known
    denied = said(7, [])
    denied.headers["X-Consul-Results-Filtered-By-ACLs"] = "true"
    assert "index" not in await scripted.hears(denied)
    assert scripted.watch.passing() is known
    assert "denied" in (scripted.watch.view().error or "")
    await scripted.hears(said(8, []))
    with pytest.raises(ServiceNotFoundError):
        scripted.watch.passing()


async def test_errors_back_off_with_jitter_and_a_cap() -> None:
    """Delays between failing questions grow, vary, and stay at two seconds or less; a success starts anew."""
    scripted = Scripted()
    for _ in range(200):
        await scripted.hears(httpx.ConnectError("refused"))
    backoffs = scripted.slept[1::2]
    assert max(backoffs[:3]) <= 0.4
    assert max(backoffs) <= 2.0
    assert len(set(backoffs)) > 150
    await scripted.hears(said(1, []))
    await scripted.hears(httpx.ConnectError("refused"))
    assert scripted.slept[-1] <= 0.1


async def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """One warning when it begins, one line when it ends, whatever comes between."""
    caplog.set_level(logging.INFO, "registry")
    scripted = Scripted()
    for fault in (*FAULTS, *FAULTS):
        await scripted.hears(fault)
    await scripted.hears(said(1, [entry(1)]))
    await scripted.hears(FAULTS[0])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
    assert caplog.records[0].__dict__["service"] == "cards"


class WatchMachine(RuleBasedStateMachine):
    """Model: the last good list, the index that Consul's rules leave, and whether the last answer was good."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.scripted = Scripted()
        self.index = 0
        self.last: list[int] | None = None
        self.passing: Snapshot | None = None
        self.registered = 0
        self.failing = False

    def hear(self, answer: httpx.Response | Exception) -> None:
        question = self.loop.run_until_complete(self.scripted.hears(answer))
        assert question.get("index") == (str(self.index) if self.index else None)
        assert ("wait" in question) == bool(self.index)

    @rule(
        index=st.one_of(st.integers(-1, 5), st.integers(2**53 - 2, 2**53 + 2), st.integers(0, 2**64)),
        passing=st.sets(st.integers(1, 4)),
        critical=st.sets(st.integers(5, 6)),
    )
    def answers(self, index: int, passing: set[int], critical: set[int]) -> None:
        """A good answer, sorted as Consul likes."""
        self.hear(said(index, [*map(entry, sorted(passing, reverse=True)), *(entry(n, "critical") for n in critical)]))
        if self.index and not passing and (self.last or (self.registered and not critical)):
            self.index = 0  # not believed before it is said once more
            return
        self.index = 0 if index < self.index else max(index, 1)
        if sorted(passing) != self.last:
            self.last, self.passing = sorted(passing), self.scripted.watch.snapshot
        self.registered = len(passing) + len(critical)
        self.failing = False

    @rule(fault=st.sampled_from(FAULTS))
    def fails(self, fault: httpx.Response | Exception) -> None:
        """No answer, or none of use."""
        self.hear(fault)
        self.index = 0
        self.failing = True

    @invariant()
    def serves_the_last_good_list(self) -> None:
        """The same tuple as long as nothing changed; else the reason why there is none."""
        watch = self.scripted.watch
        assert (watch.error is not None) == self.failing
        outcome: Snapshot | RegistryError | None
        try:
            outcome = watch.passing()
        except RegistryError as error:
            outcome = error
        if self.last is None:
            assert isinstance(outcome, RegistryError) if self.failing else outcome is None
            assert not isinstance(outcome, ServiceNotFoundError)
        elif not self.last:
            assert isinstance(outcome, NoHealthyInstanceError if self.registered else ServiceNotFoundError)
            assert isinstance(outcome, NoHealthyInstanceError) == (self.registered > 0)
        else:
            assert outcome is self.passing
            assert [instance.id for instance in watch.snapshot] == [f"cards-{number}" for number in self.last]

    def teardown(self) -> None:
        """Nothing was opened but the loop."""
        self.loop.close()


TestWatchMachine = WatchMachine.TestCase
TestWatchMachine.settings = hypothesis_settings(max_examples=40, stateful_step_count=25, deadline=None)


@contextmanager
def watching(server_url: str, timeout: float = 5.0) -> Iterator[Watch]:
    """A watch over a real connection."""
    port = int(server_url.rpartition(":")[2])
    yield Watch(AsyncConsul(ConsulSettings(host="127.0.0.1", port=port, token=None, timeout=timeout)), "cards", None)


def good(index: int, *numbers: int) -> Answer:
    """What a Consul behind a socket says."""
    headers = {"Content-Type": "application/json", "X-Consul-Index": str(index)}
    return Answer(200, json.dumps([entry(number) for number in numbers]).encode(), headers)


async def after(serve: Serve, fault: Callable[[Request], Answer | None], timeout: float = 5.0) -> Watch:
    """A watch that has heard of an instance, then met the fault, with the connection closed at the end."""
    server = serve(lambda request: good(3, 1) if "index" not in request.target else fault(request))
    with watching(server.url, timeout) as watch:
        await watch.step()
        await watch.step()
        await watch._consul.http.close()
    return watch


async def test_half_an_answer_is_none(serve: Serve) -> None:
    """An answer that breaks off, between or within its chunks, changes nothing."""

    def chunks() -> Iterator[bytes]:
        yield b"[{"
        raise ConnectionError

    headers = {"X-Consul-Index": "9"}
    for broken in (Answer(200, b"[]", {**headers, "Content-Length": "99"}), Answer(200, chunks(), headers), None):
        watch = await after(serve, lambda _, broken=broken: broken)  # type: ignore[misc]
        assert [instance.id for instance in watch.snapshot] == ["cards-1"]
        assert isinstance(watch.error, RegistryUnavailableError)


async def test_a_consul_that_hangs_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parked question is abandoned once its wait, a sixteenth more and the time-out are over."""
    monkeypatch.setattr("registry.consul.watch.WAIT", 1)
    released = threading.Event()
    started = time.monotonic()
    try:
        watch = await after(serve, lambda _: Answer() if released.wait(10) else None, timeout=0.2)
    finally:
        released.set()
    assert time.monotonic() - started > 1 + 1 / 16 + 0.2
    assert "can't be reached" in str(watch.error)
    assert len(watch.snapshot) == 1


async def test_a_consul_that_never_parks_is_not_flooded(serve: Serve) -> None:
    """Answers that come at once, each with a new index, are followed by five questions a second after the first 20."""
    index = count(1)
    server = serve(lambda _: good(next(index), 1))
    with watching(server.url) as watch:
        started = time.monotonic()
        while time.monotonic() - started < 1.5:
            await watch.step()
        await watch._consul.http.close()
    assert 20 <= len(server.requests) <= 21 + 5 * (time.monotonic() - started)


@pytest.mark.real
async def test_ten_thousand_instances_and_a_thousand_changes_leave_nothing() -> None:
    """As much lives after many changes as after a few: of small lists, and of big ones."""

    async def objects(lists: Sequence[str], *changes: int) -> list[int]:
        scripted, index, alive = Scripted(), 0, list[int]()
        for steps in changes:
            for _ in range(steps):
                index += 1
                await scripted.hears(said(index, lists[index % len(lists)]))
                scripted.asked.clear()
                scripted.slept.clear()
            gc.collect()
            alive.append(len(gc.get_objects()))
        return alive

    few, many = await objects([json.dumps([entry(n), entry(n + 1)]) for n in range(5)], 200, 1_000)
    assert many < few + 100
    big = [entry(number) for number in range(10_000)]
    few, many = await objects([json.dumps(big), json.dumps(big[1:])], 2, 4)
    assert many < few + 100
