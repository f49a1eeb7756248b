"""Reads Consul's answer about a service's instances. Source: https://developer.hashicorp.com/consul/api-docs/health

Consul takes nearly any address and port: an entry that can't be called is left out here, and costs the others nothing.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from consul.base import Response
from consul.callback import CB

from registry.errors import InvalidInputError
from registry.model import Instance, Key, LeftOut, ServiceHealth, Snapshot
from registry.validation import check_address, check_port

__all__ = ["Listing", "health_path", "parse_listing", "parse_local_health", "right_path", "tell_left_out"]

logger = logging.getLogger("registry")

_MAX_WEIGHT = 65_535
"""Consul's own limit, which it does not hold everybody to."""
_MAX_REASON = 200


@dataclass(frozen=True, slots=True)
class Listing:
    """What Consul lists of one service."""

    instances: Snapshot
    """All that can be called, sorted by id, whatever their checks say."""
    passing: Snapshot
    """Those whose every check passes, as ``?passing`` has it."""
    failing: frozenset[Key]
    """Those with a check that doesn't, without the ones in maintenance."""
    nodes: dict[Key, str]
    """On which node each instance is registered."""
    uncallable: frozenset[LeftOut]
    """Entries that nobody can call, such as one without a port."""
    left_out: tuple[LeftOut, ...]
    """All that do not pass or can't be called, sorted by id."""
    registered: int
    """How many entries there are."""
    maintained: int
    """How many of them are in maintenance."""


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


def parse_listing(entries: Any, *, mesh: bool = False) -> Listing:
    """The entries, sorted out. ``mesh``: whoever does not speak Consul Connect can't be called, such as a gateway.

    Raises: TypeError, when this is no list, or not one entry looks like Consul's.
    """
    if not isinstance(entries, list):
        raise TypeError(f"not a list: {str(entries)[:100]}")
    instances, passing, failing, uncallable, left_out = [], [], set(), set(), []
    nodes: dict[Key, str] = {}
    maintained = broken = 0
    for entry in entries:
        try:
            instance, node = _instance(entry), str(entry["Node"].get("Node"))
            absence, maintenance = _absence(entry.get("Checks") or ())
            if mesh and not instance.connect:
                raise InvalidInputError(f"it is no instance or sidecar proxy, but {entry['Service'].get('Kind')!r}")
        except InvalidInputError as error:
            uncallable.add(
                LeftOut(str(entry["Service"].get("ID")), f"it can't be called: {error}"[:_MAX_REASON], "uncallable")
            )
            continue
        except (AttributeError, LookupError, TypeError):
            broken += 1
            uncallable.add(LeftOut("?", f"not an entry of Consul's: {entry!s}"[:_MAX_REASON], "uncallable"))
            continue
        instances.append(instance)
        nodes[instance.key] = node
        if absence is None:
            passing.append(instance)
            continue
        maintained += maintenance
        left_out.append(LeftOut(instance.id, absence[:_MAX_REASON], "maintenance" if maintenance else "critical"))
        if not maintenance:
            failing.add(instance.key)
    if entries and broken == len(entries):
        raise TypeError(f"not Consul's entries: {str(entries)[:100]}")
    return Listing(
        instances=_sorted(instances),
        passing=_sorted(passing),
        failing=frozenset(failing),
        nodes=nodes,
        uncallable=frozenset(uncallable),
        left_out=tuple(sorted([*left_out, *uncallable], key=lambda each: each.id)),
        registered=len(entries),
        maintained=maintained,
    )


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


def _instance(entry: dict[str, Any]) -> Instance:
    service, node = entry["Service"], entry["Node"]
    proxy, connect = service.get("Kind") == "connect-proxy", service.get("Connect")
    port = service.get("Port")
    if not port:  # Consul omits it when it is 0
        raise InvalidInputError("it is registered without a port")
    tags, meta, weights = service.get("Tags"), service.get("Meta"), service.get("Weights")
    weight = weights.get("Passing") if isinstance(weights, dict) else 1
    return Instance(
        id=_text(service["ID"]),
        # A proxy goes by a name of its own, and shows the certificate of the service that it stands for.
        service=_text(service["Proxy"]["DestinationServiceName"] if proxy else service["Service"]),
        address=_address(service.get("Address") or node.get("Address")),
        port=check_port(port),
        tags=tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
        meta={key: value for key, value in meta.items() if isinstance(value, str)} if isinstance(meta, dict) else {},
        weight=min(weight, _MAX_WEIGHT) if type(weight) is int and weight >= 1 else 1,
        connect=proxy or (isinstance(connect, dict) and connect.get("Native") is True),
    )


def _address(address: Any) -> str:
    checked = _checked(address if isinstance(address, str) else "")
    if isinstance(checked, InvalidInputError):
        raise InvalidInputError(str(checked))
    return checked


@lru_cache(maxsize=16_384)
def _checked(address: str) -> str | InvalidInputError:
    """Without the brackets that some register an IPv6 address in, for use in URLs of their own."""
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") and ":" in address else address
    try:
        return check_address(bare)
    except InvalidInputError as error:
        return InvalidInputError(str(error).replace(repr(bare), repr(bare[:80])))


def _absence(checks: Collection[dict[str, Any]]) -> tuple[str | None, bool]:
    """Why the instance is not to be called (None: it is), and whether that is an operator's order."""
    reason = None
    for check in checks:
        status, name = check["Status"], check.get("CheckID")
        if status == "passing":
            continue
        if name == "_node_maintenance" or str(name).startswith("_service_maintenance:"):
            # Source: https://developer.hashicorp.com/consul/commands/maint
            notes = check.get("Notes")
            return f"in maintenance: {notes}" if notes else "in maintenance", True
        reason = f"check {name!r} is {status}"
    return reason, False


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a string: {value!r}")
    return value


def _sorted(instances: list[Instance]) -> Snapshot:
    return tuple(sorted(instances, key=lambda instance: instance.id))


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
