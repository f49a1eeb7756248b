"""What Consul says of a service's instances. Source: https://developer.hashicorp.com/consul/api-docs/health"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Self
from urllib.parse import quote

from consul.base import Response
from consul.callback import CB

from registry.consul.entries import Known
from registry.model import Key, LeftOut, ServiceHealth, Snapshot

__all__ = ["Listing", "health_path", "parse_local_health", "right_path", "tell_left_out"]

logger = logging.getLogger("registry")


@dataclass(frozen=True, slots=True)
class Listing:
    """What Consul lists of one service."""

    entries: tuple[Known, ...]
    """All of them, in Consul's order."""
    passing: Snapshot
    """Those whose every check passes, as ``?passing`` has it, sorted by id."""
    passing_keys: frozenset[Key]
    failing: frozenset[Key]
    """Those with a check that doesn't, without the ones in maintenance."""
    nodes: dict[Key, str]
    """On which node each instance is registered."""
    uncallable: frozenset[LeftOut]
    """Entries that nobody can call, such as one without a port."""
    left_out: tuple[LeftOut, ...]
    """All that do not pass or can't be called, sorted by id."""
    maintained: int
    """How many of the entries are in maintenance."""

    @classmethod
    def of(cls, entries: Iterable[Known]) -> Self:
        """The entries, sorted out. Raises: TypeError, when there are some and not one looks like Consul's."""
        entries = tuple(entries)
        if entries and all(known.broken for known in entries):
            raise TypeError(f"not Consul's entries: {entries[0].left_out}")
        passing = [known for known in entries if known.left_out is None]
        others = [(known, known.left_out) for known in entries if known.left_out is not None]
        return cls(
            entries=entries,
            passing=_sorted(passing),
            passing_keys=frozenset([known.key for known in passing if known.key]),
            failing=frozenset([known.key for known, left_out in others if known.key and left_out.kind == "critical"]),
            nodes={known.key: known.node for known in entries if known.key},
            uncallable=frozenset([left_out for known, left_out in others if known.instance is None]),
            left_out=tuple(sorted({left_out: None for _, left_out in others}, key=attrgetter("id"))),
            maintained=sum(left_out.kind == "maintenance" for _, left_out in others),
        )

    @property
    def registered(self) -> int:
        """How many entries there are."""
        return len(self.entries)

    @property
    def instances(self) -> Snapshot:
        """All that can be called, sorted by id, whatever their checks say."""
        return _sorted(self.entries)


def health_path(service: str, *, mesh: bool = False) -> str:
    """Where Consul lists the instances of a service, whatever characters its name holds.

    ``mesh``: whoever speaks Consul Connect for it, natively or as a proxy beside it, and nobody else.
    Source: https://developer.hashicorp.com/consul/api-docs/health#list-nodes-for-connect-capable-service
    """
    return f"/v1/health/{'connect' if mesh else 'service'}/{quote(service, safe='')}"


def right_path(service: str) -> str:
    """What Consul denies with a 403 to whoever may not read the service; that there is none is a 404, or a 200.

    Source: https://developer.hashicorp.com/consul/api-docs/agent/service#get-local-service-health
    """
    return f"/v1/agent/health/service/name/{quote(service, safe='')}"


def tell_left_out(listing: Listing, service: str, told: Collection[LeftOut]) -> frozenset[LeftOut]:
    """Logs each entry that can't be called unless it is among those ``told``; returns all that have now been told."""
    for each in listing.uncallable.difference(told):
        logger.warning(
            "left out an instance of %s, %r: %s",
            service,
            each.id,
            each.reason,
            extra={"service": service, "peer": each.id, "reason": each.reason},
        )
    return listing.uncallable


def _sorted(entries: Iterable[Known]) -> Snapshot:
    return tuple(sorted([known.instance for known in entries if known.instance], key=attrgetter("id")))


def parse_local_health(response: Response) -> ServiceHealth | None:
    """What the agent says of one of its own instances: 200, 429 and 503 are passing, warning and critical, 404 unknown.

    Source: https://developer.hashicorp.com/consul/api-docs/agent/service#get-local-service-health-by-id
    """
    code = 200 if response.code in {429, 503} else response.code
    body = CB.json()(Response(code, response.headers, response.body))
    if body is None:
        return None
    checks = body["Checks"] or ()
    return ServiceHealth(
        status=body["AggregatedStatus"],
        checks={check["CheckID"]: check["Status"] for check in checks},
        outputs={check["CheckID"]: check["Output"] for check in checks},
    )
