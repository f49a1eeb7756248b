"""One engine per process; every database failure leaves as ``DatabaseUnavailableError``."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from sqlalchemy import URL, exists, func, make_url, select, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from backend.migrations import LOCK, migrate
from backend.models import CREATE_SEARCH_INDEX, SEARCH_INDEX, Card, Publication
from registry.fastapi import DegradedError

_log = logging.getLogger("backend")
_ASYNC_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
# asyncpg raises the operating system's errors and time-outs as they are, all of them OSError.
_FAILURES = (DBAPIError, PoolTimeoutError, OSError)
CONNECTIONS = 4
"""How many each process has at most, and one for its health. Postgres allows 97 in all by default: 19 processes."""


class DatabaseUnavailableError(Exception):
    """The database can't be reached, or did not answer in time. Nothing was committed, as far as is known."""


def _complete(url: str, password: str | None) -> URL:
    parsed = make_url(url)
    driver = _ASYNC_DRIVERS.get(parsed.drivername, parsed.drivername)
    # As a part of its own, a password needs no escaping.
    return parsed.set(drivername=driver, password=password or parsed.password)


def _is_outdated(error: BaseException | None) -> bool:
    """Whether a table or a column is missing."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    missing = {"42P01", "42703"}  # Postgres, appendix A: undefined_table, undefined_column
    return getattr(cause, "sqlstate", None) in missing or any(
        words in str(cause) for words in ("no such table", "no such column", "has no column named")
    )


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

    ``password``: takes the place of the URL's, as it is, and needs no escaping.

    Raises: ValueError, for a URL that can't be used.
    """

    def __init__(
        self, url: str, timeout: float = 5.0, start_seconds: float = 15.0, password: str | None = None
    ) -> None:
        parsed = _complete(url, password)
        if parsed.get_backend_name() == "sqlite" and parsed.database in {None, "", ":memory:"}:
            raise ValueError(
                f"{url} is a database in memory, another one in each process: name a file, sqlite:///cards.db"
            )
        self._timeout = timeout
        self._start_seconds = start_seconds
        self._last_write_failed = False
        self._was_away = False
        # A cut-off statement costs its connection, and a new one costs more than the work did: an overload that cuts
        # off work feeds itself. So few connections, and who can't have one soon gets his 503 from the queue, unserved.
        self._engine = self._pool(parsed, CONNECTIONS)
        # Searches that take long must not make an instance look sick: its health waits for none of them.
        self._own = self._pool(parsed, 1)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    def _pool(self, url: URL, connections: int) -> AsyncEngine:
        # No ping before each use: it is three of a read's six round trips, and all it saves after a restart of the
        # database is one 503 for each connection, which the checks of /health mostly meet first.
        return create_async_engine(
            url,
            connect_args=_connect_args(url, self._timeout),
            pool_size=connections,
            max_overflow=0,
            pool_timeout=self._timeout / 2,
        )

    async def prepare(self) -> None:
        """Create or upgrade the tables, and open every connection: a new replica gets its full share of calls at once.

        Tried again while the database starts, or while another replica upgrades the same.

        Raises: DatabaseUnavailableError, when it still fails after ``start_seconds``.
        """
        deadline = asyncio.get_running_loop().time() + self._start_seconds
        delay = 0.05
        while True:
            try:
                await self._upgrade_tables()
                return await self._connect()
            except _FAILURES as error:
                if asyncio.get_running_loop().time() + delay > deadline:
                    raise DatabaseUnavailableError(f"The database can't be set up: {error}") from error
                _log.warning("database not ready, trying again", extra={"error": str(error), "seconds": delay})
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)

    async def _upgrade_tables(self) -> None:
        await migrate(self._own)
        if self._own.dialect.name == "postgresql":
            await self._create_search_index()

    async def _create_search_index(self) -> None:
        try:
            async with self._own.begin() as connection:
                await connection.execute(select(func.pg_advisory_xact_lock(LOCK)))  # one replica at a time
                if await connection.scalar(select(func.to_regclass(SEARCH_INDEX))) is None:
                    for statement in CREATE_SEARCH_INDEX:
                        await connection.execute(text(statement))
        except _FAILURES as error:
            # Without the right or the extension, or with too many cards for a start to wait: search works, slowly.
            _log.warning("cards are searched without an index", extra={"error": str(error)})

    async def _connect(self) -> None:
        async with AsyncExitStack() as stack:
            for _ in range(CONNECTIONS):
                await stack.enter_async_context(self._engine.connect())

    async def ping(self) -> None:
        """Health check, on a connection of its own: reads the tables, because a plain SELECT 1 does not even look at
        a SQLite file. Upgrades them when they are gone or old: somebody has replaced the database by another one.

        Raises: DatabaseUnavailableError. DegradedError, when it can be read, but the last write failed.
        """
        try:
            await self._read_or_upgrade_tables()
        except (DatabaseUnavailableError, asyncio.CancelledError):  # cancelled: whoever asked has waited long enough
            self._was_away = True
            raise
        if self._was_away:
            # What broke this connection broke those for requests: better found out here than by a request each.
            self._was_away = False
            await asyncio.gather(*(self._try_connection() for _ in range(CONNECTIONS)))
        if self._last_write_failed:
            raise DegradedError("the last write failed")

    async def _read_or_upgrade_tables(self) -> None:
        try:
            await self._read_tables()
        except DatabaseUnavailableError as error:
            if not _is_outdated(error.__cause__):
                raise
            _log.warning("tables are missing or old, upgrading", extra={"error": str(error.__cause__)})
            async with self._in_time():
                await self._upgrade_tables()
            await self._read_tables()

    async def _read_tables(self) -> None:
        tables = (exists(select(table)) for table in (Card, Publication))  # names every column, and fetches none
        async with self._in_time(), self._own.connect() as connection:
            await connection.execute(select(*tables))

    async def _try_connection(self) -> None:
        with suppress(DatabaseUnavailableError):
            async with self.session() as session:
                await session.execute(select(1))

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """A session that is rolled back unless it was committed. All of it may take ``timeout`` seconds together:
        connecting and its statements; half of them is the longest wait for a connection that others use.

        Raises: DatabaseUnavailableError, when the database is away or hangs. IntegrityError, as it is.
        """
        async with self._in_time(), self._sessions() as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A session to change something in; ``ping`` tells whether the last one that got that far failed.

        Raises: as ``session``.
        """
        try:
            async with self.session() as session:
                yield session
        except DatabaseUnavailableError:
            self._last_write_failed = True
            raise
        self._last_write_failed = False

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except (IntegrityError, DataError):  # the database answered: it is there
            raise
        except _FAILURES as error:
            if isinstance(error, ProgrammingError) and not _is_outdated(error):
                raise
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
        await self._own.dispose()
