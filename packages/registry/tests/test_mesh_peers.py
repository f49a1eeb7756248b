"""Whoever answers in place of the called service reads no byte of the request, and costs nobody else anything."""

import asyncio
import os
import socket
import ssl
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import httpx
import pytest
import uvloop
from cryptography.x509.oid import ExtendedKeyUsageOID

from registry import ConnectionOptions, DiscoveryTransport, Instance, ServiceDiscoveryClient, StaticResolver
from registry.discovery.blame import Blame, Failure, judge
from registry.mesh.identity import MeshIdentity
from registry.mesh.tls import Connection, tls_context
from tests.support.authority import Authority, FixedSource, Signed

SERVICE = "backend-api"
MESH, FOREIGN = Authority(), Authority()
ELSEWHERE = Authority("99999999-2222-3333-4444-555555555555.consul")
HEAD = f"spiffe://{MESH.trust_domain}/"
URI = MESH.uri(SERVICE)
Context = ssl.SSLContext | None
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


@dataclass
class Server:
    """An instance, and what came to it."""

    instance: Instance
    accepted: int = 0
    read: int = 0
    """Bytes of requests."""
    connections: list[asyncio.StreamWriter] = field(default_factory=list)

    def cut(self) -> None:
        """Ends every connection."""
        for writer in self.connections:
            writer.close()


def serving(signed: Signed, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, trusts: Authority = MESH) -> Context:
    """Listens with this certificate, and demands one of the mesh."""
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, signed.leaf() if signed.uris else None, trusts.roots())
    if not signed.uris:
        context = tls_context(ssl.PROTOCOL_TLS_SERVER, replace(signed, uris=("none",)).leaf(), trusts.roots())
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = min(version, context.minimum_version)
    context.maximum_version = version
    return context


async def until(condition: Callable[[], bool]) -> None:
    """Returns when it holds; gives up after 10 s."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what it looks at tells nobody
            await asyncio.sleep(0.001)


@asynccontextmanager
async def server(context: Context, service: str = SERVICE, name: str = "1") -> AsyncIterator[Server]:
    """Answers every request with its own name; counts what it reads."""
    seen: Server

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.accepted += 1
        seen.connections.append(writer)
        try:
            while data := await reader.read(65_536):
                # A port that speaks no TLS is told hello; that is no request.
                if context is None and data[:1] == b"\x16":
                    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    break
                seen.read += len(data)
                writer.write(OK % (len(name), name.encode()))
        except OSError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = listener.sockets[0].getsockname()[1]
    seen = Server(Instance(name, service, "127.0.0.1", port, connect=True))
    try:
        yield seen
    finally:
        listener.close()
        seen.cut()
        await asyncio.sleep(0)


@asynccontextmanager
async def identity(service: str = "orchestrator-api", source: FixedSource | None = None) -> AsyncIterator[MeshIdentity]:
    """A service of this mesh."""
    source = source or FixedSource(MESH.service(service).leaf(), MESH.roots())
    async with MeshIdentity(service, source) as known:
        yield known


@asynccontextmanager
async def client_of(
    *instances: Instance, peers: MeshIdentity | None, **options: float
) -> AsyncIterator[ServiceDiscoveryClient]:
    """Calls these, each in its turn; nobody is asked twice in a call."""
    services: dict[str, list[Instance]] = {}
    for each in instances:
        services.setdefault(each.service, []).append(each)
    connections = ConnectionOptions(peers=peers, **options)  # type: ignore[arg-type]
    client = ServiceDiscoveryClient(
        StaticResolver(services), policy="round_robin", connections=connections, retry_delay=0.001, timeout=2.0
    )
    async with client:
        yield client


WRONG: dict[str, tuple[Callable[[], Context], str]] = {
    "of a foreign CA": (lambda: serving(FOREIGN.service(SERVICE)), "certificate verify failed"),
    "self-signed": (lambda: serving(MESH.sign(URI, by_itself=True)), "certificate verify failed"),
    "of another service": (lambda: serving(MESH.service("research-api")), MESH.uri("research-api")),
    "of the caller's own service": (lambda: serving(MESH.service("orchestrator-api")), MESH.uri("orchestrator-api")),
    "of an agent": (lambda: serving(MESH.sign(f"{HEAD}agent/client/dc/dc1/id/node-1")), "agent/client"),
    "of a mesh gateway": (lambda: serving(MESH.sign(f"{HEAD}gateway/mesh/dc/dc1")), "gateway/mesh"),
    "of two services": (lambda: serving(MESH.sign(URI, MESH.uri("research-api"))), "2 URIs"),
    "of two services, the other first": (lambda: serving(MESH.sign(MESH.uri("research-api"), URI)), "2 URIs"),
    "of nobody": (lambda: serving(MESH.sign()), "0 URIs"),
    "with the name in DNS only": (lambda: serving(MESH.sign(dns=[SERVICE])), "0 URIs"),
    "expired": (lambda: serving(MESH.sign(URI, hours=(-3, -1))), "expired"),
    "not yet valid": (lambda: serving(MESH.sign(URI, hours=(1, 3))), "not yet valid"),
    "of another trust domain": (lambda: serving(MESH.sign(ELSEWHERE.uri(SERVICE))), ELSEWHERE.trust_domain),
    "of another datacenter": (lambda: serving(MESH.sign(URI.replace("/dc1/", "/dc2/"))), "dc/dc2"),
    "of another namespace": (lambda: serving(MESH.sign(URI.replace("/default/", "/other/"))), "ns/other"),
    "of another partition": (lambda: serving(MESH.sign(URI.replace("/ns/", "/ap/other/ns/"))), "ap/other"),
    "of a longer name": (lambda: serving(MESH.sign(f"{URI}-2")), f"{SERVICE}-2"),
    "with more after the name": (lambda: serving(MESH.sign(f"{URI}/x")), f"{SERVICE}/x"),
    "with an escape in the name": (lambda: serving(MESH.sign(URI.replace("-api", "%2dapi"))), "backend%2dapi"),
    "with a port in the trust domain": (lambda: serving(MESH.sign(URI.replace("/ns/", ":1/ns/"))), "consul:1/"),
    "https in place of spiffe": (lambda: serving(MESH.sign(URI.replace("spiffe", "https"))), "https://"),
    "for clients only": (
        lambda: serving(MESH.sign(URI, uses=[ExtendedKeyUsageOID.CLIENT_AUTH])),
        "unsuitable certificate purpose",
    ),
    "in plain HTTP": (lambda: None, "WRONG_VERSION_NUMBER"),
    "in TLS 1.1": (lambda: old(MESH.service(SERVICE)), "handshake broke off"),
}


def old(signed: Signed) -> Context:
    """Speaks only what nobody speaks any more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context = serving(signed, version=ssl.TLSVersion.TLSv1_1)
    assert context is not None
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_server_reads_no_byte_of_a_request(wrong: str) -> None:
    """The error says whom the call was for and who answered; nothing was sent, and the instance is out for a moment."""
    listen, who = WRONG[wrong]
    async with identity() as me, server(listen()) as fake, client_of(fake.instance, peers=me) as client:
        with pytest.raises(httpx.ConnectError) as raised:
            await client.post(SERVICE, "/secret", json={"card": 1}, headers={"Authorization": "Bearer secret"})
        assert f"'{SERVICE}' was expected at {fake.instance.netloc}" in str(raised.value)
        assert who in str(raised.value)
        assert fake.read == 0
        assert judge(raised.value, tls=True) == (Failure.NOT_SENT, Blame.INSTANCE)
        (state,) = client.explain(SERVICE).endpoints
        assert set(state.outcomes) == {"refused"}
        assert state.ejected_because == "refused"


@pytest.mark.parametrize("wrong", ["of another service", "of a foreign CA", "of two services"])
def test_uvloop_verifies_as_well(wrong: str) -> None:
    """The event loop that uvicorn[standard] runs services on."""
    uvloop.run(test_wrong_server_reads_no_byte_of_a_request(wrong))


@pytest.mark.parametrize("wrong", ["of another service", "of a foreign CA", "in plain HTTP"])
async def test_wrong_server_costs_no_call_and_no_other_instance_anything(wrong: str) -> None:
    """Even a POST goes on to the next instance; those keep their health, and other services never hear of it."""
    listen, _ = WRONG[wrong]
    async with AsyncExitStack() as stack:
        me = await stack.enter_async_context(identity())
        good = [
            await stack.enter_async_context(server(serving(MESH.service(SERVICE)), name=name)) for name in ("2", "3")
        ]
        other = await stack.enter_async_context(server(serving(MESH.service("research-api")), "research-api", "r"))
        fake = await stack.enter_async_context(server(listen()))
        instances = [each.instance for each in (fake, *good, other)]
        client = await stack.enter_async_context(client_of(*instances, peers=me))
        for _ in range(20):
            assert (await client.post(SERVICE, "/cards", json={})).text in {"2", "3"}
            assert (await client.get("research-api", "/")).text == "r"
        assert fake.read == 0
        states = {each.id: each for each in client.explain(SERVICE).endpoints}
        assert states["1"].ejected_because == "refused"
        for name in ("2", "3"):
            assert (states[name].failures, states[name].ejected_for, set(states[name].outcomes)) == (0, 0.0, {"ok"})


async def test_right_server_is_verified_once_for_all_calls_of_a_connection() -> None:
    """A handshake and its verification cost one connection, not each call."""
    asked = []

    class Counted(MeshIdentity):
        def verify(self, service: str, connection: Connection) -> None:
            asked.append(service)
            super().verify(service, connection)

    source = FixedSource(MESH.service("orchestrator-api").leaf(), MESH.roots())
    async with (
        Counted("orchestrator-api", source) as me,
        server(serving(MESH.service(SERVICE))) as good,
        client_of(good.instance, peers=me) as client,
    ):
        for _ in range(10):
            assert (await client.get(SERVICE, "/")).text == "1"
    assert (good.accepted, asked) == (1, [SERVICE])


async def test_verified_connection_is_not_lent_to_another_service() -> None:
    """One address under two names: what proved to be the one is not taken for the other."""
    async with identity() as me, server(serving(MESH.service(SERVICE))) as good:
        liar = replace(good.instance, service="research-api")
        async with client_of(good.instance, liar, peers=me) as client:
            assert (await client.get(SERVICE, "/")).text == "1"
            read = good.read
            with pytest.raises(httpx.ConnectError, match="'research-api' was expected"):
                await client.get("research-api", "/")
            assert good.read == read


async def test_lifespan_gives_its_identity_to_any_client() -> None:
    """A client that was made without one gets it; one that names its own keeps that; None changes nothing."""
    nobody = MeshIdentity("orchestrator-api", FixedSource())
    async with identity() as me, server(serving(MESH.service(SERVICE))) as good:
        async with client_of(good.instance, peers=None) as client:
            client.use_peers(None)
            client.use_peers(me)
            assert (await client.get(SERVICE, "/")).text == "1"
        async with client_of(good.instance, peers=me) as client:
            client.use_peers(nobody)
            assert (await client.get(SERVICE, "/")).text == "1"
    await nobody.aclose()


async def test_without_a_certificate_nobody_is_called_and_nobody_blamed() -> None:
    """The own certificate is not there yet: no connection is opened, nothing is ejected; once it is there, calls go."""
    source = FixedSource()
    me = MeshIdentity("orchestrator-api", source)
    tasks = asyncio.ensure_future(me.start())
    async with server(serving(MESH.service(SERVICE))) as good, client_of(good.instance, peers=me) as client:
        with pytest.raises(httpx.ConnectError, match="can't be called over mutual TLS yet") as raised:
            await client.get(SERVICE, "/")
        assert judge(raised.value, tls=True) == (Failure.NOT_SENT, Blame.NOBODY)
        (state,) = client.explain(SERVICE).endpoints
        assert (good.accepted, state.ejected_for, state.failures, set(state.outcomes)) == (0, 0.0, 0, {"not_sent"})
        await source.tell(MESH.service("orchestrator-api").leaf(), MESH.roots())
        await me.ready.wait()
        assert (await client.get(SERVICE, "/")).text == "1"
        await tasks
    await me.aclose()


async def test_plain_instances_serve_while_there_is_no_certificate() -> None:
    """During a migration some serve plainly: these take the calls, and no instance is blamed."""
    me = MeshIdentity("orchestrator-api", FixedSource())
    async with (
        server(serving(MESH.service(SERVICE))) as native,
        server(None, name="2") as plain,
        client_of(native.instance, replace(plain.instance, connect=False), peers=me) as client,
    ):
        for _ in range(10):
            assert (await client.post(SERVICE, "/", json={})).text == "2"
        assert [each.ejected_for for each in client.explain(SERVICE).endpoints] == [0.0, 0.0]
    assert (native.accepted, native.read) == (0, 0)
    await me.aclose()


@pytest.mark.parametrize("inner", [None, httpx.MockTransport(lambda _: httpx.Response(200))], ids=["own", "httpx"])
async def test_what_can_not_verify_does_not_call(inner: httpx.AsyncBaseTransport | None) -> None:
    """Without peers, and with a transport of httpx's, an instance of the mesh is refused before anything is sent."""
    async with server(serving(MESH.service(SERVICE))) as good:
        resolver = StaticResolver({SERVICE: [good.instance]})
        transport = DiscoveryTransport(resolver, transport=inner)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{SERVICE}") as client:
            with pytest.raises(httpx.ConnectError, match="pass ConnectionOptions\\(peers="):
                await client.get("/")
        assert good.accepted == 0


async def refused(strict: Server, me: MeshIdentity) -> None:
    """That server does not accept the caller's certificate: not sent, nobody blamed, and a POST goes elsewhere."""
    async with client_of(strict.instance, peers=me) as client:
        with pytest.raises(httpx.ConnectError, match=r"does not accept our certificate|right after") as raised:
            await client.post(SERVICE, "/", json={})
        assert judge(raised.value, tls=True).failure is Failure.NOT_SENT
    async with (
        server(serving(MESH.service(SERVICE)), name="2") as good,
        client_of(strict.instance, good.instance, peers=me) as client,
    ):
        for _ in range(10):
            assert (await client.post(SERVICE, "/", json={})).text == "2"
    assert strict.read == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_server_that_refuses_our_certificate_by_an_alert_has_read_nothing(version: ssl.TLSVersion) -> None:
    """With TLS 1.3 the alert may come after the request went out; still it is not sent."""
    context = serving(MESH.service(SERVICE), version=version, trusts=FOREIGN)
    async with identity() as me, alerting(context, drains=True) as strict:
        await refused(strict, me)
        async with client_of(strict.instance, peers=me) as client:
            with pytest.raises(httpx.ConnectError) as raised:
                await client.post(SERVICE, "/", json={})
            assert judge(raised.value, tls=True) == (Failure.NOT_SENT, Blame.NOBODY)
            assert client.explain(SERVICE).endpoints[0].ejected_for == 0.0


class Slow(MeshIdentity):
    """Takes so long to verify that the other side has refused meanwhile."""

    def verify(self, service: str, connection: Connection) -> None:
        super().verify(service, connection)
        time.sleep(0.05)


@pytest.mark.parametrize("says_why", [True, False])
async def test_connection_that_is_closed_right_after_the_handshake_is_not_sent_on(says_why: bool) -> None:
    """A server that refuses our certificate and resets the connection, as Python's do: seen before a request is out."""
    context = serving(MESH.service(SERVICE), trusts=FOREIGN)
    source = FixedSource(MESH.service("orchestrator-api").leaf(), MESH.roots())
    async with Slow("orchestrator-api", source) as me, alerting(context, says_why=says_why) as strict:
        await refused(strict, me)


@asynccontextmanager
async def alerting(context: Context, *, drains: bool = False, says_why: bool = True) -> AsyncIterator[Server]:
    """A server in a thread, which alerts as Go's and Envoy's do, and asyncio's does not.

    ``drains``: it reads what still comes before it closes. Otherwise that resets the connection.
    """
    assert context is not None
    listener = socket.create_server(("127.0.0.1", 0))
    seen = Server(Instance("1", SERVICE, "127.0.0.1", listener.getsockname()[1], connect=True))

    def silent(plain: socket.socket) -> None:
        """Ends the handshake without a word."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                plain.sendall(outgoing.read())
                incoming.write(plain.recv(65_536))
            else:
                seen.read += 1
                return

    def loud(plain: socket.socket) -> None:
        with context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False) as secured:
            try:
                secured.do_handshake()
                seen.read += len(secured.recv(65_536))
            except ssl.SSLError:
                while drains and os.read(secured.fileno(), 65_536):
                    pass

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            seen.accepted += 1
            with plain, suppress(OSError):
                plain.settimeout(5)
                (loud if says_why else silent)(plain)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


async def test_new_certificate_is_for_new_connections_and_costs_no_call() -> None:
    """The caller's certificate changes under load: kept connections serve on, new ones show the new one."""
    after = Authority()
    source = FixedSource(MESH.service("orchestrator-api").leaf(), MESH.roots())
    both = tls_context(ssl.PROTOCOL_TLS_SERVER, MESH.service(SERVICE).leaf(), MESH.roots(after))
    both.verify_mode = ssl.CERT_REQUIRED
    async with identity(source=source) as me, server(both) as one, client_of(one.instance, peers=me) as client:
        answered = 0

        async def call() -> None:
            nonlocal answered
            while not ended.is_set():
                assert (await client.post(SERVICE, "/", json={})).text == "1"
                answered += 1

        ended = asyncio.Event()
        callers: Sequence[asyncio.Task[None]] = [asyncio.ensure_future(call()) for _ in range(4)]
        serials: list[str] = []
        for number in range(6):
            signer = after if number % 2 else MESH
            await source.tell(signer.sign(MESH.uri("orchestrator-api")).leaf(), MESH.roots(after))
            await until(lambda more=answered + 20: answered >= more)  # type: ignore[misc]
            fresh = ConnectionOptions(peers=me)
            probe = ServiceDiscoveryClient(StaticResolver({SERVICE: [one.instance]}), connections=fresh)
            async with probe:
                await probe.get(SERVICE, "/")
                shown = one.connections[-1].get_extra_info("ssl_object").getpeercert()["serialNumber"]
            serials.append(shown)
        ended.set()
        await asyncio.gather(*callers)
    assert len(set(serials)) == 6
    assert one.accepted <= 4 + 6
