import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ANYTHING = st.text(st.characters(), max_size=300)  # half surrogate pairs and NUL included


async def publish(backend: httpx.AsyncClient, title: str, text: str = "", **fields: Any) -> dict[str, Any]:
    answer = await backend.post("/api/publish", json={"title": title, "content": text, **fields})
    assert answer.status_code == 201, answer.text
    card: dict[str, Any] = answer.json()
    return card


async def titles(backend: httpx.AsyncClient, **params: Any) -> list[str]:
    answer = await backend.get("/api/cards", params=params)
    assert answer.status_code == 200, answer.text
    return [card["title"] for card in answer.json()["items"]]


async def test_a_published_card_can_be_read(backend: httpx.AsyncClient) -> None:
    """What was published is what is read, tags without their repetitions, times in UTC."""
    published = await publish(backend, "  Consul ", "finds services", tags=["b", "a", "b"])
    read = (await backend.get(f"/api/cards/{published['id']}")).json()
    assert (read["title"], read["content"], read["tags"]) == ("Consul", "finds services", ["b", "a"])
    assert read["created_at"] == read["updated_at"]
    assert read["created_at"].endswith("Z")
    assert published == read | {"suggestions": [], "enriched": False}


async def test_put_replaces_everything(backend: httpx.AsyncClient) -> None:
    """PUT leaves nothing of the old card but its id and its birth."""
    before = await publish(backend, "Old", "old text", tags=["old"])
    answer = await backend.put(f"/api/cards/{before['id']}", json={"title": "New", "content": "new text"})
    after = answer.json()
    assert (after["title"], after["content"], after["tags"]) == ("New", "new text", [])
    assert (after["id"], after["created_at"]) == (before["id"], before["created_at"])
    assert after["updated_at"] > before["updated_at"]
    assert await titles(backend, q="old") == []


async def test_patch_changes_only_what_is_sent(backend: httpx.AsyncClient) -> None:
    """PATCH leaves the fields that it does not name, and search follows."""
    card = await publish(backend, "Title", "old text", tags=["tag"])
    answer = await backend.patch(f"/api/cards/{card['id']}", json={"content": "new text"})
    assert answer.status_code == 200
    assert (answer.json()["title"], answer.json()["content"], answer.json()["tags"]) == ("Title", "new text", ["tag"])
    assert await titles(backend, q="old") == []
    assert await titles(backend, q="new") == ["Title"]


async def test_a_deleted_card_is_gone_and_its_id_too(backend: httpx.AsyncClient) -> None:
    """After DELETE the card is 404, and the next card gets a new id."""
    card = await publish(backend, "First")
    assert (await backend.delete(f"/api/cards/{card['id']}")).status_code == 204
    assert (await backend.get(f"/api/cards/{card['id']}")).status_code == 404
    assert (await publish(backend, "Second"))["id"] > card["id"]


async def test_the_name_of_the_release_before_is_taken_and_shown(backend: httpx.AsyncClient) -> None:
    """During a roll, callers that send and read `text` get on with this release; a wrong field is still refused."""
    published = await backend.post("/api/publish", json={"title": "Old caller", "text": "old"})
    assert (published.status_code, published.json()["text"], published.json()["content"]) == (201, "old", "old")
    path = f"/api/cards/{published.json()['id']}"
    assert (await backend.patch(path, json={"text": "older"})).json()["content"] == "older"
    assert (await backend.put(path, json={"title": "t", "text": "oldest"})).json()["text"] == "oldest"
    assert (await backend.get("/api/cards")).json()["items"][0]["text"] == "oldest"
    assert (await backend.patch(path, json={"words": "none"})).status_code == 422


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
async def test_an_unknown_card_is_404(backend: httpx.AsyncClient, method: str) -> None:
    """Every method says which card does not exist, and PUT creates none."""
    body = None if method in {"GET", "DELETE"} else {"title": "t", "content": "t"}
    answer = await backend.request(method, "/api/cards/7", json=body)
    assert answer.status_code == 404
    assert answer.json() == {"title": "Not Found", "status": 404, "detail": "Card 7 does not exist"}
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert await titles(backend) == []


@pytest.mark.parametrize("card_id", ["0", "-1", "x", str(2**63), "9" * 40])
async def test_an_impossible_id_is_422(backend: httpx.AsyncClient, card_id: str) -> None:
    """An id that no database column can hold never reaches the database."""
    assert (await backend.get(f"/api/cards/{card_id}")).status_code == 422


async def test_the_largest_possible_id_is_404(backend: httpx.AsyncClient) -> None:
    """The border itself is only unknown."""
    assert (await backend.get(f"/api/cards/{2**63 - 1}")).status_code == 404


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("%", ["100% sure"]),
        ("_", ["snake_case"]),
        ("/", ["and/or"]),
        ("\\", ["back\\slash"]),
        ("'", ["o'clock"]),
        ("0% S", ["100% sure"]),
        ("ÄPFEL", ["Grüne Äpfel"]),
        ("äpfel", ["Grüne Äpfel"]),
        ("STRASSE", ["Straße"]),
        ("nothing", []),
    ],
)
async def test_search_takes_wildcards_literally_and_ignores_case(
    backend: httpx.AsyncClient, q: str, found: list[str]
) -> None:
    """Wildcards, escape characters and quotes are text; case is ignored beyond ASCII."""
    for title in ("100% sure", "snake_case", "and/or", "back\\slash", "o'clock", "Grüne Äpfel", "Straße"):
        await publish(backend, title)
    assert await titles(backend, q=q) == found


async def test_search_looks_at_text_and_tags(backend: httpx.AsyncClient) -> None:
    """A word in the text or in a tag is found too."""
    await publish(backend, "one", "the needle is here")
    await publish(backend, "two", tags=["Needle"])
    await publish(backend, "three")
    assert await titles(backend, q="needle") == ["two", "one"]


@pytest.mark.parametrize(
    ("limit", "offset", "found"),
    [(2, 1, [3, 2]), (5, 0, [4, 3, 2, 1, 0]), (9, 0, [4, 3, 2, 1, 0]), (9, 3, [1, 0]), (2, 5, []), (2, 7, [])],
)
async def test_pages_are_newest_first(backend: httpx.AsyncClient, limit: int, offset: int, found: list[int]) -> None:
    """limit and offset cut one stable order; total counts all pages, also of a page that is not full."""
    for number in range(5):
        await publish(backend, f"card {number}")
    page = (await backend.get("/api/cards", params={"q": "card", "limit": limit, "offset": offset})).json()
    assert [card["title"] for card in page["items"]] == [f"card {number}" for number in found]
    assert (page["total"], page["limit"], page["offset"]) == (5, limit, offset)


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 101}, {"offset": -1}, {"offset": 2**63}, {"q": "a\0b"}])
async def test_impossible_searches_are_422(backend: httpx.AsyncClient, params: dict[str, Any]) -> None:
    """Nothing that the database would choke on gets there."""
    assert (await backend.get("/api/cards", params=params)).status_code == 422


@pytest.mark.parametrize(
    ("body", "location"),
    [
        (b'{"title": "", "content": ""}', ["body", "title"]),
        (b'{"title": "   ", "content": ""}', ["body", "title"]),
        (b'{"title": "a\\u0000b", "content": ""}', ["body", "title"]),
        (b'{"title": "a", "content": "\\ud800"}', ["body", "content"]),
        (b'{"title": "a", "content": NaN}', ["body", "content"]),
        (b'{"title": "a", "content": "", "tags": [""]}', ["body", "tags", 0]),
        (b'{"title": "a", "content": "", "tags": ["b\\u0000"]}', ["body", "tags", 0]),
        (b'{"title": "a", "content": "", "tag": "misspelt"}', ["body", "tag"]),
        (b'{"title": "a"}', ["body", "content"]),
        (json.dumps({"title": "a", "content": "x" * 100_001}).encode(), ["body", "content"]),
        (json.dumps({"title": "a" * 201, "content": ""}).encode(), ["body", "title"]),
        (json.dumps({"title": "a", "content": "", "tags": ["t"] * 21}).encode(), ["body", "tags"]),
    ],
)
async def test_refused_input_is_422_and_names_the_field(
    backend: httpx.AsyncClient, body: bytes, location: list[str | int]
) -> None:
    """A refusal says where and why in a short answer, and stores nothing."""
    answer = await backend.post("/api/publish", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert [problem["loc"] for problem in answer.json()["errors"]] == [location]
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert len(answer.content) < 500
    assert await titles(backend) == []


async def test_a_very_long_card_is_kept_whole(backend: httpx.AsyncClient) -> None:
    """The longest text that is allowed comes back unchanged."""
    text = "🦆" * 100_000
    card = await publish(backend, "Long", text)
    assert (await backend.get(f"/api/cards/{card['id']}")).json()["content"] == text


async def test_a_page_shows_the_beginning_of_long_texts(backend: httpx.AsyncClient) -> None:
    """A list item has the first 500 characters, and says whether that is all."""
    await publish(backend, "Short", "🦆" * 500)
    await publish(backend, "Long", "🦆" * 501)
    long, short = (await backend.get("/api/cards")).json()["items"]
    assert (long["content"], long["complete"]) == ("🦆" * 500, False)
    assert (short["content"], short["complete"]) == ("🦆" * 500, True)


@pytest.mark.real
async def test_a_page_has_a_bounded_size(backend: httpx.AsyncClient) -> None:
    """A hundred of the largest cards: each page stays under 256 kB, and the pages together show every card once."""
    for number in range(100):
        tags = [f"{tag:02}" + "\x01" * 48 for tag in range(20)]
        await publish(backend, f"{number:03}" + "\x01" * 197, "\x01" * 100_000, tags=tags)
    seen: list[int] = []
    while len(seen) < 100:
        answer = await backend.get("/api/cards", params={"limit": 100, "offset": len(seen)})
        page = answer.json()
        assert page["items"]
        assert page["total"] == 100
        assert len(answer.content) < 2**18 + 1000
        seen += [card["id"] for card in page["items"]]
    assert seen == sorted(set(seen), reverse=True)


@given(title=ANYTHING, text=ANYTHING, tag=ANYTHING)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_text_is_stored_as_it_is_or_refused(
    backend: httpx.AsyncClient, title: str, text: str, tag: str
) -> None:
    """Whatever the characters: 201 and the same text again, findable; or 422. Never a 500, never a changed text."""
    body = json.dumps({"title": title, "content": text, "tags": [tag]})
    answer = await backend.post("/api/publish", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in {201, 422}
    if any("\0" in part or any("\ud800" <= char <= "\udfff" for char in part) for part in (title, text, tag)):
        assert answer.status_code == 422
    if answer.status_code == 201:
        card = answer.json()
        assert card["content"] == text
        assert card["title"] in title
        assert (await backend.get(f"/api/cards/{card['id']}")).json()["title"] == card["title"]
        found = await backend.get("/api/cards", params={"q": text[3:60], "limit": 1})
        assert found.json()["items"][0]["id"] == card["id"]


async def test_the_openapi_page_helps_a_newcomer(backend: httpx.AsyncClient) -> None:
    """Every route says what it does, every field has an example, and 404, 422 and 503 are described."""
    page = (await backend.get("/openapi.json")).json()
    api = {path: methods for path, methods in page["paths"].items() if path.startswith("/api/")}
    assert set(api) == {"/api/publish", "/api/cards", "/api/cards/{card_id}"}
    for path, methods in api.items():
        for operation in methods.values():
            assert operation["description"]
            assert {"422", "503"} <= set(operation["responses"])
            assert ("404" in operation["responses"]) == ("card_id" in path)
    for schema in ("CardDraft", "CardPatch", "CardView", "PublishedCard"):
        fields = page["components"]["schemas"][schema]["properties"]
        assert all("examples" in field for name, field in fields.items() if name != "suggestions")
