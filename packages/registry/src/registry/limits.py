"""A request body that comes in too slowly is given up: who sends a byte now and then holds a connection for ever."""

import asyncio
from collections.abc import Awaitable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.problems import problem

__all__ = ["SlowBodyMiddleware"]


class SlowBodyError(HTTPException):
    """408, with the connection closed. An HTTPException, because FastAPI passes on no other that reading raises."""

    def __init__(self, rate: float) -> None:
        super().__init__(408, f"the body came in at less than {rate:g} bytes a second", {"Connection": "close"})


class SlowBodyMiddleware:
    """Answers 408 to a request whose body takes longer than ``grace`` seconds and one for every ``rate`` bytes of it.

    The answer is a problem (``registry.problems``), where the app has no handler of its own for HTTPException. Counts
    from the first time that the app asks for the body. The defaults are those of Apache's mod_reqtimeout
    (``body=20,MinRate=500``).
    """

    def __init__(self, app: ASGIApp, grace: float = 20.0, rate: float = 500.0) -> None:
        self._app = app
        self._grace = grace
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _has_no_body(scope):
            await self._app(scope, receive, send)
            return
        deadline: float | None = None
        complete = started = False

        async def receive_in_time() -> Message:
            nonlocal deadline, complete
            if complete:  # what follows is the caller's leaving, and may take as long as the answer does
                return await receive()
            if deadline is None:
                deadline = asyncio.get_running_loop().time() + self._grace
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise SlowBodyError(self._rate) from None
            deadline += len(message.get("body", b"")) / self._rate
            complete = not message.get("more_body", False)
            return message

        def send_and_remember(message: Message) -> Awaitable[None]:
            nonlocal started
            started = True
            return send(message)

        try:
            await self._app(scope, receive_in_time, send_and_remember)
        except SlowBodyError as error:
            if started:
                raise
            await problem(error.status_code, error.detail, error.headers)(scope, receive, send)


def _has_no_body(scope: Scope) -> bool:
    """Whether it can't have one. Source: RFC 9112, 6.3, for HTTP/1; in HTTP/2 a body needs no header."""
    headers = dict(scope["headers"])
    return scope["http_version"] in {"1.0", "1.1"} and not (
        b"content-length" in headers or b"transfer-encoding" in headers
    )
