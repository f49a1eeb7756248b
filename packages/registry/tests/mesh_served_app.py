"""What test_mesh_served.py calls, run by the plain command: it writes down each request and message that reaches it."""

import os
from collections.abc import AsyncIterator

from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse

from registry import ServiceSettings
from registry.fastapi import Caller, RegistryMiddleware, health_router, lifespan
from registry.logs import setup_logging

settings = ServiceSettings()
setup_logging(settings)
journal = os.open(f"{os.environ['DIRECTORY']}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

app = FastAPI(lifespan=lifespan(settings))
app.add_middleware(RegistryMiddleware)
app.include_router(health_router(), prefix=os.environ.get("HEALTH_PREFIX", ""))


@app.post("/work")
async def work(caller: Caller) -> str | None:
    os.write(journal, f"{caller}\n".encode())
    return caller


@app.get("/numbers")
async def numbers() -> StreamingResponse:
    async def count() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number}\n"

    return StreamingResponse(count())


@app.websocket("/talk")
async def talk(socket: WebSocket, caller: Caller) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        os.write(journal, f"{text}\n".encode())
        await socket.send_text(f"{caller}: {text}")
