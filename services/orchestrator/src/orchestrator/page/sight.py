"""Puts together what Consul lists and what every caller sees: one entry per instance, with all who see it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.page.callers import Rates, Told
from orchestrator.page.catalog import Listing, Outlook
from orchestrator.page.journal import Entry
from orchestrator.page.sheet import Line
from orchestrator.page.state import Endpoint, Spot, Upstream
from orchestrator.registry import Instance, LeftOut

__all__ = ["Picture", "Seen", "Sighting", "Use", "uses", "whole"]


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is known at one moment; never changes."""

    epoch: str
    number: int
    at: float
    outlook: Outlook
    told: tuple[Told, ...]
    disagreements: tuple[Line, ...]
    entries: tuple[Entry, ...]
    """The last first."""


@dataclass(frozen=True, slots=True)
class Use:
    """One caller's calls to one service."""

    caller: Told
    upstream: Upstream
    rates: Rates | None


@dataclass(frozen=True, slots=True)
class Sighting:
    """One instance, as one caller sees it."""

    use: Use
    endpoint: Endpoint


@dataclass(slots=True)
class Seen:
    """One instance."""

    service: str
    id: str
    netloc: str
    """Empty: nobody knows."""
    instance: Instance | None
    """As Consul lists it among those that can be called."""
    left: LeftOut | None
    """Why Consul does not."""
    told: Told | None
    """What it says of itself."""
    sightings: list[Sighting] = field(default_factory=list)

    @property
    def zone(self) -> str:
        """Where it runs, by what Consul says, or else its callers; empty: unknown."""
        zones = [self.instance.zone if self.instance else None]
        zones += [sighting.endpoint.zone for sighting in self.sightings]
        return next((zone for zone in zones if zone), "")

    @property
    def key(self) -> str:
        """Names it on the page."""
        return f"{self.service} {self.id} {self.netloc}"


def uses(told: Iterable[Told], caller: str = "") -> Iterator[Use]:
    """Who calls whom: of one caller, by its id, or of all."""
    for each in told:
        if each.state is not None and caller in {"", each.instance.id}:
            for upstream in each.state.upstreams:
                yield Use(each, upstream, each.rates.get((upstream.service, upstream.tag)))


def whole(outlook: Outlook, told: Sequence[Told], caller: str = "") -> dict[str, list[Seen]]:
    """Every service with its instances, those that can be called first, then by id; seen by one caller or all."""
    speaking = {each.instance.key: each for each in told}
    sightings: dict[tuple[str, Spot], list[Sighting]] = {}
    for use in uses(told, caller):
        for endpoint in use.upstream.endpoints:
            sightings.setdefault((use.upstream.service.lower(), endpoint.spot), []).append(Sighting(use, endpoint))
    by_id: dict[tuple[str, str], list[Spot]] = {}
    for service, spot in sightings:
        by_id.setdefault((service, spot[0]), []).append(spot)
    return {listing.service: list(_of(listing, sightings, by_id, speaking)) for listing in outlook.listings}


def _of(
    listing: Listing,
    sightings: Mapping[tuple[str, Spot], list[Sighting]],
    by_id: Mapping[tuple[str, str], Sequence[Spot]],
    speaking: Mapping[tuple[str, str, int], Told],
) -> Iterator[Seen]:
    service, listed = listing.service, set()
    for instance in listing.passing:
        listed.add(instance.id)
        seen = sightings.get((service.lower(), (instance.id, instance.netloc)), [])
        yield Seen(service, instance.id, instance.netloc, instance, None, speaking.get(instance.key), seen)
    for left in listing.left_out:
        # Who withdrew is history; who takes over an id is there.
        if left.kind == "withdrew" or left.id in listed:
            continue
        for spot in by_id.get((service.lower(), left.id), (("", ""),)):
            seen = sightings.get((service.lower(), spot), [])
            yield Seen(service, left.id, spot[1], None, left, None, seen)
