"""The front door: what comes in, who is asked, which status goes out."""

import uuid
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, HTTPException, Path, Response

from orchestrator.auth import Subject, authenticate
from orchestrator.clients import Answer
from orchestrator.dependencies import BackendDependency, RegistryDependency, ResearchDependency, SettingsDependency
from orchestrator.health import report_health, report_service
from orchestrator.schemas import (
    Enrichment,
    EnrichRequest,
    HealthReport,
    PublishedCard,
    PublishRequest,
    Topology,
    UpstreamHealth,
)
from orchestrator.topology import read_topology
from registry.fastapi import DiscoveryClient, problem_responses

router = APIRouter(
    prefix="/api",
    dependencies=[Depends(authenticate)],
    responses=problem_responses(
        {401: "Where callers need a token: there is none, or it is not valid.", 422: "The request is not valid."}
    ),
)
_ANSWERED_BY: dict[str, Any] = {
    "X-Upstream-Instance": {"description": "The instance that answered.", "schema": {"type": "string"}}
}
_UPSTREAM = problem_responses(
    {
        502: "The upstream broke the connection, or answered with nonsense or a 5xx.",
        503: "No healthy instance of the upstream, or Consul is away.",
        504: "The upstream did not answer in time.",
    }
)


def _show_who_answered(response: Response, answer: Answer[Any]) -> None:
    if answer.instance:
        response.headers["X-Upstream-Instance"] = answer.instance


@router.post("/enrich", tags=["front door"], responses={200: {"headers": _ANSWERED_BY}, **_UPSTREAM})
async def enrich(wanted: EnrichRequest, research: ResearchDependency, response: Response) -> Enrichment:
    """Suggest tags and related cards for a text: research-api answers."""
    answer = await research.enrich(wanted)
    _show_who_answered(response, answer)
    return answer.body


@router.post("/publish", status_code=201, tags=["front door"], responses={201: {"headers": _ANSWERED_BY}, **_UPSTREAM})
async def publish(
    draft: PublishRequest,
    backend: BackendDependency,
    subject: Subject,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=200,
            pattern=r"^[\x21-\x7e]+$",
            description="Send the same key again, with the same body, to be sure that a card is published once. "
            "Without one, a key is made, so that this service may repeat the call; the answer names it.",
            examples=["5f0c7a1e-publish-1"],
        ),
    ] = None,
) -> PublishedCard:
    """Publish a card, and get suggestions for it: backend-api answers."""
    key = idempotency_key or uuid.uuid4().hex
    answer = await backend.publish(draft, key, subject)
    _show_who_answered(response, answer)
    response.headers["Idempotency-Key"] = key
    if idempotency_key and answer.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return answer.body


@router.get("/topology", tags=["overview"], responses=problem_responses({503: "Consul can't be asked."}))
async def topology(registry: RegistryDependency) -> Topology:
    """Every service that is registered, and its instances with their health, as Consul has it now."""
    return await anyio.to_thread.run_sync(read_topology, registry)


@router.get(
    "/health",
    tags=["overview"],
    responses={503: {"model": HealthReport, "description": "An upstream does not work; the body says which."}},
)
async def upstream_health(
    settings: SettingsDependency, client: DiscoveryClient, registry: RegistryDependency, response: Response
) -> HealthReport:
    """How the services behind the front door are, in words. The front door's own health is at `/health`."""
    report = await report_health(client, registry, settings.health_timeout)
    if report.status == "unhealthy":
        response.status_code = 503
    return report


@router.get(
    "/health/{service}",
    tags=["overview"],
    responses={
        **problem_responses({404: "Nobody has registered that name."}),
        503: {"model": UpstreamHealth, "description": "It does not work; the body says why."},
    },
)
async def service_health(
    service: Annotated[str, Path(max_length=63, examples=["backend-api"])],
    settings: SettingsDependency,
    client: DiscoveryClient,
    registry: RegistryDependency,
    response: Response,
) -> UpstreamHealth:
    """How any registered service is: what a call by name meets, and what Consul's checks say."""
    # Asked first, because the client goes on watching every name that it has once called.
    if service not in await anyio.to_thread.run_sync(registry.discover_all_services):
        raise HTTPException(404, f"Nobody has registered {service!r}")
    report = await report_service(client, registry, service, settings.health_timeout)
    if report.status == "unhealthy":
        response.status_code = 503
    return report
