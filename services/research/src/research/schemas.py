"""What goes over the wire, with the examples that the OpenAPI page shows."""

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class EnrichRequest(BaseModel):
    """A text to find suggestions for."""

    model_config = ConfigDict(extra="forbid")

    content: Annotated[
        str,
        Field(
            validation_alias=AliasChoices("content", "text"),  # text: until the next release
            max_length=110_000,
            examples=["Services register themselves with Consul and call each other by name."],
        ),
    ]
    limit: Annotated[int, Field(ge=1, le=50, description="At most so many tags, and so many cards.", examples=[5])] = 5


class Suggestion(BaseModel):
    """Something that related cards suggest for the text."""

    kind: Literal["tag", "card"] = Field(description="A tag to add, or a related card to read.", examples=["tag"])
    value: str = Field(description="The tag, or the related card's title.", examples=["consul"])
    score: int = Field(description="How many words are shared; higher is closer.", examples=[3])
    card_id: int | None = Field(default=None, description="Of a related card.", examples=[None])


class Enrichment(BaseModel):
    """Suggestions, closest first: tags, then related cards."""

    suggestions: list[Suggestion]
    complete: bool = Field(
        description="False: backend-api did not answer every search in time, so there may be more.",
        examples=[True],
    )
