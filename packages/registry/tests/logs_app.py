"""The service under test in test_logs.py, as a user writes it."""

import logging

from fastapi import FastAPI

from registry import ServiceSettings
from registry.fastapi import RegistryMiddleware, health_router, lifespan
from registry.logs import setup_logging

settings = ServiceSettings()
setup_logging(settings)
app = FastAPI(lifespan=lifespan(settings))
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
