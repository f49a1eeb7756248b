"""The page's questions to instances: bounded in time and size, whatever they answer, and nobody waits for another."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from orchestrator.page import callers as module
from orchestrator.page.callers import Caller, Callers
from orchestrator.page.state import State
from orchestrator.registry import Instance
from tests.pictures import instance, state

Answer = Callable[[str], bytes | None]
"""From the request's first line to all that is sent; None: nothing ever is."""


MOVED = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)


def told(events: int = 0, started: float = 1.0) -> dict[str, Any]:
    known = state(instance("caller", 0), [instance("called", 0)], 1).model_dump()
    known["instance"]["started"] = started
    event = {"at": 1.0, "kind": "ejected", "service": "called", "instance": "x", "reason": "refused", "detail": ""}
    known["events"] = [event | {"number": number} for number in range(1, events + 1)]
    return known


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Instance]:
    """An instance that says that it tells its state."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[0]
        if (sent := answer(line)) is None:
            await reader.read()
        else:
            writer.write(sent)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield Instance(f"i-{port}", "i", "127.0.0.1", port, meta={"state_path": "/registry/state"})


@pytest.fixture
async def callers() -> AsyncIterator[Callers]:
    async with Callers(lambda: None) as asking:
        yield asking


@pytest.mark.parametrize(
    ("answer", "error", "silent"),
    [
        (lambda _: None, "does not answer within 0.9 s", True),
        (lambda _: b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "answers 500", False),
        (lambda _: ok(b"{}"), "gives an answer that could not be understood", False),
        (lambda _: ok(b"\xff" * 100), "gives an answer that could not be understood", False),
        (lambda _: ok(b"[" * 100_000), "gives an answer that could not be understood", False),
        (lambda _: ok(b" " * 2**24), "its answer is larger than 8 MiB", False),
        (lambda _: b"SSH-2.0\r\n\r\n", "illegal status line", True),
        (lambda _: MOVED, "answers 302", False),
    ],
)  # fmt: skip
async def test_a_bad_answer_is_told_and_holds_nobody_up(
    callers: Callers, answer: Answer, error: str, silent: bool
) -> None:
    """Whatever one answers, the round ends in time and the others are heard."""
    async with serving(answer) as bad, serving(lambda _: ok(json.dumps(told()).encode())) as good:
        callers.follow([bad, good])
        heard = {each.instance: each for each in callers.all()}
        begun = time.monotonic()
        while heard[good].state is None or heard[bad].error is None:
            assert time.monotonic() - begun < 20
            asked = time.monotonic()
            await callers.ask(0.2)
            assert time.monotonic() - asked < 0.9, "a round is over before who hangs has timed out"
        assert error in str(heard[bad].error)
        assert (heard[bad].silent, heard[bad].state) == (silent, None)


async def test_only_who_says_so_is_asked(callers: Callers) -> None:
    """An instance without the metadata, such as Consul's own or a stranger's, gets no request."""
    asked: list[str] = []

    def remember(line: str) -> bytes:
        asked.append(line)
        return ok(json.dumps(told()).encode())

    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(remember))
        two = await stack.enter_async_context(serving(remember))
        for meta in ({}, {"state_path": "/elsewhere"}):
            callers.follow([Instance(one.id, one.service, one.address, one.port, meta=meta)])
            await callers.ask(1)
        assert (asked, callers.all()) == ([], ())
        callers.follow([two])
        await callers.ask(1)
        assert asked == ["GET /registry/state?after=0 HTTP/1.1"]


async def test_events_are_asked_for_once_and_a_new_process_is_asked_anew(callers: Callers) -> None:
    """Each event comes once; a restart under the same name starts numbers and rates again."""
    known = told(events=3)
    lines: list[str] = []

    def answer(line: str) -> bytes:
        lines.append(line.split()[1])
        after = int(line.split("after=")[1].split()[0])
        return ok(json.dumps(known | {"events": [each for each in known["events"] if each["number"] > after]}).encode())

    async with serving(answer) as spoken:
        callers.follow([spoken])
        for _ in range(3):
            await callers.ask(1)
        [caller] = callers.all()
        assert [event.number for _, event in caller.take_news()] == [1, 2, 3]
        assert lines == ["/registry/state?after=0", "/registry/state?after=3", "/registry/state?after=3"]
        assert caller.freeze(time.monotonic()).rates
        known = told(events=1, started=2.0)
        await callers.ask(1)
        assert lines[3:] == ["/registry/state?after=3", "/registry/state?after=0"]
        assert [(name, event.number) for name, event in caller.take_news()] == [(spoken.id, 1)]
        assert caller.freeze(time.monotonic()).rates == {}


async def test_of_many_each_is_asked_in_its_turn(callers: Callers, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many questions in a round; the others come in the next."""
    monkeypatch.setattr(module, "MAX_A_SECOND", 2)
    asked: list[int] = []
    async with AsyncExitStack() as stack:
        many = []
        for number in range(5):

            def answer(_: str, number: int = number) -> bytes:
                asked.append(number)
                return ok(json.dumps(told()).encode())

            many.append(await stack.enter_async_context(serving(answer)))
        rounds = []
        for _ in range(3):
            callers.follow(many)
            await callers.ask(1)
            rounds.append(sorted(asked))
            asked.clear()
    assert [len(each) for each in rounds] == [2, 2, 2]
    assert {number for each in rounds for number in each} == {0, 1, 2, 3, 4}


def test_rates_are_of_the_last_ten_seconds() -> None:
    """Calls per second and shares come from what was counted within the window, not from the beginning."""
    caller = Caller(instance("caller", 0))
    for second, calls in enumerate([1000, 1000, *range(1000, 1400, 20)]):
        known = told()
        known["upstreams"][0]["calls"] = {"ok": calls}
        known["upstreams"][0]["endpoints"][0]["picks"] = calls
        caller.told(State.model_validate(known), float(second))
    [rates] = caller.freeze(22.0).rates.values()
    assert rates.calls == pytest.approx(20.0)
    assert 9 <= rates.seconds <= 11
    assert sum(rates.picks.values()) == rates.calls * rates.seconds
