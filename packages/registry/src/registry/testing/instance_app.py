"""What an instance of `registry.testing.instances` runs: a raw ASGI app that misbehaves on command and counts.

Run by path, so that starting it costs the import of uvicorn and nothing else. Commands come as lines of JSON on stdin,
each answered by a line on stdout; the end of stdin is the end of the process.
"""

import asyncio
import json
import os
import random
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEALTHY = {"mode": "ok", "rate": 1.0, "status": 500, "delay": 0.0, "retry_after": None, "healthy": True}


class Answering:
    """The app: one line of the journal for each request, written before it is answered, so that a kill loses none."""

    def __init__(self, instance_id: str, directory: str) -> None:
        self.directory = directory
        self.behaviour: dict[str, Any] = HEALTHY
        self.server: uvicorn.Server
        self._id = instance_id
        self._journal = os.open(f"{directory}/journal", os.O_WRONLY | os.O_APPEND)
        self._body = json.dumps({"instance": instance_id, "pid": os.getpid()}).encode()
        self._headers = [(b"content-type", b"application/json"), (b"x-service-instance", instance_id.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/health":
            await self._health(scope, send)
            return
        size = await self._read(scope, receive)
        behaviour = self.behaviour
        mode = behaviour["mode"] if random.random() < behaviour["rate"] else "ok"
        os.write(self._journal, b"%s\t%s\t%s\t%s\n" % (scope["method"].encode(), _id_of(scope), mode.encode(), size))
        if behaviour["delay"]:
            await asyncio.sleep(behaviour["delay"])
        if mode == "ok":
            await self._answer(send, 200)
        elif mode == "error":
            await self._answer(send, behaviour["status"], behaviour["retry_after"])
        elif mode == "hang":
            await _gone(receive)
        else:
            if mode == "half":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
                await send({"type": "http.response.body", "body": b"half an ", "more_body": True})
            self._cut(scope)
            await _gone(receive)

    async def _health(self, scope: Scope, send: Send) -> None:
        query = scope["query_string"].decode()
        if query and query != f"instance={self._id}":
            await self._answer(send, 404)
        else:
            await self._answer(send, 200 if self.behaviour["healthy"] else 503)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """How many bytes the body has; ``-`` when the caller left before its end."""
        if scope["method"] == "GET":
            return b"0"
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"-"
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                return b"%d" % size

    async def _answer(self, send: Send, status: int, retry_after: float | None = None) -> None:
        headers = [*self._headers, (b"content-length", b"%d" % len(self._body))]
        if retry_after is not None:
            headers.append((b"retry-after", b"%d" % retry_after))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})

    def _cut(self, scope: Scope) -> None:
        connection: Any
        for connection in self.server.server_state.connections:
            if connection.client == scope["client"]:
                connection.transport.close()
                return


async def _gone(receive: Receive) -> None:
    """Returns when the caller's connection is closed."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _id_of(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name in (b"idempotency-key", b"x-request-id"):
            return bytes(value)
    return b""


def registering(answering: Answering) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The same app as a service that registers itself, with `registry.fastapi`, from the environment."""
    from fastapi import FastAPI, HTTPException

    from registry.fastapi import RegistryMiddleware, health_router, lifespan
    from registry.settings import ServiceSettings

    async def healthy() -> None:
        if not answering.behaviour["healthy"]:
            raise HTTPException(503)

    class Registered(ServiceSettings):
        """The environment is complete: these are no defaults that anything falls back to."""

        name: str = ""
        port: int = 0

    service = FastAPI(lifespan=lifespan(Registered()))
    service.add_middleware(RegistryMiddleware)
    service.include_router(health_router(behaviour=healthy))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner = answering if scope["type"] == "http" and scope["path"] != "/health" else service
        await inner(scope, receive, send)

    return app


def of_the_mesh(answering: Answering, instance_id: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The same app served by mutual TLS, as `registry.fastapi` has it served; whoever started it registers it."""
    from starlette.applications import Starlette

    from registry.mesh.membership import joined
    from registry.settings import ConsulSettings, ServiceSettings

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        settings = ServiceSettings(name=os.environ["SERVICE_NAME"], port=int(os.environ["SERVICE_PORT"]))
        async with joined(settings, ConsulSettings(), lambda: instance_id) as member:
            assert member.identity is not None
            assert member.intentions is not None
            await member.identity.ready.wait()
            await member.intentions.ready.wait()
            yield

    starting = Starlette(lifespan=lifespan)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner: Any = starting if scope["type"] == "lifespan" else answering
        await inner(scope, receive, send)

    return app


class _Server(uvicorn.Server):
    """Tells on stdout when it listens, and then obeys stdin."""

    def __init__(self, config: uvicorn.Config, answering: Answering) -> None:
        super().__init__(config)
        self._answering = answering
        answering.server = self

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_reader(0, self._obey)
        os.write(1, b"ready\n")

    def _obey(self) -> None:
        command = os.read(0, 65536)
        if not command:
            # Whoever started us is gone, and can't clean up.
            shutil.rmtree(self._answering.directory, ignore_errors=True)
            os._exit(1)
        self._answering.behaviour = HEALTHY | json.loads(command)
        os.write(1, b"done\n")


def main(instance_id: str, directory: str, listener: str, registers: str) -> None:
    """Serve on the socket with file descriptor ``listener`` until SIGTERM or the end of stdin."""
    answering = Answering(instance_id, directory)
    app: Any = answering
    if registers == "yes":
        app = registering(answering)
    elif os.environ.get("CONSUL_CONNECT") == "true":
        app = of_the_mesh(answering, instance_id)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        # The same everywhere, whatever else is installed: what is measured depends on it.
        http="h11",
        loop="asyncio",
        lifespan="off" if app is answering else "on",
    )
    _Server(config, answering).run([socket.socket(fileno=int(listener))])


if __name__ == "__main__":
    main(*sys.argv[1:])
