"""Errors that any route may meet, turned into an answer in one place."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from backend.database import DatabaseUnavailableError
from registry.fastapi import refuse_invalid_request


async def _database_unavailable(_: Request, error: DatabaseUnavailableError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "1"})


def add_error_handlers(app: FastAPI) -> None:
    """Answer refused input with 422 and a database that is away with 503."""
    app.exception_handler(RequestValidationError)(refuse_invalid_request)
    app.exception_handler(DatabaseUnavailableError)(_database_unavailable)
