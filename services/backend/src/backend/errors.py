"""Errors that any route may meet, turned into an answer in one place."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from backend.database import DatabaseUnavailableError
from registry.fastapi import refuse_invalid_request

_log = logging.getLogger("backend")


async def _database_unavailable(_: Request, error: DatabaseUnavailableError) -> JSONResponse:
    _log.warning("database unavailable", extra={"error": repr(error.__cause__)})
    return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "1"})


def add_error_handlers(app: FastAPI) -> None:
    """Answer refused input with 422 and a database that is away with 503."""
    app.exception_handler(RequestValidationError)(refuse_invalid_request)
    app.exception_handler(DatabaseUnavailableError)(_database_unavailable)
