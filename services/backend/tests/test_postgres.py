"""What only a real Postgres shows; needs its programs installed, not running."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine

from backend.cards import Cards
from backend.database import CONNECTIONS, Database, DatabaseUnavailableError
from backend.schemas import CardDraft
from registry.testing.ports import free_ports
from tests.programs import find_program

PASSWORD = "p@ss/%40:w#rd"


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of an empty Postgres with a password that must be escaped in URLs."""
    programs = find_program("initdb", "postgresql").parent
    # Postgres does not run as root, and pytest's own folders are for nobody else.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="registry-postgres-") as name:
        if user:
            shutil.chown(name, user)
        yield from _serving(programs, Path(name), user)


def _serving(programs: Path, folder: Path, user: str | None) -> Iterator[int]:
    (folder / "password").write_text(PASSWORD)
    data, [port] = folder / "data", free_ports(1)
    make = [f"{programs}/initdb", "--username=registry", f"--pwfile={folder}/password", "--auth=scram-sha-256"]
    subprocess.run([*make, "--no-sync", f"--pgdata={data}"], check=True, capture_output=True, user=user)
    serve = [f"{programs}/postgres", "-D", str(data), "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
    with (folder / "log").open("w") as log, subprocess.Popen(serve, stdout=log, stderr=log, user=user) as process:
        try:
            deadline = time.monotonic() + 30
            ready = [f"{programs}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            while subprocess.run(ready, check=False).returncode:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield port
        finally:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for the connections of a test that failed


async def _run(port: int, database: str, *statements: str) -> None:
    url = URL.create("postgresql+asyncpg", "registry", PASSWORD, "127.0.0.1", port, database)
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engine.dispose()


async def _publish(database: Database, title: str) -> None:
    async def nothing(_: str) -> None:
        return None

    await Cards(database).publish(CardDraft(title=title, text="text"), "key " + title, nothing)


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
    await _run(postgres, "postgres", "CREATE DATABASE replaced")
    databases = [Database(f"{url}/replaced", password=PASSWORD) for _ in range(3)]
    for database in databases:
        await database.prepare()
    await _publish(databases[0], "before")
    await _run(postgres, "postgres", "DROP DATABASE replaced WITH (FORCE)", "CREATE DATABASE replaced")

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
    await _run(postgres, "postgres", "CREATE DATABASE plain", "CREATE USER guest PASSWORD 'guest'")
    await _run(postgres, "plain", "GRANT ALL ON SCHEMA public TO guest")
    database = Database(f"postgresql://guest:guest@127.0.0.1:{postgres}/plain")
    await database.prepare()
    assert "cards are searched without an index" in caplog.text
    await _publish(database, "Consul")
    assert (await Cards(database).search("nsu", 10, 0)).total == 1
    await database.aclose()


async def test_health_meets_broken_connections_first(postgres: int) -> None:
    """All connections are cut at once: one check of /health finds that out, and after the next no request fails."""
    await _run(postgres, "postgres", "CREATE DATABASE cut")
    database = Database(f"postgresql://registry@127.0.0.1:{postgres}/cut", password=PASSWORD)
    await database.prepare()
    await _run(postgres, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'cut'")
    with pytest.raises(DatabaseUnavailableError):
        await database.ping()
    await database.ping()
    await asyncio.gather(*(Cards(database).search("", 1, 0) for _ in range(CONNECTIONS)))
    await database.aclose()
