"""The tables. Plain column types only, so that SQLite and Postgres hold the same."""

import json
from datetime import UTC, datetime
from hashlib import sha256

from sqlalchemy import JSON, BigInteger, DateTime, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only a column called INTEGER


def utc_now() -> datetime:
    """Now in UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)  # SQLite keeps no zone; every time in here is UTC


class Base(DeclarativeBase):
    """All tables of backend-api."""


class Card(Base):
    """A published text."""

    __tablename__ = "cards"
    # A deleted card's id is never given to another card.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012  (SQLAlchemy's own attribute)

    id: Mapped[int] = mapped_column(_BigId, primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    content: Mapped[str] = mapped_column(Text)
    tags: Mapped[list[str]] = mapped_column(JSON)
    search_text: Mapped[str] = mapped_column(Text)
    """Title, content and tags, case-folded: LIKE ignores case in SQLite for ASCII only, and in Postgres never."""
    created_at: Mapped[datetime] = mapped_column(DateTime, default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(DateTime, default=utc_now, onupdate=utc_now)


SEARCH_INDEX = "cards_search_text"
CREATE_SEARCH_INDEX = (
    "CREATE EXTENSION IF NOT EXISTS pg_trgm",
    f"CREATE INDEX {SEARCH_INDEX} ON cards USING gin (search_text gin_trgm_ops)",
)
"""For Postgres: what finds a part of a word. In SQLite every search reads every card."""


class Publication(Base):
    """The answer to a publish request that carried an Idempotency-Key; it goes with its card, or by its age.

    The primary key is what makes two racing requests on two replicas end in one card.
    """

    __tablename__ = "publications"
    __table_args__ = (Index("publications_card_id", "card_id"),)

    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    """Made by ``stored_key``: one owner's key is not another's."""
    fingerprint: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the request body."""
    answer: Mapped[dict[str, object]] = mapped_column(JSON)
    published_at: Mapped[datetime | None] = mapped_column(DateTime, default=utc_now)
    """None: stored by a release before, which knows no such column."""
    card_id: Mapped[int | None] = mapped_column(BigInteger)
    """No foreign key: the release before deletes cards and knows of none. None: stored by it."""


def stored_key(owner: str | None, key: str) -> str:
    """What an owner's key is stored under; None: nobody knows whose it is, and all of those share their keys.

    Theirs are stored as they are, as the releases before did, and an owner's never equals one: keys hold no blanks.
    """
    return key if owner is None else "of " + sha256(json.dumps([owner, key]).encode()).hexdigest()
