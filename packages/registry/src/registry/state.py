"""``/registry/state``: what this instance knows of those that it calls, and of itself. Not for strangers."""

import time
from typing import Any

from fastapi import APIRouter, Query, Request

from registry.client import ServiceDiscoveryClient
from registry.discovery.explanation import EndpointState, Explanation, ZoneState
from registry.model import View
from registry.presence.health import ROOT, find_state
from registry.presence.registrar import Registrar
from registry.telemetry import Journal

__all__ = ["STATE_PATH", "state_router"]

STATE_PATH = "/registry/state"


def state_router() -> APIRouter:
    """A router with ``GET /registry/state``: every upstream of this process, its own presence, and its last 200 events.

    It shows addresses and errors: keep it off whatever strangers can reach. ``?after=<number>``: newer events only.
    Reads memory only. An instance that has it says so to Consul, by the metadata ``state_path``.
    """
    router = APIRouter()
    started = time.time()

    @router.get(STATE_PATH, include_in_schema=False)
    async def state(request: Request, after: int = Query(default=0, ge=0)) -> dict[str, Any]:
        app = request.scope.get(ROOT) or request.app
        registrar: Registrar | None = find_state(request.scope, "registrar")
        client: ServiceDiscoveryClient | None = find_state(request.scope, "discovery_client")
        journal: Journal | None = find_state(request.scope, "journal")
        return {
            "at": time.time(),
            "instance": _presence(registrar) | {"started": started, "version": app.version},
            "upstreams": [_upstream(each) for each in client.explain_all()] if client else [],
            "events": _events(journal, after) if journal else [],
        }

    return router


def _presence(registrar: Registrar | None) -> dict[str, Any]:
    if registrar is None:
        return {"id": None, "service": None, "registered": False, "leaving": False, "registrations": {}}
    return {
        "id": registrar.instance_id,
        "service": registrar.registration.name if registrar.registration else None,
        "registered": registrar.standing.registered,
        "leaving": registrar.leaving,
        "registrations": dict(registrar.standing.registrations),
    }


def _upstream(explained: Explanation) -> dict[str, Any]:
    return {
        "service": explained.service,
        "tag": explained.tag,
        "failing_fast_for": explained.failing_fast_for,
        "calls": dict(explained.calls),
        "retries": dict(explained.retries),
        "hedges": dict(explained.hedges),
        "budget": {"left": explained.budget_left, "exhausted": explained.budget_exhausted},
        "view": _view(explained.view),
        "zones": _zones(explained.zones) if explained.zones else None,
        "endpoints": [_endpoint(each) for each in explained.endpoints],
        "outside": len(explained.outside),
    }


def _view(view: View) -> dict[str, Any]:
    return {
        "source": view.source,
        "datacenter": view.datacenter,
        "age": view.age,
        "changed": view.changed,
        "registered": view.registered,
        "error": view.error,
        "errors": view.errors,
        "left_out": [{"id": left.id, "kind": left.kind, "reason": left.reason} for left in view.left_out],
    }


def _zones(zones: ZoneState) -> dict[str, Any]:
    return {
        "own": zones.own,
        "kept": zones.kept,
        "spilled": dict(zones.spilled),
        "own_picks": zones.own_picks,
        "other_picks": zones.other_picks,
    }


def _endpoint(endpoint: EndpointState) -> dict[str, Any]:
    last = endpoint.last_failure
    return {
        "id": endpoint.id,
        "netloc": endpoint.netloc,
        "weight": endpoint.weight,
        "zone": endpoint.zone,
        "connect": endpoint.connect,
        "in_flight": endpoint.in_flight,
        "latency": endpoint.latency,
        "picks": endpoint.picks,
        "picked": dict(endpoint.picked),
        "outcomes": dict(endpoint.outcomes),
        "failures": endpoint.failures,
        "ejections": dict(endpoint.ejections),
        "ejected_for": endpoint.ejected_for,
        "ejected_because": endpoint.ejected_because,
        "last_failure": {"at": last.at, "outcome": last.outcome, "detail": last.words} if last else None,
        "listed": endpoint.listed,
    }


def _events(journal: Journal, after: int) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "at": event.at,
            "kind": event.kind,
            "service": event.service,
            "instance": event.instance,
            "reason": event.reason,
            "detail": event.detail,
            "seconds": event.seconds,
        }
        for number, event in journal
        if number > after
    ]
