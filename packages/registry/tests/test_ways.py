"""Every promise holds on every way of calling: plainly, with hooks, auth or uploads, and after redirects."""

import asyncio
import io
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from registry import DiscoveryTransport, Instance, InvalidInputError, ServiceDiscoveryClient, StaticResolver
from registry.testing.ports import free_ports
from tests.support.raw import OK, Handler, raw_servers


async def hook(_: object) -> None: ...


async def source(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


class Way:
    """A way of calling: what the call says, and what is set on the client before."""

    def __init__(self, name: str, hooked: str = "", **keywords: Any) -> None:
        self.name = name
        self.hooked = hooked
        self.keywords = keywords

    async def get(self, client: ServiceDiscoveryClient, path: str = "/", **keywords: Any) -> httpx.Response:
        """A call that may be repeated."""
        if self.hooked:
            client.http.event_hooks[self.hooked] = [hook]
        keywords = {key: value() if callable(value) else value for key, value in (self.keywords | keywords).items()}
        method = "PUT" if {"content", "files", "json"} & keywords.keys() else "GET"
        return await client.call_service("cards", path, method, **keywords)


PLAIN = Way("plainly")
WAYS = [
    PLAIN,
    Way("json", json={"a": 1}),
    Way("content", content=b"x"),
    Way("a request hook", hooked="request"),
    Way("a response hook", hooked="response"),
    Way("auth", auth=("u", "p")),
    Way("follow_redirects", follow_redirects=True),
    Way("extensions", extensions={"idempotent": True}),
]
UPLOADS = [
    Way("files", files=lambda: {"f": b"x"}),
    Way("a file object", files=lambda: {"f": io.BytesIO(b"x")}),
    Way("a stream", content=lambda: source(b"one", b"two")),
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
every_way_and_upload = pytest.mark.parametrize("way", [*WAYS, *UPLOADS], ids=lambda way: way.name)


@asynccontextmanager
async def servers(*handlers: Handler) -> AsyncIterator[list[Instance]]:
    async with raw_servers(*handlers) as found:
        yield [server.instance for server in found]


async def ok(head: bytes, writer: asyncio.StreamWriter) -> bool:
    writer.write(OK)
    return True


async def trickle(head: bytes, writer: asyncio.StreamWriter) -> bool:
    """A body without an end; a path without a slash is redirected."""
    if head.split()[1] == b"/slash":
        writer.write(b"HTTP/1.1 307 X\r\nLocation: /slash/\r\nContent-Length: 0\r\n\r\n")
        return True
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x")
        await asyncio.sleep(0.02)
    return False


async def cut(head: bytes, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    return False


async def until(moment: float) -> None:
    while time.time() < moment:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def client_of(*instances: Instance, **options: Any) -> ServiceDiscoveryClient:
    return ServiceDiscoveryClient(StaticResolver({"cards": instances}), **{"retry_delay": 0.0} | options)


@pytest.mark.real
@pytest.mark.parametrize("path", ["/", "/slash"])
@every_way_and_upload
async def test_time_outs_cover_the_body(way: Way, path: str) -> None:
    """An answer whose body trickles ends with the time-out of the attempt, and of the call, on every way."""
    async with servers(trickle) as instances:
        for options in ({"timeout": 0.2, "deadline": 5.0}, {"timeout": 5.0, "deadline": 0.2}):
            async with client_of(*instances, max_retries=1, **options) as client, asyncio.timeout(3):
                if path == "/slash" and way.name == "a stream":
                    continue  # it can't be sent twice
                with pytest.raises(httpx.TimeoutException):
                    await way.get(client, path)


@every_way
async def test_cut_body_is_repeated_and_counted(way: Way) -> None:
    """A body that breaks off sends the call to the next instance, and counts against the one that broke off."""
    async with servers(cut, ok) as instances, client_of(*instances) as client:
        for _ in range(20):
            assert (await way.get(client)).text == "ok"
        assert client.explain("cards").endpoints[0].failures >= 1


@every_way_and_upload
async def test_refused_connection_goes_to_the_next_instance(way: Way) -> None:
    """Where nothing was sent the body is untouched, whatever it is: the call goes on."""
    dead = Instance("dead", "cards", "127.0.0.1", free_ports(1)[0])
    async with servers(ok) as instances:
        for _ in range(10):
            async with client_of(dead, *instances) as client:
                assert (await way.get(client)).text == "ok"


@every_way
async def test_facade_keeps_no_cookies(way: Way) -> None:
    """What one user's call is told to remember does not go out with the next user's; ``client.http`` may keep it."""
    seen: list[bytes] = []

    async def log_in(head: bytes, writer: asyncio.StreamWriter) -> bool:
        seen.append(head)
        if b"/login" in head:
            writer.write(b"HTTP/1.1 303 See\r\nLocation: /home\r\nSet-Cookie: s=annas\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: s=annas\r\nContent-Length: 2\r\n\r\nok")
        return True

    async with servers(log_in) as instances, client_of(*instances) as client:
        for path in ("/", "/login", "/"):
            await way.get(client, path)
        await client.http.get("http://cards/")
        assert not any(b"cookie" in head.lower() for head in seen)
        await client.http.get("http://cards/")
        assert b"Cookie: s=annas" in seen[-1]
        await way.get(client)
        assert b"cookie" not in seen[-1].lower()


@every_way
async def test_default_headers_and_params_are_todays(way: Way) -> None:
    """A default header or parameter that is changed after a call holds from the next one on, on every way."""
    seen: list[bytes] = []

    async def note(head: bytes, writer: asyncio.StreamWriter) -> bool:
        seen.append(head)
        return await ok(head, writer)

    async with servers(note) as instances, client_of(*instances) as client:
        await way.get(client)
        client.http.headers["X-Version"] = "2"
        client.http.params = {"page": "7"}
        await way.get(client)
        client.http.headers["X-Version"] = "3"
        await way.get(client)
    assert [b"X-Version: %d" % n in head for n, head in zip((2, 2, 3), seen, strict=True)] == [False, True, True]
    assert [head.split()[1] for head in seen] == [b"/", b"/?page=7", b"/?page=7"]


@every_way
async def test_redirects_keep_our_scheme(way: Way) -> None:
    """A service that was told of https by a forwarded header redirects there: the call stays on what is spoken here."""

    async def slash(head: bytes, writer: asyncio.StreamWriter) -> bool:
        if head.split()[1] == b"/items":
            writer.write(b"HTTP/1.1 307 X\r\nLocation: https://cards/items/\r\nContent-Length: 0\r\n\r\n")
            return True
        return await ok(head, writer)

    async with servers(slash, slash) as instances, client_of(*instances) as client:
        response = await way.get(client, "/items")
        assert (response.text, str(response.url)) == ("ok", "http://cards/items/")
        assert [before.status_code for before in response.history] == [307]
        assert [each.ejected_for for each in client.explain("cards").endpoints] == [0.0, 0.0]


@pytest.mark.parametrize(
    "location", ["http://users/me", "https://users/me", "http://evil.example/", "http://cards:81/"]
)
@every_way_and_upload
async def test_redirects_stay_within_the_service(way: Way, location: str) -> None:
    """Elsewhere nothing is sent unless asked for, and the error says how; asked not to follow, it is an answer."""
    arrived: list[bytes] = []

    async def away(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 307 X\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % location.encode())
        return True

    async def users(head: bytes, writer: asyncio.StreamWriter) -> bool:
        arrived.append(head)
        return await ok(head, writer)

    async with servers(away, users) as (here, there):
        resolver = StaticResolver({"cards": [here], "users": [there]})
        async with ServiceDiscoveryClient(resolver, retry_delay=0.0) as client:
            if "follow_redirects" not in way.keywords:
                with pytest.raises(InvalidInputError):
                    await way.get(client, headers={"X-Api-Key": "secret"})
            response = await way.get(client, follow_redirects=False)
            assert (response.status_code, response.headers["Location"]) == (307, location)
    assert arrived == []


async def test_redirect_to_another_service_when_asked_for() -> None:
    """It drops what was for the first service only: the tag, the credentials."""
    arrived: list[bytes] = []

    async def away(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 302 X\r\nLocation: http://users/me\r\nContent-Length: 0\r\n\r\n")
        return True

    async def users(head: bytes, writer: asyncio.StreamWriter) -> bool:
        arrived.append(head)
        return await ok(head, writer)

    async with servers(away, users) as (here, there):
        tagged = Instance(here.id, "cards", here.address, here.port, tags=("v2",))
        resolver = StaticResolver({"cards": [tagged], "users": [there]})
        async with ServiceDiscoveryClient(resolver) as client:
            headers = {"Authorization": "Bearer b", "Cookie": "a=1"}
            response = await client.get("cards", "/", tag="v2", headers=headers, follow_redirects=True)
    assert response.text == "ok"
    assert b"GET /me " in arrived[0]
    assert b"Bearer" not in arrived[0]
    assert b"Cookie" not in arrived[0]


async def test_bad_location_is_an_answer() -> None:
    """A Location that is no URL leads nowhere: the answer is returned as it is."""

    async def nowhere(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 302 X\r\nLocation: http://[::1/\r\nContent-Length: 0\r\n\r\n")
        return True

    async with servers(nowhere) as instances, client_of(*instances) as client:
        assert (await client.get("cards", "/")).status_code == 302


async def test_nothing_of_ours_stays_in_the_callers_request() -> None:
    """The same request sent again has its time anew, and is as the caller made it."""
    async with servers(ok) as instances:
        transport = DiscoveryTransport(StaticResolver({"cards": instances}), deadline=0.1)
        async with httpx.AsyncClient(transport=transport) as client:
            request = client.build_request("GET", "http://cards/")
            before = dict(request.extensions), request.headers.raw
            await client.send(request)
            assert (request.extensions, request.headers.raw) == before
            await until(time.time() + 0.15)
            assert (await client.send(request)).text == "ok"


async def test_httpx_time_outs_are_taken() -> None:
    """``timeout=httpx.Timeout(…)`` limits each step as in httpx: a body that goes on is not cut, silence is."""

    async def slowly(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
        for _ in range(4 if b"/slowly" in head else 1):
            await asyncio.sleep(0.1)
            writer.write(b"x")
        await asyncio.sleep(5 if b"/silent" in head else 0)
        return True

    async with servers(slowly) as instances, client_of(*instances, max_retries=1) as client:
        assert (await client.get("cards", "/slowly", timeout=httpx.Timeout(0.3))).text == "xxxx"
        with pytest.raises(httpx.ReadTimeout):
            await client.get("cards", "/silent", timeout=httpx.Timeout(0.3))


def test_httpx_client_is_told_what_to_do() -> None:
    """The transport of an asynchronous client under a synchronous one: a sentence, not an AttributeError."""
    transport = DiscoveryTransport(StaticResolver({"cards": [Instance("cards-1", "cards", "127.0.0.1", 1)]}))
    client = httpx.Client(transport=transport)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"SyncDiscoveryTransport"):
        client.get("http://cards/")
    client.close()
    with pytest.raises(InvalidInputError, match=r"httpx\.AsyncClient"), httpx.Client(transport=transport):  # type: ignore[arg-type]
        pass


async def test_upgrade_is_told_what_to_do() -> None:
    """A WebSocket through the transport: a sentence that says where to get an address."""

    async def switch(head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        return True

    headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
    async with servers(switch) as instances, client_of(*instances) as client:
        for send in (client.get("cards", "/", headers=headers), client.http.get("http://cards/", headers=headers)):
            with pytest.raises(httpx.UnsupportedProtocol, match="get_service_url"):
                await send
        assert client.explain("cards").endpoints[0].ejected_for == 0.0


async def test_plain_iterator_as_a_body_is_told_what_to_do() -> None:
    """As in httpx, a body that can only be read by blocking is refused."""
    async with servers(ok) as instances, client_of(*instances) as client:
        with pytest.raises(RuntimeError, match="async iterator"):
            await client.post("cards", "/", content=iter([b"x"]))
