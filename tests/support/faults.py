"""Faults that only a service itself can show, on command, and a journal of what reached it: for end-to-end tests.

An overlay of the deployment runs ``uvicorn --factory tests.support.faults:create_app`` with ``FAULTS_APP`` naming
the real app, and commands it from inside its container: ``python -m tests.support.faults '{"status": 500}'``.
Without ``FAULTS_ALLOWED=yes`` it refuses to start, so that no production can be told to fail. Standard library only.
"""

import asyncio
import http.client
import importlib
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import closing
from pathlib import Path
from typing import Any

__all__ = ["FaultMiddleware", "create_app"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_PATH = "/faults"
_KINDS: dict[str, tuple[type, ...]] = {"status": (int,), "delay": (int, float), "eat": (bool,)}
_MEBIBYTE = 1 << 20
_ANSWER_SECONDS = 5.0


def create_app() -> "FaultMiddleware":
    """The app that ``FAULTS_APP`` names (``backend.main:app``), with its journal in the folder ``FAULTS_DIRECTORY``.

    The journal carries the host's name. Raises: RuntimeError, when ``FAULTS_ALLOWED`` is not ``yes``.
    """
    if os.environ.get("FAULTS_ALLOWED") != "yes":
        raise RuntimeError("Faults on command are for tests: they need FAULTS_ALLOWED=yes, which no deployment sets.")
    module, _, name = os.environ["FAULTS_APP"].partition(":")
    app: App = getattr(importlib.import_module(module), name)
    return FaultMiddleware(app, Path(os.environ["FAULTS_DIRECTORY"], socket.gethostname()))


class FaultMiddleware:
    """Around an ASGI app: does to its requests what the last ``PUT /faults`` said; never to ``/health``.

    ``{"status": 500}`` answers so instead of the app, ``{"delay": 3.0}`` waits so many seconds first, ``{"eat": true}``
    takes memory until the system ends the process, ``{}`` behaves again. The journal gets one line for each request
    with an ``X-Request-Id``, before the app sees it, so that a kill loses none: method, path, id, separated by tabs.
    """

    def __init__(self, app: App, journal: Path) -> None:
        self._app = app
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._faults: dict[str, Any] = {}
        self._eaten: list[bytes] = []

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        if scope["path"] == _PATH:
            await self._obey(receive, send)
            return
        self._write(scope)
        if delay := self._faults.get("delay"):
            await asyncio.sleep(delay)
        if status := self._faults.get("status"):
            await _answer(send, status, {"detail": "as the test commanded"})
        else:
            await self._app(scope, receive, send)

    def _write(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                os.write(self._journal, f"{scope['method']}\t{scope['path']}\t{value.decode('latin-1')}\n".encode())

    async def _obey(
        self, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            faults = json.loads(body)
            wrong = [name for name, value in faults.items() if not isinstance(value, _KINDS.get(name, ()))]
        except (ValueError, AttributeError):
            wrong = ["the body"]
        if wrong:
            await _answer(send, 422, {"detail": f"{', '.join(wrong)}: say any of status, delay (seconds), eat (true)"})
            return
        self._faults = faults
        await _answer(send, 200, faults)
        if faults.get("eat"):
            await self._eat()

    async def _eat(self) -> None:
        while True:
            # Written to, or the system would only promise it.
            self._eaten.append(os.urandom(_MEBIBYTE) * 4)
            await asyncio.sleep(0)


async def _answer(send: Callable[[Message], Awaitable[None]], status: int, body: object) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def main(command: str) -> None:
    """Commands the service on this host's ``SERVICE_PORT``. Raises: SystemExit with its answer, when it refuses."""
    port = int(os.environ["SERVICE_PORT"])
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)) as connection:
        connection.request("PUT", _PATH, command)
        with connection.getresponse() as answer:
            if answer.status != http.client.OK:
                raise SystemExit(answer.read().decode(errors="replace"))


if __name__ == "__main__":
    main(sys.argv[1])
