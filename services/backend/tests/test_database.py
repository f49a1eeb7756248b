import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TypeAlias

import httpx
import pytest
from sqlalchemy import create_mock_engine, event, make_url, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import Pool
from sqlalchemy.schema import ExecutableDDLElement

from backend.database import CONNECTIONS, Database, DatabaseUnavailableError, _complete
from backend.main import create_app
from backend.models import Base, Card
from backend.password import read_password
from backend.settings import Settings
from registry import InvalidInputError

Replica: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]


async def test_replicas_that_start_at_once_share_one_file(database_file: Path) -> None:
    """Ten replicas that create the tables at the same moment all come up."""
    databases = [Database(f"sqlite:///{database_file}") for _ in range(10)]
    async with asyncio.TaskGroup() as group:
        for database in databases:
            group.create_task(database.prepare())
    for database in databases:
        await database.ping()
        await database.aclose()


async def test_every_connection_is_open_before_the_first_call(database_file: Path) -> None:
    """The first calls of a new replica wait for none."""
    opened: list[object] = []

    def count(connection: object, _: object) -> None:
        opened.append(connection)

    event.listen(Pool, "connect", count)
    database = Database(f"sqlite:///{database_file}")
    await database.prepare()
    assert len(opened) == CONNECTIONS + 1  # and the one for health
    await asyncio.gather(*(look(database) for _ in range(CONNECTIONS)), database.ping())
    assert len(opened) == CONNECTIONS + 1
    event.remove(Pool, "connect", count)
    await database.aclose()


async def look(database: Database) -> None:
    """As a request reads."""
    async with database.session() as session:
        await session.execute(select(Card.id).limit(1))


class FirstWarning(logging.Handler):
    """Tells when something was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.set()


async def test_a_start_waits_for_the_database(database_file: Path) -> None:
    """A database that is not ready yet is asked again, and the start goes through once it is."""
    warning = FirstWarning()
    logging.getLogger("backend").addHandler(warning)
    blocker = sqlite3.connect(database_file, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    database = Database(f"sqlite:///{database_file}", timeout=0.05)
    starting = asyncio.create_task(database.prepare())
    async with asyncio.timeout(10):
        await warning.seen.wait()
        assert not starting.done()
        blocker.close()
        await starting
    logging.getLogger("backend").removeHandler(warning)
    await database.ping()
    await database.aclose()


async def test_an_unreachable_database_is_a_clear_error(caplog: pytest.LogCaptureFixture) -> None:
    """A start that can't succeed says so, whatever the driver raises, and keeps the password to itself."""
    database = Database("postgresql://user:secret@127.0.0.1:1/cards", start_seconds=0.1)
    with pytest.raises(DatabaseUnavailableError, match="can't be set up") as caught:
        await database.prepare()
    assert "secret" not in str(caught.value) + caplog.text
    await database.aclose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite+aiosqlite:///:memory:"])
def test_a_database_in_memory_is_refused(url: str) -> None:
    """Replicas could not share it."""
    with pytest.raises(ValueError, match="name a file"):
        Database(url)


async def test_a_locked_database_is_503_and_recovers(replica: Replica, database_file: Path) -> None:
    """While another process holds the write lock, writing is 503 within the time-out; then it works again."""
    backend = await replica(database_timeout=0.1)
    blocker = sqlite3.connect(database_file, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    answer = await backend.post("/api/publish", json={"title": "t", "content": "t"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"] == "The database can't be reached: try again in a moment"
    assert (await backend.get("/api/cards")).json()["total"] == 0
    blocker.close()
    assert (await backend.post("/api/publish", json={"title": "t", "content": "t"})).status_code == 201


@pytest.mark.real
async def test_a_silent_database_keeps_nobody_longer_than_the_timeout() -> None:
    """Those who connect wait one time-out, those who wait for them half of it, and nobody connects on top of those."""
    connections: list[asyncio.StreamWriter] = []
    async with await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        database = Database(f"postgresql://user:secret@127.0.0.1:{port}/cards", timeout=2.0)
        loop = asyncio.get_running_loop()
        begun = loop.time()

        async def seconds() -> float:
            with pytest.raises(DatabaseUnavailableError):
                await look(database)
            return loop.time() - begun

        took = sorted(await asyncio.gather(*(seconds() for _ in range(40))))
        await database.aclose()
        for connection in connections:
            connection.close()
    assert len(connections) == CONNECTIONS
    queued, connecting = took[:-CONNECTIONS], took[-CONNECTIONS:]
    assert queued[0] > 0.95
    assert queued[-1] < 1.9
    assert connecting[0] > 1.9
    assert connecting[-1] < 3.8


async def test_health_names_the_sick_database(replica: Replica, database_file: Path) -> None:
    """Healthy is 200; a database with the wrong tables is 503, and the body says which component it is."""
    backend = await replica()
    healthy = await backend.get("/health")
    assert (healthy.status_code, healthy.json()["components"]) == (200, {"database": {"status": "healthy"}})
    connection = sqlite3.connect(database_file)
    connection.executescript("DROP TABLE cards; CREATE TABLE cards (name)")
    connection.close()
    sick = await backend.get("/health")
    assert sick.status_code == 503
    assert sick.json()["components"]["database"]["status"] == "unhealthy"


async def test_an_empty_database_gets_its_tables(replica: Replica, database_file: Path) -> None:
    """Somebody replaces the database by an empty one: 503 until the next check of /health, which creates the tables."""
    backend = await replica()
    connection = sqlite3.connect(database_file)
    connection.executescript("DROP TABLE cards; DROP TABLE publications")
    connection.close()
    card = {"title": "t", "content": "t"}
    for answer in (await backend.post("/api/publish", json=card), await backend.get("/api/cards")):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert (await backend.get("/health")).status_code == 200
    assert (await backend.post("/api/publish", json=card, headers={"Idempotency-Key": "k"})).status_code == 201
    assert (await backend.get("/api/cards")).json()["total"] == 1


async def test_a_full_disk_is_told(replica: Replica) -> None:
    """While the last write has failed, /health says degraded, and reads are served; the next good one heals."""
    full = False

    def limit(connection: DBAPIConnection, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count = {1 if full else 1_000_000}")  # 1: as many as there are
        cursor.close()

    backend = await replica()
    event.listen(Pool, "checkout", limit)
    try:
        card = {"title": "t", "content": "x" * 50_000}
        assert (await backend.post("/api/publish", json=card)).status_code == 201
        full = True
        assert (await backend.post("/api/publish", json=card)).status_code == 503
        told = await backend.get("/health")
        assert (told.status_code, told.json()["status"]) == (200, "degraded")
        assert told.json()["components"] == {"database": {"status": "degraded", "error": "the last write failed"}}
        assert (await backend.get("/api/cards")).json()["total"] == 1
        full = False
        assert (await backend.delete("/api/cards/1")).status_code == 204
        assert (await backend.get("/health")).json()["status"] == "healthy"
    finally:
        event.remove(Pool, "checkout", limit)


async def test_health_waits_for_no_search(database_file: Path) -> None:
    """With every connection taken by those who work, the health check is answered at once."""
    database = Database(f"sqlite:///{database_file}", timeout=5.0)
    await database.prepare()
    async with AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            session = await stack.enter_async_context(database.session())
            await session.execute(select(Card.id))
        async with asyncio.timeout(1):
            await database.ping()
    await database.aclose()


async def test_a_check_that_was_given_up_is_an_outage(database_file: Path) -> None:
    """Whoever asks for the health waits less long than the database may take: that too makes the next check look."""
    database = Database(f"sqlite:///{database_file}")
    await database.prepare()
    outages: list[bool] = []
    for seconds in (None, 0, None):
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await database.ping()
        outages.append(database._was_away)
    assert outages == [False, True, False]
    await database.aclose()


@pytest.mark.parametrize("password", ["p@ss", "50%", "a/b:c?d#e", "%40", "päß wörd", "'\"\\$"])
def test_a_password_of_its_own_needs_no_escaping(password: str) -> None:
    """Whatever its characters, the driver gets it as it is, and the host stays the URL's."""
    url = _complete("postgresql://registry:old@postgres/registry", password)
    assert (url.host, url.username, url.password, url.drivername) == (
        "postgres",
        "registry",
        password,
        "postgresql+asyncpg",
    )
    assert make_url(url.render_as_string(hide_password=False)).password == password


def test_the_password_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """DATABASE_PASSWORD is its variable, and no repr shows it."""
    monkeypatch.setenv("DATABASE_PASSWORD", "p@ss%")
    settings = Settings()
    assert settings.database_password == "p@ss%"
    assert "p@ss" not in repr(settings)


def test_the_password_is_read_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DATABASE_PASSWORD_FILE names it; the line's end is not part of it, blanks are, and nothing else shows it."""
    file = tmp_path / "password"
    file.write_text(" p@ss%\n")
    monkeypatch.setenv("DATABASE_PASSWORD_FILE", str(file))
    assert read_password(Settings()) == " p@ss%"
    assert "p@ss" not in repr(Settings())


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "can't be read \\(No such file"), (b"\n", "is empty"), (b"p\xffss", "is not a text in UTF-8")],
)
def test_a_password_file_of_no_use_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    """At the start, with its name and what is wrong."""
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=words) as caught:
        create_app(Settings(database_password_file=str(file)))
    assert str(file) in str(caught.value)


def test_two_passwords_are_refused(tmp_path: Path) -> None:
    """Nobody has to guess which one counts."""
    with pytest.raises(ValueError, match="are both set: unset one"):
        read_password(Settings(database_password="one", database_password_file=str(tmp_path / "two")))


def test_the_tables_are_postgres_tables_too() -> None:
    """Postgres gets 64-bit ids that count up, and no type of SQLite's."""
    statements: list[str] = []

    def keep(statement: ExecutableDDLElement, *_: object) -> None:
        statements.append(str(statement.compile(dialect=engine.dialect)))

    engine = create_mock_engine("postgresql+asyncpg://", keep)
    Base.metadata.create_all(engine, checkfirst=False)
    cards, publications, index = sorted(statements)
    assert "id BIGSERIAL NOT NULL" in cards
    assert "key VARCHAR(200) NOT NULL" in publications
    assert "ON publications (card_id)" in index
