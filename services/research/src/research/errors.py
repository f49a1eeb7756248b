"""Errors that any route may meet, turned into an answer in one place."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse


async def _invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    # The refused value is left out: it may be long, or the very thing that can't be written as JSON
    # (half a surrogate pair, NaN), and then FastAPI's own answer would be a 500.
    detail = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
    return JSONResponse({"detail": detail}, 422)


def add_error_handlers(app: FastAPI) -> None:
    """Answer refused input with 422."""
    app.exception_handler(RequestValidationError)(_invalid_request)
