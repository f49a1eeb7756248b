"""The tables, brought up to this release from whatever is there; ``versions/`` holds each step, and says why."""

import asyncio
import logging

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, inspect, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

_log = logging.getLogger("backend")
LOCK = 0x63617264
"""Of Postgres. Of no meaning: only replicas of this service ask for it."""


async def migrate(engine: AsyncEngine) -> None:
    """Each step is taken once, however many replicas call this at once: the others wait, and find it done.

    A database that a release without migrations made is recognised by its tables. One that a newer release has
    changed stays as it is: that release still serves this one.

    Raises: what SQLAlchemy and the driver raise, waiting too long among it.
    """
    await (_in_sqlite if engine.dialect.name == "sqlite" else _in_postgres)(engine)


async def _in_sqlite(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        # Readers no longer wait for the writer. The file remembers it, but no transaction may be open.
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("PRAGMA journal_mode=WAL"))
    async with engine.begin() as connection:
        await connection.execute(text("BEGIN IMMEDIATE"))  # one process at a time, and all steps or none
        await connection.run_sync(_upgrade)


async def _in_postgres(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        try:
            # Whoever hangs in the middle must not keep the others out: its connection is closed, and the lock with it.
            await connection.execute(text("SET idle_session_timeout = '5s'"))
            # Of the connection, not of a transaction: a step that changes many rows commits in between. And asked for
            # again and again: a server goes on waiting for a lock when its client has long given up.
            while not await connection.scalar(select(func.pg_try_advisory_lock(LOCK))):
                await connection.commit()
                await asyncio.sleep(0.1)
            await connection.commit()
            await connection.run_sync(_upgrade)
            await connection.execute(select(func.pg_advisory_unlock(LOCK)))
            await connection.execute(text("RESET idle_session_timeout"))
            await connection.commit()
        except BaseException:
            await connection.invalidate()
            raise


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "backend:migrations")
    config.attributes["connection"] = connection
    in_transaction = connection.in_transaction()
    if not inspect(connection).has_table("cards"):
        # Whoever removed the tables by hand need not have known that their version is kept in another one.
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
    versions = set(MigrationContext.configure(connection).get_current_heads())
    if not in_transaction:
        connection.commit()  # each step then has a transaction of its own
    if unknown := versions - {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}:
        _log.warning("a newer release has changed the tables: they stay", extra={"versions": sorted(unknown)})
        return
    command.upgrade(config, "head")
