"""A service that calls another, run by the plain command `python -m uvicorn`; the rest is CONSUL_CONNECT."""

import os

from fastapi import FastAPI

from registry import ServiceSettings
from registry.fastapi import Caller, DiscoveryClient, RegistryMiddleware, health_router, lifespan

upstream = os.environ.get("UPSTREAM")
app = FastAPI(lifespan=lifespan(ServiceSettings(), upstreams=[upstream] if upstream else []))
app.add_middleware(RegistryMiddleware)
app.include_router(health_router())


@app.post("/work")
async def work(caller: Caller) -> dict[str, str | int | None]:
    return {"caller": caller, "pid": os.getpid()}


@app.post("/relay")
async def relay(client: DiscoveryClient) -> object:
    """What the upstream answers to a request that is not repeated once it was sent."""
    assert upstream is not None
    return (await client.post(upstream, "/work")).json()
