"""Connections on real sockets: never more than allowed, turns in order, none used that is not fresh, none lost."""

import asyncio
import errno
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest

from packages.registry.tests.raw_server import (
    OK,
    Handler,
    RawServer,
    answering,
    attempt,
    open_sender,
    raw_server,
    request,
    stalling,
    until,
)
from registry import Instance, ServiceDiscoveryClient, StaticResolver
from registry.discovery.blame import Blame, Failure, Verdict, judge
from registry.discovery.connections import Connections
from registry.discovery.options import ConnectionOptions
from registry.discovery.sender import H11Sender
from registry.testing.ports import free_ports
from tests.support.server import Serve

UNKNOWN = Instance("cards-1", "cards", "cards.invalid", 80)


def taking(seconds: float) -> Handler:
    """Answers after so long, over connections that it keeps."""

    async def handler(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await seen.read(reader)
            await asyncio.sleep(seconds)
            writer.write(OK)

    return handler


def pool_of(sender: H11Sender) -> Connections:
    assert sender._connections is not None
    return sender._connections


async def test_callers_beyond_the_limit_queue_in_order() -> None:
    """Thirty callers, three connections: never more, and who came first is served first."""
    async with raw_server(taking(0.01)) as server, open_sender(ConnectionOptions(max_connections=3)) as sender:
        calls = [attempt(sender, server, request(path=f"/{number}"), read=True) for number in range(30)]
        assert all(answer.content == b"ok" for answer in await asyncio.gather(*calls))
        assert server.accepted == 3
        order = [int(head.split()[1][1:]) for head in server.requests]
        assert all(abs(place - number) < 3 for place, number in enumerate(order)), order


async def test_who_waits_for_its_turn_too_long_is_told() -> None:
    """PoolTimeout after ``pool`` seconds or the attempt's limit, not sent, against nobody; the queue is as before."""
    async with raw_server(stalling(b"")) as server, open_sender(ConnectionOptions(max_connections=1)) as sender:
        holder = asyncio.create_task(attempt(sender, server, read=True))
        await until(lambda: len(server.requests) == 1)
        for pool, limit in ((0.1, 5.0), (5.0, 0.1)):
            started = time.monotonic()
            with pytest.raises(httpx.PoolTimeout, match="of at most 1") as raised:
                await attempt(sender, server, request(pool=pool), limit, read=True)
            assert 0.05 < time.monotonic() - started < 2
            assert judge(raised.value) == Verdict(Failure.NOT_SENT, Blame.CALLER)
        assert not pool_of(sender)._waiters
        holder.cancel()
        await server.has_open(0)


async def test_full_pool_ejects_nobody() -> None:
    """The caller's own saturation says nothing of the instances."""
    async with raw_server(taking(1)) as server:
        resolver = StaticResolver({"cards": [server.instance]})
        options = ConnectionOptions(max_connections=1)
        async with ServiceDiscoveryClient(resolver, max_retries=1, connections=options) as client:
            holder = asyncio.create_task(client.get("cards", "/x"))
            await until(lambda: len(server.requests) == 1)
            late = await asyncio.gather(
                *(client.get("cards", "/x", timeout=0.1) for _ in range(20)), return_exceptions=True
            )
            assert [type(each) for each in late] == [httpx.PoolTimeout] * 20
            (endpoint,) = client.explain("cards").endpoints
            assert (endpoint.failures, endpoint.ejected_for) == (0, 0.0)
            assert (await holder).content == b"ok"


@pytest.mark.parametrize("called", [False, True], ids=["waiting", "just called"])
async def test_cancelled_caller_passes_its_turn_on(called: bool) -> None:
    """Whether it still waits or its turn has just come: the next in the queue is served."""
    release = asyncio.Event()

    async def once_released(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await seen.read(reader)
            await release.wait()
            writer.write(OK)

    async with raw_server(once_released) as server, open_sender(ConnectionOptions(max_connections=1)) as sender:

        async def hold() -> None:
            await attempt(sender, server, read=True)
            if called:
                second.cancel()  # which has been called, and did not yet run

        holder = asyncio.create_task(hold())
        await until(lambda: len(server.requests) == 1)
        second, third = (asyncio.create_task(attempt(sender, server, read=True)) for _ in range(2))
        await until(lambda: len(pool_of(sender)._waiters) == 2)
        if not called:
            second.cancel()
        release.set()
        await holder
        assert (await third).content == b"ok"
        assert second.cancelled() is True
        assert server.accepted == 1


async def test_queue_is_not_overtaken() -> None:
    """One connection, one caller that calls without a pause, one that waits: it is served second."""
    async with raw_server(taking(0.005)) as server, open_sender(ConnectionOptions(max_connections=1)) as sender:

        async def without_pause() -> None:
            while True:
                await attempt(sender, server, request(path="/greedy"), read=True)

        greedy = asyncio.create_task(without_pause())
        await until(lambda: len(server.requests) == 1)
        for _ in range(5):
            before = len(server.requests)
            await asyncio.wait_for(attempt(sender, server, request(path="/patient"), read=True), 2)
            assert len(server.requests) <= before + 2
        greedy.cancel()


async def test_idle_connections_expire() -> None:
    """After ``keepalive`` seconds a connection is closed, without a call; and the next call opens another."""
    async with raw_server(answering(OK)) as server, open_sender(ConnectionOptions(keepalive=0.1)) as sender:
        for accepted in (1, 2):
            await attempt(sender, server, read=True)
            await attempt(sender, server, read=True)
            assert (server.accepted, server.open) == (accepted, 1)
            await server.has_open(0)
            assert not pool_of(sender)._all


@contextmanager
def thread_server(unasked: bytes | None) -> Iterator[tuple[Instance, threading.Event, threading.Event, list[bytes]]]:
    """Answers each request with OK, and when told to sends what nobody asked for, or closes: in another thread."""
    go, gone, requests = threading.Event(), threading.Event(), list[bytes]()
    with ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection = opened.enter_context(listener.accept()[0])
                    requests.append(connection.recv(65_536))
                    connection.sendall(OK)
                    go.wait(5)
                    if unasked is None:
                        connection.close()
                    else:
                        connection.sendall(unasked)
                    gone.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield Instance("cards-1", "cards", *listener.getsockname()), go, gone, requests
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("unasked", [None, b"x", OK], ids=["end", "byte", "answer"])
@pytest.mark.parametrize("seen", [False, True], ids=["not yet seen", "seen"])
async def test_connection_with_something_to_read_is_not_used(unasked: bytes | None, seen: bool) -> None:
    """Whatever came on an idle connection, noticed by the event loop or not: the next call takes another."""
    with thread_server(unasked) as (instance, go, gone, requests):
        async with open_sender() as sender:
            await attempt(sender, instance, request("POST", "/first"), read=True)
            go.set()
            gone.wait(5)  # blocks the event loop on purpose
            if seen:
                await until(lambda: not pool_of(sender)._all)
            assert (await attempt(sender, instance, request("POST", "/second"), read=True)).content == b"ok"
            assert [each.split()[1] for each in requests] == [b"/first", b"/second"]


async def test_idle_connection_gives_way_at_the_limit() -> None:
    """Another instance is to be called: the connection that was idle longest is closed first, not beside it."""
    async with (
        raw_server(answering(OK)) as one,
        raw_server(answering(OK)) as two,
        raw_server(answering(OK)) as three,
        open_sender(ConnectionOptions(max_connections=2)) as sender,
    ):
        for number in range(1, 10):
            for server in (one, two, three):
                await attempt(sender, server, request("POST"), read=True)
                assert len(pool_of(sender)._all) <= 2
                assert server.accepted == number
        await until(lambda: one.open + two.open + three.open == 2)
        assert (one.open, two.open, three.open) == (0, 1, 1)


async def test_slow_name_server_is_within_the_connect_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up counts: ConnectTimeout, so nothing was sent, whichever limit is the shorter."""

    async def slowly(*_: Any, **__: Any) -> list[Any]:
        await asyncio.sleep(5)
        return []

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", slowly)
    async with open_sender() as sender:
        for connect, limit in ((0.1, 5.0), (5.0, 0.1), (0.1, None)):
            started = time.monotonic()
            with pytest.raises(httpx.ConnectTimeout) as raised:
                await attempt(sender, UNKNOWN, request("POST", connect=connect), limit, read=True)
            assert time.monotonic() - started < 2
            assert judge(raised.value).failure is Failure.NOT_SENT
        assert not pool_of(sender)._all


async def test_name_server_that_does_not_answer_is_no_reason_to_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller learns it at once, though connections to others are in use; it speaks against no instance."""

    async def fails(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async with raw_server(stalling(b"")) as server, open_sender() as sender:
        holder = asyncio.create_task(attempt(sender, server, read=True))
        await until(lambda: len(server.requests) == 1)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fails)
        with pytest.raises(httpx.ConnectError) as raised:
            await asyncio.wait_for(attempt(sender, UNKNOWN, read=True), 2)
        assert judge(raised.value) == Verdict(Failure.NOT_SENT, Blame.CALLER)
        holder.cancel()
        await server.has_open(0)


@pytest.mark.parametrize("code", [errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENOBUFS])
async def test_callers_queue_for_what_this_machine_lacks(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No port or descriptor for a third connection: callers share two, nobody is blamed, nobody tries in a loop."""
    loop = asyncio.get_running_loop()
    create, tries, connecting = loop.create_connection, 0, 0
    opened: list[asyncio.Transport] = []

    async def create_connection(*args: Any, **kw: Any) -> Any:
        nonlocal tries, connecting
        tries += 1
        if connecting + sum(not transport.is_closing() for transport in opened) >= 2:
            raise OSError(code, "none left")
        connecting += 1
        try:
            made = await create(*args, **kw)
        finally:
            connecting -= 1
        opened.append(made[0])
        return made

    monkeypatch.setattr(loop, "create_connection", create_connection)
    async with raw_server(taking(0.02)) as one, raw_server(taking(0.02)) as two:
        resolver = StaticResolver({"cards": [one.instance], "notes": [two.instance]})
        async with ServiceDiscoveryClient(resolver, max_retries=1) as client:
            calls = [client.post("cards" if number % 2 else "notes", "/x") for number in range(30)]
            answers = await asyncio.wait_for(asyncio.gather(*calls), 10)
            assert [answer.status_code for answer in answers] == [200] * 30
            assert tries < 100
            for service in ("cards", "notes"):
                (endpoint,) = client.explain(service).endpoints
                assert (endpoint.failures, endpoint.ejected_for) == (0, 0.0)


async def test_shortage_ends_with_an_attempt_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one connection that was being opened is given up: who queues for its descriptor gets it, not silence."""
    loop = asyncio.get_running_loop()
    create, tries = loop.create_connection, 0

    async def create_connection(*args: Any, **kw: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 1:
            await asyncio.sleep(5)
        if tries == 2:
            raise OSError(errno.EMFILE, "none left")
        return await create(*args, **kw)

    monkeypatch.setattr(loop, "create_connection", create_connection)
    async with raw_server(answering(OK)) as server, open_sender() as sender:
        late = asyncio.create_task(attempt(sender, server, request(connect=0.1), read=True))
        await until(lambda: tries == 1)
        assert (await asyncio.wait_for(attempt(sender, server, read=True), 2)).content == b"ok"
        with pytest.raises(httpx.ConnectTimeout):
            await late


async def test_shortage_that_no_connection_can_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ours is open, so nothing is to be waited for: everybody is told at once, and nobody is ejected."""

    async def create_connection(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
    resolver = StaticResolver({"cards": [Instance("cards-1", "cards", "127.0.0.1", 1)]})
    async with ServiceDiscoveryClient(resolver, max_retries=1) as client:
        calls = (client.get("cards", "/x") for _ in range(10))
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        assert [type(each) for each in outcomes] == [httpx.ConnectError] * 10
        (endpoint,) = client.explain("cards").endpoints
        assert (endpoint.failures, endpoint.ejected_for) == (0, 0.0)


OUT_OF_DESCRIPTORS = """
import asyncio, os, resource, sys
from registry import Instance, ServiceDiscoveryClient, StaticResolver

async def main(port):
    resolver = StaticResolver({"cards": [Instance("cards-1", "cards", "127.0.0.1", port)]})
    async with ServiceDiscoveryClient(resolver, timeout=20, max_retries=1) as client:
        await client.get("cards", "/x")
        lowest_free = os.dup(0)
        os.close(lowest_free)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 4, most))
        answers = await asyncio.gather(*(client.get("cards", "/x") for _ in range(200)), return_exceptions=True)
        print({getattr(answer, "status_code", repr(answer)) for answer in answers})
        (endpoint,) = client.explain("cards").endpoints
        print(endpoint.failures, endpoint.ejected_for)

asyncio.run(main(int(sys.argv[1])))
"""


@pytest.mark.real
async def test_out_of_descriptors_callers_wait_for_each_other() -> None:
    """A process with four descriptors left sends 200 calls at once: all are answered, and nobody is ejected."""
    async with raw_server(taking(0.005)) as server:
        program = [sys.executable, "-W", "error", "-c", OUT_OF_DESCRIPTORS, str(server.instance.port)]
        done = await asyncio.to_thread(subprocess.run, program, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.splitlines() == ["{200}", "0 0.0"], done.stderr
        assert server.accepted < 8


async def test_closing_closes_all_in_use_or_not() -> None:
    """Idle, waiting for an answer and with a body half read: none is left, nor is a timer."""
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    async with raw_server(answering(OK)) as one, raw_server(stalling(b"")) as two, raw_server(stalling(half)) as three:
        sender = H11Sender()
        await attempt(sender, one, read=True)
        waiting = asyncio.create_task(attempt(sender, two, read=True))
        stream = await sender.send(request(), three.instance, {}, 5.0, read=False)
        await until(lambda: len(two.requests) == 1)
        await sender.aclose()
        for server in (one, two, three):
            await server.has_open(0)
        with pytest.raises(httpx.TransportError):
            await waiting
        with pytest.raises(httpx.TransportError):
            await stream.aread()
        await stream.aclose()
        assert pool_of(sender)._sweep is None
        assert not pool_of(sender)._all


def test_each_event_loop_has_connections_of_its_own(serve: Serve) -> None:
    """The same sender in one loop after the other: it works, and no connection crosses over."""
    server, sender = serve(), H11Sender()
    instance = Instance("cards-1", "cards", "127.0.0.1", server.port)

    async def call() -> Connections:
        await attempt(sender, instance, read=True)
        await attempt(sender, instance, read=True)
        pool = pool_of(sender)
        await sender.aclose()
        return pool

    assert asyncio.run(call()) is not asyncio.run(call())
    assert len(server.requests) == 4


async def test_no_outcome_costs_a_connection() -> None:
    """A thousand calls answered, refused, reset, cut or cancelled at any step: in the end all places are free again."""
    chance = random.Random(7)

    async def moody(seen: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await seen.read(reader)
            match chance.randrange(4):
                case 0:
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                    return
                case 1:
                    writer.write(OK[:-1])
                    return
                case _:
                    writer.write(OK)

    async with raw_server(moody) as server, open_sender(ConnectionOptions(max_connections=5)) as sender:
        nobody = Instance("cards-2", "cards", "127.0.0.1", free_ports(1)[0])

        async def once() -> bool:
            instance = nobody if chance.randrange(4) == 0 else server.instance
            call = asyncio.create_task(attempt(sender, instance, read=chance.random() < 0.5))
            if chance.randrange(2):
                for _ in range(chance.randrange(8)):
                    await asyncio.sleep(0)
                call.cancel()
            try:
                return (await call).content == b"ok"
            except (httpx.TransportError, asyncio.CancelledError):
                return False

        async def in_turn() -> list[bool]:
            return [await once() for _ in range(100)]

        answered = sum(sum(each) for each in await asyncio.gather(*(in_turn() for _ in range(10))))
        assert 50 < answered < 950
        pool = pool_of(sender)
        pool.close()
        await until(lambda: not pool._all)
        assert (pool._used, list(pool._waiters), pool._called) == (set(), [], None)
        with suppress(httpx.TransportError):  # the server is as moody as before
            await attempt(sender, server, read=True)


async def test_connection_cancelled_as_it_stands_is_counted_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller leaves between the connection and its use: the limit is neither lower nor higher afterwards."""
    loop = asyncio.get_running_loop()
    create = loop.create_connection

    async def create_connection(*args: Any, **kw: Any) -> Any:
        made = await create(*args, **kw)
        made[0].close()
        raise OSError(errno.ECONNRESET, "gone")

    async with raw_server(taking(0.02)) as server, open_sender(ConnectionOptions(max_connections=2)) as sender:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "create_connection", create_connection)
            for _ in range(5):
                with pytest.raises(httpx.ConnectError):
                    await attempt(sender, server, read=True)
        await server.has_open(0)
        before = server.accepted
        await asyncio.gather(*(attempt(sender, server, read=True) for _ in range(20)))
        assert server.accepted == before + 2
