"""What can be done with cards. Knows the database, knows no HTTP."""

import hashlib
import itertools
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from pydantic_core import to_json
from sqlalchemy import ColumnElement, Delete, Update, and_, delete, exists, func, or_, select, update
from sqlalchemy.exc import IntegrityError

from backend.clients import Enrichment
from backend.database import Database
from backend.models import Card, Publication, stored_key, utc_now
from backend.schemas import (
    EXCERPT_LENGTH,
    CardDraft,
    CardExcerpt,
    CardPatch,
    CardView,
    Page,
    PublishedCard,
    Suggestion,
)

_PAGE_BYTES = 2**18
_BATCH = 500


class CardNotFoundError(Exception):
    """No card has this id."""

    def __init__(self, card_id: int) -> None:
        super().__init__(f"Card {card_id} does not exist")


class KeyReusedError(Exception):
    """This Idempotency-Key came with another body before."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Idempotency-Key '{key}' was used before with a different body: "
            "send the same body again, or choose a new key"
        )


def _fingerprint(draft: CardDraft) -> str:
    # With the field names of the first release: a key that an instance of it took is known to this one.
    return hashlib.sha256(to_json({"title": draft.title, "text": draft.content, "tags": draft.tags})).hexdigest()


def _search_text(title: str, content: str, tags: list[str]) -> str:
    return "\n".join([title, content, *tags]).casefold()


def _seconds_ago(seconds: float) -> datetime:
    return utc_now() - timedelta(seconds=seconds)


def _assign(card: Card, draft: CardDraft) -> None:
    card.title, card.content, card.tags = draft.title, draft.content, draft.tags
    card.search_text = _search_text(draft.title, draft.content, draft.tags)


def _news(enrichment: Enrichment, draft: CardDraft) -> list[Suggestion]:
    return [found for found in enrichment.suggestions if found.kind != "tag" or found.value not in draft.tags]


class Cards:
    """The cards of one database. Every method may raise DatabaseUnavailableError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def publish(
        self,
        draft: CardDraft,
        key: str | None,
        enrich: Callable[[str], Awaitable[Enrichment | None]],
        owner: str | None = None,
    ) -> tuple[PublishedCard, bool]:
        """Store the card once per owner and key; the flag says that this is the answer given before, replayed.

        ``owner``: whose key it is; None: nobody knows. ``enrich`` is asked before the card is stored, so that no
        transaction is open meanwhile and a card is not among its own suggestions. None from it means: none to be had.

        Raises: KeyReusedError, when its owner used the key with another body before.
        """
        if key is not None and (before := await self._published(owner, key, draft)):
            return before, True
        enrichment = await enrich(f"{draft.title}\n{draft.content}")
        async with self._database.writing() as session:
            now = utc_now()
            card = Card(created_at=now, updated_at=now)
            _assign(card, draft)
            session.add(card)
            await session.flush()
            published = PublishedCard(
                **CardView.model_validate(card).model_dump(),
                suggestions=_news(enrichment, draft) if enrichment else [],
                enriched=bool(enrichment and enrichment.complete),
            )
            if key is not None:
                answer = published.model_dump(mode="json")
                session.add(
                    Publication(
                        key=stored_key(owner, key), fingerprint=_fingerprint(draft), answer=answer, card_id=card.id
                    )
                )
            try:
                await session.commit()
            except IntegrityError:
                await session.rollback()
                # Only the key can clash: another request with it was first, perhaps on another replica.
                if key is None or not (before := await self._published(owner, key, draft)):
                    raise
                return before, True
        return published, False

    async def forget_keys(self, age: float) -> None:
        """Forget the keys that are older than ``age`` seconds, and what was answered to them; their cards stay.

        Those without a card go as well: an instance of the release before deletes a card alone. What it stored has
        neither a time nor a card's id: its time is that of the first time that this meets it, its id in its answer.
        """
        undated, expired = Publication.published_at.is_(None), Publication.published_at < _seconds_ago(age)
        answered = Publication.answer["id"].as_integer()
        unlinked = and_(Publication.card_id.is_(None), answered.is_not(None))
        orphaned = and_(Publication.card_id.is_not(None), ~exists().where(Card.id == Publication.card_id))
        await self._in_batches(update(Publication).values(published_at=utc_now()), undated)
        await self._in_batches(update(Publication).values(card_id=answered), unlinked)
        await self._in_batches(delete(Publication), or_(expired, orphaned))

    async def _in_batches(self, change: Update | Delete, those: ColumnElement[bool]) -> None:
        # Little by little: no request waits for long, and no statement takes longer than it may.
        some = change.where(Publication.key.in_(select(Publication.key).where(those).limit(_BATCH)))
        while True:
            async with self._database.writing() as session:
                changed = (await session.scalars(some.returning(Publication.key))).all()
                await session.commit()
            if len(changed) < _BATCH:
                return

    async def _published(self, owner: str | None, key: str, draft: CardDraft) -> PublishedCard | None:
        async with self._database.session() as session:
            publication = await session.get(Publication, stored_key(owner, key))
        if publication is None:
            return None
        if publication.fingerprint != _fingerprint(draft):
            raise KeyReusedError(key)
        return PublishedCard.model_validate(publication.answer)

    async def read(self, card_id: int) -> CardView:
        """Raises: CardNotFoundError."""
        async with self._database.session() as session:
            card = await session.get(Card, card_id)
        if card is None:
            raise CardNotFoundError(card_id)
        return CardView.model_validate(card)

    async def replace(self, card_id: int, draft: CardDraft) -> CardView:
        """Raises: CardNotFoundError; a PUT creates no card."""
        return await self._change(card_id, draft)

    async def change(self, card_id: int, patch: CardPatch) -> CardView:
        """Change the fields that were sent, and only those.

        Raises: CardNotFoundError.
        """
        return await self._change(card_id, patch)

    async def _change(self, card_id: int, change: CardDraft | CardPatch) -> CardView:
        async with self._database.writing() as session:
            # Writing before reading locks the row (in SQLite: the file) until the commit, so two changes that cross
            # can't lose a field.
            if not await session.scalar(
                update(Card).where(Card.id == card_id).values(updated_at=utc_now()).returning(Card.id)
            ):
                raise CardNotFoundError(card_id)
            card = await session.get_one(Card, card_id)
            before = CardDraft.model_construct(title=card.title, content=card.content, tags=card.tags)
            whole = isinstance(change, CardDraft)
            _assign(card, before.model_copy(update=change.model_dump(exclude_unset=not whole)))
            await session.commit()
            return CardView.model_validate(card)

    async def delete(self, card_id: int) -> None:
        """With the card goes what was answered when it was published: nothing that it held is kept.

        Raises: CardNotFoundError.
        """
        async with self._database.writing() as session:
            if not await session.scalar(delete(Card).where(Card.id == card_id).returning(Card.id)):
                raise CardNotFoundError(card_id)
            await session.execute(delete(Publication).where(Publication.card_id == card_id))
            await session.commit()

    async def search(self, q: str, limit: int, offset: int) -> Page[CardExcerpt]:
        """Cards that contain ``q`` in title, content or a tag, ignoring case; newest first. Wildcards are plain text.

        Without their full contents, and so many that the page stays under 256 kB: it may be shorter than ``limit``.
        """
        matches = [Card.search_text.contains(q.casefold(), autoescape=True)] if q else []
        # Cut in the database: a hundred long cards need not come here to be shortened.
        excerpt = func.substr(Card.content, 1, EXCERPT_LENGTH).label("content")
        complete = (func.length(Card.content) <= EXCERPT_LENGTH).label("complete")
        columns = Card.id, Card.title, excerpt, complete, Card.tags, Card.created_at, Card.updated_at
        page = select(*columns).where(*matches).order_by(Card.id.desc()).limit(limit).offset(offset)
        async with self._database.session() as session:
            cards = [CardExcerpt.model_validate(row) for row in await session.execute(page)]
            # A page that is not full is the last one, and its end is the total.
            total = offset + len(cards)
            if len(cards) == limit or (offset and not cards):
                total = await session.scalar(select(func.count()).select_from(Card).where(*matches)) or 0
        return Page(items=_first(cards, _PAGE_BYTES), total=total, limit=limit, offset=offset)


def _first(cards: list[CardExcerpt], limit: int) -> list[CardExcerpt]:
    """As many as go into ``limit`` bytes."""
    ends = itertools.accumulate(len(card.model_dump_json().encode()) for card in cards)
    return [card for card, end in zip(cards, ends, strict=True) if end <= limit]
