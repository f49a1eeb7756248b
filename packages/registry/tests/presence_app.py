"""The service under test in test_presence.py and test_drain.py, run by the plain command `python -m uvicorn`."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request

from registry import ServiceSettings
from registry.fastapi import RegistryMiddleware, health_router, lifespan

logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s", force=True)
directory = os.environ["DIRECTORY"]
journal = os.open(f"{directory}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def is_first() -> bool:
    """Whether no other worker has started yet."""
    try:
        os.close(os.open(f"{directory}/first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@asynccontextmanager
async def own_lifespan(app: FastAPI) -> AsyncIterator[None]:
    await asyncio.sleep(float(os.environ.get("STARTUP_SECONDS" if is_first() else "LATER_STARTUP_SECONDS", "0")))
    yield
    logging.getLogger("app").info("own lifespan left")


async def database() -> None:
    if os.access(f"{directory}/sick", os.F_OK):
        raise ConnectionError("postgresql://user:hunter2@db/cards refused")


app = FastAPI(lifespan=lifespan(ServiceSettings(), inner=own_lifespan))
app.add_middleware(RegistryMiddleware)
app.include_router(health_router(database=database))


@app.post("/work")
async def work(request: Request) -> str:
    """Count this request, durably, before it is answered."""
    os.write(journal, request.headers["X-Request-Id"].encode() + b"\n")
    await asyncio.sleep(0.05)
    return str(os.getpid())


@app.get("/pid")
async def pid() -> int:
    return os.getpid()


@app.get("/error")
async def error() -> None:
    raise RuntimeError("unhandled")
