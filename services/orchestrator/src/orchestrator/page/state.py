"""What ``/registry/state`` of an instance says, as far as the page shows it. Whoever registers can answer anything."""

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field


def _shorten(value: object) -> object:
    return value[:200] if isinstance(value, str) else value


def _drop_surrogates(value: str) -> str:
    return value.encode(errors="replace").decode()


_Text = Annotated[str, BeforeValidator(_shorten), AfterValidator(_drop_surrogates)]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Counts: TypeAlias = Annotated[Mapping[_Text, _Count], Field(max_length=50)]


Spot: TypeAlias = tuple[str, str]
"""An instance's id and address: an id alone may be taken over by another."""


class LastFailure(BaseModel):
    """The last failure that counted against an instance."""

    at: _Time
    outcome: _Text
    detail: _Text = ""


class Endpoint(BaseModel):
    """One instance, as one caller sees it."""

    id: _Text
    netloc: _Text
    zone: _Text | None = None
    """Where it runs; None: unknown, or told by an older release."""
    in_flight: _Count
    latency: _Seconds
    picks: _Count
    picked: Counts
    outcomes: Counts
    ejected_for: _Seconds
    ejected_because: _Text | None
    last_failure: LastFailure | None
    listed: bool

    @property
    def spot(self) -> Spot:
        """What it is told apart by."""
        return self.id, self.netloc


class Budget(BaseModel):
    """What a caller may still spend on retries."""

    left: _Seconds
    exhausted: _Count


class View(BaseModel):
    """How fresh a caller's list is."""

    age: _Seconds | None
    error: _Text | None


class Upstream(BaseModel):
    """One service that a caller calls."""

    service: _Text
    tag: _Text | None
    failing_fast_for: _Seconds
    calls: Counts
    retries: Counts
    hedges: Counts
    budget: Budget
    view: View
    endpoints: Annotated[list[Endpoint], Field(max_length=20_000)]


class Event(BaseModel):
    """Something that happened, as one instance saw it."""

    number: _Count
    at: _Time
    kind: _Text
    service: _Text
    instance: _Text | None
    reason: _Text
    detail: _Text


class Presence(BaseModel):
    """What an instance says of itself."""

    id: _Text | None
    registered: bool
    leaving: bool
    started: _Time
    version: _Text


class State(BaseModel):
    """The whole answer."""

    instance: Presence
    upstreams: Annotated[list[Upstream], Field(max_length=1_000)]
    events: Annotated[list[Event], Field(max_length=1_000)]
