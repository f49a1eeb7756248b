"""What backend-api does as long as it runs, beside answering."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TypeAlias

from fastapi import FastAPI

from backend.cards import Cards
from backend.database import Database

_log = logging.getLogger("backend")
_HOUR = 3600.0
Lifespan: TypeAlias = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def keep(database: Database, key_age: float, every: float = _HOUR) -> Lifespan:
    """Keeps the tables up to date, and forgets keys older than ``key_age``, at least ``every`` so many seconds."""

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        async with database.lifespan(app):
            forgetting = asyncio.create_task(_forget(Cards(database), key_age, every))
            try:
                yield
            finally:
                forgetting.cancel()
                with suppress(asyncio.CancelledError):
                    await forgetting

    return run


async def _forget(cards: Cards, key_age: float, every: float) -> None:
    while True:
        # Replicas that start together need not do it together; doing it twice does no harm.
        await asyncio.sleep(every * random.uniform(0.5, 1.0))
        try:
            await cards.forget_keys(key_age)
        except Exception:
            _log.warning("old keys stay until the next time", exc_info=True)
