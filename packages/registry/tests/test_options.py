"""Every knob turns: one test for each field of each options object, and no field without one."""

import asyncio
import dataclasses
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import httpx
import pytest
import trustme

from registry import (
    ConnectionOptions,
    DiscoveryTransport,
    EjectionPolicy,
    Instance,
    InvalidInputError,
    ResponseTooLargeError,
    RetryPolicy,
    ServiceDiscoveryClient,
    StaticResolver,
)
from registry.discovery.blame import Failure
from registry.discovery.endpoint import Endpoint
from registry.discovery.pool import Pool
from registry.discovery.retry import RetryBudget
from registry.discovery.roster import Roster
from registry.mesh.identity import MeshIdentity
from registry.mesh.tls import tls_context
from tests.support.authority import Authority, FixedSource
from tests.support.raw import OK, Handler, raw_servers
from tests.support.server import Answer, Serve

NOT_SENT, SENT = Failure.NOT_SENT, Failure.SENT

turned: set[tuple[type, str]] = set()
"""Which fields the tests below turned."""


Options = TypeVar("Options")


def turn(kind: type[Options], **values: object) -> Options:
    turned.update((kind, name) for name in values)
    return kind(**values)


class Fleet:
    """A pool of three with a clock of its own."""

    def __init__(self, policy: EjectionPolicy) -> None:
        self.now = 1_000.0
        self.pool = Pool("cards", clock=lambda: self.now, roster=Roster(policy))
        self.list("abc")

    def list(self, names: str) -> None:
        self.pool.update(tuple(Instance(name, "cards", "10.0.0.1", ord(name)) for name in names))

    def __getitem__(self, name: str) -> Endpoint:
        return next(endpoint for endpoint in self.pool.endpoints.values() if endpoint.instance.id == name)

    def fail(self, name: str, times: int, failure: Failure = SENT, seconds: float = 0.0) -> float:
        """For how long that ejects it."""
        for _ in range(times):
            self.pool.failed(self[name], failure, seconds)
        return max(0.0, self[name].ejected_until - self.now)

    def picks(self, *, safe: bool = True, tries: int = 100) -> set[str]:
        picked = (self.pool.pick((), safe=safe) for _ in range(tries))
        return {endpoint.instance.id for endpoint in picked if endpoint}


# -- ejection ----------------------------------------------------------------------------------------------------------


def test_failures_that_eject() -> None:
    """Two in a row are enough, if so set."""
    fleet = Fleet(turn(EjectionPolicy, failures=2))
    assert (fleet.fail("a", 1), fleet.fail("a", 1)) == (0.0, 30.0)


def test_seconds_of_an_ejection() -> None:
    """As long as set, times how often, and no longer than the most."""
    fleet = Fleet(turn(EjectionPolicy, failures=1, seconds=4.0, max_seconds=6.0))
    assert fleet.fail("a", 1) == 4.0
    fleet.now += 4.0
    assert fleet.fail("a", 1) == 6.0


def test_seconds_of_a_refusal() -> None:
    """The first is as set, then it doubles up to the most."""
    fleet = Fleet(turn(EjectionPolicy, refused=1.0, max_refused=3.0))
    seen = []
    for _ in range(3):
        seen.append(fleet.fail("a", 1, NOT_SENT))
        fleet.now += 5.0
    assert seen == [1.0, 2.0, 3.0]


def test_slow_connect() -> None:
    """A connect that took as long as set ejects for as long as it took."""
    assert Fleet(turn(EjectionPolicy, slow_connect=2.0)).fail("a", 1, NOT_SENT, 1.9) == pytest.approx(0.1)
    assert Fleet(turn(EjectionPolicy, slow_connect=2.0)).fail("a", 1, NOT_SENT, 2.1) == pytest.approx(2.1)


@pytest.mark.parametrize("doubt", [0.5, 5.0])
def test_doubt(doubt: float) -> None:
    """So long after a bad answer a call that can't be repeated goes elsewhere."""
    fleet = Fleet(turn(EjectionPolicy, doubt=doubt))
    fleet.fail("a", 1)
    fleet.now += 1.0
    assert ("a" in fleet.picks(safe=False)) is (doubt < 1.0)


@pytest.mark.parametrize(("interval", "probed"), [(0.1, {"a", "b"}), (60.0, {"a"})])
def test_probe_interval(interval: float, probed: set[str]) -> None:
    """No two ejected instances are tried within it."""
    fleet = Fleet(turn(EjectionPolicy, probe_interval=interval))
    fleet.list("abcdefg")
    fleet.fail("a", 1, NOT_SENT)
    fleet.fail("b", 1, NOT_SENT)
    seen = set()
    for _ in range(2):
        fleet.now += 0.5
        seen |= fleet.picks(tries=1) & {"a", "b"}
    assert len(seen) == len(probed)


def test_remember() -> None:
    """What Consul lost is forgotten after so long, and no more of it is kept than set."""
    fleet = Fleet(turn(EjectionPolicy, remember=5.0))
    fleet.list("c")
    fleet.now += 4.0
    fleet.list("cd")
    assert len(fleet.pool.gone) == 2
    fleet.now += 2.0
    fleet.list("c")
    assert len(fleet.pool.gone) == 1
    fleet = Fleet(turn(EjectionPolicy, remember_at_most=1))
    fleet.list("c")
    assert len(fleet.pool.gone) == 1


def test_latency_is_forgotten() -> None:
    """A latency counts for 1/e after the decay, twice as long after each peak, as often as set."""
    for decay, peaks in ((1.0, 0), (1.0, 1), (3.0, 0)):
        policy = turn(EjectionPolicy, latency_decay=decay, latency_peaks=peaks)
        endpoint = Endpoint(Instance("a", "cards", "10.0.0.1", 1), policy=policy)
        endpoint.observe(1.0, 10.0)
        assert endpoint.latency(10.0 + decay * 2**peaks) == pytest.approx(0.368, abs=0.001)


# -- retries -----------------------------------------------------------------------------------------------------------


async def test_max_retries_and_delays(serve: Serve) -> None:
    """As many attempts as set, with delays between nothing and what they grow to."""
    server = serve(lambda _: Answer(503))
    policy = turn(RetryPolicy, max_retries=4, retry_delay=0.0, max_delay=0.0)
    async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]}), retry=policy) as client:
        with pytest.raises(httpx.HTTPStatusError):
            await client.get("cards", "/")
    assert len(server.requests) == 4
    assert {RetryPolicy(retry_delay=8.0, max_delay=0.5).delay(9) <= 0.5 for _ in range(50)} == {True}
    assert max(RetryPolicy(retry_delay=8.0, max_delay=99.0).delay(9) for _ in range(50)) > 0.5


async def test_max_wait(serve: Serve) -> None:
    """A ``Retry-After`` beyond it is not waited for by a call without a deadline."""
    server = serve(lambda _: Answer(503, b"", {"Retry-After": "2"}))
    policy = turn(RetryPolicy, retry_delay=0.0, max_wait=1.0)
    transport = DiscoveryTransport(StaticResolver({"cards": [server.of("cards")]}), retry=policy)
    async with httpx.AsyncClient(transport=transport) as client, asyncio.timeout(1):
        assert (await client.get("http://cards/")).status_code == 503
    assert len(server.requests) == 1


def test_budget() -> None:
    """So many retries for each call, and so many a second beside."""
    turn(RetryPolicy, budget_ratio=0.5, budget_per_second=2.0)
    budget = RetryBudget(0.5, 2.0, clock=lambda: 1_000.0)
    for _ in range(4):
        budget.deposit()
    assert [budget.withdraw() for _ in range(5)] == [True, True, True, True, False]


async def test_budget_is_the_policys(serve: Serve) -> None:
    """A budget of next to nothing allows next to no retries."""
    server = serve(lambda _: Answer(503))
    policy = RetryPolicy(max_retries=9, retry_delay=0.0, max_delay=0.0, budget_ratio=0.0, budget_per_second=2.0)
    async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]}), retry=policy) as client:
        with pytest.raises(httpx.HTTPStatusError):
            await client.get("cards", "/")
    assert len(server.requests) <= 4


async def test_failure_statuses(serve: Serve) -> None:
    """A 429 can be a failure that goes to the next instance, and a 501 an answer."""
    policy = turn(RetryPolicy, retry_delay=0.0, failure_statuses=frozenset({429, 503}))
    for status, requests in ((429, 3), (501, 1)):
        server = serve(lambda _, status=status: Answer(status))
        async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]}), retry=policy) as client:
            with pytest.raises(httpx.HTTPStatusError):
                await client.get("cards", "/")
        assert len(server.requests) == requests


# -- connections -------------------------------------------------------------------------------------------------------


async def seen_by(handler: Handler, options: ConnectionOptions, calls: int = 6) -> list[str]:
    """What so many calls at once came to."""

    async def call(client: ServiceDiscoveryClient) -> str:
        try:
            return (await client.get("cards", "/")).text
        except ResponseTooLargeError:
            return "too large"

    async with raw_servers(handler) as (server,):
        resolver = StaticResolver({"cards": [server.instance]})
        async with ServiceDiscoveryClient(resolver, connections=options) as client:
            return list(await asyncio.gather(*(call(client) for _ in range(calls))))


async def test_max_connections() -> None:
    """Never more at once than set, and everybody is served."""
    now, most = 0, 0

    async def count(request: bytes, writer: asyncio.StreamWriter) -> bool:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        writer.write(OK)
        return True

    assert await seen_by(count, turn(ConnectionOptions, max_connections=2)) == ["ok"] * 6
    assert most == 2


async def test_max_instances() -> None:
    """Calls go to so many of three, as these work."""
    asked = set()

    async def note(request: bytes, writer: asyncio.StreamWriter) -> bool:
        asked.add(writer.get_extra_info("sockname"))
        writer.write(OK)
        return True

    async with raw_servers(note, note, note) as servers:
        resolver = StaticResolver(
            {"cards": [dataclasses.replace(server.instance, id=f"{n}") for n, server in enumerate(servers)]}
        )
        options = turn(ConnectionOptions, max_instances=2)
        async with ServiceDiscoveryClient(resolver, connections=options) as client:
            for _ in range(30):
                await client.get("cards", "/")
    assert len(asked) == 2


@pytest.mark.parametrize(("keepalive", "connections"), [(0.05, 2), (5.0, 1)])
async def test_keepalive(keepalive: float, connections: int) -> None:
    """A connection that was idle for longer is not used again."""
    seen = set()

    async def note(request: bytes, writer: asyncio.StreamWriter) -> bool:
        seen.add(writer.get_extra_info("peername"))
        writer.write(OK)
        return True

    options = turn(ConnectionOptions, keepalive=keepalive)
    async with raw_servers(note) as (server,):
        resolver = StaticResolver({"cards": [server.instance]})
        async with ServiceDiscoveryClient(resolver, connections=options) as client:
            await client.get("cards", "/")
            await asyncio.sleep(0.1)
            await client.get("cards", "/")
    assert len(seen) == connections


def answering(answer: bytes) -> Handler:
    async def handler(request: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer)
        return True

    return handler


LONG_HEAD = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\nContent-Length: 2\r\n\r\nok"
MANY = b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 1_200 + b"Content-Length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("answer", "options", "seen"),
    [
        (LONG_HEAD, {}, "too large"),
        (LONG_HEAD, {"max_header_size": 80_000}, "ok"),
        (OK, {"max_header_size": 10}, "too large"),
        (MANY, {}, "too large"),
        (MANY, {"max_headers": 2_000}, "ok"),
        (OK, {"max_response_size": 1}, "too large"),
        (OK, {"max_response_size": 2}, "ok"),
    ],
)
async def test_sizes_of_answers(answer: bytes, options: dict[str, int], seen: str) -> None:
    """Over a limit an error, under it the answer; each limit by itself."""
    assert await seen_by(answering(answer), turn(ConnectionOptions, **options), 1) == [seen]


async def test_ssl() -> None:
    """An instance with ``secure=true`` is called over https, with the CA of one's choice."""
    ca, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trusted = ssl.create_default_context()
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca.configure_trust(trusted)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        resolver = StaticResolver({"cards": [Instance("a", "cards", "127.0.0.1", port, meta={"secure": "true"})]})
        async with ServiceDiscoveryClient(resolver, connections=turn(ConnectionOptions, ssl=trusted)) as client:
            assert (await client.get("cards", "/")).text == "ok"
        async with ServiceDiscoveryClient(resolver, max_retries=1) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get("cards", "/")
            assert client.explain("cards").endpoints[0].ejected_for == 0.0


async def handshakes(options: ConnectionOptions) -> int:
    """How many it takes for two calls, 0.1 s apart, of an instance of the mesh."""
    accepted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        with suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(OK)
        writer.close()

    mesh = Authority()
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, mesh.service("cards").leaf(), mesh.roots())
    async with (
        MeshIdentity("caller", FixedSource(mesh.service("caller").leaf(), mesh.roots())) as me,
        await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server,
    ):
        port = server.sockets[0].getsockname()[1]
        resolver = StaticResolver({"cards": [Instance("a", "cards", "127.0.0.1", port, connect=True)]})
        used = dataclasses.replace(options, peers=turn(ConnectionOptions, peers=me).peers)
        async with ServiceDiscoveryClient(resolver, connections=used) as client:
            for _ in range(2):
                await client.get("cards", "/")
                await asyncio.sleep(0.1)
    return accepted


async def test_peers() -> None:
    """They take the place of ``ssl`` for instances of the mesh, whose connections ``keepalive`` is not for."""
    assert await handshakes(ConnectionOptions(keepalive=0.05, ssl=ssl.create_default_context())) == 1
    assert ConnectionOptions().peers_keepalive == 60.0


async def test_peers_keepalive() -> None:
    """A connection to an instance of the mesh that was idle for longer is not used again."""
    assert await handshakes(turn(ConnectionOptions, peers_keepalive=0.05)) == 2


# -- all of them -------------------------------------------------------------------------------------------------------

KINDS: list[Callable[..., object]] = [ConnectionOptions, EjectionPolicy, RetryPolicy]


def test_every_knob_was_turned() -> None:
    """The tests above leave no field out."""
    fields = {(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    assert turned == fields


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_refused(kind: Callable[..., object]) -> None:
    """A number that can't be meant is an error that names it, before anything is sent."""
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.type in {int, float, "int", "float"}:
            with pytest.raises(InvalidInputError):
                kind(**{field.name: -1})
