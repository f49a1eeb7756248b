"""The services that backend-api calls, by name.

research-api calls back: publishing waits for its suggestions, and it searches the cards here for them. The circle has
one turn, since a search calls nobody, and a bound: three attempts of five searches, in ``enrich_timeout`` together.
"""

import asyncio

import httpx
from pydantic import BaseModel, ValidationError

from backend.schemas import Suggestion
from registry import RegistryError, ServiceDiscoveryClient

UPSTREAMS = ("research-api",)


class ResearchUnavailableError(Exception):
    """research-api gave no usable answer in time."""


class Enrichment(BaseModel):
    """The part of research-api's answer that is read here."""

    suggestions: list[Suggestion]
    complete: bool


class ResearchClient:
    """research-api, as backend-api uses it."""

    def __init__(self, client: ServiceDiscoveryClient, timeout: float = 2.0) -> None:
        self._client = client
        self._timeout = timeout

    async def enrich(self, text: str, limit: int = 5) -> Enrichment:
        """Suggestions for a text, in at most ``timeout`` seconds, whatever happens.

        Raises: ResearchUnavailableError, when there is no instance, no answer in time, or no sensible one.
        """
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._client.post(
                    "research-api",
                    "/api/enrich",
                    json={"content": text, "limit": limit},
                    # It only reads, so it may be asked again; half the time leaves room for a second instance.
                    idempotent=True,
                    timeout=self._timeout / 2,
                )
            return Enrichment.model_validate_json(answer.content)
        except (RegistryError, httpx.HTTPError, TimeoutError, ValidationError) as error:
            raise ResearchUnavailableError(f"research-api gave no suggestions: {error}") from error
