"""The front door asks for tokens: real processes, a real Consul, and an issuer whose keys change."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from registry.testing.agent import running_agent
from tests.support.issuer import AUDIENCE, EC_KEY, ISSUER, RSA_KEY, Issuer
from tests.system import System, running_system

CARD = {"title": "Behind the door", "content": "Services find each other with Consul"}
JWKS = "jwks.json"


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    """Whom the front door trusts."""
    return Issuer()


@pytest.fixture(scope="module")
def system(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory, issuer: Issuer) -> Iterator[System]:
    """All services, told of the issuer; only the front door listens to that."""
    directory = tmp_path_factory.mktemp("system")
    (directory / JWKS).write_text(json.dumps(issuer.jwks(RSA_KEY)))
    variables = {"AUTH_JWKS_FILE": str(directory / JWKS), "AUTH_ISSUER": ISSUER, "AUTH_AUDIENCE": AUDIENCE}
    with (
        running_agent(binary=consul_binary, in_memory=True) as consul,
        running_system(consul, directory, variables=variables) as running,
    ):
        yield running


def publish(system: System, token: str = "", **headers: str) -> httpx.Response:
    """A card, under one key for all."""
    named = {"Idempotency_Key": "one"} | ({"Authorization": f"Bearer {token}"} if token else {}) | headers
    return system.post("/api/publish", CARD, **named)


def log(system: System) -> str:
    """What the front door has logged."""
    return "".join(path.read_text() for path in system.directory.glob("orchestrator-api-*.log"))


def test_whoever_has_a_token_is_let_in_and_meets_nobody_else(system: System, issuer: Issuer) -> None:
    """Two callers with one key have a card each; a caller who repeats it gets the same; a stranger gets nothing, also
    when he names himself; the log says who asked, and holds no token."""
    tokens = {name: issuer.token(sub=name) for name in ("alice", "bob")}
    first = {name: publish(system, token, X_Subject="mallory") for name, token in tokens.items()}
    again = {name: publish(system, token) for name, token in tokens.items()}
    assert {answer.status_code for answer in [*first.values(), *again.values()]} == {201}
    assert first["alice"].json()["id"] != first["bob"].json()["id"]
    for name, answer in again.items():
        assert answer.json()["id"] == first[name].json()["id"]
        assert answer.headers["Idempotent-Replayed"] == "true"
    assert publish(system).status_code == 401
    assert publish(system, X_Subject="alice").status_code == 401
    assert publish(system, issuer.token(EC_KEY, "RS256")).status_code == 401
    assert system.get("/api/topology").status_code == 401
    assert system.get("/health").status_code == 200
    lines = [line for line in log(system).splitlines() if "/api/publish" in line]
    assert {line.partition("subject=")[2].split()[0] for line in lines if " 201" in line} == {"alice", "bob"}
    assert not [part for token in tokens.values() for part in token.split(".")[1:] if part in log(system)]


def test_a_new_key_of_the_issuer_is_found_by_itself(system: System, issuer: Issuer) -> None:
    """The file is replaced; tokens of the new key pass, those of the old one as long as it is there."""
    assert publish(system, issuer.token(EC_KEY, "ES256")).status_code == 401
    new = system.directory / "new.json"
    new.write_text(json.dumps(issuer.jwks()))
    new.replace(system.directory / JWKS)
    system.until(lambda: publish(system, issuer.token(EC_KEY, "ES256")).status_code == 201, "the new key is known")
    assert publish(system, issuer.token()).status_code == 201
