"""Authorities change, agents die, certificates are renewed: no call is lost meanwhile."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from registry import ConnectionOptions, ConsulResolver, ConsulSettings, ServiceDiscoveryClient
from registry.mesh.agent import AgentSource
from registry.mesh.identity import MeshIdentity
from registry.testing.agent import running_agent
from registry.testing.fixtures import ConsulAgent
from tests.support.authority import Authority
from tests.support.command import ServiceProcess, running_service, wait_until
from tests.support.load import Load
from tests.support.mesh import authority_of, new_root

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
SERVICE, CALLER = "backend-api", "orchestrator-api"


@contextmanager
def served(consul: ConsulAgent) -> Iterator[ServiceProcess]:
    """backend-api, once it is found."""
    env = {"CONSUL_CONNECT": "true"}
    with running_service("mesh_served_app:app", SERVICE, consul=consul, cwd=HERE, env=env, wait=False) as service:
        wait_until(service.is_found, 90)
        yield service


@asynccontextmanager
async def calling(consul: ConsulAgent, keepalive: float) -> AsyncIterator[tuple[MeshIdentity, Load]]:
    """orchestrator-api, three callers that post without pause."""
    settings = ConsulSettings(host="127.0.0.1", port=consul.http_port)
    async with MeshIdentity(CALLER, AgentSource(settings)) as me:
        options = ConnectionOptions(peers=me, peers_keepalive=keepalive)
        async with ServiceDiscoveryClient(ConsulResolver(settings, mesh="true"), connections=options) as client:

            async def post(id_: str) -> httpx.Response:
                await asyncio.sleep(0.02)
                return await client.post(SERVICE, "/work", headers={"X-Request-Id": id_})

            async with Load(post, callers=3) as load:
                yield me, load


async def until(condition: Callable[[], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what it looks at tells nobody
            await asyncio.sleep(0.05)


def serial_shown(port: int, me: MeshIdentity) -> str:
    """The serial number of the certificate that a new connection meets."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        me.client_context().wrap_socket(plain, server_hostname=me.server_name(SERVICE)) as connection,
    ):
        shown = connection.getpeercert()
        assert shown
        return str(shown["serialNumber"])


def failures(load: Load) -> list[tuple[str | None, str]]:
    return [(failure.error, failure.message) for failure in load.report.failures]


# The agent renews certificates at a random moment of the 30 s after a root has changed.
async def test_authority_changes_twice_under_load(consul_binary: Path) -> None:
    """Both sides get new certificates by the new authority, on new and on kept connections: every POST arrives."""
    with running_agent(binary=consul_binary, in_memory=True) as consul:
        first = authority_of(consul)
        with served(consul) as service:
            async with calling(consul, 0.01) as (me, on_new), calling(consul, 60.0) as (kept, on_kept):
                loads = (on_new, on_kept)
                await asyncio.gather(*(load.reached(50) for load in loads))
                for _ in range(2):
                    shown, own = await asyncio.to_thread(serial_shown, service.port, me), (me._leaf, kept._leaf)
                    await asyncio.to_thread(new_root, consul, Authority(first.trust_domain))
                    await until(lambda own=own: me._leaf != own[0] and kept._leaf != own[1], 90)  # type: ignore[misc]
                    async with asyncio.timeout(90):
                        while await asyncio.to_thread(serial_shown, service.port, me) == shown:  # noqa: ASYNC110
                            await asyncio.sleep(0.2)
                    await asyncio.gather(*(load.reached(load.calls + 50) for load in loads))
            assert [failures(load) for load in loads] == [[], []]
            assert all(load.report.calls > 150 for load in loads)
            assert service.log.count("this service is spiffe://") >= 3


async def test_agent_is_dead_for_five_seconds_under_load(private_consul_agent: ConsulAgent) -> None:
    """Certificates, roots, intentions and instances serve on, for new connections, too: every POST arrives."""
    with served(private_consul_agent) as service:
        async with calling(private_consul_agent, 0.01) as (me, load):
            await load.reached(50)
            await asyncio.to_thread(private_consul_agent.kill)
            begun = load.now
            await until(lambda: load.now > begun + 5, 20)
            assert me.complaint is not None
            during = load.report.between(begun + 0.5).calls
            await asyncio.to_thread(private_consul_agent.start)
            await until(lambda: me.complaint is None, 20)
            await load.reached(load.calls + 50)
        assert failures(load) == []
        assert during > 50
        wait_until(service.is_found, 60)
