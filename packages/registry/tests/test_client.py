"""The discovery client on real sockets: what arrives, how often, at whom, and what the caller is told."""

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from registry import (
    DiscoveryTransport,
    InvalidInputError,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
    ServiceRegistry,
    StaticResolver,
)
from registry.discovery.balancing import Pick
from registry.model import Instance
from registry.testing.fixtures import ConsulAgent, Instances
from registry.testing.ports import free_ports
from tests.support.server import Answer, RecordingServer, Request, Serve


def picking_in_order(instances: Sequence[Instance]) -> Pick:
    """A policy without chance: the first of these that is left."""
    ids = [instance.id for instance in instances]
    return lambda candidates, now: min(candidates, key=lambda endpoint: ids.index(endpoint.instance.id))


def client_of(*instances: RecordingServer | Instance, in_order: bool = False, **kwargs: Any) -> ServiceDiscoveryClient:
    """A client for which these are the instances of ``cards``; quick to retry."""
    found = [i if isinstance(i, Instance) else i.of("cards") for i in instances]
    if in_order:
        kwargs["policy"] = picking_in_order(found)
    return ServiceDiscoveryClient(StaticResolver({"cards": found}), **{"timeout": 5.0, "retry_delay": 0.01} | kwargs)


def refusing() -> Instance:
    """An instance at a port where nobody listens."""
    (port,) = free_ports(1)
    return Instance(f"cards-refusing-{port}", "cards", "127.0.0.1", port)


def arrivals(*servers: RecordingServer) -> Counter[str]:
    """How often each target arrived, over all servers."""
    return Counter(request.target for server in servers for request in server.requests)


def notes(error: BaseException) -> list[str]:
    """The notes of an error."""
    return list(getattr(error, "__notes__", []))


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["get", "post", "put", "patch", "delete"])
async def test_every_verb_arrives(serve: Serve, verb: str) -> None:
    """Each verb's method sends that method, to the path that was given, and returns an httpx.Response."""
    server = serve(lambda _: Answer(200, b'{"name": "ace"}'))
    async with client_of(server) as client:
        response = await getattr(client, verb)("cards", "/api/cards/7?full=1")
        assert isinstance(response, httpx.Response)
        assert response.json() == {"name": "ace"}
        assert str(response.url) == "http://cards/api/cards/7?full=1"
    (request,) = server.requests
    assert (request.method, request.target) == (verb.upper(), "/api/cards/7?full=1")


@pytest.mark.parametrize("method", ["GET", "post", "HEAD", "OPTIONS"])
async def test_call_service_takes_any_method(serve: Serve, method: str) -> None:
    """``call_service`` sends whatever method it is told to, GET unless told."""
    server = serve()
    async with client_of(server) as client:
        await client.call_service("cards", "/", method)
        await client.call_service("cards", "/")
    assert [request.method for request in server.requests] == [method.upper(), "GET"]


async def test_params_join_the_query(serve: Serve) -> None:
    """``params`` are encoded into the query, beside what the path already asks for."""
    server = serve()
    async with client_of(server) as client:
        await client.get("cards", "/search", params={"q": "a b&c=d/é", "page": 2})
        await client.get("cards", "/search?q=1", params={"page": 2})
    first, second = (httpx.URL(request.target).params for request in server.requests)
    assert dict(first) == {"q": "a b&c=d/é", "page": "2"}
    assert dict(second) == {"q": "1", "page": "2"}


async def test_json_and_headers_arrive(serve: Serve) -> None:
    """``json`` becomes the body with its content type, ``headers`` arrive as given."""
    server = serve()
    async with client_of(server) as client:
        await client.post(
            "cards", "/", json={"title": "Ünïcode"}, headers={"X-Request-Id": "r-1", "Accept": "text/csv"}
        )
    (request,) = server.requests
    assert json.loads(request.body) == {"title": "Ünïcode"}
    assert request.headers["content-type"] == "application/json"
    assert (request.headers["x-request-id"], request.headers["accept"]) == ("r-1", "text/csv")


async def test_data_is_a_form(serve: Serve) -> None:
    """``data`` becomes a form."""
    server = serve()
    async with client_of(server) as client:
        await client.post("cards", "/", data={"a": "1", "b": "x y"})
    (request,) = server.requests
    assert request.body == b"a=1&b=x+y"
    assert request.headers["content-type"] == "application/x-www-form-urlencoded"


async def test_other_keywords_reach_httpx(serve: Serve) -> None:
    """``content``, ``files``, ``cookies`` and ``auth`` do what they do in httpx."""
    server = serve()
    async with client_of(server) as client:
        await client.post("cards", "/", content=b"raw", auth=("user", "password"))
        await client.post("cards", "/", files={"file": ("name.txt", b"text")})
    raw, multipart = server.requests
    assert raw.body == b"raw"
    assert raw.headers["authorization"].startswith("Basic ")
    assert b'filename="name.txt"' in multipart.body


async def test_the_host_header_is_the_service(serve: Serve) -> None:
    """The instance sees the logical name as Host, not its own address."""
    server = serve()
    async with client_of(server) as client:
        await client.get("cards", "/")
    assert server.requests[0].headers["host"] == "cards"


async def test_cookies_of_one_call_stay_out_of_the_next(serve: Serve) -> None:
    """A session that an answer opens belongs to that call: the next one may be for another user."""
    server = serve(lambda _: Answer(200, b"{}", {"Set-Cookie": "session=of-one-user; Path=/"}))
    async with client_of(server) as client:
        await client.get("cards", "/")
        await client.get("cards", "/")
    assert "cookie" not in server.requests[1].headers


async def test_calls_keep_their_connections(serve: Serve) -> None:
    """Calls one after the other use one connection per instance."""
    open_connections: list[int] = []

    def answer(_: Request) -> Answer:
        open_connections.append(len(server.connections))
        return Answer()

    server = serve(answer)
    async with client_of(server) as client:
        for _ in range(100):
            await client.get("cards", "/")
    assert max(open_connections) == 1


# -- answers that are errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 429])
async def test_4xx_raises_at_once(serve: Serve, status: int) -> None:
    """A 4xx is raised as HTTPStatusError with its answer, after one request, although another instance exists."""
    one, two = servers = serve(lambda _: Answer(status, b"because")), serve(lambda _: Answer(status, b"because"))
    async with client_of(one, two) as client:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await client.get("cards", "/")
    assert (caught.value.response.status_code, caught.value.response.text) == (status, "because")
    assert arrivals(*servers) == {"/": 1}


async def test_5xx_raises_after_the_last_attempt(serve: Serve) -> None:
    """Three instances, three attempts: each is asked once, then the last 5xx is raised with one note per attempt."""
    servers = [serve(lambda _: Answer(503, b"sick")) for _ in range(3)]
    async with client_of(*servers, max_retries=3) as client:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await client.get("cards", "/")
    assert (caught.value.response.status_code, caught.value.response.text) == (503, "sick")
    assert [len(server.requests) for server in servers] == [1, 1, 1]
    assert [note.partition(" on ")[0] for note in notes(caught.value)] == ["attempt 1", "attempt 2", "attempt 3"]
    for server in servers:
        (told,) = [note for note in notes(caught.value) if f"127.0.0.1:{server.port}" in note]
        assert "503" in told


async def test_5xx_of_a_single_instance_is_tried_again(serve: Serve) -> None:
    """With one instance only, all attempts go to it, with back-off; the one that works counts."""

    def answer(_: Request) -> Answer:
        return Answer(200 if len(server.requests) == 3 else 500)

    server = serve(answer)
    async with client_of(server, max_retries=3) as client:
        assert (await client.get("cards", "/")).status_code == 200
    assert len(server.requests) == 3


@pytest.mark.parametrize("max_retries", [1, 2, 5])
async def test_max_retries_counts_attempts(serve: Serve, max_retries: int) -> None:
    """``max_retries`` is the number of attempts in total, the first one included."""
    server = serve(lambda _: Answer(500))
    async with client_of(server, max_retries=max_retries) as client:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await client.get("cards", "/")
    assert len(server.requests) == len(notes(caught.value)) == max_retries


async def test_5xx_of_a_post_is_not_repeated(serve: Serve) -> None:
    """A POST that was answered with 5xx may have had its effect: it is raised after one request."""
    servers = [serve(lambda _: Answer(502)) for _ in range(2)]
    async with client_of(*servers) as client:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await client.post("cards", "/", json={})
    assert arrivals(*servers) == {"/": 1}
    assert len(notes(caught.value)) == 1


# -- failing over ------------------------------------------------------------------------------------------------------


async def test_a_get_goes_to_the_next_instance(serve: Serve) -> None:
    """A GET whose connection is cut, that is answered 500, or refused, succeeds on the next instance."""
    cut, sick, good = serve(lambda _: None), serve(lambda _: Answer(500)), serve()
    for bad in (cut, sick, refusing()):
        async with client_of(bad, good, in_order=True) as client:
            assert (await client.get("cards", "/")).status_code == 200
    assert (len(cut.requests), len(sick.requests), len(good.requests)) == (1, 1, 3)


async def test_a_get_cut_within_the_body_goes_to_the_next_instance(serve: Serve) -> None:
    """An answer that breaks off half way is no answer: the next instance gives a whole one."""
    half = serve(lambda _: Answer(200, b'{"half', {"Content-Length": "100"}))
    good = serve(lambda _: Answer(200, b'{"whole": 1}'))
    async with client_of(half, good, in_order=True) as client:
        assert (await client.get("cards", "/")).json() == {"whole": 1}
    assert len(half.requests) == 1


async def test_a_post_that_was_cut_after_writing_is_sent_once(serve: Serve) -> None:
    """A POST that the instance has read before it died is sent once and raised, though another instance exists."""
    cut, good = serve(lambda _: None), serve()
    async with client_of(cut, good, in_order=True) as client:
        with pytest.raises(httpx.TransportError) as raised:
            await client.post("cards", "/", json={})
    assert (len(cut.requests), len(good.requests)) == (1, 0)
    assert len(notes(raised.value)) == 1
    assert not isinstance(raised.value, (httpx.ConnectError, httpx.ConnectTimeout))


async def test_a_post_on_a_kept_connection_that_is_cut_is_sent_once(serve: Serve) -> None:
    """The same when the connection had already carried a call: it arrives once and is raised."""
    server = serve(lambda request: Answer() if request.target == "/first" else None)
    async with client_of(server) as client:
        for _ in range(5):
            await client.post("cards", "/first", json={})
            with pytest.raises(httpx.TransportError):
                await client.post("cards", "/second", json={})
    assert arrivals(server) == {"/first": 5, "/second": 5}


@asynccontextmanager
async def raw_server(handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[Instance]:
    """An instance that is nothing but a socket."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Instance(f"cards-raw-{port}", "cards", "127.0.0.1", port)
    finally:
        server.close()


@pytest.mark.parametrize("ending", ["close", "reset", "garbage", "half headers"])
async def test_a_post_that_was_read_is_sent_once_however_it_ends(ending: str) -> None:
    """Closed, reset, answered with garbage or with half a head: what was read is not sent again, and is an error."""
    read = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        read.append(head)
        await reader.readexactly(len(b'{"a":1}'))
        if ending == "reset":
            # Closing with a linger time of zero sends RST in place of FIN.
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if ending == "garbage":
            writer.write(b"not http at all\r\n\r\n")
        if ending == "half headers":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-")
        writer.close()

    async with raw_server(handle) as instance, client_of(instance) as client:
        with pytest.raises(httpx.TransportError) as caught:
            await client.post("cards", "/", json={"a": 1})
    assert len(read) == 1
    assert len(notes(caught.value)) == 1


async def test_a_post_to_a_refused_port_goes_to_the_next_instance(serve: Serve) -> None:
    """Nobody has seen a POST whose connection was refused: it is sent to the next instance, once."""
    good = serve()
    async with client_of(refusing(), good, in_order=True) as client:
        await client.post("cards", "/", json={})
        assert "refused" in {endpoint.ejected_because for endpoint in client.explain("cards").endpoints}
    assert len(good.requests) == 1


async def test_all_refused_is_a_connect_error_with_notes() -> None:
    """When nobody listens anywhere, the last refusal is raised, with a note for each instance that was tried."""
    instances = [refusing() for _ in range(3)]
    async with client_of(*instances, max_retries=3) as client:
        with pytest.raises(httpx.ConnectError) as caught:
            await client.post("cards", "/", json={})
    assert all(any(instance.id in note for note in notes(caught.value)) for instance in instances)
    assert len(notes(caught.value)) == 3


REPEATABLE: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {"headers": {"Idempotency-Key": "k-1"}},
    "idempotent=True": {"idempotent": True},
}


@pytest.mark.parametrize("how", REPEATABLE)
@pytest.mark.parametrize("verb", ["post", "patch"])
async def test_a_post_that_may_be_repeated_is(serve: Serve, how: str, verb: str) -> None:
    """With an Idempotency-Key or ``idempotent=True`` a cut or sick POST goes to the next instance, the same again."""
    cut, sick, good = serve(lambda _: None), serve(lambda _: Answer(503)), serve()
    for number in range(30):
        async with client_of(cut, sick, good) as client:
            await getattr(client, verb)("cards", f"/{number}", json={"number": number}, **REPEATABLE[how])
    assert arrivals(good) == {f"/{number}": 1 for number in range(30)}
    for request in cut.requests + sick.requests + good.requests:
        assert json.loads(request.body) == {"number": int(request.target[1:])}
        assert request.headers.get("idempotency-key") == ("k-1" if how == "Idempotency-Key" else None)
    assert cut.requests
    assert sick.requests


async def test_idempotent_false_beats_the_method(serve: Serve) -> None:
    """A PUT that its caller calls not idempotent is sent once."""
    servers = [serve(lambda _: Answer(500)) for _ in range(2)]
    async with client_of(*servers) as client:
        with pytest.raises(httpx.HTTPStatusError):
            await client.put("cards", "/", json={}, idempotent=False)
    assert arrivals(*servers) == {"/": 1}


async def chunks() -> AsyncIterator[bytes]:
    """A body that exists once."""
    yield b"one "
    yield b"two"


@pytest.mark.parametrize("bad", ["sick", "cut"])
async def test_a_body_that_cannot_be_replayed_is_sent_once(serve: Serve, bad: str) -> None:
    """A body from a generator is never sent twice, though the method would allow it."""
    servers = [serve(lambda _: Answer(500) if bad == "sick" else None) for _ in range(2)]
    async with client_of(*servers) as client:
        with pytest.raises(httpx.HTTPError):
            await client.put("cards", "/", content=chunks(), idempotent=True)
    assert arrivals(*servers) == {"/": 1}
    assert [request.body for server in servers for request in server.requests] == [b"one two"]


async def test_a_body_that_cannot_be_replayed_arrives(serve: Serve) -> None:
    """When nothing fails, a body from a generator arrives whole."""
    server = serve()
    async with client_of(server) as client:
        await client.post("cards", "/", content=chunks())
    assert server.requests[0].body == b"one two"


# -- finding -----------------------------------------------------------------------------------------------------------


async def test_unknown_service_is_a_value_error(service_registry: ServiceRegistry) -> None:
    """A name that nobody has is a ValueError with the documented message."""
    async with ServiceDiscoveryClient(service_registry) as client:
        with pytest.raises(ValueError, match=r"^Service 'nonexistent-service' not found in registry$"):
            await client.get("nonexistent-service", "/health")


async def test_calls_spread_over_the_instances_of_consul(
    service_registry: ServiceRegistry, consul_agent: ConsulAgent, service_name: str, instances: Instances
) -> None:
    """Instances that Consul knows are found by name and all get calls; one that is deregistered gets none."""
    one, two, three = instances(service_name, 3, consul=consul_agent, check_interval=None)
    async with ServiceDiscoveryClient(service_registry) as client:

        async def share(calls: int) -> Counter[str]:
            answers = [await client.get(service_name, "/") for _ in range(calls)]
            return Counter(answer.json()["instance"] for answer in answers)

        assert set(await share(90)) == {each.instance.id for each in (one, two, three)}
        one.deregister()
        deadline = time.monotonic() + 5
        while set(await share(20)) != {two.instance.id, three.instance.id}:
            assert time.monotonic() < deadline


async def test_tag_chooses_instances(serve: Serve) -> None:
    """With ``tag`` only instances that carry it are called; an unused tag is "not found"."""
    blue, green = serve(), serve()
    instances = [blue.of("cards", tags=("blue",)), green.of("cards", tags=("green", "new"))]
    async with client_of(*instances) as client:
        for _ in range(10):
            await client.get("cards", "/", tag="green")
        with pytest.raises(ServiceNotFoundError):
            await client.get("cards", "/", tag="red")
    assert (len(blue.requests), len(green.requests)) == (0, 10)


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hanging(serve: Serve) -> Iterator[RecordingServer]:
    """A server that reads requests and answers none before the test is over."""
    over = threading.Event()
    yield serve(lambda _: over.wait(20) and None)
    over.set()


async def test_timeout_bounds_one_attempt(hanging: RecordingServer) -> None:
    """Each attempt ends after ``timeout`` seconds, and after the last one the time-out is raised with its notes."""
    begun = time.monotonic()
    async with client_of(hanging, timeout=0.2, deadline=5.0, max_retries=2) as client:
        with pytest.raises(httpx.ReadTimeout) as caught:
            await client.get("cards", "/")
    assert 0.4 <= time.monotonic() - begun < 2
    assert len(hanging.requests) == len(notes(caught.value)) == 2


async def test_timeout_of_a_call_beats_the_clients(hanging: RecordingServer) -> None:
    """``timeout=`` of one call replaces the client's."""
    begun = time.monotonic()
    async with client_of(hanging, timeout=10, max_retries=1) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.get("cards", "/", timeout=0.2)
    assert time.monotonic() - begun < 2


async def test_a_hanging_instance_costs_one_timeout(hanging: RecordingServer, serve: Serve) -> None:
    """A GET that hangs is tried on the next instance after its time-out; a POST is not, it may have been seen."""
    good = serve()
    async with client_of(hanging, good, timeout=0.15, in_order=True) as client:
        assert (await client.get("cards", "/")).status_code == 200
    async with client_of(hanging, good, timeout=0.15, in_order=True) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("cards", "/", json={})
    assert [request.method for request in hanging.requests] == ["GET", "POST"]
    assert [request.method for request in good.requests] == ["GET"]


async def test_deadline_covers_all_attempts(hanging: RecordingServer) -> None:
    """The whole call ends at its deadline, whatever the attempts' time-outs and number."""
    begun = time.monotonic()
    async with client_of(hanging, timeout=0.3, deadline=0.5, max_retries=50) as client:
        with pytest.raises(httpx.TimeoutException) as caught:
            await client.get("cards", "/")
    assert time.monotonic() - begun < 1.5
    assert notes(caught.value)


async def test_deadline_covers_the_body(serve: Serve) -> None:
    """An answer that drips for ever, each piece within the time-out, ends at the deadline too."""
    over = threading.Event()

    def drip() -> Iterator[bytes]:
        for _ in range(100):
            if over.wait(0.05):
                return
            yield b"x"

    server = serve(lambda _: Answer(200, drip()))
    begun = time.monotonic()
    try:
        async with client_of(server, timeout=0.5, deadline=0.8, max_retries=3) as client:
            with pytest.raises(httpx.TimeoutException):
                await client.get("cards", "/")
        assert time.monotonic() - begun < 2
    finally:
        over.set()


async def test_deadline_covers_redirects(serve: Serve) -> None:
    """A chain of slow redirects is one call with one deadline."""

    def answer(request: Request) -> Answer:
        time.sleep(0.15)
        return Answer(307, b"", {"Location": f"http://cards{request.target}x"})

    server = serve(answer)
    begun = time.monotonic()
    async with client_of(server, timeout=1.0, deadline=0.5) as client:
        with pytest.raises(httpx.HTTPError):
            await client.get("cards", "/")
    assert time.monotonic() - begun < 1.5


async def test_retry_after_is_honoured(serve: Serve) -> None:
    """A single instance that asks for a second gets it before it is asked again."""
    times: list[float] = []

    def answer(_: Request) -> Answer:
        times.append(time.monotonic())
        return Answer(503, b"", {"Retry-After": "1"}) if len(times) == 1 else Answer()

    server = serve(answer)
    async with client_of(server) as client:
        assert (await client.get("cards", "/")).status_code == 200
    assert times[1] - times[0] >= 1.0


async def test_retry_after_beyond_the_deadline_ends_the_call(serve: Serve) -> None:
    """Nobody waits for a retry that could not come in time: the 503 is raised at once."""
    server = serve(lambda _: Answer(503, b"come back tomorrow", {"Retry-After": "86400"}))
    begun = time.monotonic()
    async with client_of(server, deadline=10) as client:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await client.get("cards", "/")
    assert time.monotonic() - begun < 2
    assert caught.value.response.status_code == 503


async def test_a_cancelled_call_ends_its_attempt(serve: Serve) -> None:
    """Cancelling a call closes its connection, starts no other attempt, and leaves the client usable."""
    arrived, closed = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        assert not arrived.is_set()
        arrived.set()
        assert await reader.read() == b""
        closed.set()
        writer.close()

    good = serve()
    async with raw_server(handle) as instance:
        resolver = StaticResolver({"cards": [instance], "other": [good.of("other")]})
        async with ServiceDiscoveryClient(resolver, timeout=10) as client:
            async with asyncio.timeout(5):
                call = asyncio.ensure_future(client.get("cards", "/"))
                await arrived.wait()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                await closed.wait()
            assert (await client.get("other", "/")).status_code == 200


async def test_many_calls_side_by_side(serve: Serve) -> None:
    """Two hundred calls at once all arrive, each once."""
    servers = [serve() for _ in range(2)]
    async with client_of(*servers) as client:
        await asyncio.gather(*(client.post("cards", f"/{number}", json={}) for number in range(200)))
    assert arrivals(*servers) == {f"/{number}": 1 for number in range(200)}


# -- redirects ---------------------------------------------------------------------------------------------------------


def with_slash(request: Request) -> Answer:
    """What a web framework does to a path without its slash: it sends the caller to where Host says, plus slash."""
    path, _, query = request.target.partition("?")
    if path.endswith("/"):
        return Answer()
    location = f"http://{request.headers['host']}{path}/" + (f"?{query}" if query else "")
    return Answer(307, b"", {"Location": location})


@pytest.mark.parametrize("verb", ["get", "post"])
async def test_slash_redirect_stays_on_the_service(serve: Serve, verb: str) -> None:
    """A redirect to the same path with a slash comes back to the service, with body, query and Authorization."""
    server = serve(with_slash)
    async with client_of(server) as client:
        content = {"json": {"a": 1}} if verb == "post" else {}
        response = await getattr(client, verb)(
            "cards", "/api/cards?q=1", headers={"Authorization": "Bearer b"}, **content
        )
    assert (response.status_code, str(response.url)) == (200, "http://cards/api/cards/?q=1")
    first, second = server.requests
    assert (first.target, second.target) == ("/api/cards?q=1", "/api/cards/?q=1")
    assert (first.headers["authorization"], second.headers["authorization"]) == ("Bearer b", "Bearer b")
    assert (second.method, second.body) == (first.method, first.body)


@pytest.mark.parametrize(
    "location",
    ["http://evil.example/", "//evil.example/", "http://127.0.0.1:{port}/", "http://[::1]/", "http://169.254.1.1/"],
)
async def test_redirect_leads_to_no_address(serve: Serve, location: str) -> None:
    """An instance can't send the caller to an address: only services are reached, the rest is an error."""
    outside = serve()
    server = serve(lambda _: Answer(302, b"", {"Location": location.format(port=outside.port)}))
    async with client_of(server) as client:
        with pytest.raises(InvalidInputError):
            await client.get("cards", "/", headers={"Authorization": "Bearer b"})
    assert outside.requests == []


async def test_redirect_to_another_service_drops_authorization(serve: Serve) -> None:
    """Asked to, a redirect to another service is followed, but not with the credentials that were for the first."""
    server, other = serve(lambda _: Answer(302, b"", {"Location": "http://other/x"})), serve()
    resolver = StaticResolver({"cards": [server.of("cards")], "other": [other.of("other")]})
    async with ServiceDiscoveryClient(resolver) as client:
        await client.get("cards", "/", headers={"Authorization": "Bearer b"}, follow_redirects=True)
    (request,) = other.requests
    assert request.target == "/x"
    assert "authorization" not in request.headers


async def test_redirect_loop_ends(serve: Serve) -> None:
    """A service that redirects to itself for ever is an error."""
    server = serve(lambda _: Answer(302, b"", {"Location": "/"}))
    async with client_of(server) as client:
        with pytest.raises(httpx.TooManyRedirects):
            await client.get("cards", "/")


@pytest.mark.parametrize(
    "name", ["my_service", "My.Service", "team/service", "k\xe4rten", "a" * 64, "___", "xn--a", "a?b#c%2f"]
)
async def test_names_of_others_are_called(serve: Serve, name: str) -> None:
    """Whatever Consul takes for a name can be called, redirects included; it is kept out of URL and Host."""
    server = serve(with_slash)
    resolver = StaticResolver({name: [server.of(name)], "s-my-service": []})
    async with ServiceDiscoveryClient(resolver) as client:
        response = await client.get(name, "/cards")
        assert (response.status_code, response.url.path) == (200, "/cards/")
        assert client.explain(name).endpoints[0].picks == 2
    assert re.fullmatch(r"s-[a-z0-9-]+", server.requests[0].headers["host"])


# -- the transport in any httpx client ---------------------------------------------------------------------------------


async def test_httpx_client_over_the_transport(serve: Serve) -> None:
    """``httpx.AsyncClient(transport=DiscoveryTransport(...), base_url=...)`` finds, balances and fails over."""
    server = serve()
    transport = DiscoveryTransport(StaticResolver({"cards": [server.of("cards"), refusing()]}))
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        for number in range(10):
            response = await client.get(f"/{number}")
            assert (response.status_code, str(response.url)) == (200, f"http://cards/{number}")
        with pytest.raises(ServiceNotFoundError):
            await client.get("http://nonexistent-service/")
    assert arrivals(server) == {f"/{number}": 1 for number in range(10)}


async def test_last_5xx_is_returned_by_the_transport(serve: Serve) -> None:
    """To an httpx client a 5xx is an answer: the last one is returned, readable, after all attempts."""
    servers = [serve(lambda _: Answer(503, b"sick")) for _ in range(3)]
    transport = DiscoveryTransport(StaticResolver({"cards": [server.of("cards") for server in servers]}))
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (503, "sick")
    assert [len(server.requests) for server in servers] == [1, 1, 1]


async def test_extensions_carry_tag_and_idempotence(serve: Serve) -> None:
    """Through an httpx client ``tag`` and ``idempotent`` are request extensions."""
    sick, good = serve(lambda _: Answer(500)), serve()
    instances = [sick.of("cards", tags=("a",)), good.of("cards", tags=("a", "b"))]
    transport = DiscoveryTransport(StaticResolver({"cards": instances}), policy=picking_in_order(instances))
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        await client.post("/b", extensions={"tag": "b"})
        assert (await client.post("/a", extensions={"tag": "a", "idempotent": True})).status_code == 200
    assert (arrivals(sick), arrivals(good)) == ({"/a": 1}, {"/a": 1, "/b": 1})


async def test_streaming_responses_arrive_piece_by_piece(serve: Serve) -> None:
    """A streamed answer is handed on as it comes: the second piece is sent only after the first was read."""
    first_was_read = threading.Event()

    def body() -> Iterator[bytes]:
        yield b"first"
        assert first_was_read.wait(5)
        yield b"second"

    server = serve(lambda _: Answer(200, body()))
    transport = DiscoveryTransport(StaticResolver({"cards": [server.of("cards")]}))
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        async with client.stream("GET", "/") as response:
            pieces = []
            async for piece in response.aiter_bytes():
                pieces.append(piece)
                first_was_read.set()
        assert b"".join(pieces) == b"firstsecond"
        assert pieces[0] == b"first"


async def test_auth_cookies_and_hooks_of_httpx_work(serve: Serve) -> None:
    """An httpx client over the transport keeps its auth, cookies and event hooks."""
    server = serve(lambda _: Answer(200, b"{}", {"Set-Cookie": "seen=1"}))
    heard: list[str] = []

    async def hear(response: httpx.Response) -> None:
        heard.append(str(response.url))

    transport = DiscoveryTransport(StaticResolver({"cards": [server.of("cards")]}))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://cards", auth=("u", "p"), event_hooks={"response": [hear]}
    ) as client:
        await client.get("/1")
        await client.get("/2")
    assert heard == ["http://cards/1", "http://cards/2"]
    assert server.requests[1].headers["cookie"] == "seen=1"
    assert server.requests[1].headers["authorization"].startswith("Basic ")


async def test_an_app_in_process_stands_in_for_instances() -> None:
    """``transport=httpx.ASGITransport(app)`` replaces the network: tests of a service need no socket."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    resolver = StaticResolver({"cards": [Instance("cards-1", "cards", "127.0.0.1", 80)]})
    async with ServiceDiscoveryClient(resolver, transport=httpx.ASGITransport(app)) as client:
        assert (await client.get("cards", "/in/process")).text == "/in/process"


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"max_retries": 0},
        {"retry_delay": -0.1},
        {"retry_delay": float("nan")},
        {"deadline": 0},
    ],
)
def test_bad_arguments_are_told(arguments: dict[str, Any]) -> None:
    """A client that could never work is not made."""
    with pytest.raises(InvalidInputError):
        client_of(**arguments)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
async def test_bad_timeout_of_a_call_is_told(serve: Serve, timeout: float) -> None:
    """A time-out that no call can keep is told before anything is sent."""
    server = serve()
    async with client_of(server) as client:
        with pytest.raises(InvalidInputError):
            await client.get("cards", "/", timeout=timeout)
    assert server.requests == []
