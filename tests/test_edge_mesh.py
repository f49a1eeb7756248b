"""The edge as a member of the mesh: a real HAProxy, and a certificate that changes while it runs."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import anyio.to_thread
import httpx
import pytest

from deploy.compose.edge_identity import keep
from registry.mesh.tls import tls_context
from registry.testing.agent import ConsulAgent
from tests.edge import Edge, replicas, running_edge, until
from tests.support.authority import Authority, FixedSource

BACKEND = "backend-api"
CALLERS = 4


def serving(authority: Authority, *trusted: Authority) -> ssl.SSLContext:
    """As backend-api serves: it lets in nobody without a certificate of those authorities."""
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, authority.service(BACKEND).leaf(), authority.roots(*trusted))
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@asynccontextmanager
async def keeping(folder: Path, source: FixedSource) -> AsyncIterator[None]:
    """The edge's certificate is kept fresh; there is one."""
    await anyio.to_thread.run_sync(partial(folder.mkdir, exist_ok=True))
    task = asyncio.create_task(keep(folder, source))

    async def there() -> bool:
        return (folder / "edge.pem").exists() or task.done()

    try:
        await until(there, "a certificate is there")
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A caller that never repeats a request."""
    async with httpx.AsyncClient(trust_env=False, timeout=20) as caller:
        yield caller


def serial(pem: Path) -> str:
    """Of a certificate, as ssl tells it of a peer."""
    return str(ssl._ssl._test_decode_cert(str(pem))["serialNumber"])  # type: ignore[attr-defined]


async def test_certificate_and_authority_change_and_no_call_fails(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient
) -> None:
    """A new authority signs for the edge while it is called: new connections show that, and every call is answered."""
    old, new = Authority(), Authority()
    source, mesh = FixedSource(old.service("edge").leaf(), old.roots()), tmp_path / "mesh"
    failed, answered, ended = [], 0, asyncio.Event()

    async def load(edge: Edge) -> None:
        nonlocal answered
        while not ended.is_set():
            answer = await client.post(f"{edge.url(BACKEND)}/work")
            answered += 1
            await asyncio.sleep(0.02)  # the replicas share this loop
            if answer.status_code != 200:
                failed.append(answer.status_code)

    async with (
        keeping(mesh, source),
        replicas(consul_agent, BACKEND, 2, serving(old, new)) as backends,
        running_edge(consul_agent, tmp_path, BACKEND, mesh=mesh) as edge,
    ):
        first = serial(mesh / "edge.pem")
        assert {caller for each in backends for caller in each.callers} == {first}
        callers = [asyncio.create_task(load(edge)) for _ in range(CALLERS)]
        await source.tell(new.service("edge").leaf(), new.roots(old))

        async def renewed() -> bool:
            return serial(mesh / "edge.pem") != first and all(
                serial(mesh / "edge.pem") in each.callers for each in backends
            )

        await until(renewed, "new connections show the new certificate")
        more = answered + 100

        async def went_on() -> bool:
            return answered > more

        await until(went_on, "calls go on")
        ended.set()
        await asyncio.gather(*callers)
    print(f"{answered} calls, {len(failed)} failed")  # noqa: T201
    assert failed == []


async def test_a_replica_of_another_authority_is_not_called(
    consul_agent: ConsulAgent, tmp_path: Path, client: httpx.AsyncClient
) -> None:
    """Whoever has no certificate of the mesh's authority gets no call, and neither has who speaks plainly."""
    ours, theirs = Authority(), Authority()
    source, mesh = FixedSource(ours.service("edge").leaf(), ours.roots()), tmp_path / "mesh"
    async with (
        keeping(mesh, source),
        replicas(consul_agent, BACKEND, 1, serving(ours)) as [good],
        replicas(consul_agent, BACKEND, 1, serving(theirs, ours)) as [bad],
        replicas(consul_agent, BACKEND, 1) as [plain],
        running_edge(consul_agent, tmp_path, BACKEND, mesh=mesh) as edge,
    ):
        for _ in range(20):
            assert (await client.get(f"{edge.url(BACKEND)}/read")).json() == {"port": good.port}
        assert (bad.seen, plain.seen) == ([], [])
    assert (mesh / "edge.pem").stat().st_mode & 0o777 == 0o400
