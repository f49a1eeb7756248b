"""The edge as containers have it, run as a process: its configuration on a real Consul's DNS, and replicas to hit."""

import asyncio
import contextlib
import json
import os
import re
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio.to_thread
import httpx

from registry import ServiceRegistry
from registry.testing.agent import ConsulAgent
from registry.testing.ports import free_ports
from tests.programs import find_program
from tools.services import ROOT, SERVICES

CONFIGURATION = ROOT / "deploy/compose/haproxy.cfg"
START_SECONDS = 30.0


@dataclass
class Seen:
    """One request as a replica read it; ``body``: the bytes that came, complete or not."""

    target: str
    headers: dict[str, str]
    body: int = 0


@dataclass
class Replica:
    """A server that does what the path says: ``/break`` hangs up, ``/hang`` is silent, ``/503`` answers that."""

    port: int = 0
    fault: str = ""
    """Its own, ``break`` or ``hang``, on whatever but /health is asked."""
    seen: list[Seen] = field(default_factory=list)
    callers: set[str] = field(default_factory=set)
    """The serial numbers of the certificates that connections of the last moments have shown."""

    def ran(self, path: str) -> int:
        """How often this path was asked for here."""
        return sum(seen.target.endswith(path) for seen in self.seen)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until it ends."""
        if certificate := writer.get_extra_info("peercert"):
            self.callers.add(str(certificate["serialNumber"]))
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        seen = Seen(f"{method} {path}", headers)
        if path != "/health":
            self.seen.append(seen)
        left = int(headers.get("content-length", "0"))
        while left:
            chunk = await reader.read(min(left, 65_536))
            if not chunk:
                return False
            left -= len(chunk)
            seen.body += len(chunk)
        fault = self.fault if path != "/health" else ""
        if "break" in {fault, path[1:]}:
            return False
        if "hang" in {fault, path[1:]}:
            await asyncio.Event().wait()
        status = int(path[1:]) if path[1:].isdigit() else 200
        body = json.dumps({"port": self.port}).encode()
        head = f"HTTP/1.1 {status} as asked\r\nContent-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return True


@dataclass
class Edge:
    """A running edge: the port of each service, by its name in Consul, and of ``topology``, the page."""

    ports: dict[str, int]
    pid: int

    def url(self, service: str) -> str:
        """Where the edge publishes it."""
        return f"http://127.0.0.1:{self.ports[service]}"


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Returns once it holds. Raises: AssertionError, which says what it waited for."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_SECONDS):
            while not await condition():  # noqa: ASYNC110 (another process has no event for it)
                await asyncio.sleep(0.02)
            return
    raise AssertionError(f"not within {START_SECONDS:g} s: {what}")


@asynccontextmanager
async def replicas(
    agent: ConsulAgent, service: str, count: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[list[Replica]]:
    """So many replicas of a service, found by Consul; ``tls``: what they serve with."""
    made: list[Replica] = []
    async with AsyncExitStack() as stack:
        registry = stack.enter_context(ServiceRegistry("127.0.0.1", agent.http_port))
        for _ in range(count):
            replica = Replica()
            server = await asyncio.start_server(replica.serve, "127.0.0.1", 0, limit=2**20, ssl=tls)
            stack.push_async_callback(_end, server)
            replica.port = server.sockets[0].getsockname()[1]
            made.append(replica)

            def register(port: int = replica.port) -> str:
                if tls is None:
                    return registry.register_service(service, "127.0.0.1", port, health_check_interval="1s")
                entry: dict[str, str | int] = {
                    "ID": f"{service}-{port}",
                    "Name": service,
                    "Address": "127.0.0.1",
                    "Port": port,
                }
                url = f"{agent.url}/v1/agent/service/register"  # without a check: it would ask plainly
                httpx.put(url, json=entry, trust_env=False).raise_for_status()
                return str(entry["ID"])

            instance = await anyio.to_thread.run_sync(register)
            stack.push_async_callback(anyio.to_thread.run_sync, registry.deregister_service, instance)
        yield made


async def _end(server: asyncio.Server) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if "Replica.serve" in repr(task.get_coro())]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def running_edge(agent: ConsulAgent, folder: Path, *ready: str, mesh: Path | None = None) -> AsyncIterator[Edge]:
    """The edge, once it serves these services; ended whatever happens. ``mesh``: where its certificate is."""
    haproxy = find_program("haproxy", "haproxy")
    alive, topology, *ports = free_ports(2 + len(SERVICES))
    text = CONFIGURATION.read_text().replace('"${CONSUL_ADDRESS}:8600"', f"127.0.0.1:{agent.dns_port}")
    text = text.replace("127.0.0.1:8404", f"127.0.0.1:{alive}").replace("bind :8090", f"bind 127.0.0.1:{topology}")
    for service, port in zip(SERVICES, ports, strict=True):
        text, found = re.subn(rf"bind :{service.port}$", f"bind 127.0.0.1:{port}", text, flags=re.MULTILINE)
        assert found == 1
    file = folder / "haproxy.cfg"
    file.write_text(text)
    environment = os.environ if mesh is None else {**os.environ, "EDGE_MESH": str(mesh)}
    with _process(haproxy, file, folder / "haproxy.log", environment) as process:
        names = [service.name for service in SERVICES]
        edge = Edge({"topology": topology, **dict(zip(names, ports, strict=True))}, process.pid)
        async with httpx.AsyncClient(trust_env=False) as client:
            for name in ready:

                async def serves(name: str = name) -> bool:
                    assert process.poll() is None, (folder / "haproxy.log").read_text()
                    with contextlib.suppress(httpx.TransportError):
                        return (await client.get(f"{edge.url(name)}/health")).is_success
                    return False

                await until(serves, f"the edge serves {name}")
        yield edge


@contextmanager
def _process(
    haproxy: Path, configuration: Path, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as file:
        process = subprocess.Popen([haproxy, "-db", "-f", configuration], stdout=file, stderr=file, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
