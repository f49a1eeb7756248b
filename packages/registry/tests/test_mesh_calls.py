"""Services call each other through the mesh: real Consul, real certificates, the plain command of uvicorn."""

import asyncio
import os
import signal
import ssl
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from registry import (
    ConnectionOptions,
    ConsulResolver,
    ConsulSettings,
    RegistryError,
    RetryPolicy,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
    SyncDiscoveryTransport,
)
from registry.consul.resolver import Mesh
from registry.mesh.agent import AgentSource
from registry.mesh.identity import MeshIdentity
from registry.testing.agent import running_agent
from registry.testing.fixtures import ConsulAgent
from tests.support.command import ServiceProcess, running_service, wait_until

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
Start = Callable[..., ServiceProcess]


@pytest.fixture
def start(consul_agent: ConsulAgent) -> Iterator[Start]:
    """Starts `mesh_app` under a name, with what CONSUL_CONNECT says, and returns once it is found."""
    with ExitStack() as stack:

        def run(name: str, connect: Mesh, upstream: str = "", *, agent: ConsulAgent = consul_agent) -> ServiceProcess:
            env = {"CONSUL_CONNECT": connect, "UPSTREAM": upstream, "CONSUL_CONNECT_ALLOW_UNSAFE_AGENT": "true"}
            service = running_service("mesh_app:app", name, consul=agent, cwd=HERE, wait=False, env=env)
            process = stack.enter_context(service)
            wait_until(process.is_found, 90)
            return process

        yield run


@pytest.fixture
def name() -> str:
    """Of a service that no other test uses."""
    return f"backend-{uuid.uuid4().hex[:8]}"


def settings_of(agent: ConsulAgent, token: str | None = None) -> ConsulSettings:
    return ConsulSettings.model_validate({"host": "127.0.0.1", "port": agent.http_port, "token": token or agent.token})


@asynccontextmanager
async def member(agent: ConsulAgent, mesh: Mesh, service: str = "driver") -> AsyncIterator[ServiceDiscoveryClient]:
    """A client that is no service: as docs/howto/mesh-client.md has it."""
    settings = settings_of(agent)
    async with MeshIdentity(service, AgentSource(settings, allow_unsafe_agent=True)) as me:
        connections = ConnectionOptions(peers=me)
        async with ServiceDiscoveryClient(ConsulResolver(settings, mesh=mesh), connections=connections) as client:
            yield client


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what it looks at tells nobody
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("mesh", ["client", "true"])
async def test_native_instance_is_called_and_knows_its_caller(
    start: Start, name: str, consul_agent: ConsulAgent, mesh: Mesh
) -> None:
    """The certificate says who calls; a connection is verified once, and `explain` shows that it is."""
    start(name, "true")
    async with member(consul_agent, mesh) as client:
        for _ in range(5):
            assert (await client.post(name, "/work")).json()["caller"] == "driver"
        (state,) = client.explain(name).endpoints
        assert (state.connect, state.outcomes) == (True, {"ok": 5})


async def test_without_an_identity_a_native_instance_is_not_called(
    start: Start, name: str, consul_agent: ConsulAgent
) -> None:
    """A caller outside of the mesh is told what it lacks, and the instance loses nothing."""
    start(name, "true")
    async with ServiceDiscoveryClient(ConsulResolver(settings_of(consul_agent)), retry_delay=0.01) as client:
        with pytest.raises(httpx.ConnectError, match="CONSUL_CONNECT=client"):
            await client.post(name, "/work")
        assert client.explain(name).endpoints[0].ejected_for == 0.0


def test_threads_call_through_the_mesh(start: Start, name: str, consul_agent: ConsulAgent) -> None:
    """SyncDiscoveryTransport verifies as well: the identity may belong to an event loop in another thread."""
    start(name, "true")

    async def call() -> list[str]:
        settings = settings_of(consul_agent)
        async with MeshIdentity("driver", AgentSource(settings, allow_unsafe_agent=True)) as me:
            transport = SyncDiscoveryTransport(
                ConsulResolver(settings, mesh="true"), connections=ConnectionOptions(peers=me)
            )
            with httpx.Client(transport=transport, base_url=f"http://{name}") as client:
                return [(await asyncio.to_thread(client.post, "/work")).json()["caller"] for _ in range(3)]

    assert asyncio.run(call()) == ["driver"] * 3


async def test_strict_caller_sees_only_the_mesh(start: Start, name: str, consul_agent: ConsulAgent) -> None:
    """With ``true``, an instance that serves plainly is none; with ``client`` it is called plainly."""
    start(name, "client")
    async with member(consul_agent, "true") as client:
        with pytest.raises(ServiceNotFoundError):
            await client.post(name, "/work")
    async with member(consul_agent, "client") as client:
        assert (await client.post(name, "/work")).json()["caller"] is None
        assert client.explain(name).endpoints[0].connect is False


STEPS: dict[str, list[tuple[str, Mesh]]] = {
    "caller first": [("caller", "client"), ("callee", "client"), ("callee", "true"), ("caller", "true")],
    "callee first": [("callee", "client"), ("caller", "client"), ("callee", "true"), ("caller", "true")],
}


@pytest.mark.parametrize("order", STEPS)
async def test_migration_loses_no_call(start: Start, name: str, consul_agent: ConsulAgent, order: str) -> None:
    """false → client → true, one service after the other, under load: every POST arrives, and none of them twice."""
    names = {"caller": f"{name}-front", "callee": name}
    running: dict[str, ServiceProcess] = {}

    def roll(role: str, mode: Mesh) -> None:
        before = running.get(role)
        running[role] = start(names[role], mode, names["callee"] if role == "caller" else "")
        if before is not None:
            before.end(signal.SIGTERM)

    await asyncio.to_thread(roll, "callee", "false")
    await asyncio.to_thread(roll, "caller", "false")
    answered, failed, ended = Counter[str | None](), [], asyncio.Event()

    async def load(client: ServiceDiscoveryClient) -> None:
        while not ended.is_set():
            try:
                answered[(await client.post(names["caller"], "/relay")).json()["caller"]] += 1
            except Exception as error:
                failed.append(f"{error!r} {getattr(error, '__notes__', '')}")
            await asyncio.sleep(0.01)

    async with member(consul_agent, "client") as client:
        callers = [asyncio.ensure_future(load(client)) for _ in range(4)]
        for role, mode in STEPS[order]:
            await asyncio.to_thread(roll, role, mode)
            before = answered.total()
            await until(lambda before=before: answered.total() > before + 20)  # type: ignore[misc]
        ended.set()
        await asyncio.gather(*callers)
    print(f"{order}: {answered}")  # noqa: T201
    assert failed == []
    assert answered[None] > 20
    assert answered[names["caller"]] > 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
async def test_failover_is_what_it_is_without_the_mesh(
    start: Start, name: str, consul_agent: ConsulAgent, number: signal.Signals
) -> None:
    """One of two native instances dies or hangs under load: every call that may be repeated succeeds."""
    one, two = start(name, "true"), start(name, "true")
    answered, ended = Counter[int](), asyncio.Event()
    async with member(consul_agent, "true") as client:

        async def load() -> None:
            while not ended.is_set():
                answer = await client.post(name, "/work", idempotent=True, timeout=1.0)
                answered[answer.json()["pid"]] += 1

        callers = [asyncio.ensure_future(load()) for _ in range(4)]
        await until(lambda: len(answered) == 2)
        os.kill(one.process.pid, number)
        more = answered[two.process.pid] + 200
        await until(lambda: answered[two.process.pid] > more or any(each.done() for each in callers))
        ended.set()
        await asyncio.gather(*callers)
    print(f"{number.name}: {answered.total()} calls, 0 failed")  # noqa: T201


def new_root(agent: ConsulAgent) -> None:
    """Consul makes a new root, cross-signed by the old one, and new certificates within half a minute."""
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    configuration = {"LeafCertTTL": "72h", "IntermediateCertTTL": "8760h", "PrivateKey": key.decode()}
    body = {"Provider": "consul", "Config": configuration}
    httpx.put(f"{agent.url}/v1/connect/ca/configuration", json=body, timeout=20, trust_env=False).raise_for_status()


async def test_new_root_costs_no_call(start: Start, name: str, fresh_consul_agent: ConsulAgent) -> None:
    """The mesh gets a new root under load, on kept and on new connections; caller and service get new certificates."""
    agent = fresh_consul_agent
    await asyncio.to_thread(start, name, "true", agent=agent)
    settings = settings_of(agent)
    failed: list[str] = []
    answered, ended = Counter[str](), asyncio.Event()
    async with MeshIdentity("driver", AgentSource(settings, allow_unsafe_agent=True)) as me:
        kept, fresh = ConnectionOptions(peers=me), ConnectionOptions(peers=me, peers_keepalive=0.001)

        async def load(connections: ConnectionOptions) -> None:
            # Each call by itself counts: nothing is tried again.
            resolver = ConsulResolver(settings, mesh="true")
            async with ServiceDiscoveryClient(
                resolver, connections=connections, retry=RetryPolicy(max_retries=1)
            ) as client:
                while not ended.is_set():
                    try:
                        answered[(await client.post(name, "/work")).json()["caller"]] += 1
                    except Exception as error:
                        failed.append(f"{error!r}")
                    await asyncio.sleep(0.02)

        callers = [asyncio.ensure_future(load(each)) for each in (kept, kept, fresh, fresh)]
        await until(lambda: answered.total() > 20)
        own, server = me._leaf, await shown(me, name, settings)
        root = me.client_context().get_ca_certs()
        await asyncio.to_thread(new_root, agent)
        await until(lambda: len(me.client_context().get_ca_certs()) > len(root))
        changed = time.monotonic()
        await until(lambda: me._leaf != own)
        while (await shown(me, name, settings)) == server:
            assert time.monotonic() < changed + 60
            await asyncio.sleep(0.5)
        more = answered.total() + 20
        await until(lambda: answered.total() > more)
        ended.set()
        await asyncio.gather(*callers)
    print(f"new root under load: {answered}, {len(failed)} failed")  # noqa: T201
    assert failed == []


async def shown(me: MeshIdentity, service: str, settings: ConsulSettings) -> str:
    """The serial number of the certificate that the service shows now."""
    seen: list[str] = []

    class Looking:
        client_context, server_name = me.client_context, me.server_name

        def verify(self, service: str, connection: ssl.SSLObject) -> None:
            me.verify(service, connection)
            certificate = connection.getpeercert()
            assert certificate
            seen.append(str(certificate["serialNumber"]))

    resolver = ConsulResolver(settings, mesh="true")
    async with ServiceDiscoveryClient(resolver, connections=ConnectionOptions(peers=Looking())) as client:
        await client.post(service, "/work")
    return seen[0]


def test_what_a_token_lacks_is_said(consul_binary: Path, name: str) -> None:
    """Without service:read on the callee, the error has the policy line; with it, the instance is found."""
    with running_agent(acl=True, binary=consul_binary, in_memory=True) as agent:
        root = httpx.Client(base_url=agent.url, headers={"X-Consul-Token": agent.token or ""}, trust_env=False)
        with root:
            native = {"Name": name, "Address": "127.0.0.1", "Port": 9, "Connect": {"Native": True}}
            root.put("/v1/agent/service/register", json=native).raise_for_status()

            def token(rules: str) -> str:
                policy = {"Name": uuid.uuid4().hex, "Rules": rules}
                root.put("/v1/acl/policy", json=policy).raise_for_status()
                answer = root.put("/v1/acl/token", json={"Policies": [{"Name": policy["Name"]}]}).raise_for_status()
                return str(answer.json()["SecretID"])

            nothing = token('service "other" { policy = "write" }')
            no_node = token(f'service "{name}" {{ policy = "read" }}')
            enough = token(f'service "{name}" {{ policy = "read" }} node_prefix "" {{ policy = "read" }}')

        async def ask(secret: str) -> object:
            resolver = ConsulResolver(settings_of(agent, secret), mesh="true", upstreams=[name])
            try:
                await resolver.start()
                return resolver.resolve(name)
            finally:
                await resolver.aclose()

        with pytest.raises(RegistryError, match=f'service "{name}" {{ policy = "read" }}') as raised:
            asyncio.run(ask(nothing))
        assert nothing not in str(raised.value)
        with pytest.raises(RegistryError, match="node_prefix"):
            asyncio.run(ask(no_node))
        found = asyncio.run(ask(enough))
        assert isinstance(found, tuple)
        assert [(each.service, each.connect) for each in found] == [(name, True)]
