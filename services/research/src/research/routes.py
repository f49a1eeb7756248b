"""The HTTP side: what comes in, which status goes out."""

import asyncio
import logging

from fastapi import APIRouter

from registry.fastapi import problem_responses
from research.clients import BackendUnavailableError, Card
from research.dependencies import BackendDependency, SettingsDependency
from research.schemas import Enrichment, EnrichRequest
from research.suggest import keywords, suggest

_log = logging.getLogger("research")
_SEARCHES = 5
router = APIRouter(prefix="/api", responses=problem_responses({422: "The request is not valid."}))


@router.post("/enrich", tags=["enrich"])
async def enrich(wanted: EnrichRequest, backend: BackendDependency, settings: SettingsDependency) -> Enrichment:
    """Suggest tags and related cards for a text.

    The most frequent words of the text are searched for in backend-api's cards; the cards found are ranked by the
    words that they share with the text. Suggestions are a bonus to whoever asks, so a backend-api that is away or slow
    is no error: the answer is 200 with what was found, perhaps nothing, and `complete` is false.
    """

    async def search(word: str) -> list[Card] | None:
        try:
            async with asyncio.timeout(settings.search_timeout):
                return await backend.search(word)
        except (BackendUnavailableError, TimeoutError) as error:
            _log.warning("search failed", extra={"word": word, "error": repr(error)})
            return None

    found = await asyncio.gather(*map(search, keywords(wanted.content, _SEARCHES)))
    cards = [card for cards in found if cards is not None for card in cards]
    # In a thread: fifty long cards are megabytes of words, and other requests must not wait for them.
    suggestions = await asyncio.to_thread(suggest, wanted.content, cards, wanted.limit)
    return Enrichment(suggestions=suggestions, complete=None not in found)
