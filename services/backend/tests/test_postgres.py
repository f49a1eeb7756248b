"""What only a real Postgres shows; needs its programs installed, not running."""

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import URL, Connection, func, select, text
from sqlalchemy.ext.asyncio import create_async_engine

from backend.cards import Cards
from backend.database import CONNECTIONS, Database, DatabaseUnavailableError
from backend.migrations import LOCK, _upgrade
from backend.schemas import CardDraft
from tests.postgres import PASSWORD, run_sql, running_postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of an empty Postgres with a password that must be escaped in URLs."""
    with running_postgres() as port:
        yield port


async def _publish(database: Database, title: str) -> None:
    async def nothing(_: str) -> None:
        return None

    await Cards(database).publish(CardDraft(title=title, content="text"), "key " + title, nothing)


async def test_an_index_is_made_and_used(postgres: int) -> None:
    """Ten replicas that start at once make one index; a search for a part of a word goes through it."""
    databases = [Database(f"postgresql://registry@127.0.0.1:{postgres}/postgres", password=PASSWORD) for _ in range(10)]
    async with asyncio.TaskGroup() as group:
        for database in databases:
            group.create_task(database.prepare())
    await _publish(databases[0], "Grüne Äpfel")
    assert (await Cards(databases[1]).search("Ne äpf", 10, 0)).total == 1
    assert (await Cards(databases[1]).search("", 10, 0)).total == 1
    async with databases[0].session() as session:
        await session.execute(text("SET LOCAL enable_seqscan = off"))
        await session.execute(text("SET LOCAL enable_indexscan = off"))
        plan = await session.scalars(text("EXPLAIN SELECT id FROM cards WHERE search_text LIKE '%apf/%l%' ESCAPE '/'"))
        assert "cards_search_text" in "\n".join(plan)
    for database in databases:
        await database.aclose()


async def test_a_replaced_database_gets_its_tables(postgres: int) -> None:
    """The database is dropped and made anew under running replicas: their next health checks create what is missing."""
    url = f"postgresql://registry@127.0.0.1:{postgres}"
    await run_sql(postgres, "postgres", "CREATE DATABASE replaced")
    databases = [Database(f"{url}/replaced", password=PASSWORD) for _ in range(3)]
    for database in databases:
        await database.prepare()
    await _publish(databases[0], "before")
    await run_sql(postgres, "postgres", "DROP DATABASE replaced WITH (FORCE)", "CREATE DATABASE replaced")

    async def healed(database: Database) -> None:
        while True:
            try:
                await database.ping()
                return await _publish(database, f"after {id(database)}")
            except DatabaseUnavailableError:
                await asyncio.sleep(0.05)

    async with asyncio.timeout(20):
        await asyncio.gather(*map(healed, databases))
    assert (await Cards(databases[0]).search("after", 10, 0)).total == 3
    for database in databases:
        await database.aclose()


async def test_without_the_right_to_an_index_cards_are_searched(
    postgres: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A user who may not install the extension gets tables and a warning, and search works."""
    await run_sql(postgres, "postgres", "CREATE DATABASE plain", "CREATE USER guest PASSWORD 'guest'")
    await run_sql(postgres, "plain", "GRANT ALL ON SCHEMA public TO guest")
    database = Database(f"postgresql://guest:guest@127.0.0.1:{postgres}/plain")
    await database.prepare()
    assert "cards are searched without an index" in caplog.text
    await _publish(database, "Consul")
    assert (await Cards(database).search("nsu", 10, 0)).total == 1
    await database.aclose()


async def test_health_meets_broken_connections_first(postgres: int) -> None:
    """All connections are cut at once: one check of /health finds that out, and after the next no request fails."""
    await run_sql(postgres, "postgres", "CREATE DATABASE cut")
    database = Database(f"postgresql://registry@127.0.0.1:{postgres}/cut", password=PASSWORD)
    await database.prepare()
    await run_sql(postgres, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'cut'")
    with pytest.raises(DatabaseUnavailableError):
        await database.ping()
    await database.ping()
    await asyncio.gather(*(Cards(database).search("", 1, 0) for _ in range(CONNECTIONS)))
    await database.aclose()


async def test_a_start_waits_for_whoever_upgrades(postgres: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it takes, and leaves no lock behind; a replica that hangs meanwhile would lose its own."""
    patience: list[object] = []

    def upgrade(connection: Connection) -> None:
        patience.append(connection.scalar(text("SHOW idle_session_timeout")))
        connection.commit()
        _upgrade(connection)

    monkeypatch.setattr("backend.migrations._upgrade", upgrade)
    await run_sql(postgres, "postgres", "CREATE DATABASE busy")
    engine = create_async_engine(URL.create("postgresql+asyncpg", "registry", PASSWORD, "127.0.0.1", postgres, "busy"))
    url = f"postgresql://registry@127.0.0.1:{postgres}/busy"
    database = Database(url, timeout=0.3, start_seconds=0, password=PASSWORD)
    async with engine.connect() as other:
        await other.execute(select(func.pg_advisory_lock(LOCK)))
        starting = asyncio.create_task(database.prepare())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.shield(starting)
        await other.execute(select(func.pg_advisory_unlock(LOCK)))
        await starting
        assert await other.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) == 0
    async with database._own.connect() as own:
        patience.append(await own.scalar(text("SHOW idle_session_timeout")))
    assert patience == ["5s", "0"]
    await database.aclose()
    await engine.dispose()
