"""One engine per process; every database failure leaves as ``DatabaseUnavailableError``."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from sqlalchemy import URL, make_url, select, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from backend.models import Base, Card

_log = logging.getLogger("backend")
_ASYNC_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
# asyncpg raises the operating system's errors and time-outs as they are, all of them OSError.
_FAILURES = (DBAPIError, PoolTimeoutError, OSError)
CONNECTIONS = 4
"""How many each process has at most. Postgres allows 97 in all by default: enough for 24 processes."""


class DatabaseUnavailableError(Exception):
    """The database can't be reached, or did not answer in time. Nothing was committed, as far as is known."""


def _with_driver(url: str) -> URL:
    parsed = make_url(url)
    return parsed.set(drivername=_ASYNC_DRIVERS.get(parsed.drivername, parsed.drivername))


def _connect_args(url: URL, timeout: float) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"timeout": timeout}  # how long to wait for another process's write lock
    if url.get_driver_name() == "asyncpg":
        # A replica that hangs, or loses its network, must not hold its locks until the connection is given up.
        settings = {"idle_in_transaction_session_timeout": str(round(timeout * 1000))}
        return {"timeout": timeout, "command_timeout": timeout, "server_settings": settings}
    return {}


class Database:
    """The tables of backend-api behind a connection pool; several processes may share one database or SQLite file.

    Raises: ValueError, for a URL that can't be used.
    """

    def __init__(self, url: str, timeout: float = 5.0, start_seconds: float = 15.0) -> None:
        parsed = _with_driver(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database in {None, "", ":memory:"}:
            raise ValueError(
                f"{url} is a database in memory, another one in each process: name a file, sqlite:///cards.db"
            )
        self._timeout = timeout
        self._start_seconds = start_seconds
        # A cut-off statement costs its connection, and a new one costs more than the work did: an overload that cuts
        # off work feeds itself. So few connections, and who can't have one soon gets his 503 from the queue, unserved.
        # No ping before each use: it is three of a read's six round trips, and all it saves after a restart of the
        # database is one 503 for each connection, which the checks of /health mostly meet first.
        self._engine = create_async_engine(
            parsed,
            connect_args=_connect_args(parsed, timeout),
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=timeout / 2,
        )
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    async def prepare(self) -> None:
        """Create what is missing, and open every connection: a new replica gets its full share of calls at once.

        Tried again while the database starts, or while another replica creates the same.

        Raises: DatabaseUnavailableError, when it still fails after ``start_seconds``.
        """
        deadline = asyncio.get_running_loop().time() + self._start_seconds
        delay = 0.05
        while True:
            try:
                await self._create_tables()
                return await self._connect()
            except _FAILURES as error:
                if asyncio.get_running_loop().time() + delay > deadline:
                    raise DatabaseUnavailableError(f"The database can't be set up: {error}") from error
                _log.warning("database not ready, trying again", extra={"error": str(error), "seconds": delay})
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)

    async def _create_tables(self) -> None:
        if self._engine.dialect.name == "sqlite":
            # Readers no longer wait for the writer. The file remembers it, but no transaction may be open.
            async with self._engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("PRAGMA journal_mode=WAL"))
        async with self._engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    async def _connect(self) -> None:
        async with AsyncExitStack() as stack:
            for _ in range(CONNECTIONS):
                await stack.enter_async_context(self._engine.connect())

    async def ping(self) -> None:
        """Health check: reads a table, because a plain SELECT 1 does not even look at a SQLite file.

        Raises: DatabaseUnavailableError, or what SQLAlchemy raises when the table is gone.
        """
        async with self.session() as session:
            await session.execute(select(Card.id).limit(1))

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """A session that is rolled back unless it was committed. All of it may take ``timeout`` seconds together:
        connecting and its statements; half of them is the longest wait for a connection that others use.

        Raises: DatabaseUnavailableError, when the database is away or hangs. IntegrityError, as it is.
        """
        try:
            async with asyncio.timeout(self._timeout), self._sessions() as session:
                yield session
        except (IntegrityError, DataError, ProgrammingError):  # the database answered: it is there
            raise
        except _FAILURES as error:
            raise DatabaseUnavailableError("The database can't be reached: try again in a moment") from error

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Tables exist inside; connections are closed after. Raises: DatabaseUnavailableError."""
        try:
            await self.prepare()
            yield
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._engine.dispose()
