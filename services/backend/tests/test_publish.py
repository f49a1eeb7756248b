import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from backend import cards
from backend.cards import Cards
from backend.database import Database
from backend.lifespan import keep
from backend.models import stored_key

Replica: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
CARD = {"title": "Consul", "content": "finds services", "tags": ["known"]}
SUGGESTIONS: list[dict[str, Any]] = [
    {"kind": "tag", "value": "known", "score": 3, "card_id": None},
    {"kind": "tag", "value": "discovery", "score": 2, "card_id": None},
    {"kind": "card", "value": "Older card", "score": 2, "card_id": 1},
]


class Research:
    """A research-api that answers what it is told to, and remembers what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        self.app = FastAPI()

        @self.app.post("/api/enrich")
        async def enrich(body: dict[str, Any]) -> Any:
            self.asked.append(body)
            return await answer() if callable(answer) else answer


async def card_count(backend: httpx.AsyncClient) -> int:
    total: int = (await backend.get("/api/cards")).json()["total"]
    return total


async def test_suggestions_come_from_research_api(replica: Replica) -> None:
    """Publishing asks research-api by name, with title and text, and leaves out tags that the card has."""
    research = Research({"suggestions": SUGGESTIONS, "complete": True, "a new field": 1})
    backend = await replica(research.app)
    answer = await backend.post("/api/publish", json=CARD)
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/api/cards/{answer.json()['id']}"
    assert answer.json()["enriched"] is True
    assert answer.json()["suggestions"] == SUGGESTIONS[1:]
    assert research.asked == [{"content": "Consul\nfinds services", "limit": 5}]


async def test_an_incomplete_enrichment_is_called_so(replica: Replica) -> None:
    """Suggestions that research-api calls incomplete are shown, but not as the whole."""
    backend = await replica(Research({"suggestions": SUGGESTIONS[1:], "complete": False}).app)
    card = (await backend.post("/api/publish", json=CARD)).json()
    assert (card["suggestions"], card["enriched"]) == (SUGGESTIONS[1:], False)


async def _refuses() -> None:
    raise HTTPException(422, "no")


async def _fails() -> None:
    raise HTTPException(500, "no")


@pytest.mark.parametrize("answer", [_refuses, _fails, {"unexpected": "shape"}, "no object"])
async def test_publishing_succeeds_without_suggestions(replica: Replica, answer: Any) -> None:
    """A research-api that refuses, fails or talks nonsense costs the suggestions, not the card."""
    backend = await replica(Research(answer).app)
    card = await backend.post("/api/publish", json=CARD)
    assert card.status_code == 201
    assert (card.json()["suggestions"], card.json()["enriched"]) == ([], False)
    assert await card_count(backend) == 1


async def test_a_hanging_research_api_costs_at_most_the_timeout(replica: Replica) -> None:
    """Publishing waits no longer for suggestions than it is set to."""

    async def hang() -> None:
        await asyncio.Event().wait()

    backend = await replica(Research(hang).app, enrich_timeout=0.2)
    started = time.monotonic()
    card = await backend.post("/api/publish", json=CARD)
    assert (card.status_code, card.json()["enriched"]) == (201, False)
    assert 0.2 <= time.monotonic() - started < 2


async def test_the_same_key_again_is_the_same_answer(replica: Replica) -> None:
    """A repeated request gets the first answer, marked as replayed, from any replica, without asking research-api."""
    research = Research({"suggestions": SUGGESTIONS, "complete": True})
    one, two = await replica(research.app), await replica(research.app)
    headers = {"Idempotency-Key": "key"}
    first = await one.post("/api/publish", json=CARD, headers=headers)
    again = await two.post("/api/publish", json=CARD, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert len(research.asked) == 1
    assert await card_count(one) == 1


async def test_the_same_key_for_another_body_is_refused(backend: httpx.AsyncClient) -> None:
    """A key can't be used for two cards: 422 in the shape of every other 422, with a sentence."""
    headers = {"Idempotency-Key": "key"}
    await backend.post("/api/publish", json=CARD, headers=headers)
    answer = await backend.post("/api/publish", json=CARD | {"title": "Other"}, headers=headers)
    assert answer.status_code == 422
    [problem] = answer.json()["errors"]
    assert problem["loc"] == ["header", "idempotency-key"]
    assert "'key' was used before with a different body" in problem["msg"]
    assert await card_count(backend) == 1


async def test_without_a_key_every_request_is_a_card(backend: httpx.AsyncClient) -> None:
    """Two requests without a key are two cards, and different keys are too."""
    for headers in ({}, {}, {"Idempotency-Key": "a"}, {"Idempotency-Key": "b"}):
        assert (await backend.post("/api/publish", json=CARD, headers=headers)).status_code == 201
    assert await card_count(backend) == 4


async def test_a_key_goes_with_its_card(backend: httpx.AsyncClient, database_file: Path) -> None:
    """Nothing of a deleted card is kept, so the key then publishes another; other cards keep theirs."""
    for key in ("key", "other"):
        answer = await backend.post("/api/publish", json=CARD, headers={"Idempotency-Key": key})
    with closing(sqlite3.connect(database_file)) as connection:
        [other] = connection.execute("SELECT card_id FROM publications WHERE key = 'other'").fetchone()
        assert other == answer.json()["id"]
        await backend.delete(f"/api/cards/{other - 1}")
        assert connection.execute("SELECT key FROM publications").fetchall() == [("other",)]
    again = await backend.post("/api/publish", json=CARD | {"title": "New"}, headers={"Idempotency-Key": "key"})
    assert (again.status_code, again.json()["id"], again.json()["title"]) == (201, other + 1, "New")
    assert "Idempotent-Replayed" not in again.headers


async def test_a_key_is_its_owner_s(backend: httpx.AsyncClient) -> None:
    """Owners of one key, with the same body or another, publish a card each, and none learns of the others'; nor does
    somebody who sends what the database stores an owner's key under."""
    requests = [({}, CARD), ({"X-Subject": "alice"}, CARD), ({"X-Subject": "bob"}, CARD | {"title": "Other"})]
    rounds = [
        [
            await backend.post("/api/publish", json=body, headers={"Idempotency-Key": "key"} | caller)
            for caller, body in requests
        ]
        for _ in range(2)
    ]
    first, again = rounds
    assert {answer.status_code for answer in first + again} == {201}
    assert len({answer.json()["id"] for answer in first}) == 3
    assert [answer.json() for answer in again] == [answer.json() for answer in first]
    guessed = {"Idempotency-Key": stored_key("subject alice", "key")}
    assert (await backend.post("/api/publish", json=CARD, headers=guessed)).status_code == 422


@pytest.mark.parametrize(
    ("service", "subject", "owner"),
    [
        (None, None, None),
        (None, "alice", "subject alice"),
        ("orchestrator-api", "alice", "subject alice"),
        ("orchestrator-api", None, "service orchestrator-api"),
        ("research-api", None, "service research-api"),
        ("research-api", "alice", "service research-api"),
    ],
)
async def test_only_the_front_door_speaks_for_others(
    replica: Replica, database_file: Path, service: str | None, subject: str | None, owner: str | None
) -> None:
    """Where services have proved which they are, a subject is believed of orchestrator-api alone."""
    backend = await replica()
    transport = backend._transport
    assert isinstance(transport, httpx.ASGITransport)
    app = transport.app

    async def judged(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"registry.caller": service}, receive, send)

    transport.app = judged
    headers = {"Idempotency-Key": "key"} | ({"X-Subject": subject} if subject else {})
    assert (await backend.post("/api/publish", json=CARD, headers=headers)).status_code == 201
    with closing(sqlite3.connect(database_file)) as connection:
        assert connection.execute("SELECT key FROM publications").fetchall() == [(stored_key(owner, "key"),)]


@pytest.mark.parametrize(
    ("one", "other"), [(("a", "b c"), ("a b", "c")), ((None, "a b"), ("a", "b")), (("a", "b"), ("A", "b"))]
)
def test_no_two_owners_have_one_stored_key(one: tuple[str | None, str], other: tuple[str | None, str]) -> None:
    """Wherever the owner's name ends; what is stored fits into its column."""
    assert stored_key(*one) != stored_key(*other)
    assert len(stored_key("c" * 1_000, "k" * 200)) <= 200


@pytest.mark.parametrize("subject", ["", "a b", "x" * 1_001, "line\nbreak"])
async def test_an_unusable_subject_is_refused(backend: httpx.AsyncClient, subject: str) -> None:
    """The front door sends none of these, so whoever does is not it."""
    answer = await backend.post("/api/publish", json=CARD, headers={"X-Subject": subject})
    assert answer.status_code == 422
    assert await card_count(backend) == 0


async def test_old_keys_are_forgotten_and_cards_stay(replica: Replica, database_file: Path) -> None:
    """A key is known for its time, one without a time from the first look on; then it may publish another card."""
    backend, database = await replica(), Database(f"sqlite:///{database_file}")
    for key in ("old", "young", "undated", *(f"many-{number}" for number in range(7))):
        assert (await backend.post("/api/publish", json=CARD, headers={"Idempotency-Key": key})).status_code == 201
    with closing(sqlite3.connect(database_file, isolation_level=None)) as connection:
        connection.execute("UPDATE publications SET published_at = '2026-01-01' WHERE key LIKE 'many%' OR key = 'old'")
        connection.execute("UPDATE publications SET published_at = NULL WHERE key = 'undated'")
        with patch.object(cards, "_BATCH", 3):
            await Cards(database).forget_keys(60)
        assert sorted(connection.execute("SELECT key FROM publications")) == [("undated",), ("young",)]
        assert connection.execute("SELECT count(*) FROM publications WHERE published_at IS NULL").fetchone() == (0,)
    await database.aclose()
    assert await card_count(backend) == 10
    again = await backend.post("/api/publish", json=CARD | {"title": "New"}, headers={"Idempotency-Key": "old"})
    assert (again.status_code, again.json()["title"]) == (201, "New")


async def until(condition: Callable[[], bool]) -> None:
    """Returns as soon as it holds; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_running_service_forgets_keys_and_survives_a_failure(
    database_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The lifespan does it again and again, also after a time when the database did not work."""
    database = Database(f"sqlite:///{database_file}", timeout=0.1)
    async with keep(database, key_age=1e-6, every=0.02)(FastAPI()):
        with closing(sqlite3.connect(database_file, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            await until(lambda: "old keys stay until the next time" in caplog.text)
            connection.execute("ROLLBACK")
            insert = "INSERT INTO publications VALUES ('key', 'print', '{}', '2026-01-01', NULL)"
            connection.execute(insert)
            await until(lambda: connection.execute("SELECT * FROM publications").fetchone() is None)


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "ä".encode().decode("latin-1")])
async def test_an_unusable_key_is_refused(backend: httpx.AsyncClient, key: str) -> None:
    """A key is 1 to 200 visible ASCII characters."""
    answer = await backend.post("/api/publish", json=CARD, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 422
    assert await card_count(backend) == 0


async def racing(replica: Replica, bodies: list[dict[str, Any]]) -> tuple[list[httpx.Response], int]:
    """The answers to requests with one key that all pass the look-up before any stores its card, and the card count."""
    everybody = asyncio.Barrier(len(bodies))

    async def meet() -> dict[str, Any]:
        await everybody.wait()
        return {"suggestions": [], "complete": True}

    research = Research(meet)
    replicas = [await replica(research.app) for _ in range(3)]
    headers = {"Idempotency-Key": "key"}
    answers = await asyncio.gather(
        *(replicas[n % 3].post("/api/publish", json=body, headers=headers) for n, body in enumerate(bodies))
    )
    assert len(research.asked) == len(bodies)
    return answers, await card_count(replicas[0])


async def test_racing_requests_with_one_key_make_one_card(replica: Replica) -> None:
    """Twelve requests at once on three replicas of one SQLite file: one card, and all learn of it."""
    answers, cards = await racing(replica, [CARD] * 12)
    assert cards == 1
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1


async def test_racing_requests_with_one_key_and_different_bodies(replica: Replica) -> None:
    """The first body wins, every other one is refused."""
    answers, cards = await racing(replica, [CARD | {"title": f"Card {number}"} for number in range(6)])
    assert cards == 1
    assert sorted(answer.status_code for answer in answers) == [201, 422, 422, 422, 422, 422]


async def test_many_cards_at_once_on_three_replicas(replica: Replica) -> None:
    """Writers that share a SQLite file wait for each other; none is lost or refused."""
    replicas = [await replica() for _ in range(3)]
    bodies = [CARD | {"title": f"Card {number}"} for number in range(60)]
    answers = await asyncio.gather(*(replicas[n % 3].post("/api/publish", json=body) for n, body in enumerate(bodies)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 60


async def test_changes_that_cross_lose_no_field(replica: Replica) -> None:
    """Two replicas that patch different fields at once: both changes stay, and search knows both."""
    one, two = await replica(), await replica()
    card = (await one.post("/api/publish", json=CARD)).json()
    for number in range(20):
        await asyncio.gather(
            one.patch(f"/api/cards/{card['id']}", json={"title": f"title{number}"}),
            two.patch(f"/api/cards/{card['id']}", json={"content": f"text{number}"}),
        )
        for q in (f"title{number}", f"text{number}"):
            assert (await one.get("/api/cards", params={"q": q})).json()["total"] == 1
