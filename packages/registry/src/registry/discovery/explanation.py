"""The state of one upstream as this process sees it: what ``explain`` returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from registry.discovery.endpoint import Endpoint, LastFailure
from registry.discovery.zones import ZoneState
from registry.model import LeftOut, View
from registry.telemetry import AttemptOutcome, CallOutcome, PickReason

__all__ = ["EndpointState", "Explanation", "ZoneState"]


@dataclass(frozen=True, slots=True)
class EndpointState:
    """One instance as this process sees it. Times in seconds from now; counts since it was first seen."""

    id: str
    netloc: str
    weight: int
    zone: str | None
    """Where it runs; None: unknown."""
    connect: bool
    """Whether it is called over mutual TLS, and has to prove who it is."""
    in_flight: int
    latency: float
    picks: int
    """How often it was picked."""
    failures: int
    """Failures in a row."""
    ejected_for: float
    """How long it will not be picked; 0: it is not ejected."""
    listed: bool
    """False: lost by the registry, or its checks fail; asked only if nothing else is left."""
    picked: Mapping[PickReason, int]
    """How often, and why."""
    outcomes: Mapping[AttemptOutcome, int]
    """How attempts there ended."""
    ejections: Mapping[AttemptOutcome, int]
    """How often it was ejected, and by which outcome."""
    ejected_because: AttemptOutcome | None
    """What it is ejected for; None: it is not."""
    last_failure: LastFailure | None
    """The last one that counted against it, even if it has answered since."""

    @classmethod
    def of(cls, endpoint: Endpoint, now: float, *, listed: bool) -> "EndpointState":
        """Copies what changes with each call."""
        counts = endpoint.counts
        return cls(
            id=endpoint.instance.id,
            netloc=endpoint.instance.netloc,
            weight=endpoint.instance.weight,
            zone=endpoint.instance.zone,
            connect=endpoint.instance.connect,
            in_flight=endpoint.in_flight,
            latency=endpoint.latency(now),
            picks=sum(counts.picks.values()),
            failures=endpoint.failures,
            ejected_for=max(0.0, endpoint.ejected_until - now),
            listed=listed,
            picked=dict(counts.picks),
            outcomes=dict(counts.outcomes),
            ejections=dict(counts.ejections),
            ejected_because=endpoint.ejected_because if endpoint.ejected_until else None,
            last_failure=endpoint.last_failure,
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an instance would be chosen or not, and what calls have come to."""

    service: str
    tag: str | None
    endpoints: tuple[EndpointState, ...]
    failing_fast_for: float
    """How long calls are turned away because every instance fails; 0: they are not."""
    view: View
    """How fresh the list is, and what the registry said last."""
    calls: Mapping[CallOutcome, int]
    """How many calls ended how."""
    retries: Mapping[AttemptOutcome, int]
    """How many attempts followed an attempt that ended so."""
    hedges: Mapping[Literal["won", "lost"], int]
    """How many second attempts, sent because the first took long, gave the answer or not."""
    budget_left: float
    """How many retries may follow at once."""
    budget_exhausted: int
    """How many retries there was no budget for."""
    zones: ZoneState | None
    """How far calls stay in the own zone; None: no zone was named, so that those of all zones are equal."""
    departed: Mapping[str, Mapping[AttemptOutcome, int]]
    """How attempts ended at those who are not among the endpoints any more, but were a minute ago, by their ids."""
    outside: tuple[str, ...] = ()
    """Ids of those that are listed too, and not called while enough of the ``endpoints`` work, in order.

    A caller knows ``ConnectionOptions.max_instances``, and one more for each of them that is ejected.
    """

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Which instances the registry knows and does not offer, and why: ``view.left_out``."""
        return self.view.left_out
