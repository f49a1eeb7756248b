"""One entry of Consul's answer about a service: an instance, and whether it may be called.

Consul takes nearly any address and port: an entry that can't be called is left out, and costs the others nothing.
"""

import sys
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import msgspec

from registry.errors import InvalidInputError
from registry.model import Instance, Key, LeftOut
from registry.validation import check_address, check_port, is_zone

__all__ = ["Known", "broken_entry", "read_entry"]

_MAX_WEIGHT = 65_535
"""Consul's own limit, which it does not hold everybody to."""
_MAX_REASON = 200


class _Node(msgspec.Struct, rename="pascal", gc=False):
    node: Any = None
    address: Any = None
    locality: Any = None


class _Proxy(msgspec.Struct, rename="pascal", gc=False):
    destination_service_name: Any = None


class _Service(msgspec.Struct, rename="pascal", gc=False):
    id: Any = msgspec.field(default=None, name="ID")
    service: Any = None
    kind: Any = None
    address: Any = None
    port: Any = None
    tags: Any = None
    meta: Any = None
    weights: Any = None
    connect: Any = None
    locality: Any = None
    proxy: _Proxy | None = None


class _Check(msgspec.Struct, rename="pascal", gc=False):
    status: Any
    check_id: Any = msgspec.field(default=None, name="CheckID")
    notes: Any = None


class _Entry(msgspec.Struct, rename="pascal", gc=False):
    """What is used of an entry; all else is passed over unread."""

    node: _Node
    service: _Service
    checks: list[_Check] | None = None


_ENTRY = msgspec.json.Decoder(_Entry)
_JSON = msgspec.json.Decoder(msgspec.Raw)


class Known(msgspec.Struct, frozen=True, gc=False):
    """One entry, once it was read."""

    instance: Instance | None
    """None: it can't be called."""
    key: Key | None = None
    node: str = ""
    left_out: LeftOut | None = None
    """Why it is not offered; None: it is."""
    broken: bool = False
    """It is no entry of Consul's."""


def read_entry(raw: bytes, *, mesh: bool = False) -> Known:
    """One entry. ``mesh``: whoever does not speak Consul Connect can't be called, such as a gateway.

    Raises: msgspec.DecodeError, when this is no JSON.
    """
    try:
        entry = _ENTRY.decode(raw)
    except msgspec.ValidationError:
        _JSON.decode(raw)  # whatever else may be wrong with it
        return broken_entry(raw)
    try:
        instance = _instance(entry)
        if mesh and not instance.connect:
            raise InvalidInputError(f"it is no instance or sidecar proxy, but {entry.service.kind!r}")
    except InvalidInputError as error:
        reason = f"it can't be called: {error}"[:_MAX_REASON]
        return Known(None, left_out=LeftOut(str(entry.service.id), reason, "uncallable"))
    except (AttributeError, TypeError):
        return broken_entry(raw)
    return Known(instance, instance.key, str(entry.node.node), _absence(instance, entry.checks or ()))


def broken_entry(raw: bytes) -> Known:
    """What is said of whatever is no entry of Consul's."""
    reason = f"not an entry of Consul's: {raw[:_MAX_REASON].decode(errors='replace')}"[:_MAX_REASON]
    return Known(None, left_out=LeftOut("?", reason, "uncallable"), broken=True)


def _instance(entry: _Entry) -> Instance:
    service, weights = entry.service, entry.service.weights
    if not service.port:  # Consul omits it when it is 0
        raise InvalidInputError("it is registered without a port")
    weight = weights.get("Passing") if isinstance(weights, dict) else 1
    proxy, connect, tags, meta = service.kind == "connect-proxy", service.connect, service.tags, service.meta
    return Instance(
        id=_text(service.id),
        # A proxy goes by a name of its own, and shows the certificate of the service that it stands for.
        service=sys.intern(
            _text(service.proxy and service.proxy.destination_service_name if proxy else service.service)
        ),
        address=_address(service.address or entry.node.address),
        port=check_port(service.port),
        tags=_tags(tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()),
        meta=_meta(tuple(pair for pair in meta.items() if isinstance(pair[1], str)) if isinstance(meta, dict) else ()),
        weight=min(weight, _MAX_WEIGHT) if type(weight) is int and weight >= 1 else 1,
        connect=proxy or (isinstance(connect, dict) and connect.get("Native") is True),
        zone=_zone(meta, service.locality, entry.node.locality),
    )


def _zone(meta: Any, *localities: Any) -> str | None:
    """The first that names one: the metadata that this package writes, then Consul's own word of service and node.

    Source: https://developer.hashicorp.com/consul/docs/reference/agent/configuration-file/general#locality
    """
    named = [meta.get("zone") if isinstance(meta, dict) else None]
    named += [locality.get("Zone") for locality in localities if isinstance(locality, dict)]
    return next((sys.intern(zone) for zone in named if is_zone(zone)), None)


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


@lru_cache(maxsize=1_024)
def _tags(tags: tuple[str, ...]) -> tuple[str, ...]:
    """The same object for all who have the same: a fleet's differ little."""
    return tags


@lru_cache(maxsize=1_024)
def _meta(pairs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Likewise."""
    return dict(pairs)


def _absence(instance: Instance, checks: Collection[_Check]) -> LeftOut | None:
    """Why the instance is not to be called; None: it is."""
    reason = None
    for check in checks:
        if check.status == "passing":
            continue
        if check.check_id == "_node_maintenance" or str(check.check_id).startswith("_service_maintenance:"):
            # Source: https://developer.hashicorp.com/consul/commands/maint
            said = f"in maintenance: {check.notes}" if check.notes else "in maintenance"
            return LeftOut(instance.id, said[:_MAX_REASON], "maintenance")
        reason = f"check {check.check_id!r} is {check.status}"
    return LeftOut(instance.id, reason[:_MAX_REASON], "critical") if reason else None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a string: {value!r}")
    return value
