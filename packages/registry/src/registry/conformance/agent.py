"""What a Consul agent knows of a service, in the words of the examination. Every method raises RegistryError."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from consul.base import Response
from consul.callback import CB

from registry.consul.connection import SyncConsul, consul_errors
from registry.errors import RegistryError
from registry.model import Instance
from registry.settings import ConsulSettings

__all__ = ["Agent", "HealthCheck"]

# A check's address stands nowhere but in its output: 'HTTP GET http://…: 200 OK Output: …' or 'Get "http://…": dial …'
_ASKED = re.compile(r'(?:^HTTP [A-Z]+ |^[A-Z][a-z]+ ")(https?://[^\s"]+?)(?:"|: \d{3}\b)')
_JSON: Callable[[Response], Any] = CB.json()
_DURATION = re.compile(r"([\d.]+)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class HealthCheck:
    """One check that the agent runs on an instance."""

    kind: str
    """``http``, ``ttl``, ``tcp``, …"""
    status: str
    interval: float
    """Seconds between two runs."""
    timeout: float
    output: str
    """What the last run said; empty before the first one."""

    @property
    def url(self) -> str | None:
        """What it asks; None as long as it has not run."""
        asked = _ASKED.match(self.output)
        return asked[1] if asked else None


class Agent:
    """The agent that the service registers with. Blocks; close it."""

    def __init__(self, settings: ConsulSettings) -> None:
        self.url = settings.url
        self._settings = settings
        self._consul = SyncConsul(settings)
        self.hides = False
        """Whether `instances` may have left out what our token must not see."""

    def close(self) -> None:
        """Closes the connections."""
        self._consul.http.close()

    def address(self) -> str:
        """Where other machines reach the agent, as it says itself; else where we do."""
        with suppress(RegistryError):  # a service's token need not be allowed to read this
            return str(self._get("/v1/agent/self")["Member"]["Addr"])
        return self._settings.host

    def instances(self) -> list[Instance]:
        """The instances that registered with this agent, healthy or not, as far as we may see them."""
        entries = self._get("/v1/agent/services", callback=self._note_rights)
        return [
            Instance(entry["ID"], entry["Service"], entry["Address"], entry["Port"])
            for entry in entries.values()
            if not entry.get("Kind")  # sidecars and gateways
        ]

    def lists(self, instance_id: str) -> bool:
        """Whether the instance is registered with this agent, healthy or not."""
        return any(instance.id == instance_id for instance in self.instances())

    def passing(self, service: str) -> set[str]:
        """The ids that discovery finds."""
        return {
            entry["Service"]["ID"] for entry in self._get(f"/v1/health/service/{quote(service)}", [("passing", "1")])
        }

    def nodes(self, instance: Instance) -> set[str]:
        """The nodes on which an instance of the same id is registered."""
        entries = self._get(f"/v1/health/service/{quote(instance.service)}")
        return {entry["Node"]["Node"] for entry in entries if entry["Service"]["ID"] == instance.id}

    def checks(self, instance_id: str) -> list[HealthCheck]:
        """The checks that the agent runs on this instance, those of its maintenance left out."""
        found = []
        for check in (self._get("/v1/agent/checks") or {}).values():
            if check["ServiceID"] == instance_id and check["Type"] not in {"", "maintenance"}:
                limits = _seconds(check["Interval"]), _seconds(check["Timeout"])
                found.append(HealthCheck(check["Type"], check["Status"], *limits, check["Output"]))
        return found

    def is_in_maintenance(self, instance_id: str) -> bool:
        """Whether somebody took the instance out of discovery by hand."""
        return f"_service_maintenance:{instance_id}" in (self._get("/v1/agent/checks") or {})

    def deregister(self, instance_id: str) -> dict[str, Any]:
        """Forgets the instance, and returns what `register` needs to bring it back."""
        entry: dict[str, Any] = self._get(f"/v1/agent/service/{quote(instance_id)}")
        checks = [
            {
                "HTTP": check.url,
                "Interval": f"{check.interval:g}s",
                "Timeout": f"{check.timeout or 2.0:g}s",
                "Status": "passing",
            }
            for check in self.checks(instance_id)
            if check.url
        ]
        with consul_errors(self._settings):
            self._consul.agent.service.deregister(instance_id)
        same = ("ID", "Tags", "Meta", "Port", "Address", "Weights")
        return {"Name": entry["Service"], "Checks": checks} | {name: entry[name] for name in same}

    def register(self, entry: dict[str, Any]) -> None:
        """Brings back what `deregister` returned, as far as Consul shows it."""
        with consul_errors(self._settings):
            self._consul.http.put(CB.boolean(), "/v1/agent/service/register", data=json.dumps(entry))

    def _get(
        self, path: str, params: list[tuple[str, str]] | None = None, callback: Callable[[Response], Any] = _JSON
    ) -> Any:
        with consul_errors(self._settings):
            return self._consul.http.get(callback, path, params)

    def _note_rights(self, response: Response) -> Any:
        # Without a token nothing is said to be filtered, though everything may be.
        filtered = response.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true"
        denied = response.headers.get("X-Consul-Default-ACL-Policy") == "deny"
        self.hides = filtered or (denied and not self._consul.http.tokens.current())
        return _JSON(response)


def _seconds(duration: str) -> float:
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(duration))
