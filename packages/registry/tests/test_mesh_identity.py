"""A service's certificate and roots: the newest for the next handshake, nothing but its own, and no key anywhere."""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from registry import ConsulSettings, UnsafeAgentError
from registry.mesh.agent import AgentSource
from registry.mesh.identity import MeshIdentity, choose_source
from registry.mesh.settings import MeshSettings
from registry.mesh.tls import peer_uri
from registry.testing.fixtures import ConsulAgent
from tests.support.authority import Authority, FixedSource
from tests.support.mesh import token_for
from tests.support.server import Answer, Request, Serve

MESH = Authority()
OWN, PEER = "orchestrator-api", "backend-api"


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what it looks at tells nobody
            await asyncio.sleep(0.001)


@asynccontextmanager
async def identity(service: str = OWN, source: FixedSource | None = None) -> AsyncIterator[MeshIdentity]:
    source = source or FixedSource(MESH.service(service).leaf(), MESH.roots())
    async with MeshIdentity(service, source) as me:
        yield me


@asynccontextmanager
async def listening(server: MeshIdentity) -> AsyncIterator[int]:
    """A port that says who called and hangs up when it hears something."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{peer_uri(writer.get_extra_info('ssl_object'))}\n".encode())
        await reader.read(1)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server.server_context())
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


async def meet(client: MeshIdentity, port: int, service: str = PEER) -> tuple[str, int, asyncio.StreamWriter]:
    """Who the server says that we are, the serial number of its certificate, and the open connection."""
    name = client.server_name(service)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client.client_context(), server_hostname=name)
    shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
    client.verify(service, shown)
    if not (told := (await reader.readline()).decode().strip()):  # with TLS 1.3 it refuses us after the handshake
        writer.close()
        raise ConnectionResetError("hung up")
    certificate: Any = shown.getpeercert()
    return told, int(certificate["serialNumber"], 16), writer


async def test_both_sides_know_each_other() -> None:
    """The server reads the caller's name, and the caller verifies the server's, in any case of letters."""
    async with identity() as client, identity(PEER) as server, listening(server) as port:
        told, _, writer = await meet(client, port, "Backend-API")
        assert client.service_of(told) == server.service_of(told) == OWN
        with pytest.raises(ssl.CertificateError, match=r"expected .*/svc/research-api, and met .*/backend-api"):
            client.verify("research-api", writer.get_extra_info("ssl_object"))
        writer.close()


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "",
        "https://example.com",
        f"spiffe://{MESH.trust_domain}/agent/client/dc/dc1/id/x",
        f"spiffe://{MESH.trust_domain}/gateway/mesh/dc/dc1",
        f"spiffe://{MESH.trust_domain}/ns/other/dc/dc1/svc/{PEER}",
        f"spiffe://{MESH.trust_domain}/ap/other/ns/default/dc/dc1/svc/{PEER}",
        f"spiffe://{MESH.trust_domain}/ns/default/dc/dc1/svc/{PEER}/",
        f"spiffe://{MESH.trust_domain}/ns/default/dc/dc1/svc/",
        f"spiffe://{MESH.trust_domain}/ns/default/dc/dc1/svc/{PEER}\n",
        f"spiffe://{MESH.trust_domain}.evil/ns/default/dc/dc1/svc/{PEER}",
        f"spiffe://evil.{MESH.trust_domain}/ns/default/dc/dc1/svc/{PEER}",
        f"x-spiffe://{MESH.trust_domain}/ns/default/dc/dc1/svc/{PEER}",
    ],
)
async def test_only_services_of_this_mesh_have_a_name(uri: str | None) -> None:
    """Agents, gateways, namespaces, partitions, other trust domains, and what looks like one: nobody."""
    async with identity() as me:
        assert me.service_of(uri) is None


async def test_new_certificate_and_root_serve_the_next_handshake() -> None:
    """A leaf, then a root is changed: new handshakes show and trust it, and open connections stay."""
    ours, theirs = (FixedSource(MESH.service(name).leaf(), MESH.roots()) for name in (OWN, PEER))
    async with identity(OWN, ours) as client, identity(PEER, theirs) as server, listening(server) as port:
        _, first, kept = await meet(client, port)
        await theirs.tell(leaf=MESH.service(PEER).leaf())
        await until(lambda: server._leaf == theirs._leaf)
        _, second, writer = await meet(client, port)
        writer.close()
        newer = Authority(MESH.trust_domain)
        await ours.tell(roots=newer.roots(MESH))
        await theirs.tell(newer.service(PEER).leaf(), newer.roots(MESH))
        await until(lambda: (server._leaf, server._roots, client._roots) == (theirs._leaf, theirs._roots, ours._roots))
        _, third, writer = await meet(client, port)
        writer.close()
        assert len({first, second, third}) == 3
        assert not kept.is_closing()
        kept.close()
        # The old authority goes: who still shows its certificate is refused by the server.
        await theirs.tell(roots=newer.roots())
        await until(lambda: server._roots == theirs._roots)
        with pytest.raises(OSError):
            await meet(client, port)


async def test_without_a_certificate_nothing_is_sent_and_nobody_let_in() -> None:
    """Before the first one: a call says why, and a handshake is refused."""
    async with identity() as client:
        silent = FixedSource()
        server = MeshIdentity(PEER, silent)
        async with asyncio.TaskGroup() as group:
            group.create_task(server.start())
            async with listening(server) as port:
                with pytest.raises(ssl.SSLError, match="has no certificate of the mesh: Consul has not told"):
                    server.client_context()
                with pytest.raises(OSError):
                    await meet(client, port)
                await silent.tell(MESH.service(PEER).leaf(), MESH.roots())
                await server.ready.wait()
                _, _, writer = await meet(client, port)
                writer.close()
        await server.aclose()


async def test_certificate_that_has_ended_calls_nobody() -> None:
    """Consul was away for days: the error says since when, and that nothing was sent is sure."""
    ended = replace(MESH.service(OWN).leaf(), expires=datetime.now(UTC) - timedelta(seconds=1))
    async with identity(OWN, FixedSource(ended, MESH.roots())) as me:
        with pytest.raises(ssl.SSLError, match=r"this service's certificate ended at \d{4}-"):
            me.client_context()


def test_resumed_session_with_an_ended_certificate_is_nobody() -> None:
    """TLS 1.2 may resume a session without looking at dates again; here they are looked at."""
    names = (("URI", MESH.uri(OWN)),)

    class Resumed:
        def __init__(self, ends: str) -> None:
            self._shown = {"subjectAltName": names, "notAfter": ends}

        def getpeercert(self) -> object:
            return self._shown

    assert peer_uri(Resumed("Nov 30 22:27:35 2096 GMT")) == MESH.uri(OWN)
    with pytest.raises(ssl.CertificateError, match="ended on Nov 30 22:27:35 2020 GMT"):
        peer_uri(Resumed("Nov 30 22:27:35 2020 GMT"))


async def test_certificate_of_somebody_else_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    """A source that tells another service's: said, and not used."""
    async with identity(OWN, FixedSource(MESH.service(PEER).leaf(), MESH.roots())) as me:
        assert not me.ready.is_set()
        assert f"asked for the certificate of {OWN}, and was told {MESH.uri(PEER)}" in str(me.complaint)
    assert len([record for record in caplog.records if record.name == "registry"]) == 1


async def test_broken_certificate_leaves_the_last_one(caplog: pytest.LogCaptureFixture) -> None:
    """What OpenSSL can't read is said, and replaces nothing."""
    source = FixedSource(MESH.service(OWN).leaf(), MESH.roots())
    async with identity(OWN, source) as me:
        before = me.client_context()
        broken = replace(MESH.service(OWN).leaf(), certificate="no PEM")
        await source.tell(broken)
        await until(lambda: "certificate" in str(me.complaint))
        assert me.client_context() is before
        await source.tell(MESH.service(OWN).leaf())
        await until(lambda: me.complaint is None)
        assert me.client_context() is not before


async def test_key_is_in_no_file_log_or_repr(caplog: pytest.LogCaptureFixture) -> None:
    """No descriptor stays open that has it, and no text that we make."""
    caplog.set_level(logging.DEBUG)
    leaf = MESH.service(OWN).leaf()
    async with identity(OWN, FixedSource(leaf, MESH.roots())) as me:
        assert not any("memfd" in name for name in descriptors())
        assert leaf.key.splitlines()[1] not in repr(leaf) + repr(me) + repr(vars(me)) + caplog.text


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one by which the folder is read
            found.append(str(entry.readlink()))
    return found


@pytest.mark.parametrize(
    ("value", "mode"),
    [("true", "true"), ("1", "true"), ("client", "client"), ("0", "false"), ("", "false"), (None, "false")],
)
def test_mode_is_read_as_consul_reads_truth(monkeypatch: pytest.MonkeyPatch, value: str | None, mode: str) -> None:
    """``1`` and ``0`` are words for it, too; unset and empty are off."""
    if value is not None:
        monkeypatch.setenv("CONSUL_CONNECT", value)
    assert MeshSettings().mode == mode
    assert MeshSettings(mode="client").mode == "client"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CONSUL_CONNECT", "yes please", "set it to false, client or true"),
        ("CONSUL_GRPC_ADDR", "consul", "set it to host:port"),
        ("CONSUL_GRPC_ADDR", "unix:///run/consul.sock", "set it to host:port"),
        ("CONSUL_CONNECT_ALLOW_UNSAFE_AGENT", "perhaps", "valid boolean"),
    ],
)
def test_invalid_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str) -> None:
    """The message says which one, and what to write."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError, match=rf"(?s){variable}.*{said}"):
        MeshSettings()


def told(content: object, status: int = 200) -> Answer:
    """As Consul answers."""
    headers = {"Content-Type": "application/json", "X-Consul-Index": "7", "X-Consul-Default-ACL-Policy": "deny"}
    return Answer(status, json.dumps(content).encode(), headers)


async def test_agent_that_refuses_others_is_used(serve: Serve) -> None:
    """What a fixed release does: own token 200, without a token and with a wrong one 403."""
    leaf = MESH.service(OWN).leaf()

    def answer(request: Request) -> Answer:
        if request.headers.get("x-consul-token") != "ours":
            return told("Permission denied", 403)
        if "/ca/leaf/" in request.target:
            about = {"ServiceURI": leaf.uri, "ValidBefore": leaf.expires.isoformat()}
            return told({"CertPEM": leaf.certificate, "PrivateKeyPEM": leaf.key} | about)
        if "/ca/roots" in request.target:
            return told({"TrustDomain": MESH.trust_domain, "Roots": [{"RootCert": MESH.root}]})
        return told({})

    server = serve(answer)
    settings = ConsulSettings(host="127.0.0.1", port=server.port, token=SecretStr("ours"))
    async with MeshIdentity(OWN, AgentSource(settings)) as me:
        await until(me.ready.is_set)
    asked = [request.headers.get("x-consul-token") for request in server.requests if "leaf" in request.target]
    assert asked[:2] == ["ours", None]
    assert asked[2] not in {"ours", None}


@pytest.mark.parametrize(
    "broken", [[], {"CertPEM": "x"}, {"CertPEM": "x", "PrivateKeyPEM": "y", "ServiceURI": "z", "ValidBefore": "soon"}]
)
async def test_broken_answer_shows_no_content(serve: Serve, broken: object) -> None:
    """A leaf in another shape is no leaf; the error tells what is missing, and not what there was."""
    server = serve(lambda _: told(broken))
    settings = ConsulSettings(host="127.0.0.1", port=server.port)
    async with MeshIdentity(OWN, AgentSource(settings, allow_unsafe_agent=True)) as me:
        assert "sent a broken" in str(me.complaint)
        assert not me.ready.is_set()


async def test_source_is_the_agent_unless_a_server_is_named() -> None:
    """``CONSUL_GRPC_ADDR`` chooses."""
    agent, server = choose_source(), choose_source(MeshSettings(grpc_address="localhost:8503"))
    assert isinstance(agent, AgentSource)
    assert not isinstance(server, AgentSource)
    await agent.aclose()
    await server.aclose()


@pytest.mark.real
async def test_agent_that_gives_the_key_to_others_is_refused(fresh_locked_agent: ConsulAgent) -> None:
    """The Consul that can be built here has CVE-2026-105765; the error says so, and the ways out."""
    token = token_for(fresh_locked_agent, f'service "{OWN}" {{ policy = "write" }}')
    settings = ConsulSettings(host="127.0.0.1", port=fresh_locked_agent.http_port, token=SecretStr(token))
    with pytest.raises(UnsafeAgentError) as refused:
        await MeshIdentity(OWN, AgentSource(settings)).start()
    for word in ("CVE-2026-105765", "2.1.0", "CONSUL_GRPC_ADDR", "CONSUL_CONNECT_ALLOW_UNSAFE_AGENT=true", OWN):
        assert word in str(refused.value)
    assert token not in str(refused.value)
    async with MeshIdentity(OWN, AgentSource(settings, allow_unsafe_agent=True)) as me:
        assert me.ready.is_set()


@pytest.mark.real
async def test_without_acls_it_is_said_once_that_nobody_is_kept_out(
    consul_agent: ConsulAgent, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to refuse then: the agent gives every certificate to everybody by design."""
    settings = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    source = AgentSource(settings)
    async with MeshIdentity("plain-api", source) as me:
        assert me.ready.is_set()
        async for _ in source.leaves("plain-api"):
            break
    assert len([record for record in caplog.records if "ACLs are off" in record.message]) == 1


@pytest.mark.real
async def test_token_without_the_right_gets_nothing(
    fresh_locked_agent: ConsulAgent, caplog: pytest.LogCaptureFixture
) -> None:
    """Another service's certificate is refused by Consul; that is said once, and tried again quietly."""
    token = token_for(fresh_locked_agent, 'service "research-api" { policy = "write" }')
    settings = ConsulSettings(host="127.0.0.1", port=fresh_locked_agent.http_port, token=SecretStr(token))
    async with MeshIdentity(OWN, AgentSource(settings)) as me:
        await asyncio.sleep(0.6)
        assert not me.ready.is_set()
        assert "ermission denied" in str(me.complaint)
    assert len([record for record in caplog.records if "no news of the mesh's certificate" in record.message]) == 1
    assert token not in caplog.text
