"""An entry behind a load balancer, which leads each connection to another agent, and behind a proxy that cuts."""

import asyncio
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest

from registry import (
    ConsulResolver,
    ConsulSettings,
    Registrar,
    RegistryError,
    ServiceDiscoveryClient,
    ServiceRegistry,
    ServiceSettings,
)
from registry.consul.connection import AsyncConsul
from registry.presence.entry import Entry
from registry.presence.registration import Registration
from registry.testing.agent import ConsulAgent
from tests.support.command import wait_until


class Member(ConsulAgent):
    """An agent with a node's name of its own: the server, or a client that joins one."""

    name = "node-a"
    serf: int
    server_serf: int | None = None

    def _settings(self, serf_port: int, server_port: int) -> dict[str, object]:
        self.serf = serf_port
        settings = super()._settings(serf_port, server_port) | {"node_name": self.name}
        if self.server_serf is not None:
            del settings["bootstrap"]
            settings |= {"server": False, "retry_join": [f"127.0.0.1:{self.server_serf}"], "retry_interval": "1s"}
        return settings


class SecondMember(Member):
    """The client."""

    name = "node-b"


@pytest.fixture(scope="module")
def cluster(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Member, Member]]:
    """A server, and a client agent that joined it."""
    with ExitStack() as stack:
        agents: list[Member] = []
        for kind in (Member, SecondMember):
            if agents:
                kind.server_serf = agents[0].serf
            agent = kind(consul_binary, tmp_path_factory.mktemp("agent"), None, acl=False)
            stack.callback(agent.close)
            agent.start()
            agents.append(agent)
        nodes = f"{agents[1].url}/v1/catalog/nodes"
        wait_until(lambda: {node["Node"] for node in httpx.get(nodes).json()} == {"node-a", "node-b"}, 30)
        yield agents[0], agents[1]


class Balancer(socketserver.ThreadingTCPServer):
    """Leads each new connection to the next of the ports, as kube-proxy or a name with several addresses would."""

    daemon_threads = True

    def __init__(self, *ports: int) -> None:
        self.ports = cycle(ports)
        self.accepted = 0
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Connection)
        self.settings = ConsulSettings.model_validate({"host": "127.0.0.1", "port": self.server_address[1]})
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def accepts_more_than(self, before: int) -> Callable[[], bool]:
        """Whether so many connections were made by now."""
        return lambda: self.accepted > before

    def cut(self) -> None:
        """Ends all connections."""
        for connection in tuple(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Connection(socketserver.BaseRequestHandler):
    server: Balancer

    def handle(self) -> None:
        self.server.accepted += 1
        self.server.open.add(self.request)
        with socket.create_connection(("127.0.0.1", next(self.server.ports))) as agent:
            back = threading.Thread(target=self.pipe, args=(agent, self.request), daemon=True)
            back.start()
            self.pipe(self.request, agent)
            back.join()
        self.server.open.discard(self.request)

    def pipe(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def balancer() -> Iterator[Callable[..., Balancer]]:
    """Makes balancers, in front of these agents, that end with the test."""
    with ExitStack() as stack:

        def make(*agents: ConsulAgent) -> Balancer:
            balancer = stack.enter_context(Balancer(*(agent.http_port for agent in agents)))
            stack.callback(balancer.shutdown)
            return balancer

        yield make


def listed(agent: ConsulAgent, name: str) -> list[str]:
    """On which nodes Consul knows instances of a service, whatever their health."""
    return [entry["Node"]["Node"] for entry in httpx.get(f"{agent.url}/v1/health/service/{name}").json()]


def held(agent: ConsulAgent, name: str) -> bool:
    """Whether this agent itself has an instance of the service, which it would write to the catalog again."""
    return name in {service["Service"] for service in httpx.get(f"{agent.url}/v1/agent/services").json().values()}


def test_deregistering_finds_the_agent_that_has_it(
    cluster: tuple[Member, Member], balancer: Callable[..., Balancer], service_name: str
) -> None:
    """The 404 of another agent is no "gone": True once no agent has the instance, False when none ever had."""
    one, two = cluster
    balanced = balancer(two, one)  # whoever deregisters comes to the other one first
    with ServiceRegistry("127.0.0.1", one.http_port) as registry:
        service_id = registry.register_service(service_name, "10.0.0.1", 80)
    wait_until(lambda: listed(two, service_name) == ["node-a"])
    with ServiceRegistry(settings=balanced.settings) as registry:
        assert registry.deregister_service(service_id) is True
        wait_until(lambda: not listed(two, service_name))
        assert not held(one, service_name)
        assert registry.deregister_service(service_id) is False


def test_deregistering_without_that_agent_cleans_the_catalog(cluster: tuple[Member, Member], service_name: str) -> None:
    """Where the agent that has the instance can't be reached, at least no caller finds it."""
    one, two = cluster
    with ServiceRegistry("127.0.0.1", two.http_port) as registry:
        service_id = registry.register_service(service_name, "10.0.0.1", 80)
    wait_until(lambda: listed(one, service_name) == ["node-b"])
    with ServiceRegistry("127.0.0.1", one.http_port) as other:
        assert other.deregister_service(service_id) is True
        assert listed(one, service_name) == []
    with ServiceRegistry("127.0.0.1", two.http_port) as registry:
        registry.deregister_service(service_id)


async def test_removing_without_that_agent_is_told(
    cluster: tuple[Member, Member], service_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Presence says which agent may bring the instance back, and what to do about it."""
    one, two = cluster
    registration = Registration(name=service_name, address="10.0.0.1", port=80)
    consuls = [AsyncConsul(ConsulSettings(host="127.0.0.1", port=agent.http_port)) for agent in cluster]
    try:
        await Entry(consuls[1]).write(registration)
        await asyncio.to_thread(wait_until, lambda: listed(one, service_name) == ["node-b"])
        await Entry(consuls[0]).remove(registration.id)
        assert listed(one, service_name) == []
        (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
        assert "node-b" in warning
        assert "CONSUL_HTTP_ADDR" in warning
        await Entry(consuls[1]).remove(registration.id)
        assert not held(two, service_name)
    finally:
        for consul in consuls:
            await consul.http.close()


@asynccontextmanager
async def present(
    name: str, consul: ConsulSettings, monkeypatch: pytest.MonkeyPatch, **service: float
) -> AsyncIterator[Registrar]:
    """A registrar whose own probe finds the instance well, though nobody listens there; withdrawn at the end."""
    settings = ServiceSettings.model_validate({"name": name, "port": 1, "address": "127.0.0.1", **service})
    registrar = Registrar(settings, consul)
    monkeypatch.setattr(registrar, "answers", AsyncMock(return_value=True))
    registrar.start()
    try:
        yield registrar
    finally:
        await registrar.withdraw()
        await registrar.aclose()


async def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds, without holding the loop."""
    await asyncio.to_thread(wait_until, condition, 10)


async def test_presence_behind_a_load_balancer(
    cluster: tuple[Member, Member],
    balancer: Callable[..., Balancer],
    service_name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One instance is one entry however often its connection is cut and led elsewhere; withdrawn, it is nowhere."""
    one, two = cluster
    balanced = balancer(one, two)
    async with present(service_name, balanced.settings, monkeypatch) as registrar:
        await until(lambda: registrar._entry._nodes)
        (node,) = registrar._entry._nodes
        for _ in range(4):
            before = balanced.accepted
            await until(lambda: balanced.open)
            balanced.cut()
            await until(balanced.accepts_more_than(before))
            assert listed(one, service_name) == [node]
    assert listed(one, service_name) == []
    assert not held(one, service_name)
    assert not held(two, service_name)
    assert not [record for record in caplog.records if "in doubt" in record.getMessage()]


async def test_a_cut_after_the_write_is_no_failed_registration(
    cluster: tuple[Member, Member], service_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after it is bookkeeping: another attempt might write the instance at another agent, too."""
    one, two = cluster
    consul = AsyncConsul(ConsulSettings(host="127.0.0.1", port=two.http_port))
    get, registration = consul.http.get, Registration(name=service_name, address="10.0.0.1", port=80)

    async def cut_once_written(*args: Any, **options: Any) -> Any:
        if held(two, service_name):
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return await get(*args, **options)

    monkeypatch.setattr(consul.http, "get", cut_once_written)
    entry = Entry(consul)
    await entry.write(registration)
    assert listed(two, service_name) == ["node-b"]
    await entry.remove(registration.id)
    assert not held(two, service_name)
    assert not listed(one, service_name)
    await consul.http.close()


async def test_what_a_killed_process_left_at_another_agent_is_replaced(
    cluster: tuple[Member, Member],
    balancer: Callable[..., Balancer],
    service_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new process with the id of one that was killed has one entry, wherever the old one is; and leaves none."""
    one, two = cluster
    old = AsyncConsul(ConsulSettings(host="127.0.0.1", port=one.http_port))
    await Entry(old).write(Registration(name=service_name, address="127.0.0.1", port=1))
    await old.http.close()
    await until(lambda: listed(one, service_name) == ["node-a"])
    balanced = balancer(two, one, two)
    async with present(service_name, balanced.settings, monkeypatch) as registrar:
        await until(lambda: registrar._entry._nodes)
        await until(lambda: len(listed(one, service_name)) == 1)
        assert [held(agent, service_name) for agent in cluster].count(True) == 1
    assert listed(one, service_name) == []
    assert not any(held(agent, service_name) for agent in cluster)


async def test_a_cut_question_is_no_reason_to_write(
    cluster: tuple[Member, Member],
    balancer: Callable[..., Balancer],
    service_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An instance that Consul finds sick stays out of discovery, however often a proxy cuts the presence query."""
    agent = cluster[0]
    proxy = balancer(agent)
    writes = 0
    write = Entry.write

    async def counted(entry: Entry, registration: Registration) -> None:
        nonlocal writes
        writes += 1
        await write(entry, registration)

    monkeypatch.setattr(Entry, "write", counted)

    def status() -> str:
        (entry,) = httpx.get(f"{agent.url}/v1/health/service/{service_name}").json()
        return next(str(check["Status"]) for check in entry["Checks"] if check["ServiceID"])

    async with present(service_name, proxy.settings, monkeypatch, health_check_interval=0.5):
        await until(lambda: listed(agent, service_name))
        await until(lambda: status() == "critical")
        for _ in range(5):
            before = proxy.accepted
            await until(lambda: proxy.open)
            proxy.cut()
            await until(proxy.accepts_more_than(before))
            assert status() == "critical"
    assert writes == 1


async def test_the_park_is_as_long_as_the_settings_say(
    cluster: tuple[Member, Member], service_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shorter ``wait`` presence and watches ask anew that often, and nothing is written again."""
    asked: list[httpx.Request] = []
    send = httpx.AsyncClient.send

    async def recorded(client: httpx.AsyncClient, request: httpx.Request, **options: object) -> httpx.Response:
        asked.append(request)
        return await send(client, request, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx.AsyncClient, "send", recorded)
    consul = ConsulSettings(host="127.0.0.1", port=cluster[0].http_port, wait=1)
    async with present(service_name, consul, monkeypatch), ServiceDiscoveryClient(ConsulResolver(consul)) as client:
        with suppress(RegistryError):
            await client.get("nobody", "/")
        await until(lambda: [1 for request in asked if {"index", "wait"} <= set(request.url.params)])
        await until(lambda: len([1 for request in asked if "wait" in request.url.params]) > 1)
    assert {request.url.params["wait"] for request in asked if "wait" in request.url.params} == {"1s"}
    assert len([1 for request in asked if request.url.path.endswith("/register")]) == 1
