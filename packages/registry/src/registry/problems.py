"""Errors as RFC 9457 has them, ``application/problem+json``: whatever goes wrong, callers read one shape."""

from collections.abc import Mapping
from functools import partial
from http.client import responses
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.utils import is_body_allowed_for_status_code
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["add_problem_handlers", "problem", "problem_responses"]

_PLAIN = PlainTextResponse("Content Too Large", 413)
"""What Starlette answers to a body over ``max_body_size``."""
_MEDIA_TYPE = "application/problem+json"
_SCHEMA = {
    "title": "Problem",
    "type": "object",
    "required": ["title", "status", "detail"],
    "properties": {
        "title": {"type": "string", "description": "The status in words.", "examples": ["Not Found"]},
        "status": {"type": "integer", "examples": [404]},
        "detail": {"type": "string", "description": "What happened.", "examples": ["Card 7 does not exist"]},
        "errors": {"type": "array", "items": {"type": "object"}, "description": "With 422: what is wrong, and where."},
    },
}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **members: object) -> JSONResponse:
    """An answer that says what went wrong, for an exception handler; ``members`` are added to its body.

    The body is ``{"title": "Not Found", "status": 404, "detail": "Card 7 does not exist"}``; there is no ``type``,
    which means that the status says it all (RFC 9457, 4.2.1).
    """
    body = {"title": responses.get(status, "Error"), "status": status, "detail": detail, **members}
    return JSONResponse(body, status, headers, _MEDIA_TYPE)


def problem_responses(described: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI shows of them: ``APIRouter(responses=problem_responses({404: "No card has this id."}))``."""
    content = {_MEDIA_TYPE: {"schema": _SCHEMA}}
    return {status: {"description": description, "content": content} for status, description in described.items()}


def add_problem_handlers(app: FastAPI) -> None:
    """Answers every HTTPException, refused input (422) and what nobody caught (500) as ``problem`` does.

    A 422 has ``errors``, each with ``type``, ``loc`` and ``msg``, and without the refused value: that may be long, or
    the very thing that can't be written as JSON (half a surrogate pair, NaN), and then FastAPI's own answer is a 500.
    So is a body over ``max_body_size`` (413), which Starlette answers itself, in plain text, around all handlers.
    """
    app.exception_handler(HTTPException)(_http_exception)
    app.exception_handler(RequestValidationError)(_refused)
    app.exception_handler(Exception)(_uncaught)
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: partial(_too_large, build())  # type: ignore[method-assign]


async def _too_large(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    replaced = False

    async def send_as_problem(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start":
            replaced = (message["status"], message["headers"]) == (_PLAIN.status_code, _PLAIN.raw_headers)
            if replaced:
                await problem(413, "The body is larger than this service takes")(scope, receive, send)
        if not replaced:
            await send(message)

    await app(scope, receive, send_as_problem)


async def _http_exception(_: Request, error: HTTPException) -> Response:
    if not is_body_allowed_for_status_code(error.status_code):
        return Response(status_code=error.status_code, headers=error.headers)
    return problem(error.status_code, str(error.detail), error.headers)


async def _refused(_: Request, error: RequestValidationError) -> Response:
    errors = [{name: found[name] for name in ("type", "loc", "msg")} for found in error.errors()]
    return problem(422, "The request is not valid: errors say what and where", errors=errors)


async def _uncaught(_: Request, error: Exception) -> Response:
    return problem(500, "The service has failed: its log says why")
