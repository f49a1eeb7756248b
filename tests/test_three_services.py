"""The three services as a user starts them: real processes, a real Consul, and nothing but names between them."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.testing.agent import running_agent
from tests.system import System, running_system


@pytest.fixture(scope="module")
def system(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system for all tests here: starting it is the expensive part. Who stops a process starts it again."""
    with (
        running_agent(binary=consul_binary, in_memory=True) as consul,
        running_system(consul, tmp_path_factory.mktemp("system")) as running,
    ):
        yield running


def card(title: str) -> dict[str, Any]:
    return {"title": title, "content": "Services find each other with Consul", "tags": ["registry"]}


def test_publishing_reaches_research_and_backend_by_name(system: System) -> None:
    """A card goes from the front door to backend-api, research-api and back, and comes enriched; all replicas serve."""
    first = system.post("/api/publish", card("First card"))
    assert first.status_code == 201, first.text
    assert first.headers["X-Service-Instance"] in system.passing("orchestrator-api")
    assert first.headers["X-Upstream-Instance"] in system.passing("backend-api")

    second = system.post("/api/publish", card("Second card")).json()
    assert second["enriched"] is True
    assert first.json()["id"] in [found["card_id"] for found in second["suggestions"]]

    enriched = system.post("/api/enrich", {"content": "Who can find services?"})
    assert enriched.json()["complete"] is True
    assert "registry" in [found["value"] for found in enriched.json()["suggestions"]]
    assert enriched.headers["X-Upstream-Instance"] in system.passing("research-api")

    answered = Counter[str]()
    system.until(
        lambda: (
            bool(answered.update([system.post("/api/publish", card("More")).headers["X-Upstream-Instance"]]))
            or answered.keys() == system.passing("backend-api")
        ),
        "an answer from each of three backends",
    )


def test_a_title_and_a_content_are_a_card(system: System) -> None:
    """The shortest card is published, read, replaced, changed and deleted, whichever replica is asked."""
    published = system.post("/api/publish", {"title": "Test Card", "content": "Hello world"})
    assert (published.status_code, published.json()["content"]) == (201, "Hello world")
    path = f"/api/cards/{published.json()['id']}"
    first, second, third = sorted(system.passing("backend-api"))
    with httpx.Client(trust_env=False, verify=False) as client:

        def ask(instance: str, method: str, body: Any = None) -> httpx.Response:
            port = instance.rsplit("-", 1)[1]
            return client.request(method, f"http://127.0.0.1:{port}{path}", json=body)

        assert ask(first, "GET").json()["content"] == "Hello world"
        assert ask(second, "PUT", {"title": "Test Card", "content": "Hello"}).json()["content"] == "Hello"
        assert ask(third, "PATCH", {"content": "Hello again"}).json()["title"] == "Test Card"
        assert ask(first, "GET").json()["content"] == "Hello again"
        assert ask(second, "DELETE").status_code == 204
        assert ask(third, "GET").status_code == 404


def test_one_key_is_one_card_however_often_it_is_sent(system: System) -> None:
    """The same key through the front door is one card, whichever replica gets it."""
    answers = [system.post("/api/publish", card("Once"), Idempotency_Key="once") for _ in range(10)]
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert [answer.headers.get("Idempotent-Replayed") for answer in answers] == [None, *["true"] * 9]


def test_the_overview_shows_everybody(system: System) -> None:
    """Topology and health through the front door agree with Consul."""
    services = {found["service"]: found for found in system.get("/api/topology").json()["services"]}
    for service in ("backend-api", "research-api", "orchestrator-api"):
        shown = {instance["id"] for instance in services[service]["instances"] if instance["healthy"]}
        assert shown == system.passing(service)
    health = system.get("/api/health")
    assert (health.status_code, health.json()["words"]) == (200, "Everything works")


def test_publishing_goes_on_without_research(system: System) -> None:
    """With research-api gone, cards are published without suggestions, and the front door says what is missing."""
    [research] = system.passing("research-api")
    with system.without(research, signal.SIGTERM):
        assert system.passing("research-api") == set()
        published = system.post("/api/publish", card("Alone"))
        assert (published.status_code, published.json()["enriched"]) == (201, False)
        # The front door may still know it from before: that it refuses is 502, and then nobody is left.
        first, second = (system.post("/api/enrich", {"content": "consul"}) for _ in range(2))
        assert (first.status_code in {502, 503}, first.json()["service"]) == (True, "research-api")
        assert (second.status_code, second.json()["service"]) == (503, "research-api")
        health = system.get("/api/health")
        assert health.status_code == 503
        assert "research-api has no healthy instance" in health.json()["words"]
    assert system.post("/api/publish", card("In company")).json()["enriched"] is True


def test_a_killed_backend_is_not_noticed(system: System) -> None:
    """After kill -9 of one of three backends every card is still published, each once."""
    victim = min(system.passing("backend-api"))
    with system.without(victim, signal.SIGKILL):
        answers = [system.post("/api/publish", card(f"Card {number}")) for number in range(20)]
    assert {answer.status_code for answer in answers} == {201}
    assert victim not in {answer.headers["X-Upstream-Instance"] for answer in answers}
    assert len({answer.json()["id"] for answer in answers}) == 20
