"""Reads Consul's answer about a service's instances. Source: https://developer.hashicorp.com/consul/api-docs/health"""

from typing import Any

from consul.base import Response
from consul.callback import CB

from registry.model import Instance, ServiceHealth, Snapshot

__all__ = ["parse_entries", "parse_local_health", "parse_passing"]


def parse_entries(entries: list[dict[str, Any]]) -> Snapshot:
    """All instances in the answer, sorted by id, whatever their checks say."""
    return tuple(sorted(map(_instance, entries), key=lambda instance: instance.id))


def parse_passing(entries: list[dict[str, Any]]) -> Snapshot:
    """The instances whose every check passes, as ``?passing`` has it, sorted by id."""
    return parse_entries([entry for entry in entries if all(c["Status"] == "passing" for c in entry["Checks"])])


def _instance(entry: dict[str, Any]) -> Instance:
    service = entry["Service"]
    return Instance(
        id=service["ID"],
        service=service["Service"],
        address=service["Address"] or entry["Node"]["Address"],
        port=service["Port"],
        tags=tuple(service["Tags"] or ()),
        meta=service["Meta"] or {},
        weight=service["Weights"]["Passing"],
    )


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
