"""A Postgres of a test's own, where its programs are installed."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine

from registry.testing.ports import free_ports
from tests.programs import find_program

PASSWORD = "p@ss/%40:w#rd"


@contextmanager
def running_postgres() -> Iterator[int]:
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


async def run_sql(port: int, database: str, *statements: str) -> None:
    """Each statement by itself, as its superuser."""
    url = URL.create("postgresql+asyncpg", "registry", PASSWORD, "127.0.0.1", port, database)
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engine.dispose()
