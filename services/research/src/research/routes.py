"""The HTTP side: what comes in, which status goes out."""

import asyncio
import logging
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from registry.fastapi import DiscoveryClient
from research.clients import BackendClient, BackendUnavailableError, Card
from research.schemas import Enrichment, EnrichRequest
from research.suggest import keywords, suggest

_log = logging.getLogger("research")
_SEARCHES = 5
router = APIRouter(prefix="/api")


async def _backend(request: Request, client: DiscoveryClient) -> BackendClient:
    # Half the time for one attempt leaves room for a second instance.
    return BackendClient(client, request.app.state.settings.search_timeout / 2)


@router.post("/enrich", tags=["enrich"])
async def enrich(
    wanted: EnrichRequest, backend: Annotated[BackendClient, Depends(_backend)], request: Request
) -> Enrichment:
    """Suggest tags and related cards for a text.

    The most frequent words of the text are searched for in backend-api's cards; the cards found are ranked by the
    words that they share with the text. Suggestions are a bonus to whoever asks, so a backend-api that is away or slow
    is no error: the answer is 200 with what was found, perhaps nothing, and `complete` is false.
    """
    timeout: float = request.app.state.settings.search_timeout

    async def search(word: str) -> list[Card] | None:
        try:
            async with asyncio.timeout(timeout):
                return await backend.search(word)
        except (BackendUnavailableError, TimeoutError) as error:
            _log.warning("search failed", extra={"word": word, "error": repr(error)})
            return None

    found = await asyncio.gather(*map(search, keywords(wanted.content, _SEARCHES)))
    cards = [card for cards in found if cards is not None for card in cards]
    # In a thread: fifty long cards are megabytes of words, and other requests must not wait for them.
    suggestions = await asyncio.to_thread(suggest, wanted.content, cards, wanted.limit)
    return Enrichment(suggestions=suggestions, complete=None not in found)
