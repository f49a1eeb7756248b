import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import httpx
import pytest

import orchestrator.registry
import registry
from orchestrator.main import create_app
from orchestrator.settings import Settings
from registry import Instance, ServiceDiscoveryClient, Snapshot, StaticResolver
from registry.fastapi import discovery_client

Start: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
UPSTREAMS = {
    "backend-api": [Instance("backend-1", "backend-api", "10.0.0.1", 8002)],
    "research-api": [Instance("research-1", "research-api", "10.0.0.2", 8001)],
}
CARD = {"title": "Consul", "content": "finds services", "tags": ["registry"]}
PUBLISHED = CARD | {"id": 7, "suggestions": [], "enriched": True, "a field of tomorrow": 1}
ENRICHED = {"suggestions": [{"kind": "tag", "value": "registry", "score": 1}], "complete": True, "more": [2]}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts orchestrator-api without Consul; `upstream` answers every request to an instance."""
    async with AsyncExitStack() as stack:

        async def run(
            upstream: Callable[[httpx.Request], Any], resolver: registry.Resolver | None = None
        ) -> httpx.AsyncClient:
            app = create_app(Settings())
            discovery = await stack.enter_async_context(
                ServiceDiscoveryClient(
                    resolver or StaticResolver(UPSTREAMS), retry_delay=0.0, transport=httpx.MockTransport(upstream)
                )
            )
            app.dependency_overrides[discovery_client] = lambda: discovery
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")
            return await stack.enter_async_context(client)

        yield run


def answers(status: int, json: Any = None, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: httpx.Response(status, json=json, headers=named)


async def test_enrich_asks_research_api(start: Start) -> None:
    """The request goes to research-api whole, its answer comes back whole, with who answered."""
    seen: list[httpx.Request] = []

    def research(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=ENRICHED, headers={"X-Service-Instance": "research-1"})

    front = await start(research)
    answer = await front.post("/api/enrich", json={"content": "consul", "limit": 3})
    assert (answer.status_code, answer.json()) == (200, ENRICHED)
    assert answer.headers["X-Upstream-Instance"] == "research-1"
    assert [(str(request.url), request.headers["Host"]) for request in seen] == [
        ("http://10.0.0.2:8001/api/enrich", "research-api")
    ]
    assert seen[0].read() == b'{"content":"consul","limit":3}'


async def test_publish_asks_backend_api(start: Start) -> None:
    """The card goes to backend-api whole, its answer comes back whole, with who answered."""
    seen: list[httpx.Request] = []

    def backend(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(201, json=PUBLISHED, headers={"X-Service-Instance": "backend-1"})

    front = await start(backend)
    answer = await front.post("/api/publish", json=CARD, headers={"Idempotency-Key": "my-key"})
    assert (answer.status_code, answer.json()) == (201, PUBLISHED)
    assert answer.headers["X-Upstream-Instance"] == "backend-1"
    assert answer.headers["Idempotency-Key"] == "my-key"
    assert "Idempotent-Replayed" not in answer.headers
    assert [(str(request.url), request.headers["Idempotency-Key"]) for request in seen] == [
        ("http://10.0.0.1:8002/api/publish", "my-key")
    ]


async def test_the_name_of_the_release_before_is_taken(start: Start) -> None:
    """A caller who still sends `text` is passed on with `content`."""
    seen: list[Any] = []

    def upstream(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.read()))
        return httpx.Response(201, json=PUBLISHED | ENRICHED)

    front = await start(upstream)
    assert (await front.post("/api/publish", json={"title": "t", "text": "old"})).status_code == 201
    assert (await front.post("/api/enrich", json={"text": "old"})).status_code == 200
    assert [body["content"] for body in seen] == ["old", "old"]


async def test_a_replayed_answer_is_called_so(start: Start) -> None:
    """A caller who repeats a key learns that nothing new was published."""
    front = await start(answers(201, PUBLISHED, Idempotent_Replayed="true"))
    answer = await front.post("/api/publish", json=CARD, headers={"Idempotency-Key": "my-key"})
    assert answer.headers["Idempotent-Replayed"] == "true"


async def test_publish_without_a_key_is_repeated_under_one_key(start: Start) -> None:
    """A POST whose answer got lost is sent again, under the key that this service made; requests share none."""
    keys: list[str] = []

    def backend(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 1:
            raise httpx.ReadError("connection reset", request=request)
        return httpx.Response(201, json=PUBLISHED, headers={"Idempotent-Replayed": "true"})

    front = await start(backend)
    first = await front.post("/api/publish", json=CARD)
    assert first.status_code == 201
    assert "Idempotent-Replayed" not in first.headers  # the caller asked once
    assert len(keys) == 2
    assert len(set(keys)) == 1
    second = await front.post("/api/publish", json=CARD)
    assert second.headers["Idempotency-Key"] != first.headers["Idempotency-Key"] == keys[0]


async def test_enrich_is_repeated_because_it_only_reads(start: Start) -> None:
    """A failed enrich is asked again of another attempt."""
    outcomes = iter([httpx.Response(500), httpx.Response(200, json=ENRICHED)])
    front = await start(lambda _: next(outcomes))
    assert (await front.post("/api/enrich", json={"content": "consul"})).status_code == 200


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 429])
async def test_an_upstream_4xx_passes_through(start: Start, status: int) -> None:
    """What the caller did wrong is for the caller to read: status, body, type and who said it."""
    body = {"detail": [{"loc": ["body", "title"], "msg": "too long"}]}
    wait = "0" if status == 429 else "7"  # a 429 is waited for, before it is passed on
    front = await start(answers(status, body, X_Service_Instance="backend-1", Retry_After=wait))
    answer = await front.post("/api/publish", json=CARD)
    assert (answer.status_code, answer.json()) == (status, body)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Upstream-Instance"] == "backend-1"
    assert answer.headers["Retry-After"] == wait


@pytest.mark.parametrize("status", [429, 503])
async def test_what_an_upstream_declined_is_not_declined_by_us(start: Start, status: int) -> None:
    """Who is told that nothing was executed may send it anywhere again; only the upstream can say so of itself."""
    front = await start(answers(status, {}, X_Not_Executed="lag", Retry_After="0"))
    answer = await front.post("/api/publish", json=CARD)
    assert answer.status_code == status
    assert "X-Not-Executed" not in answer.headers


async def test_a_4xx_that_is_no_json_passes_through(start: Start) -> None:
    """Even an answer of a proxy in between stays what it was."""
    front = await start(lambda _: httpx.Response(413, html="<h1>Too large</h1>"))
    answer = await front.post("/api/publish", json=CARD)
    assert (answer.status_code, answer.text) == (413, "<h1>Too large</h1>")
    assert answer.headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize("value", ["\u20ac", "\u00fc\u20ac", "\u00ff", "a\tb", "\x7f", ""])
@pytest.mark.parametrize("status", [201, 422, 503])
async def test_what_no_header_can_hold_is_left_out(start: Start, status: int, value: str) -> None:
    """An upstream's headers are passed on when they are printable ASCII; others cost the header, not the answer."""
    names = ("X-Service-Instance", "Retry-After", "Content-Type")
    headers = [(name.encode(), value.encode()) for name in names]
    front = await start(lambda _: httpx.Response(status, content=json.dumps(PUBLISHED), headers=headers))
    answer = await front.post("/api/publish", json=CARD)
    assert answer.status_code == status
    assert "X-Upstream-Instance" not in answer.headers
    assert answer.headers.get("Retry-After") == ("1" if status == 503 else None)


async def test_headers_of_the_caller_go_nowhere(start: Start) -> None:
    """Framing and hop-by-hop headers of a caller belong to his connection; the calls on his behalf have their own."""
    seen: list[httpx.Request] = []

    def upstream(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(201, json=PUBLISHED | ENRICHED)

    front = await start(upstream)
    names = ["Connection", "Keep-Alive", "Proxy-Authorization", "TE", "Trailer", "Upgrade", "Expect", "Cookie"]
    theirs = dict.fromkeys(names, "theirs") | {"Content-Length": "3", "Transfer-Encoding": "theirs"}
    for path, body in (("/api/publish", CARD), ("/api/enrich", {"content": "consul"})):
        content = json.dumps(body).encode()
        headers = {**theirs, "Host": "elsewhere", "Content-Type": "application/json"}
        assert (await front.post(path, content=content, headers=headers)).status_code in {200, 201}
    for request in seen:
        assert "theirs" not in request.headers.values()
        assert request.headers["Host"].endswith("-api")
        assert request.headers["Content-Length"] == str(len(request.read()))
    assert len(seen) == 2


def raises(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def upstream(_: httpx.Request) -> httpx.Response:
        raise error

    return upstream


@pytest.mark.parametrize(
    ("upstream", "status", "words"),
    [
        (answers(500, {"detail": "secret stack"}), 502, "answered with status 500"),
        (answers(501), 502, "answered with status 501"),
        (answers(503, {"detail": "database away"}), 503, "answered with status 503"),
        (answers(504), 504, "answered with status 504"),
        (raises(httpx.ConnectError("refused")), 502, "could not be reached (ConnectError)"),
        (raises(httpx.ReadError("reset")), 502, "could not be reached (ReadError)"),
        (raises(httpx.RemoteProtocolError("garbage")), 502, "could not be reached (RemoteProtocolError)"),
        (raises(httpx.ConnectTimeout("slow")), 504, "did not answer in time"),
        (raises(httpx.ReadTimeout("slow")), 504, "did not answer in time"),
        (raises(httpx.PoolTimeout("busy")), 504, "did not answer in time"),
        (answers(200, {"unexpected": "shape"}), 502, "gave an answer that could not be understood"),
        (lambda _: httpx.Response(200, text="no json"), 502, "gave an answer that could not be understood"),
        (lambda _: httpx.Response(302, headers={"Location": "/api/enrich"}), 502, "could not be understood"),
    ],
)
@pytest.mark.parametrize(
    ("path", "body", "service"),
    [("/api/enrich", {"content": "consul"}, "research-api"), ("/api/publish", CARD, "backend-api")],
)
async def test_what_fails_behind_the_front_door_is_told_in_words(
    start: Start, upstream: Any, status: int, words: str, path: str, body: Any, service: str
) -> None:
    """Each kind of failure has its status, and the sentence names the service."""
    answer = await (await start(upstream)).post(path, json=body)
    assert answer.status_code == status
    assert answer.json()["service"] == service
    assert answer.json()["detail"].startswith(service)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert words in answer.json()["detail"]
    assert ("Retry-After" in answer.headers) == (status == 503)


class Failing(StaticResolver):
    """A resolver that always gives the same error."""

    def __init__(self, error: registry.RegistryError) -> None:
        super().__init__({})
        self.error = error

    def resolve(self, service: str, tag: str | None = None) -> Snapshot:
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (registry.ServiceNotFoundError("backend-api"), "backend-api has no healthy instance"),
        (registry.NoHealthyInstanceError("backend-api", 3), "backend-api has no healthy instance"),
        (registry.RegistryUnavailableError("down"), "Consul can't be asked where backend-api is"),
        (registry.RegistryError("ACL says no"), "backend-api can't be looked up: ACL says no"),
    ],
)
async def test_nobody_to_ask_is_503(start: Start, error: registry.RegistryError, words: str) -> None:
    """No instance and no Consul are both 503, in different words, and nothing is sent."""
    front = await start(raises(AssertionError("sent")), Failing(error))
    answer = await front.post("/api/publish", json=CARD)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["detail"].startswith(words)
    assert answer.json()["service"] == "backend-api"


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"title": "t", "content": NaN}',
        b'{"title": "\\ud800", "content": "t"}',
        b'{"title": "t", "content": "t", "tags": ["\\udfff"]}',
        b'{"title": "t", "content": "t", "misspelt": 1}',
        json.dumps({"title": "t" * 1_001, "content": "t"}).encode(),
        json.dumps({"title": "t", "content": "t" * 110_001}).encode(),
        json.dumps({"title": "t", "content": "t", "tags": ["t"] * 101}).encode(),
        json.dumps({"title": "t", "content": "t", "tags": ["t" * 201]}).encode(),
    ],
)
async def test_what_can_not_be_passed_on_is_422(start: Start, body: bytes) -> None:
    """Input that has no meaning for any upstream is refused here, and nothing is sent."""
    front = await start(raises(AssertionError("sent")))
    answer = await front.post("/api/publish", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("path", ["/api/publish", "/api/enrich"])
async def test_a_body_too_large_is_413(start: Start, path: str, chunked: bool) -> None:
    """More than 2 MiB is refused, with a Content-Length or without, and nothing is sent."""
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield b" " * 2**20

    front = await start(raises(AssertionError("sent")))
    headers = {} if chunked else {"Content-Length": str(100 * 2**20)}
    answer = await front.post(path, content=body(), headers=headers)
    assert (answer.status_code, answer.headers["Content-Type"]) == (413, "application/problem+json")
    assert taken <= 3


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "line\nbreak"])
async def test_an_unusable_key_is_refused(start: Start, key: str) -> None:
    """A key that could not stand in a header is never passed on."""
    front = await start(raises(AssertionError("sent")))
    answer = await front.post("/api/publish", json=CARD, headers={"Idempotency-Key": key})
    assert answer.status_code == 422


async def test_the_front_door_is_healthy_without_its_upstreams(start: Start) -> None:
    """/health is about this service alone."""
    front = await start(raises(AssertionError("sent")), StaticResolver({}))
    answer = await front.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "healthy"})


async def test_a_cancelled_request_cancels_its_upstream_call(start: Start) -> None:
    """A caller who leaves takes the upstream call along."""
    reached, left = asyncio.Event(), asyncio.Event()

    async def hang(_: httpx.Request) -> httpx.Response:
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        raise AssertionError

    front = await start(hang)
    request = asyncio.create_task(front.post("/api/publish", json=CARD))
    async with asyncio.timeout(5):
        await reached.wait()
        request.cancel()
        await left.wait()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_the_openapi_page_helps_a_newcomer(start: Start) -> None:
    """Every route says what it does and how it fails."""
    page = (await (await start(answers(200))).get("/openapi.json")).json()
    api = {path: methods for path, methods in page["paths"].items() if path.startswith("/api/")}
    assert set(api) == {"/api/enrich", "/api/publish", "/api/topology", "/api/health", "/api/health/{service}"}
    for methods in api.values():
        for operation in methods.values():
            assert operation["description"]
            assert "503" in operation["responses"]
    for schema in ("EnrichRequest", "PublishRequest", "PublishedCard"):
        assert all("examples" in field for field in page["components"]["schemas"][schema]["properties"].values())


def test_the_registry_is_found_under_the_documented_path() -> None:
    """``orchestrator.registry`` has exactly the public names of ``registry``, and they are the same objects."""
    assert sorted(orchestrator.registry.__all__) == sorted(registry.__all__)
    for name in registry.__all__:
        assert getattr(orchestrator.registry, name) is getattr(registry, name)
