"""An issuer's keys: when they are read, and what counts while they can't be."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from orchestrator.keys import Keys, KeysUnavailableError, from_address
from tests.support.issuer import EC_KEY, RSA_KEY, Issuer


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    """Whom the keys are of."""
    return Issuer()


class Source:
    """A JWK set that changes, hangs and goes away, and a clock."""

    def __init__(self, document: Any) -> None:
        self.document = document
        self.now = 1_000.0
        self.readings = 0
        self.away = False
        self.asked = asyncio.Event()
        self.free = asyncio.Event()
        self.free.set()

    async def read(self) -> bytes:
        self.readings += 1
        self.asked.set()
        await self.free.wait()
        if self.away:
            raise OSError("no route")
        return json.dumps(self.document).encode()

    def clock(self) -> float:
        return self.now

    def keys(self) -> Keys:
        return Keys(self.read, self.clock)


async def test_keys_are_read_once(issuer: Issuer) -> None:
    """A thousand tokens of known keys cost one reading."""
    source = Source(issuer.jwks())
    keys = source.keys()
    found = await asyncio.gather(*(keys.find((RSA_KEY, EC_KEY)[number % 2]) for number in range(1_000)))
    assert {key.algorithm_name for key in found if key} == {"RS256", "ES256"}
    assert source.readings == 1


async def test_a_new_key_is_found_and_made_up_ones_cost_little(issuer: Issuer) -> None:
    """An unknown id asks the issuer anew, but a flood of them every ten seconds at most."""
    source = Source(issuer.jwks(RSA_KEY))
    keys = source.keys()
    assert await keys.find(RSA_KEY)
    source.document = issuer.jwks()
    source.now += 11
    assert await keys.find(EC_KEY)
    assert source.readings == 2
    for number in range(1_000):
        assert await keys.find(f"made up {number}") is None
    assert source.readings == 2
    source.now += 11
    assert await asyncio.gather(*(keys.find(f"made up {number}") for number in range(100))) == [None] * 100
    assert source.readings == 3


async def test_a_key_that_was_withdrawn_ends(issuer: Issuer) -> None:
    """Five minutes later it counts no more."""
    source = Source(issuer.jwks())
    keys = source.keys()
    assert await keys.find(EC_KEY)
    source.document = issuer.jwks(RSA_KEY)
    source.now += 299
    assert await keys.find(EC_KEY)
    source.now += 2
    assert await keys.find(EC_KEY) is None
    assert await keys.find(RSA_KEY)


async def test_known_keys_outlive_their_issuer_for_an_hour(issuer: Issuer) -> None:
    """While it is away known keys count and unknown ones can't be judged; after an hour none counts; then it heals."""
    source = Source(issuer.jwks(RSA_KEY))
    keys = source.keys()
    assert await keys.find(RSA_KEY)
    source.away = True
    source.now += 3_599
    assert await keys.find(RSA_KEY)
    with pytest.raises(KeysUnavailableError):
        await keys.find("new")
    source.now += 2
    with pytest.raises(KeysUnavailableError):
        await keys.find(RSA_KEY)
    source.away = False
    source.now += 11
    assert await keys.find(RSA_KEY)


async def test_nobody_waits_for_news_of_a_known_key(issuer: Issuer) -> None:
    """While one request asks a silent issuer for news, others go on with what is known."""
    source = Source(issuer.jwks())
    keys = source.keys()
    assert await keys.find(RSA_KEY)
    source.now += 301
    source.asked.clear()
    source.free.clear()
    first = asyncio.create_task(keys.find(RSA_KEY))
    async with asyncio.timeout(2):
        await source.asked.wait()
        assert await keys.find(RSA_KEY)
    assert not first.done()
    source.free.set()
    assert await first


@pytest.mark.parametrize(
    "change",
    [
        lambda jwk: jwk | {"kid": None},
        lambda jwk: jwk | {"use": "enc"},
        lambda jwk: jwk | {"key_ops": ["sign"]},
        lambda jwk: jwk | {"alg": "HS256"},
        lambda jwk: jwk | {"alg": "none"},
        lambda jwk: jwk | {"kty": "XY"},
        lambda jwk: jwk | {"n": "?"},
        lambda jwk: jwk | {"d": "AQAB"},
        lambda jwk: {"kty": "oct", "kid": RSA_KEY, "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"},
        lambda jwk: "a word",
    ],
)
async def test_what_can_not_check_a_signature_is_no_key(issuer: Issuer, change: Any) -> None:
    """Nor is a secret, or a private key: such a set lets nobody in."""
    [jwk] = issuer.jwks(RSA_KEY)["keys"]
    source = Source({"keys": [change(jwk)]})
    with pytest.raises(KeysUnavailableError):
        await source.keys().find(RSA_KEY)


@pytest.mark.parametrize("document", [[], {}, {"keys": {}}, {"keys": None}, "keys", None])
async def test_what_is_no_set_is_refused(document: Any) -> None:
    """Whatever the issuer's address answers, nobody is let in by it."""
    with pytest.raises(KeysUnavailableError):
        await Source(document).keys().find(RSA_KEY)


@pytest.fixture
async def address() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Of a server that answers once with each of these, and the list."""
    answers: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop(0))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json", answers


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return head.encode() + b"\r\n\r\n" + body


async def test_keys_come_from_an_address(issuer: Issuer, address: tuple[str, list[bytes]]) -> None:
    """As the body of a 200, and of nothing else: no redirect, no error, nothing large."""
    url, answers = address
    answers.append(http("200 OK", json.dumps(issuer.jwks()).encode()))
    assert await Keys(from_address(url)).find(RSA_KEY)
    refused = [
        http("302 Found", b"", f"Location: {url}"),
        http("404 Not Found", json.dumps(issuer.jwks()).encode()),
        http("200 OK", b" " * 2**18 + json.dumps(issuer.jwks()).encode()),
        b"nonsense",
    ]
    for answer in refused:
        answers[:] = [answer, http("200 OK", json.dumps(issuer.jwks()).encode())]
        with pytest.raises(KeysUnavailableError):
            await Keys(from_address(url)).find(RSA_KEY)
        assert len(answers) == 1


async def test_an_issuer_proves_who_it_is(issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By https, keys come from whoever has a certificate that this machine trusts, and from nobody else."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http("200 OK", json.dumps(issuer.jwks()).encode()))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}/jwks.json"
        with pytest.raises(KeysUnavailableError):
            await Keys(from_address(url)).find(RSA_KEY)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert await Keys(from_address(url)).find(RSA_KEY)


async def test_a_silent_issuer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading has a time limit, and then it is 503."""
    monkeypatch.setattr("orchestrator.keys._READ_SECONDS", 0.05)
    source = Source({})
    source.free.clear()
    async with asyncio.timeout(2):
        with pytest.raises(KeysUnavailableError):
            await source.keys().find(RSA_KEY)
