import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import Instance, ServiceDiscoveryClient, StaticResolver
from registry.fastapi import discovery_client
from research.main import create_app
from research.settings import Settings

Start: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
BACKEND = Instance("backend-1", "backend-api", "127.0.0.1", 8002)
NOTHING = {"suggestions": [], "complete": False}


class Backend:
    """A backend-api whose cards are given, and that remembers every request."""

    def __init__(self, *cards: dict[str, Any], fails_on: str = "") -> None:
        self.requests: list[str] = []
        self.queries: list[str] = []
        self.app = FastAPI()

        @self.app.middleware("http")
        async def remember(request: Request, call_next: Any) -> Any:
            self.requests.append(f"{request.method} {request.url.path}")
            return await call_next(request)

        @self.app.get("/api/cards")
        async def search(q: str, limit: int) -> Any:
            self.queries.append(q)
            if q == fails_on:
                raise HTTPException(500, "sick")
            found = [card for card in cards if q in json.dumps(card, ensure_ascii=False).casefold()]
            return {"items": found[:limit], "total": len(found), "limit": limit, "offset": 0}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts research-api without Consul; `backend` is the fake that it asks by name."""
    async with AsyncExitStack() as stack:

        async def run(backend: FastAPI | None = None, **overrides: Any) -> httpx.AsyncClient:
            app = create_app(Settings(**overrides))
            resolver = StaticResolver({"backend-api": [BACKEND]} if backend else {})
            upstream = httpx.ASGITransport(backend) if backend else None
            discovery = await stack.enter_async_context(
                ServiceDiscoveryClient(resolver, retry_delay=0.0, transport=upstream)
            )
            app.dependency_overrides[discovery_client] = lambda: discovery
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://research")
            return await stack.enter_async_context(client)

        yield run


def card(number: int, title: str, *tags: str) -> dict[str, Any]:
    return {"id": number, "title": title, "content": "", "tags": list(tags), "created_at": "2026-01-31T12:00:00Z"}


async def test_suggestions_come_from_the_cards_of_backend_api(start: Start) -> None:
    """Each keyword is searched for by name; what is found becomes tags and related cards."""
    backend = Backend(card(1, "Consul agents", "registry"), card(2, "Gardening", "fruit"))
    research = await start(backend.app)
    answer = await research.post("/api/enrich", json={"content": "Agents of Consul", "limit": 3})
    assert answer.status_code == 200
    assert answer.json() == {
        "suggestions": [
            {"kind": "tag", "value": "registry", "score": 2, "card_id": None},
            {"kind": "card", "value": "Consul agents", "score": 2, "card_id": 1},
        ],
        "complete": True,
    }
    assert sorted(backend.queries) == ["agents", "consul"]


async def test_the_release_before_is_understood(start: Start) -> None:
    """During a roll, a backend-api of the release before asks with `text`, and shows its cards with it."""
    old = {**card(1, "Consul", "registry"), "text": "agents"}
    del old["content"]
    research = await start(Backend(old).app)
    answer = (await research.post("/api/enrich", json={"text": "agents"})).json()
    assert ([found["value"] for found in answer["suggestions"]], answer["complete"]) == (["registry", "Consul"], True)


async def test_enriching_only_reads(start: Start) -> None:
    """At most five searches and nothing else, so publishing, which asks for this, is never asked in return."""
    backend = Backend()
    research = await start(backend.app)
    await research.post("/api/enrich", json={"content": " ".join(f"word{number}" for number in range(50))})
    assert backend.requests == ["GET /api/cards"] * 5


async def test_a_text_without_words_needs_no_backend(start: Start) -> None:
    """Nothing to search for is a complete answer, even when nobody could be asked."""
    research = await start()
    answer = await research.post("/api/enrich", json={"content": "a, b & c"})
    assert (answer.status_code, answer.json()) == (200, {"suggestions": [], "complete": True})


async def test_no_backend_is_an_incomplete_answer(start: Start) -> None:
    """With no backend-api to be found the answer is 200, empty, and says that it is incomplete."""
    research = await start()
    answer = await research.post("/api/enrich", json={"content": "consul"})
    assert (answer.status_code, answer.json()) == (200, NOTHING)


async def test_what_was_found_is_kept_when_one_search_fails(start: Start) -> None:
    """A search that fails makes the answer incomplete; the others still count."""
    backend = Backend(card(1, "Consul", "registry"), fails_on="agents")
    research = await start(backend.app)
    answer = (await research.post("/api/enrich", json={"content": "consul agents"})).json()
    assert [found["value"] for found in answer["suggestions"]] == ["registry", "Consul"]
    assert answer["complete"] is False


@pytest.mark.parametrize("page", [{"items": [{"id": "x"}]}, {"cards": []}, "nonsense", None])
async def test_an_answer_that_is_no_page_of_cards_is_no_answer(start: Start, page: Any) -> None:
    """A backend-api that talks nonsense makes the answer incomplete, not a 500."""
    backend = FastAPI()
    backend.get("/api/cards")(lambda: page)
    research = await start(backend)
    answer = await research.post("/api/enrich", json={"content": "consul"})
    assert (answer.status_code, answer.json()) == (200, NOTHING)


async def test_a_hanging_backend_costs_at_most_the_timeout(start: Start) -> None:
    """All searches together wait no longer than they are set to."""
    backend = FastAPI()

    @backend.get("/api/cards")
    async def hang() -> None:
        await asyncio.Event().wait()

    research = await start(backend, search_timeout=0.2)
    started = time.monotonic()
    answer = await research.post("/api/enrich", json={"content": "consul agents register"})
    assert (answer.status_code, answer.json()) == (200, NOTHING)
    assert 0.2 <= time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("body", "location"),
    [
        (b"{}", ["body", "content"]),
        (b'{"content": NaN}', ["body", "content"]),
        (b'{"content": "a", "limit": 0}', ["body", "limit"]),
        (b'{"content": "a", "limit": 51}', ["body", "limit"]),
        (b'{"content": "a", "limits": 1}', ["body", "limits"]),
        (json.dumps({"content": "x" * 110_001}).encode(), ["body", "content"]),
    ],
)
async def test_refused_input_is_422_and_names_the_field(start: Start, body: bytes, location: list[str]) -> None:
    """A refusal says where and why in a short answer."""
    research = await start()
    answer = await research.post("/api/enrich", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert [problem["loc"] for problem in answer.json()["errors"]] == [location]
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert len(answer.content) < 300


@given(text=st.text(st.characters(), max_size=500))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_text_is_enriched(start: Start, text: str) -> None:
    """Whatever the characters: a complete answer, or 422 for half a surrogate pair, which is no text; never a 500."""
    research = await start(Backend(card(1, text.encode(errors="replace").decode(), "tag")).app)
    answer = await research.post(
        "/api/enrich", content=json.dumps({"content": text}), headers={"Content-Type": "application/json"}
    )
    if text.encode(errors="ignore").decode() == text:
        assert (answer.status_code, answer.json()["complete"]) == (200, True)
    else:
        assert answer.status_code == 422


async def test_research_is_healthy_without_its_upstream(start: Start) -> None:
    """Health is about research-api alone: a missing backend-api does not make it sick."""
    research = await start()
    answer = await research.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "healthy"})


async def test_the_openapi_page_helps_a_newcomer(start: Start) -> None:
    """The route says what happens when backend-api is away, and every field has an example."""
    page = (await (await start()).get("/openapi.json")).json()
    operation = page["paths"]["/api/enrich"]["post"]
    assert "`complete` is false" in operation["description"]
    for schema in ("EnrichRequest", "Suggestion"):
        assert all("examples" in field for field in page["components"]["schemas"][schema]["properties"].values())
