"""Postgres copies the old cards' ``text`` to ``content`` little by little: requests wait for a few rows at most."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ROWS = 500


def upgrade() -> None:
    """Can be broken off, and goes on where it was."""
    if op.get_context().dialect.name == "sqlite":
        return  # copied already: all of SQLite's steps are one transaction
    with op.get_context().autocommit_block():
        connection = op.get_bind()
        last = connection.scalar(sa.text("SELECT max(id) FROM cards WHERE content IS NULL")) or 0
        done = connection.scalar(sa.text("SELECT min(id) - 1 FROM cards WHERE content IS NULL")) or 0
        copy = sa.text("UPDATE cards SET content = text WHERE id > :done AND id <= :done + :rows AND content IS NULL")
        while done < last:
            connection.execute(copy, {"done": done, "rows": _ROWS})
            done += _ROWS
