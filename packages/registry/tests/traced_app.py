"""A service that is traced, and calls itself: for test_tracing_service.py."""

import logging
import os

from fastapi import FastAPI
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor

from registry import ServiceSettings
from registry.fastapi import DiscoveryClient, RegistryMiddleware, health_router, lifespan
from registry.logs import setup_logging
from registry.tracing import server_telemetry, set_up_tracing


class Settings(ServiceSettings):
    name: str = "traced-api"
    port: int = 8009


settings = Settings()
setup_logging(settings)
app = FastAPI(
    telemetry=server_telemetry(settings),
    lifespan=lifespan(settings, upstreams=["traced-api"], observer=set_up_tracing(settings)),
)
app.add_middleware(RegistryMiddleware)
app.include_router(health_router())
if os.environ.get("INSTRUMENT") == "httpx":
    HTTPXClientInstrumentor().instrument()


@app.get("/pid")
async def pid() -> int:
    return os.getpid()


@app.get("/calls")
async def calls(client: DiscoveryClient) -> int:
    logging.getLogger("traced").info("calling")
    return (await client.get("traced-api", "/pid")).status_code
