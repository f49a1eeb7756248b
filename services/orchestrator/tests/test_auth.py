"""Who is let in by the front door, and who is not."""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI
from fastapi.routing import APIRoute
from jwt.algorithms import RSAAlgorithm

from orchestrator.auth import AuthSettings
from orchestrator.main import create_app
from orchestrator.settings import Settings
from registry import Instance, ServiceDiscoveryClient, StaticResolver
from registry.fastapi import discovery_client
from registry.logs import JsonFormatter
from tests.support.issuer import AUDIENCE, EC_KEY, ISSUER, RSA_KEY, Issuer, encode, sign

CARD = {"title": "Consul", "content": "finds services", "tags": ["registry"]}
PUBLISHED = CARD | {"id": 7, "suggestions": [], "enriched": True}
BACKEND = Instance("backend-1", "backend-api", "10.0.0.1", 8002)
HEADER = {"alg": "RS256", "kid": RSA_KEY, "typ": "JWT"}
Headers: TypeAlias = list[tuple[str, str]]
Shape: TypeAlias = Callable[[Issuer], "str | Headers | dict[str, Any]"]
"""A token; or headers; or arguments of a request."""


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    """Whom the front door trusts."""
    return Issuer()


@pytest.fixture
def app(issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """The front door, locked."""
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(issuer.jwks()))
    for name, value in {"JWKS_FILE": str(file), "ISSUER": ISSUER, "AUDIENCE": AUDIENCE}.items():
        monkeypatch.setenv(f"AUTH_{name}", value)
    return create_app(Settings())


@pytest.fixture
def reached() -> list[httpx.Request]:
    """What has come to backend-api."""
    return []


@pytest.fixture
async def front(app: FastAPI, reached: list[httpx.Request]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it; without Consul."""

    def backend(request: httpx.Request) -> httpx.Response:
        reached.append(request)
        return httpx.Response(201, json=PUBLISHED)

    resolver = StaticResolver({"backend-api": [BACKEND]})
    async with ServiceDiscoveryClient(resolver, transport=httpx.MockTransport(backend)) as discovery:
        app.dependency_overrides[discovery_client] = lambda: discovery
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
@pytest.mark.parametrize(
    "make",
    [
        lambda issuer: issuer.token(),
        lambda issuer: issuer.token(EC_KEY, "ES256"),
        lambda issuer: issuer.token(aud=["others", AUDIENCE]),
        lambda issuer: issuer.token(header={"typ": "at+jwt"}),
        lambda issuer: issuer.token(exp=int(time.time()) - 5),
        lambda issuer: issuer.token(nbf=None, iat=None, more={"nested": [1]}),
    ],
    ids=["rsa", "ec", "one of its audiences", "access token", "clocks differ", "the least"],
)
async def test_a_good_token_passes(
    front: httpx.AsyncClient, issuer: Issuer, reached: list[httpx.Request], make: Callable[[Issuer], str], scheme: str
) -> None:
    """With either kind of key, and however the scheme is written; backend-api is told who calls, and no token."""
    headers = {"Authorization": f"{scheme} {make(issuer)}", "X-Subject": "mallory"}
    assert (await front.post("/api/publish", json=CARD, headers=headers)).status_code == 201
    [request] = reached
    assert request.headers.get_list("X-Subject") == ["alice"]
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("auth0|5f7c", "auth0|5f7c"),
        ("spiffe://td/ns/a", "spiffe://td/ns/a"),
        ("a b\r\nX-Admin: 1", "a%20b%0D%0AX-Admin:%201"),
        ("100%", "100%25"),
        ("Grüße", "Gr%C3%BC%C3%9Fe"),
    ],
)
async def test_whoever_calls_fits_into_a_header(
    front: httpx.AsyncClient, issuer: Issuer, reached: list[httpx.Request], subject: str, name: str
) -> None:
    """Any subject is passed on, and no two as the same."""
    answer = await front.post("/api/publish", json=CARD, headers=bearer(issuer.token(sub=subject)))
    assert answer.status_code == 201
    assert reached[0].headers["X-Subject"] == name


async def test_every_api_route_is_locked(app: FastAPI, front: httpx.AsyncClient) -> None:
    """Without a token all of /api is 401, and says how to get in; /health, which Consul asks, is as it was."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    routes += [each for route in app.routes for each in getattr(getattr(route, "original_router", None), "routes", ())]
    api = [route for route in routes if route.path.startswith("/api")]
    locked = {(method, route.path) for route in api for method in route.methods or ()}
    assert {path for _, path in locked} >= {"/api/publish", "/api/enrich", "/api/topology", "/api/health"}
    for method, path in locked:
        body = CARD if method == "POST" else None
        answer = await front.request(method, path.replace("{service}", "backend-api"), json=body)
        assert answer.status_code == 401, path
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="orchestrator-api"'
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["detail"].startswith("Send a token")
    assert (await front.get("/health")).status_code == 200


def hmac_token(secret: bytes, header: dict[str, Any], issuer: Issuer) -> str:
    return sign(header, issuer.claims(), lambda signed: hmac.digest(secret, signed, hashlib.sha256))


def public_pem(issuer: Issuer) -> bytes:
    return issuer.rsa_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def stranger(issuer: Issuer, **header: Any) -> str:
    """A token of a stranger's key, who puts something into its header."""
    key = rsa.generate_private_key(65537, 2048)
    own = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    head = {name: own if value == "own" else value for name, value in ({"kid": RSA_KEY} | header).items()}
    return jwt.encode(issuer.claims(), key, "RS256", head)


def tampered(issuer: Issuer, part: int, change: Callable[[str], str]) -> str:
    parts = issuer.token().split(".")
    parts[part] = change(parts[part])
    return ".".join(parts)


def claims_twice(issuer: Issuer) -> str:
    claims = json.dumps(issuer.claims())
    return issuer.sign(HEADER, f'{claims[:-1]}, "sub": "admin"}}')


HOSTILE: dict[str, Shape] = {
    # nothing, or not where it should be
    "no header": lambda _: [],
    "an empty header": lambda _: [("Authorization", "")],
    "no token": lambda _: [("Authorization", "Bearer")],
    "a blank for a token": lambda _: [("Authorization", "Bearer  ")],
    "no scheme": lambda issuer: [("Authorization", issuer.token())],
    "another scheme": lambda issuer: [("Authorization", f"Basic {issuer.token()}")],
    "a scheme before": lambda issuer: [("Authorization", f"Basic Bearer {issuer.token()}")],
    "in the query": lambda issuer: {"params": {"access_token": issuer.token(), "token": issuer.token()}},
    "in a cookie": lambda issuer: [("Cookie", f"Authorization=Bearer {issuer.token()}; access_token={issuer.token()}")],
    "in the body": lambda issuer: {"json": CARD | {"access_token": issuer.token()}},
    "for a proxy": lambda issuer: [("Proxy-Authorization", f"Bearer {issuer.token()}")],
    "in headers of others": lambda issuer: [
        (name, f"Bearer {issuer.token()}")
        for name in ("X-Authorization", "X-Forwarded-Authorization", "X-Access-Token")
    ],
    "the name alone": lambda _: [("X-Subject", "alice")],
    # too much
    "two headers, a good one first": lambda issuer: [
        ("Authorization", f"Bearer {issuer.token()}"),
        ("Authorization", f"Bearer {stranger(issuer)}"),
    ],
    "two headers, a good one last": lambda issuer: [
        ("Authorization", f"Bearer {stranger(issuer)}"),
        ("authorization", f"Bearer {issuer.token()}"),
    ],
    "two good headers": lambda issuer: [("Authorization", f"Bearer {issuer.token()}")] * 2,
    "two in one header": lambda issuer: f"{issuer.token()}, Bearer {issuer.token()}",
    "something after it": lambda issuer: f"{issuer.token()} x",
    "something before it": lambda issuer: f"\t{issuer.token()}",
    "a quoted one": lambda issuer: f'"{issuer.token()}"',
    "huge": lambda issuer: issuer.token(more="x" * 8_192),
    # junk
    "a word": lambda _: "letmein",
    "a word in lower case": lambda _: [("Authorization", "bearer letmein")],
    "three words": lambda _: "a.b.c",
    "dots": lambda _: "..",
    "five parts": lambda issuer: f"{issuer.token()}.a.b",
    "letters beyond ASCII": lambda issuer: issuer.token()[:-1] + "ä",
    "a NUL": lambda issuer: issuer.token() + "\0",
    "a header that is a list": lambda issuer: issuer.sign("[]", issuer.claims()),
    "a header without an end": lambda issuer: issuer.sign("{", issuer.claims()),
    "a header of brackets": lambda issuer: sign("[" * 5_000, "{}", lambda _: b"x"),
    "claims that are a list": lambda issuer: issuer.sign(HEADER, "[]"),
    "claims that are no JSON": lambda issuer: issuer.sign(HEADER, "sub=admin"),
    "claims of brackets": lambda issuer: issuer.sign(HEADER, "[" * 5_000),
    # algorithms
    "alg none": lambda issuer: sign(HEADER | {"alg": "none"}, issuer.claims(), lambda _: b""),
    "alg none, signed": lambda issuer: sign(HEADER | {"alg": "none"}, issuer.claims(), lambda _: b"x"),
    "alg nOnE": lambda issuer: sign(HEADER | {"alg": "nOnE"}, issuer.claims(), lambda _: b"x"),
    "no alg": lambda issuer: issuer.sign({"kid": RSA_KEY}, issuer.claims()),
    "alg that is a list": lambda issuer: issuer.sign(HEADER | {"alg": ["RS256"]}, issuer.claims()),
    "alg of another hash": lambda issuer: issuer.token(alg="RS512"),
    "alg of another padding": lambda issuer: issuer.token(alg="PS256"),
    "HS256 with the public key": lambda issuer: hmac_token(public_pem(issuer), HEADER | {"alg": "HS256"}, issuer),
    "HS256 with the public number": lambda issuer: hmac_token(
        issuer.jwks(RSA_KEY)["keys"][0]["n"].encode(), HEADER | {"alg": "HS256"}, issuer
    ),
    "HS256 that says RS256": lambda issuer: hmac_token(public_pem(issuer), HEADER, issuer),
    "HS256 with no secret": lambda issuer: hmac_token(b"", HEADER | {"alg": "HS256"}, issuer),
    "an elliptic signature of zeros": lambda issuer: sign(
        {"alg": "ES256", "kid": EC_KEY}, issuer.claims(), lambda _: bytes(64)
    ),
    # keys
    "a stranger's key": stranger,
    "an unknown key": lambda issuer: stranger(issuer, kid="another"),
    "no key": lambda issuer: issuer.token(None),
    "the other key": lambda issuer: issuer.token(EC_KEY),
    "a key that is a number": lambda issuer: issuer.sign(HEADER | {"kid": 1}, issuer.claims()),
    "a key that is a file": lambda issuer: hmac_token(b"", {"alg": "HS256", "kid": "../../../dev/null"}, issuer),
    "a key that is a path": lambda issuer: stranger(issuer, kid="../../../../proc/self/environ"),
    "a key that is a query": lambda issuer: stranger(issuer, kid="' UNION SELECT 'x' --"),
    "a key with another case": lambda issuer: issuer.token(RSA_KEY.upper()),
    "a key that it brings": lambda issuer: stranger(issuer, jwk="own"),
    "an unknown key that it brings": lambda issuer: stranger(issuer, kid="mine", jwk="own"),
    "a key at an address": lambda issuer: stranger(issuer, jku="http://127.0.0.1:1/jwks.json"),
    "an unknown key at an address": lambda issuer: stranger(issuer, kid="mine", jku="http://127.0.0.1:1/jwks.json"),
    "a certificate at an address": lambda issuer: stranger(issuer, x5u="http://127.0.0.1:1/cert.pem"),
    "a certificate that it brings": lambda issuer: stranger(issuer, x5c=["MIIB"]),
    # changed
    "another subject": lambda issuer: tampered(
        issuer, 1, lambda _: encode(json.dumps(issuer.claims(sub="admin")).encode())
    ),
    "no signature": lambda issuer: tampered(issuer, 2, lambda _: ""),
    "half a signature": lambda issuer: tampered(issuer, 2, lambda part: part[:100]),
    "a signature and more": lambda issuer: tampered(issuer, 2, lambda part: part + "AAAA"),
    "another token's signature": lambda issuer: tampered(issuer, 2, lambda _: issuer.token(sub="bob").split(".")[2]),
    # what it says
    "expired": lambda issuer: issuer.token(exp=int(time.time()) - 60),
    "expired, in lower case": lambda issuer: [("Authorization", f"bearer {issuer.token(exp=1)}")],
    "for ever": lambda issuer: issuer.token(exp=None),
    "until infinity": lambda issuer: issuer.sign(HEADER, issuer.claims(exp=float("inf"))),
    "until a word": lambda issuer: issuer.token(exp="never"),
    "not yet": lambda issuer: issuer.token(nbf=int(time.time()) + 60),
    "of tomorrow": lambda issuer: issuer.token(iat=int(time.time()) + 86_400),
    "another audience": lambda issuer: issuer.token(aud="others"),
    "other audiences": lambda issuer: issuer.token(aud=["others", AUDIENCE + "2"]),
    "a part of the audience": lambda issuer: issuer.token(aud=AUDIENCE[:-1]),
    "an audience in another case": lambda issuer: issuer.token(aud=AUDIENCE.upper()),
    "no audience": lambda issuer: issuer.token(aud=None),
    "an audience that is an object": lambda issuer: issuer.token(aud={AUDIENCE: True}),
    "another issuer": lambda issuer: issuer.token(iss="https://other.example"),
    "almost the issuer": lambda issuer: issuer.token(iss=ISSUER + "/"),
    "no issuer": lambda issuer: issuer.token(iss=None),
    "issuers": lambda issuer: issuer.sign(HEADER, issuer.claims(iss=[ISSUER])),
    "nobody": lambda issuer: issuer.token(sub=None),
    "an empty name": lambda issuer: issuer.token(sub=""),
    "a number for a name": lambda issuer: issuer.sign(HEADER, issuer.claims(sub=1)),
    "a very long name": lambda issuer: issuer.token(sub="x" * 1_001),
    "a name that is no text": lambda issuer: issuer.sign(HEADER, issuer.claims(sub="\ud800")),
    "two names": claims_twice,
    "two algorithms": lambda issuer: issuer.sign(
        f'{{"alg": "none", "alg": "RS256", "kid": "{RSA_KEY}"}}', issuer.claims()
    ),
    # kinds
    "a critical extension": lambda issuer: issuer.token(header={"crit": ["exp"]}),
    "claims that are not encoded": lambda issuer: issuer.token(header={"b64": False}),
    "a logout token": lambda issuer: issuer.token(header={"typ": "logout+jwt"}),
    "a proof": lambda issuer: issuer.token(header={"typ": "dpop+jwt"}),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_shape_does_not_pass(
    front: httpx.AsyncClient,
    issuer: Issuer,
    reached: list[httpx.Request],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """401 with a reason, backend-api never hears of it, and neither answer nor log holds what was sent."""
    caplog.set_level(logging.DEBUG)
    made = HOSTILE[name](issuer)
    if isinstance(made, str):
        made = [("Authorization", f"Bearer {made}")]
    given: dict[str, Any] = {"json": CARD} | (made if isinstance(made, dict) else {})
    if isinstance(made, list):
        given["headers"] = [(key.encode(), value.encode()) for key, value in made]
    answer = await front.post("/api/publish", **given)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="orchestrator-api"')
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert reached == []
    sent = [value for key, value in made if len(value) > 40] if isinstance(made, list) else []
    logged = "".join(JsonFormatter().format(record) for record in caplog.records)
    assert not [value for value in sent if value[-40:] in answer.text + logged or value[10:50] in answer.text + logged]


def test_enough_was_tried() -> None:
    """Ninety shapes and more."""
    assert len(HOSTILE) >= 90


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"exp": 1}, "it has expired"),
        ({"nbf": 2**33}, "it is not valid yet"),
        ({"aud": "others"}, "it is for another audience"),
        ({"iss": "https://other.example"}, "it is from another issuer"),
        ({"sub": None}, "it lacks one of exp, iss, aud and sub"),
    ],
)
async def test_a_refusal_says_why(
    front: httpx.AsyncClient, issuer: Issuer, changed: dict[str, Any], words: str
) -> None:
    """In the answer and in its header, as RFC 6750 has it, so that its owner can mend it."""
    answer = await front.post("/api/publish", json=CARD, headers=bearer(issuer.token(**changed)))
    said = f"The token is not valid: {words}"
    assert answer.json() == {"title": "Unauthorized", "status": 401, "detail": said}
    challenge = f'Bearer realm="orchestrator-api", error="invalid_token", error_description="{said}"'
    assert answer.headers["WWW-Authenticate"] == challenge


@pytest.mark.parametrize("path", ["//api/publish", "/api//publish", "/API/publish", "/api/publish/", "/api/./publish"])
async def test_other_spellings_lead_nowhere(front: httpx.AsyncClient, reached: list[httpx.Request], path: str) -> None:
    """No spelling of a path goes around the door."""
    answer = await front.post(httpx.URL("http://front").copy_with(raw_path=path.encode()), json=CARD)
    assert answer.status_code in {307, 401, 404}
    assert reached == []


async def test_what_is_logged_says_who_asked(
    front: httpx.AsyncClient, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    """Every record of a request has the subject, and none the token."""
    token = issuer.token()
    caplog.set_level(logging.DEBUG)

    class Format(logging.Handler):
        lines: list[dict[str, Any]] = []  # noqa: RUF012

        def emit(self, record: logging.LogRecord) -> None:
            self.lines.append(json.loads(JsonFormatter().format(record)))

    handler = Format()
    logging.getLogger("registry").addHandler(handler)
    try:
        app_log = logging.getLogger("registry")
        app_log.setLevel(logging.DEBUG)
        await front.post("/api/publish", json=CARD, headers=bearer(token))
        app_log.info("afterwards")
    finally:
        logging.getLogger("registry").removeHandler(handler)
    assert handler.lines[-1]["subject"] == "alice"
    assert token not in json.dumps(handler.lines)


async def test_keys_that_can_not_be_had_let_nobody_in(
    monkeypatch: pytest.MonkeyPatch,
    front: httpx.AsyncClient,
    app: FastAPI,
    issuer: Issuer,
    reached: list[httpx.Request],
) -> None:
    """Neither a good token nor a bad one: 503 with words, and when to come again."""
    monkeypatch.setenv("AUTH_JWKS_FILE", "/nowhere/jwks.json")
    app.state.door = AuthSettings().door()
    for token in (issuer.token(), stranger(issuer)):
        answer = await front.post("/api/publish", json=CARD, headers=bearer(token))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        assert answer.json()["detail"].startswith("The issuer's keys can't be had")
    assert reached == []


@pytest.mark.parametrize("variables", [{}, {"AUTH_ISSUER": "", "AUTH_JWKS_FILE": ""}])
def test_nobody_is_asked_when_nothing_is_set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Which is the plain demo's case."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert AuthSettings().door() is None


WHOLE = {"AUTH_JWKS_FILE": "/jwks.json", "AUTH_ISSUER": ISSUER, "AUTH_AUDIENCE": AUDIENCE}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        *(({name: value}, "to ask callers for a token, set") for name, value in WHOLE.items()),
        *(({**WHOLE, name: ""}, "to ask callers for a token, set") for name in WHOLE),
        ({**WHOLE, "AUTH_JWKS_URL": "https://issuer.example"}, "either AUTH_JWKS_URL or AUTH_JWKS_FILE"),
        ({**WHOLE, "AUTH_JWKS_FILE": "", "AUTH_JWKS_URL": "http://issuer.example"}, "keys come by https"),
        ({**WHOLE, "AUTH_JWKS_FILE": "", "AUTH_JWKS_URL": "http://localhost.example"}, "keys come by https"),
        ({**WHOLE, "AUTH_JWKS_FILE": "", "AUTH_JWKS_URL": "file:///etc/passwd"}, "keys come by https"),
        ({**WHOLE, "AUTH_JWKS_FILE": "", "AUTH_JWKS_URL": "https://"}, "keys come by https"),
    ],
)
def test_half_a_lock_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str) -> None:
    """A service that should ask for tokens and can't does not start, rather than let everybody in."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        create_app(Settings())
