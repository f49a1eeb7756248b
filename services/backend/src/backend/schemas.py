"""What goes over the wire, with the examples that the OpenAPI page shows.

How it may change: callers get new fields and may leave out new parameters at any time. A field that gets another name
is taken and shown under both for one release, because during a roll callers and instances of both talk to each other.
"""

from datetime import UTC, datetime
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, computed_field


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain the NUL character (U+0000): databases can't store it")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be valid Unicode: it holds half of a surrogate pair")
    return value


def _in_utc(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _distinct(tags: list[str]) -> list[str]:
    return list(dict.fromkeys(tags))


_Time = Annotated[datetime, AfterValidator(_in_utc), Field(examples=["2026-01-31T12:00:00Z"])]
SearchText = Annotated[str, StringConstraints(max_length=200), AfterValidator(_storable)]
"""What to search for."""
_Title = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=200),
    AfterValidator(_storable),
    Field(examples=["Service discovery with Consul"]),
]
_EXAMPLE = "Services register themselves with Consul and call each other by name."
_Content = Annotated[
    str,
    StringConstraints(max_length=100_000),
    AfterValidator(_storable),
    Field(validation_alias=AliasChoices("content", "text"), examples=[_EXAMPLE]),  # text: until the next release
]
_Tag = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=50), AfterValidator(_storable)]
_Tags = Annotated[list[_Tag], Field(max_length=20, examples=[["consul", "discovery"]]), AfterValidator(_distinct)]


class CardDraft(BaseModel):
    """A whole card, as a caller writes it."""

    model_config = ConfigDict(extra="forbid")

    title: _Title
    content: _Content
    tags: _Tags = Field(default_factory=list)


class CardPatch(BaseModel):
    """The fields to change; what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    # The defaults are never used (only fields that were sent are applied); they make a field optional without
    # making it nullable.
    title: _Title = Field(default_factory=str)
    content: _Content = Field(default_factory=str)
    tags: _Tags = Field(default_factory=list)


class CardView(BaseModel):
    """A stored card. Times are UTC."""

    model_config = ConfigDict(from_attributes=True)

    id: int = Field(examples=[1])
    title: str = Field(examples=["Service discovery with Consul"])
    content: Annotated[str, Field(validation_alias=AliasChoices("content", "text"), examples=[_EXAMPLE])]
    tags: list[str] = Field(examples=[["consul", "discovery"]])
    created_at: _Time
    updated_at: _Time

    @computed_field(examples=[_EXAMPLE], json_schema_extra={"deprecated": True})
    def text(self) -> str:
        """The old name of `content`; the next release drops it."""
        return self.content


EXCERPT_LENGTH = 500
"""Characters."""


class CardExcerpt(CardView):
    """A stored card as a page shows it: with the beginning of its content."""

    content: str = Field(description="The first 500 characters.", examples=[_EXAMPLE])
    complete: bool = Field(description="False: the content goes on; read the card by its id.", examples=[True])


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    items: list[Item] = Field(
        description="At most `limit`, and as many as go into 256 kB: the next page begins at `offset` + their number."
    )
    total: int = Field(description="Items that match, on all pages.", examples=[1])
    limit: int = Field(examples=[20])
    offset: int = Field(examples=[0])


class Suggestion(BaseModel):
    """Something that related cards suggest for this one."""

    kind: Literal["tag", "card"] = Field(description="A tag to add, or a related card to read.", examples=["tag"])
    value: str = Field(description="The tag, or the related card's title.", examples=["consul"])
    score: int = Field(description="How many words are shared; higher is closer.", examples=[3])
    card_id: int | None = Field(default=None, description="Of a related card.", examples=[None])


class PublishedCard(CardView):
    """A card as it was published, with what research-api suggested for it."""

    suggestions: list[Suggestion]
    enriched: bool = Field(
        description="False: research-api gave no complete answer in time, so there may be more suggestions.",
        examples=[True],
    )
