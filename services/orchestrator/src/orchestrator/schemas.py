"""What goes over the wire, with the examples that the OpenAPI page shows.

What comes from an upstream is passed on whole: a field that it adds tomorrow needs no change here.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field


def _unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode: it holds half of a surrogate pair") from None
    return value


# Generous ceilings, so that nothing is passed on that could not be right; the upstream has the last word.
_Title = Annotated[str, Field(max_length=1_000, examples=["Service discovery with Consul"]), AfterValidator(_unicode)]
_Tag = Annotated[str, Field(max_length=200), AfterValidator(_unicode)]
_Content = Annotated[
    str,
    AfterValidator(_unicode),
    Field(
        validation_alias=AliasChoices("content", "text"),  # text: until the next release
        max_length=110_000,
        examples=["Services register themselves with Consul and call each other by name."],
    ),
]


class EnrichRequest(BaseModel):
    """A text to find suggestions for. research-api decides what is valid."""

    model_config = ConfigDict(extra="forbid")

    content: _Content
    limit: int | None = Field(default=None, description="At most so many tags, and so many cards.", examples=[5])


class Enrichment(BaseModel):
    """research-api's answer."""

    model_config = ConfigDict(extra="allow")

    suggestions: list[dict[str, Any]] = Field(
        examples=[[{"kind": "tag", "value": "consul", "score": 3, "card_id": None}]]
    )
    complete: bool = Field(description="False: there may be more suggestions.", examples=[True])


class PublishRequest(BaseModel):
    """A card to publish. backend-api decides what is valid."""

    model_config = ConfigDict(extra="forbid")

    title: _Title
    content: _Content
    tags: list[_Tag] = Field(default_factory=list, max_length=100, examples=[["consul", "discovery"]])


class PublishedCard(BaseModel):
    """backend-api's answer."""

    model_config = ConfigDict(extra="allow")

    id: int = Field(examples=[1])
    title: str = Field(examples=["Service discovery with Consul"])
    content: str = Field(examples=["Services register themselves with Consul and call each other by name."])
    tags: list[str] = Field(examples=[["consul", "discovery"]])
    suggestions: list[dict[str, Any]] = Field(
        examples=[[{"kind": "tag", "value": "consul", "score": 3, "card_id": None}]]
    )
    enriched: bool = Field(description="False: there may be more suggestions.", examples=[True])


Status = Literal["healthy", "degraded", "unhealthy"]


class TopologyInstance(BaseModel):
    """One instance of a service."""

    id: str = Field(examples=["backend-api-10.0.0.7-8002"])
    address: str = Field(examples=["10.0.0.7"])
    port: int = Field(examples=[8002])
    tags: list[str] = Field(examples=[["v1"]])
    healthy: bool = Field(description="Whether every health check passes, so that callers find it.")


class TopologyService(BaseModel):
    """A service and its instances, sorted by id."""

    service: str = Field(examples=["backend-api"])
    healthy_instances: int = Field(examples=[1])
    instances: list[TopologyInstance]


class Topology(BaseModel):
    """Every registered service, sorted by name."""

    services: list[TopologyService]


class UpstreamHealth(BaseModel):
    """How one upstream is."""

    service: str = Field(examples=["backend-api"])
    status: Status = Field(description="degraded: it works, but an instance does not.")
    words: str = Field(examples=["backend-api works; instances that pass their checks: 3 of 3"])
    instance: str | None = Field(description="Who answered, if anybody.", examples=["backend-api-10.0.0.7-8002"])


class HealthReport(BaseModel):
    """How everything behind the front door is; the worst status counts."""

    status: Status
    words: str = Field(examples=["Everything works"])
    services: list[UpstreamHealth]
