"""The service under test in test_logs.py, as a user writes it."""

import logging

import uvicorn
from fastapi import FastAPI

from registry import ServiceSettings
from registry.fastapi import RegistryMiddleware, health_router, lifespan
from registry.logs import setup_logging
from registry.tracing import server_telemetry, set_up_tracing

settings = ServiceSettings()
setup_logging(settings)
app = FastAPI(telemetry=server_telemetry(settings), lifespan=lifespan(settings, observer=set_up_tracing(settings)))
app.add_middleware(RegistryMiddleware)
app.include_router(health_router())
logger = logging.getLogger("shop")


@app.get("/work")
async def work() -> None:
    logger.debug("looking", extra={"shelf": 7})
    logger.info("sold %s", "tea", extra={"price": 2.5, "to": "two\npeople"})


@app.get("/error")
async def error() -> None:
    raise RuntimeError("unhandled")


if __name__ == "__main__":
    uvicorn.run(app, port=settings.port)
