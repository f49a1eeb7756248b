"""The services that research-api calls, by name.

backend-api waits for the answer while it publishes, so this only searches there, which calls nobody: the circle has one
turn. All searches, five at most, end within ``search_timeout``, which is less than backend-api waits.
"""

from typing import Annotated

import httpx
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from registry import RegistryError, ServiceDiscoveryClient

UPSTREAMS = ("backend-api",)


class BackendUnavailableError(Exception):
    """backend-api gave no usable answer."""


class Card(BaseModel):
    """The part of a card that is read here."""

    id: int
    title: str
    content: Annotated[str, Field(validation_alias=AliasChoices("content", "text"))]  # text: of the release before
    tags: list[str]


class _CardPage(BaseModel):
    items: list[Card]


class BackendClient:
    """backend-api, as research-api uses it."""

    def __init__(self, client: ServiceDiscoveryClient, timeout: float = 1.5) -> None:
        self._client = client
        self._timeout = timeout

    async def search(self, q: str, limit: int = 10) -> list[Card]:
        """The newest cards that contain ``q``, at most ``limit``; an attempt takes at most ``timeout`` seconds.

        Raises: BackendUnavailableError, when there is no instance, no answer, or no sensible one.
        """
        try:
            answer = await self._client.get(
                "backend-api", "/api/cards", params={"q": q, "limit": limit}, timeout=self._timeout
            )
            return _CardPage.model_validate_json(answer.content).items
        except (RegistryError, httpx.HTTPError, ValidationError) as error:
            raise BackendUnavailableError(f"backend-api did not answer the search: {error}") from error
