"""The HTTP side of cards: what comes in, which status goes out."""

import logging
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Response

from backend.clients import Enrichment, ResearchUnavailableError
from backend.dependencies import CardsDependency, OwnerDependency, ResearchDependency
from backend.schemas import CardDraft, CardExcerpt, CardPatch, CardView, Page, PublishedCard, SearchText
from registry.fastapi import problem_responses

_log = logging.getLogger("backend")
_PROBLEMS = problem_responses({422: "The request is not valid.", 503: "The database is away."})
router = APIRouter(prefix="/api", responses=_PROBLEMS)
_MISSING = problem_responses({404: "No card has this id."})
_BIGGEST_ID = 2**63 - 1  # of a BIGINT column


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
    research: ResearchDependency,
    owner: OwnerDependency,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> PublishedCard:
    """Publish a card, and get suggestions for it from research-api.

    The card is stored whether or not research-api answers; `enriched` says which it was.
    The same `Idempotency-Key` of the same caller is answered as before and publishes nothing;
    with a different body it is refused (422).
    """

    async def enrich(text: str) -> Enrichment | None:
        try:
            return await research.enrich(text)
        except ResearchUnavailableError as error:
            _log.warning("published without suggestions", extra={"error": str(error)})
            return None

    card, replayed = await cards.publish(draft, idempotency_key, enrich, owner)
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
) -> Page[CardExcerpt]:
    """Find cards, newest first. `%`, `_` and `*` mean themselves."""
    return await cards.search(q, limit, offset)


@router.get("/cards/{card_id}", tags=["cards"], responses=_MISSING)
async def read_card(card_id: CardId, cards: CardsDependency) -> CardView:
    """Read one card."""
    return await cards.read(card_id)


@router.put("/cards/{card_id}", tags=["cards"], responses=_MISSING)
async def replace_card(card_id: CardId, draft: CardDraft, cards: CardsDependency) -> CardView:
    """Replace a whole card. A card that does not exist is not created: publish it."""
    return await cards.replace(card_id, draft)


@router.patch("/cards/{card_id}", tags=["cards"], responses=_MISSING)
async def change_card(card_id: CardId, patch: CardPatch, cards: CardsDependency) -> CardView:
    """Change the fields that are sent; the others stay."""
    return await cards.change(card_id, patch)


@router.delete("/cards/{card_id}", status_code=204, tags=["cards"], responses=_MISSING)
async def delete_card(card_id: CardId, cards: CardsDependency) -> None:
    """Delete a card. Its id is never given again."""
    await cards.delete(card_id)
