"""The look that all viewers share: it runs while somebody looks, and never longer than the service serves."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from orchestrator.page import hub as module
from orchestrator.page.hub import Hub
from orchestrator.registry import ConsulSettings, ServiceRegistry
from registry.testing.fixtures import ConsulAgent
from tests.pictures import instance, state


@pytest.fixture
async def asked(consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[float]]:
    """When an instance was asked for its state; it is registered, with checks that pass."""
    monkeypatch.setattr(module, "LINGER", 0.3)
    times: list[float] = []
    told = state(instance("looked-at", 0), [instance("called", 0)], 1).model_dump_json().encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readuntil(b"\r\n\r\n")
        if line.startswith(b"GET /registry/state"):
            times.append(time.monotonic())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(told), told))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with ServiceRegistry("127.0.0.1", consul_agent.http_port) as registry:
        meta = {"state_path": "/registry/state"}
        name = await asyncio.to_thread(
            registry.register_service, "looked-at", "127.0.0.1", port, meta=meta, health_check_interval="1s"
        )
        while not await asyncio.to_thread(registry.discover_service, "looked-at"):  # noqa: ASYNC110 (its check)
            await asyncio.sleep(0.05)
        async with server:
            yield times
        await asyncio.to_thread(registry.deregister_service, name)


@pytest.fixture
async def leaving() -> asyncio.Event:
    """Whether the process was told to stop."""
    return asyncio.Event()


@pytest.fixture
async def hub(consul_agent: ConsulAgent, leaving: asyncio.Event) -> AsyncIterator[Hub]:
    settings = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    made = Hub(settings, leaving.is_set)
    yield made
    await made.aclose()


def looks() -> int:
    return sum(task.get_name().startswith("page: the look") for task in asyncio.all_tasks())


async def test_nobody_is_asked_unless_somebody_looks(hub: Hub, asked: list[float]) -> None:
    """Once a second while one looks; soon after the last has left, no more; then anew."""
    assert (asked, looks()) == ([], 0)
    async with asyncio.timeout(30), aclosing(hub.stream("")) as stream:
        while len(asked) < 4:
            await anext(stream)
    assert asked[3] - asked[1] > 1.8
    async with asyncio.timeout(10):
        while looks():  # noqa: ASYNC110 (nothing tells of its end)
            await asyncio.sleep(0.05)
    count = len(asked)
    await asyncio.sleep(1.5)
    assert len(asked) == count
    sheet = await hub.sheet("")
    assert sheet is not None
    assert "looked-at" in [group.key for group in sheet.instances]


async def test_viewers_share_one_look_and_its_numbers(hub: Hub, asked: list[float]) -> None:
    """Two streams bring the same text under the same number, and ask nobody twice as often."""
    async with asyncio.timeout(30), aclosing(hub.stream("")) as one, aclosing(hub.stream("")) as two:
        begun = time.monotonic()
        first = {json.loads(text)["number"]: text for text in [await anext(one) for _ in range(4)]}
        second = {json.loads(text)["number"]: text for text in [await anext(two) for _ in range(4)]}
        assert (looks(), len(asked) <= time.monotonic() - begun + 2) == (1, True)
        while not first.keys() & second.keys():
            text = await anext(two)
            second[json.loads(text)["number"]] = text
    assert all(first[number] == second[number] for number in first.keys() & second.keys())


async def test_a_leaving_process_ends_its_streams(hub: Hub, leaving: asyncio.Event, asked: list[float]) -> None:
    """Told to stop, every stream ends within a second, and nobody else is let in."""
    async with asyncio.timeout(30), aclosing(hub.stream("")) as stream:
        await anext(stream)
        assert not hub.is_full
        leaving.set()
        begun = time.monotonic()
        async for _ in stream:
            pass
        assert time.monotonic() - begun < 1.5
    assert (hub.is_full, await hub.sheet("")) == (True, None)


async def test_viewers_are_counted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many look at once."""
    monkeypatch.setattr(module, "MAX_VIEWERS", 1)
    async with asyncio.timeout(30), aclosing(hub.stream("")) as stream:
        await anext(stream)
        assert hub.is_full
    assert not hub.is_full


async def test_a_failure_is_logged_and_the_next_viewer_begins_anew(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong within ends the streams, and is not the end."""
    with monkeypatch.context() as broken:
        broken.setattr(module, "whole", None)
        assert await hub.sheet("") is None
    assert "the look at the system failed" in caplog.text
    assert await hub.sheet("") is not None
