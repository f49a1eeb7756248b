"""The HTTP side of cards: what comes in, which status goes out."""

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response

from backend.cards import CardNotFoundError, Cards, KeyReusedError
from backend.clients import Enrichment, ResearchClient, ResearchUnavailableError
from backend.schemas import CardDraft, CardPage, CardPatch, CardView, Problem, PublishedCard, SearchText
from registry.fastapi import DiscoveryClient

_log = logging.getLogger("backend")
router = APIRouter(prefix="/api", responses={503: {"model": Problem, "description": "The database is away."}})
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No card has this id."}}
_BIGGEST_ID = 2**63 - 1  # of a BIGINT column


async def _cards(request: Request) -> Cards:
    return Cards(request.app.state.database)


async def _research(request: Request, client: DiscoveryClient) -> ResearchClient:
    return ResearchClient(client, request.app.state.settings.enrich_timeout)


CardsDependency = Annotated[Cards, Depends(_cards)]
Research = Annotated[ResearchClient, Depends(_research)]
CardId = Annotated[int, Path(ge=1, le=_BIGGEST_ID, examples=[1])]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="Send the same key again, with the same body, to be sure that a card is published once.",
        examples=["5f0c7a1e-publish-1"],
    ),
]


@router.post(
    "/publish",
    status_code=201,
    tags=["publish"],
    responses={
        201: {
            "headers": {
                "Location": {"description": "The card's path.", "schema": {"type": "string"}},
                "Idempotent-Replayed": {
                    "description": "`true`: this key was seen before, and this is the answer given then.",
                    "schema": {"type": "string"},
                },
            }
        }
    },
)
async def publish(
    draft: CardDraft,
    cards: CardsDependency,
    research: Research,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> PublishedCard:
    """Publish a card, and get suggestions for it from research-api.

    The card is stored whether or not research-api answers; `enriched` says which it was.
    The same `Idempotency-Key` again is answered as before and publishes nothing;
    with a different body it is refused (422).
    """

    async def enrich(text: str) -> Enrichment | None:
        try:
            return await research.enrich(text)
        except ResearchUnavailableError as error:
            _log.warning("published without suggestions", extra={"error": str(error)})
            return None

    try:
        card, replayed = await cards.publish(draft, idempotency_key, enrich)
    except KeyReusedError as error:
        # The shape of every other 422, so that callers read one.
        problem = {"type": "idempotency_key_reused", "loc": ["header", "idempotency-key"], "msg": str(error)}
        raise HTTPException(422, [problem]) from error
    response.headers["Location"] = f"/api/cards/{card.id}"
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return card


@router.get("/cards", tags=["cards"])
async def search_cards(
    cards: CardsDependency,
    q: Annotated[
        SearchText,
        Query(
            description="Text to find in title, content or a tag, ignoring case; empty: every card.",
            examples=["consul"],
        ),
    ] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    offset: Annotated[int, Query(ge=0, le=_BIGGEST_ID)] = 0,
) -> CardPage:
    """Find cards, newest first. `%`, `_` and `*` mean themselves."""
    return await cards.search(q, limit, offset)


@router.get("/cards/{card_id}", tags=["cards"], responses=_MISSING)
async def read_card(card_id: CardId, cards: CardsDependency) -> CardView:
    """Read one card."""
    try:
        return await cards.read(card_id)
    except CardNotFoundError as error:
        raise HTTPException(404, str(error)) from error


@router.put("/cards/{card_id}", tags=["cards"], responses=_MISSING)
async def replace_card(card_id: CardId, draft: CardDraft, cards: CardsDependency) -> CardView:
    """Replace a whole card. A card that does not exist is not created: publish it."""
    try:
        return await cards.replace(card_id, draft)
    except CardNotFoundError as error:
        raise HTTPException(404, str(error)) from error


@router.patch("/cards/{card_id}", tags=["cards"], responses=_MISSING)
async def change_card(card_id: CardId, patch: CardPatch, cards: CardsDependency) -> CardView:
    """Change the fields that are sent; the others stay."""
    try:
        return await cards.change(card_id, patch)
    except CardNotFoundError as error:
        raise HTTPException(404, str(error)) from error


@router.delete("/cards/{card_id}", status_code=204, tags=["cards"], responses=_MISSING)
async def delete_card(card_id: CardId, cards: CardsDependency) -> None:
    """Delete a card. Its id is never given again."""
    try:
        await cards.delete(card_id)
    except CardNotFoundError as error:
        raise HTTPException(404, str(error)) from error
