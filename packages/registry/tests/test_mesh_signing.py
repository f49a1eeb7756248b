"""A server signs: the key is made here, stays here, and is renewed before the certificate ends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from registry import ConsulSettings, InvalidInputError, RegistryUnavailableError
from registry.mesh import signing
from registry.mesh.identity import MeshIdentity
from registry.mesh.protobuf import chunks, encode
from registry.mesh.settings import MeshSettings
from registry.mesh.signing import SigningSource
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.authority import Authority
from tests.support.mesh import authority_of, new_root, token_for

OWN = "orchestrator-api"


@pytest.fixture(scope="module", autouse=True)
async def one_event_loop() -> AsyncIterator[None]:
    """For all these tests: grpc tells what ended late to the loop it began on, and fails others once that is closed."""
    yield  # noqa: PT022  # only what is left later keeps the loop


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what it looks at tells nobody
            await asyncio.sleep(0.001)


@asynccontextmanager
async def signed(consul: ConsulAgent, token: str | None = None, service: str = OWN) -> AsyncIterator[MeshIdentity]:
    """A service whose certificate this Consul's server signs."""
    secret = token or consul.token
    settings = ConsulSettings(host="127.0.0.1", port=consul.http_port, token=SecretStr(secret) if secret else None)
    mesh = MeshSettings(grpc_address=f"127.0.0.1:{consul.grpc_port}")
    async with MeshIdentity(service, SigningSource(mesh, settings)) as me:
        yield me


@pytest.mark.real
async def test_key_is_made_here_and_fits(fresh_locked_agent: ConsulAgent) -> None:
    """service:write on the own name is enough; the certificate belongs to the key, and names the service alone."""
    token = token_for(fresh_locked_agent, f'service "{OWN}" {{ policy = "write" }}')
    async with signed(fresh_locked_agent, token) as me:
        await until(me.ready.is_set)
        assert me._leaf is not None
        certificate = x509.load_pem_x509_certificate(me._leaf.certificate.encode())
        key = serialization.load_pem_private_key(me._leaf.key.encode(), None)
        forms = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        assert certificate.public_key().public_bytes(*forms) == key.public_key().public_bytes(*forms)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [name.value for name in names] == [me.uri(OWN)] == [me._leaf.uri]
        assert me._leaf.expires == certificate.not_valid_after_utc
        assert me.datacenter == "dc1"
        me.client_context()
        # The agent, which would give a certificate from its cache to anybody, has none of this one's.
        own = str(certificate.serial_number)
        async with httpx.AsyncClient(base_url=fresh_locked_agent.url, trust_env=False) as stranger:
            answer = await stranger.get(f"/v1/agent/connect/ca/leaf/{OWN}")
        assert answer.status_code == 403
        assert own not in answer.text


@pytest.mark.real
@pytest.mark.parametrize("rules", ['service "other-api" { policy = "write" }', None], ids=["foreign token", "no token"])
async def test_who_may_not_gets_nothing(fresh_locked_agent: ConsulAgent, rules: str | None) -> None:
    """Another service's token, and none: refused by the server, and said."""
    token = token_for(fresh_locked_agent, rules) if rules else "11111111-1111-4111-8111-111111111111"
    async with signed(fresh_locked_agent, token) as me:
        await until(lambda: "did not give" in str(me.complaint))
        assert any(word in str(me.complaint) for word in ("PERMISSION_DENIED", "UNAUTHENTICATED", "ACL not found"))
        assert not me.ready.is_set()
        assert token not in str(me.complaint)


@pytest.mark.real
async def test_root_is_followed(fresh_consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new authority: trusted at once, together with the former; a new certificate by it within ``SPREAD``."""
    monkeypatch.setattr(signing, "SPREAD", 0.2)
    first = authority_of(fresh_consul_agent)
    async with signed(fresh_consul_agent) as me:
        await until(me.ready.is_set)
        before = me._leaf
        second = Authority(first.trust_domain)
        await asyncio.to_thread(new_root, fresh_consul_agent, second)
        await until(lambda: me._leaf != before)
        assert me._leaf is not None
        assert me._roots is not None
        issuer = x509.load_pem_x509_certificate(second.root.encode())
        x509.load_pem_x509_certificate(me._leaf.certificate.encode()).verify_directly_issued_by(issuer)
        assert {first.root.strip(), second.root.strip()} <= {root.strip() for root in me._roots.certificates}


@pytest.mark.real
async def test_renewed_within_its_life(fresh_consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 60 to 90 % of it, and each time with another key."""
    assert signing.RENEW == (0.6, 0.9)
    monkeypatch.setattr(signing, "RENEW", (0.0, 0.0))  # at once, which is after a second
    async with signed(fresh_consul_agent) as me:
        await until(me.ready.is_set)
        first = me._leaf
        await until(lambda: me._leaf != first)
        assert first is not None
        assert me._leaf is not None
        assert me._leaf.key != first.key
        assert (me._leaf.expires - datetime.now(UTC)).total_seconds() > 71 * 3600


@pytest.mark.real
async def test_server_that_is_away_is_waited_for(private_consul_agent: ConsulAgent) -> None:
    """Killed and started again: the last certificate serves on, and then there is no complaint any more."""
    async with signed(private_consul_agent) as me:
        await until(me.ready.is_set)
        await asyncio.to_thread(private_consul_agent.kill)
        await until(lambda: "UNAVAILABLE" in str(me.complaint))
        me.client_context()
        await asyncio.to_thread(private_consul_agent.start)
        await until(lambda: me.complaint is None, 20)


async def test_address_by_tls_needs_what_signed_the_server() -> None:
    """``https://`` or a CA makes it TLS; a port that speaks none is an error that says so, and no certificate."""
    mesh = MeshSettings(grpc_address="https://127.0.0.1:1")
    async with MeshIdentity(OWN, SigningSource(mesh, ConsulSettings())) as me:
        await until(lambda: "UNAVAILABLE" in str(me.complaint))


async def test_another_authority_of_the_servers_is_trusted_once_its_file_is_there(tmp_path: Path) -> None:
    """The servers get new certificates by a new authority, and are asked again as soon as the file has changed."""
    file, [port] = tmp_path / "ca.pem", free_ports(1)
    settings = MeshSettings(grpc_address=f"localhost:{port}", grpc_ca_file=file)
    source: SigningSource | None = None
    for authority in (Authority(), Authority()):
        file.write_text(authority.root)
        source = source or SigningSource(settings, ConsulSettings())
        async with telling_roots(authority, port), asyncio.timeout(20):
            while True:
                try:
                    assert (await anext(source.roots())).certificates == (authority.root,)
                    break
                except RegistryUnavailableError:  # the server was just started
                    await asyncio.sleep(0.05)
    assert source is not None
    await source.aclose()


@asynccontextmanager
async def telling_roots(authority: Authority, port: int) -> AsyncIterator[None]:
    """A server of Consul, as far as its roots; it shows a certificate of the same authority."""

    async def told(request: bytes, context: object) -> AsyncIterator[bytes]:
        root = encode(5, authority.root)
        head = bytes([3 << 3 | 2, len(root) & 127 | 128, len(root) >> 7])  # no text: longer than 127 bytes
        yield encode(1, "an id") + encode(2, authority.trust_domain) + head + root

    signed = authority.sign(dns=["localhost"])
    handler = grpc.unary_stream_rpc_method_handler(told)
    service = signing._SERVICE.removeprefix("/")
    server = grpc.aio.server(handlers=[grpc.method_handlers_generic_handler(service, {"WatchRoots": handler})])
    shown = [(signed.key.encode(), signed.certificate.encode())]
    server.add_secure_port(f"localhost:{port}", grpc.ssl_server_credentials(shown))
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def test_file_that_is_not_there_is_named() -> None:
    """Said when the service starts."""
    mesh = MeshSettings(grpc_address="consul:8503", grpc_ca_file=Path("/nowhere/ca.pem"))
    with pytest.raises(InvalidInputError, match="CONSUL_GRPC_CACERT /nowhere/ca"):
        SigningSource(mesh, ConsulSettings())


@given(st.text(), st.integers(1, 100))
def test_strings_come_back(value: str, number: int) -> None:
    """What is written is read, by its number only."""
    message = encode(number, value) + encode(number + 1, "other") + encode(number, value)
    assert chunks(message, number) == [value.encode()] * 2
    assert chunks(message, number + 2) == []


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(message: bytes) -> None:
    """Never anything but a list or a ValueError."""
    with suppress(ValueError):
        assert isinstance(chunks(message, 1), list)


def test_other_kinds_are_skipped() -> None:
    """A number of eight bytes, one of four, and a varint before the string."""
    message = b"\x09" + bytes(8) + b"\x15" + bytes(4) + b"\x18\xff\x01" + encode(4, "x")
    assert chunks(message, 4) == [b"x"]
    with pytest.raises(ValueError, match="kind 3"):
        chunks(b"\x0b", 1)
    with pytest.raises(ValueError, match="breaks off"):
        chunks(encode(1, "abc")[:-1], 1)
