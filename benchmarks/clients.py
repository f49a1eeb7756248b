"""The clients that are measured side by side: each makes the same call, and reads its status and its body."""

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import aiohttp
import consul
import httpx
import httpx2
from httpx_aiohttp import AiohttpTransport

from registry import ConsulResolver, ConsulSettings, DiscoveryTransport, ServiceDiscoveryClient

__all__ = ["CLIENTS", "Call", "Client", "Target"]

PATH = "/api/cards/1"

Answer = tuple[int, bytes]
Call = Callable[[], Awaitable[Answer]]
Opened = AbstractAsyncContextManager[Call]


@dataclass(frozen=True)
class Target:
    """What is called."""

    service: str
    urls: list[str]
    """Where its instances are, for clients that know no registry."""
    consul: ConsulSettings

    @property
    def instances(self) -> int:
        """How many instances it has."""
        return len(self.urls)


@dataclass(frozen=True)
class Client:
    """A way to call."""

    name: str
    title: str
    open: Callable[[Target], Opened]
    slow: bool = False
    """Measured in one round only, and not warmed up: a factor of a hundred shows at once."""


def _over_httpx(client: httpx.AsyncClient | httpx2.AsyncClient, urls: list[str]) -> Call:
    turn = itertools.cycle(url + PATH for url in urls)

    async def call() -> Answer:
        response = await client.get(next(turn))
        return response.status_code, response.content

    return call


@asynccontextmanager
async def bare_httpx(target: Target) -> AsyncIterator[Call]:
    """One long-lived client with its default limits; without them it is slower still."""
    async with httpx.AsyncClient(trust_env=False) as client:
        yield _over_httpx(client, target.urls)


@asynccontextmanager
async def bare_httpx2(target: Target) -> AsyncIterator[Call]:
    """What continues httpx, in the same way."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        yield _over_httpx(client, target.urls)


@asynccontextmanager
async def httpx_aiohttp(target: Target) -> AsyncIterator[Call]:
    """The same over somebody else's transport."""
    async with httpx.AsyncClient(transport=AiohttpTransport(limits=httpx.Limits(max_connections=0))) as client:
        yield _over_httpx(client, target.urls)


@asynccontextmanager
async def bare_aiohttp(target: Target) -> AsyncIterator[Call]:
    """The limit: no httpx, no discovery."""
    turn = itertools.cycle(url + PATH for url in target.urls)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call() -> Answer:
            async with session.get(next(turn)) as response:
                return response.status, await response.read()

        yield call


@asynccontextmanager
async def usual_sample(target: Target) -> AsyncIterator[Call]:
    """As samples are often written: ask Consul at every call, then open a client for it."""
    agent = consul.Consul(host=target.consul.host, port=target.consul.port)

    async def call() -> Answer:
        _, entries = agent.health.service(target.service, passing=True)
        service = random.choice(entries)["Service"]
        async with httpx.AsyncClient() as client:
            response = await client.get(f"http://{service['Address']}:{service['Port']}{PATH}")
        return response.status_code, response.content

    yield call
    agent.http.session.close()


@asynccontextmanager
async def facade(target: Target) -> AsyncIterator[Call]:
    """Ours, as a service uses it."""
    async with ServiceDiscoveryClient(ConsulResolver(target.consul)) as client:

        async def call() -> Answer:
            response = await client.get(target.service, PATH)
            return response.status_code, response.content

        yield call


@asynccontextmanager
async def transport(target: Target) -> AsyncIterator[Call]:
    """Ours under an ordinary httpx client, such as a generated one."""
    async with httpx.AsyncClient(transport=DiscoveryTransport(ConsulResolver(target.consul))) as client:
        yield _over_httpx(client, [f"http://{target.service}"])


CLIENTS = [
    Client("usual", "usual sample: Consul query and new client per call", usual_sample, slow=True),
    Client("httpx", "bare `httpx.AsyncClient`", bare_httpx),
    Client("httpx2", "bare `httpx2.AsyncClient`", bare_httpx2),
    Client("httpx_aiohttp", "httpx over `httpx_aiohttp`", httpx_aiohttp),
    Client("transport", "ours: httpx over `DiscoveryTransport`", transport),
    Client("facade", "ours: `ServiceDiscoveryClient`", facade),
    Client("aiohttp", "bare aiohttp (the limit)", bare_aiohttp),
]
