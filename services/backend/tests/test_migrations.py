"""A database of an earlier release becomes one of this release, under instances of both."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from backend import migrations
from backend.cards import Cards
from backend.database import Database, DatabaseUnavailableError
from backend.models import Base
from backend.schemas import CardDraft, CardPatch
from tests.postgres import PASSWORD, run_sql, running_postgres

RELEASE_BEFORE = {
    "sqlite": """
        CREATE TABLE cards (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, text TEXT NOT NULL, tags JSON NOT NULL,
            search_text TEXT NOT NULL, created_at DATETIME NOT NULL, updated_at DATETIME NOT NULL);
        CREATE TABLE publications (
            key VARCHAR(200) NOT NULL PRIMARY KEY, fingerprint VARCHAR(64) NOT NULL, answer JSON NOT NULL)""",
    "postgresql": """
        CREATE TABLE cards (
            id BIGSERIAL NOT NULL PRIMARY KEY, title TEXT NOT NULL, text TEXT NOT NULL, tags JSON NOT NULL,
            search_text TEXT NOT NULL, created_at TIMESTAMP NOT NULL, updated_at TIMESTAMP NOT NULL);
        CREATE TABLE publications (
            key VARCHAR(200) NOT NULL PRIMARY KEY, fingerprint VARCHAR(64) NOT NULL, answer JSON NOT NULL)""",
}
"""The tables as the release without migrations makes them."""
ROWS = 1200
INSERT = """INSERT INTO cards (title, text, tags, search_text, created_at, updated_at)
    VALUES ('Old', 'old text', '["old"]', 'old', '2026-01-01 00:00:00', '2026-01-01 00:00:00')"""
PUBLICATION = """INSERT INTO publications VALUES ('old key',
    '982e5ae3cc81f8a932106f70768bfb603a3a2ae21e43cf1d9392391f0e8aaf21', '{"id": 1, "title": "Old",
    "text": "old text", "tags": ["old"], "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z",
    "suggestions": [], "enriched": true}')""".replace(":", r"\:")
REPLICA = """
import asyncio, logging, sys
from backend.database import Database
logging.basicConfig(level="INFO")
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(Database(sys.argv[1]).prepare())
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of an empty Postgres."""
    with running_postgres() as port:
        yield port


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.real)])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, in either."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/cards.db"
    port = request.getfixturevalue("postgres")
    name = f"cards_{tmp_path.name.lower()}".translate(str.maketrans("[]-", "___"))
    await run_sql(port, "postgres", f'CREATE DATABASE "{name}"')
    url = make_url(f"postgresql+asyncpg://registry@127.0.0.1:{port}/{name}").set(password=PASSWORD)
    return url.render_as_string(hide_password=False)


@pytest.fixture
async def before(url: str) -> AsyncIterator[AsyncEngine]:
    """What an instance of the release before sees: its tables, with rows in them."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        for statement in RELEASE_BEFORE[engine.dialect.name].split(";"):
            await connection.execute(text(statement))
        for _ in range(ROWS):
            await connection.execute(text(INSERT))
        await connection.execute(text(PUBLICATION))
    yield engine
    await engine.dispose()


async def start_three(url: str) -> str:
    """Three replicas, each a process, prepare the database at the same moment; what they log."""
    start = partial(asyncio.create_subprocess_exec, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    replicas = [await start(sys.executable, "-c", REPLICA, url) for _ in range(3)]
    for replica in replicas:
        assert replica.stdout is not None
        await replica.stdout.readline()
    logs = [error.decode() for _, error in await asyncio.gather(*(replica.communicate(b"\n") for replica in replicas))]
    assert [replica.returncode for replica in replicas] == [0, 0, 0], logs
    return "".join(logs)


async def never(_: str) -> None:
    raise AssertionError("asked for suggestions")


async def nothing(_: str) -> None:
    return None


async def differing(engine: AsyncEngine) -> int:
    """How many cards an instance of the release before sees otherwise than one of this release."""
    async with engine.connect() as connection:
        count = "SELECT count(*) FROM cards WHERE content IS NULL OR text IS NULL OR content <> text"
        return int(await connection.scalar(text(count)) or 0)


@pytest.mark.real
async def test_three_replicas_upgrade_a_database_of_the_release_before(url: str, before: AsyncEngine) -> None:
    """Started at once, all come up, each step is taken once, and every card, id and key is still known."""
    async with before.begin() as connection:
        await connection.execute(text(f"DELETE FROM cards WHERE id = {ROWS}"))
    logs = await start_three(url)
    assert logs.count("Running upgrade") == len(list((Path(migrations.__file__).parent / "versions").glob("*.py")))
    assert await differing(before) == 0
    database = Database(url)
    await database.prepare()
    cards = Cards(database)
    assert (await cards.read(1)).content == "old text"
    assert (await cards.search("", 10, 0)).total == ROWS - 1
    draft = CardDraft(title="Old", content="old text", tags=["old"])
    replayed, again = await cards.publish(draft, "old key", never)
    assert (again, replayed.content, replayed.enriched) == (True, "old text", True)
    assert (await cards.publish(draft, None, nothing))[0].id == ROWS + 1
    await database.aclose()


async def test_both_releases_write_side_by_side(url: str, before: AsyncEngine) -> None:
    """Whoever writes a card, with either name, the others read it under theirs."""
    database = Database(url)
    await database.prepare()
    cards = Cards(database)
    published, _ = await cards.publish(CardDraft(title="New", content="new text"), "new key", nothing)
    await cards.change(2, CardPatch(content="changed here"))
    async with before.begin() as connection:
        await connection.execute(text(INSERT))
        await connection.execute(text("UPDATE cards SET text = 'changed there', title = 'There' WHERE id = 3"))
        read = text(f"SELECT text FROM cards WHERE id IN (2, {published.id}) ORDER BY id")
        assert list(await connection.scalars(read)) == ["changed here", "new text"]
        [answer] = await connection.scalars(text("SELECT answer FROM publications WHERE key = 'new key'"))
    assert (json.loads(answer) if isinstance(answer, str) else answer)["text"] == "new text"
    assert (await cards.read(published.id + 1)).content == "old text"
    assert (await cards.read(3)).content == "changed there"
    assert await differing(before) == 0
    await database.aclose()


async def test_a_key_of_the_release_before_goes_with_its_card(url: str, before: AsyncEngine) -> None:
    """It is told its card, from its answer; one whose card an instance of that release has deleted goes when that is
    next done, and one whose card this release deletes goes at once."""
    database = Database(url)
    await database.prepare()
    cards = Cards(database)
    publication = PUBLICATION.replace("publications VALUES", "publications (key, fingerprint, answer) VALUES")
    async with before.begin() as connection:
        for card in (2, 3):
            stored = publication.replace("old key", f"key {card}").replace(r'"id"\: 1,', rf'"id"\: {card},')
            await connection.execute(text(stored))
        await connection.execute(text("DELETE FROM cards WHERE id = 2"))
    await cards.forget_keys(3600)
    async with before.connect() as connection:
        links = await connection.execute(text("SELECT key, card_id FROM publications ORDER BY card_id"))
        assert [tuple(link) for link in links] == [("old key", 1), ("key 3", 3)]
    await cards.delete(3)
    async with before.connect() as connection:
        assert list(await connection.scalars(text("SELECT key FROM publications"))) == ["old key"]
    await database.aclose()


async def test_a_key_of_the_release_before_counts_from_when_it_is_met(url: str, before: AsyncEngine) -> None:
    """Nobody knows its age, so it is kept for a whole time more, and then it goes."""
    database = Database(url)
    await database.prepare()
    kept: list[int] = []
    for age in (3600, 3600, -1):
        await Cards(database).forget_keys(age)
        async with before.connect() as connection:
            kept.append(len((await connection.execute(text("SELECT key FROM publications"))).all()))
    assert kept == [1, 1, 0]
    await database.aclose()


@pytest.mark.real
async def test_the_release_before_works_on_while_the_tables_change(url: str, before: AsyncEngine) -> None:
    """An instance that reads, publishes and changes cards all through an upgrade meets no error and loses nothing."""
    upgrade = asyncio.create_task(start_three(url))
    written = 0
    while not upgrade.done():
        async with before.begin() as connection:
            await connection.execute(text(INSERT))
            await connection.execute(
                text(f"UPDATE cards SET text = 'written {written}' WHERE id = {written % ROWS + 1}")
            )
            await connection.execute(text("SELECT id, title, text FROM cards ORDER BY id DESC LIMIT 10"))
        written += 1
    await upgrade
    assert written > 3
    assert await differing(before) == 0
    async with before.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM cards")) == ROWS + written


async def test_the_steps_make_what_the_models_say(url: str) -> None:
    """But for the old name, which stays for the release before, until the next one drops it."""
    database = Database(url)
    await database.prepare()

    def compare(connection: Connection) -> list[tuple[object, ...]]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found = compare_metadata(context, Base.metadata)
        flat = [change for entry in found for change in (entry if isinstance(entry, list) else [entry])]
        return [change for change in flat if change[0] != "remove_index"]  # the one for search

    async with database._own.connect() as connection:
        changes = await connection.run_sync(compare)
    await database.aclose()
    kinds = {(change[0], getattr(change[3], "name", change[3])) for change in changes}
    assert kinds == {("remove_column", "text"), ("modify_nullable", "content")}


async def test_a_newer_release_s_tables_stay(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """An instance of this release that starts while the next one is rolled out, or rolled back, serves on."""
    newer = Database(url)
    await newer.prepare()
    async with newer.session() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = 'newer'"))
        await session.commit()
    database = Database(url, start_seconds=0)
    await database.prepare()
    assert "a newer release has changed the tables" in caplog.text
    await Cards(database).publish(CardDraft(title="t", content="t"), None, nothing)
    await database.aclose()
    await newer.aclose()


async def test_a_restored_backup_of_the_release_before_is_upgraded(url: str, before: AsyncEngine) -> None:
    """Replaced under a running instance, the database is upgraded by the next check of /health."""
    database = Database(url)
    await database.prepare()
    async with before.begin() as connection:
        for name in ("cards", "publications", "alembic_version"):
            await connection.execute(text(f"DROP TABLE {name}"))
        for statement in RELEASE_BEFORE[before.dialect.name].split(";"):
            await connection.execute(text(statement))
        await connection.execute(text(INSERT))
    with suppress(DatabaseUnavailableError):
        await database.ping()  # that a cached plan is outdated may cost one
    await database.ping()
    assert (await Cards(database).read(1)).content == "old text"
    await database.aclose()
