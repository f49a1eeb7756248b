"""The services that orchestrator-api calls, by name."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from orchestrator.auth import SUBJECT_HEADER
from orchestrator.registry import RegistryError, ServiceDiscoveryClient
from orchestrator.schemas import Enrichment, EnrichRequest, PublishedCard, PublishRequest

BACKEND = "backend-api"
RESEARCH = "research-api"
UPSTREAMS = (BACKEND, RESEARCH)

Body = TypeVar("Body", bound=BaseModel)


class UpstreamError(Exception):
    """A call to another service failed; ``cause`` says how."""

    def __init__(self, service: str, cause: RegistryError | httpx.HTTPError | ValidationError | TimeoutError) -> None:
        super().__init__(f"{service}: {cause}")
        self.service = service
        self.cause = cause


@dataclass(frozen=True)
class Answer(Generic[Body]):
    """What an upstream answered, and which instance of it."""

    body: Body
    instance: str | None
    replayed: bool


def read_header(response: httpx.Response, name: str) -> str | None:
    """A header of an upstream's answer, if it can be passed on: printable ASCII and nothing else."""
    value: str = response.headers.get(name, "")
    return value if value and value.isascii() and value.isprintable() else None


class _Upstream:
    def __init__(self, client: ServiceDiscoveryClient, timeout: float = 5.0) -> None:
        self._client = client
        self._timeout = timeout

    async def _post(self, service: str, path: str, answer: type[Body], **kwargs: Any) -> Answer[Body]:
        try:
            response = await self._client.post(service, path, timeout=self._timeout, **kwargs)
            body = answer.model_validate_json(response.content)
        except (RegistryError, httpx.HTTPError, ValidationError) as error:
            raise UpstreamError(service, error) from error
        return Answer(
            body,
            instance=read_header(response, "X-Service-Instance"),
            replayed=response.headers.get("Idempotent-Replayed") == "true",
        )


class ResearchClient(_Upstream):
    """research-api, as orchestrator-api uses it."""

    async def enrich(self, wanted: EnrichRequest) -> Answer[Enrichment]:
        """Suggestions for a text. It only reads, so it may be asked again.

        Raises: UpstreamError.
        """
        body = wanted.model_dump(exclude_none=True)
        return await self._post(RESEARCH, "/api/enrich", Enrichment, json=body, idempotent=True)


class BackendClient(_Upstream):
    """backend-api, as orchestrator-api uses it."""

    async def publish(self, draft: PublishRequest, idempotency_key: str, subject: str | None) -> Answer[PublishedCard]:
        """A card, published once however often it has to be sent: that is what the key is for, the subject's own.

        Raises: UpstreamError.
        """
        headers = {"Idempotency-Key": idempotency_key} | ({SUBJECT_HEADER: subject} if subject else {})
        return await self._post(BACKEND, "/api/publish", PublishedCard, json=draft.model_dump(), headers=headers)
