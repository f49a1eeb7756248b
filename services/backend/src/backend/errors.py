"""Errors that any route may meet, each turned into an answer in one place."""

import logging

from fastapi import FastAPI, Request, Response

from backend.cards import CardNotFoundError, KeyReusedError
from backend.database import DatabaseUnavailableError
from registry.fastapi import problem

_log = logging.getLogger("backend")


async def _database_unavailable(_: Request, error: DatabaseUnavailableError) -> Response:
    _log.warning("database unavailable", extra={"error": repr(error.__cause__)})
    return problem(503, str(error), {"Retry-After": "1"})


async def _card_not_found(_: Request, error: CardNotFoundError) -> Response:
    return problem(404, str(error))


async def _key_reused(_: Request, error: KeyReusedError) -> Response:
    found = {"type": "idempotency_key_reused", "loc": ["header", "idempotency-key"], "msg": str(error)}
    return problem(422, str(error), errors=[found])


def add_error_handlers(app: FastAPI) -> None:
    """Answer a card that does not exist with 404, a key used twice with 422, a database that is away with 503."""
    app.exception_handler(DatabaseUnavailableError)(_database_unavailable)
    app.exception_handler(CardNotFoundError)(_card_not_found)
    app.exception_handler(KeyReusedError)(_key_reused)
