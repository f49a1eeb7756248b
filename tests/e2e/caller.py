"""The load of the scenes, a process of its own: GETs and POSTs at a steady rate, a line of JSON for each that ended.

``by-name`` runs in a container of the network and calls through ServiceDiscoveryClient, as a service would; ``edge``
runs on the host and calls through the edge with bare httpx, which never repeats a request by itself.
Says ``ready``, and ends when its stdin does.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from typing import Any, Protocol

import httpx

from registry import ConsulResolver, ServiceDiscoveryClient
from registry.settings import ConsulSettings
from registry.testing.load import Load

SERVICE = "backend-api"
SEARCH = {"q": "no card says this", "limit": "1"}
ATTEMPT_SECONDS = 2.0
"""What one attempt may take; the edge gives a replica as long."""
PAUSE = 0.05


class Send(Protocol):
    """Either client."""

    async def __call__(self, method: str, path: str, **keywords: Any) -> httpx.Response: ...


@asynccontextmanager
async def by_name() -> AsyncIterator[Send]:
    """A client with every setting as it comes, but for the time-out of an attempt."""
    resolver = ConsulResolver(ConsulSettings(), upstreams=[SERVICE])
    await resolver.start()
    async with ServiceDiscoveryClient(resolver, timeout=ATTEMPT_SECONDS) as client:

        async def send(method: str, path: str, **keywords: Any) -> httpx.Response:
            return await client.call_service(SERVICE, path, method, **keywords)

        yield send


@asynccontextmanager
async def edge(url: str) -> AsyncIterator[Send]:
    """A client that sends every request once; it waits longer than the edge, to hear what the edge says."""
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=10.0, trust_env=False, limits=limits) as client:

        async def send(method: str, path: str, **keywords: Any) -> httpx.Response:
            return await client.request(method, path, **keywords)

        yield send


async def run(connected: AbstractAsyncContextManager[Send], rate: float) -> None:
    """Calls until stdin ends: as many GETs as POSTs, ``rate`` of each per second."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, lambda: ended.set() if not os.read(0, 1024) else None)
    async with connected as send:

        async def get(request_id: str) -> httpx.Response:
            return await send("GET", "/api/cards", params=SEARCH, headers={"X-Request-Id": request_id})

        async def post(request_id: str) -> httpx.Response:
            card = {"title": title(request_id), "text": "These were made", "tags": []}
            return await send("POST", "/api/publish", json=card, headers={"X-Request-Id": request_id})

        say("ready")
        async with Load(get, rate=rate) as gets, Load(post, rate=rate) as posts:
            streams = {"GET": Stream("GET", gets), "POST": Stream("POST", posts)}
            while not ended.is_set():
                await asyncio.sleep(PAUSE)
                for stream in streams.values():
                    stream.tell()
        for stream in streams.values():
            stream.tell()


class Stream:
    """One load, and how much of it was told."""

    def __init__(self, method: str, load: Load) -> None:
        self._method = method
        self._load = load
        self._told = 0
        self._began_at = time.time() - load.now

    def tell(self) -> None:
        """A line for each call that has ended since; times are the system's, the same in every container."""
        ended = self._load.calls
        for outcome in self._load.last(ended - self._told).outcomes:
            say(json.dumps(asdict(outcome) | {"method": self._method, "started": self._began_at + outcome.started}))
        self._told = ended


def title(request_id: str) -> str:
    """The id in pieces that are no words, so that research-api is asked and finds nothing to search for."""
    return " ".join(request_id[start : start + 3] for start in range(0, len(request_id), 3))


def say(line: str) -> None:
    """One line on stdout."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", metavar="URL", help="through the edge at this address, in place of by name")
    parser.add_argument("--rate", type=float, required=True, help="GETs, and POSTs, per second")
    options = parser.parse_args()
    asyncio.run(run(edge(options.edge) if options.edge else by_name(), options.rate))
