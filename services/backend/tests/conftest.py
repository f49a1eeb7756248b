from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from fastapi import FastAPI

from backend.main import create_app
from backend.settings import Settings
from registry import Instance, ServiceDiscoveryClient, StaticResolver
from registry.fastapi import discovery_client

Replica: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
RESEARCH = Instance("research-1", "research-api", "127.0.0.1", 8001)


@pytest.fixture
def database_file(tmp_path: Path) -> Path:
    """The file that all replicas of a test share."""
    return tmp_path / "cards.db"


@pytest.fixture
async def replica(database_file: Path) -> AsyncIterator[Replica]:
    """Starts replicas of backend-api on one SQLite file, without Consul; `research` is the fake they ask by name."""
    async with AsyncExitStack() as stack:

        async def start(research: FastAPI | None = None, **settings: Any) -> httpx.AsyncClient:
            app = create_app(Settings(database_url=f"sqlite:///{database_file}", **settings))
            await stack.enter_async_context(app.state.database.lifespan(app))
            resolver = StaticResolver({"research-api": [RESEARCH]} if research else {})
            upstream = httpx.ASGITransport(research) if research else None
            discovery = await stack.enter_async_context(
                ServiceDiscoveryClient(resolver, retry_delay=0.0, transport=upstream)
            )
            app.dependency_overrides[discovery_client] = lambda: discovery
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://backend")
            return await stack.enter_async_context(client)

        yield start


@pytest.fixture
async def backend(replica: Replica) -> httpx.AsyncClient:
    """One replica, with no research-api to be found."""
    return await replica()
