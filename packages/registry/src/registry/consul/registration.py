"""What is written to Consul for one instance: the service entry and its health check."""

from dataclasses import dataclass, field, replace
from typing import Any, Self
from urllib.parse import quote

from consul import Check

from registry.model import Instance
from registry.settings import ServiceSettings
from registry.validation import (
    check_address,
    check_duration,
    check_id,
    check_meta,
    check_path,
    check_port,
    check_service,
    check_tag,
)

__all__ = ["Registration"]

FAILURES_BEFORE_CRITICAL = 3


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One instance and its check, validated. Raises: InvalidInputError."""

    name: str
    address: str
    port: int
    service_id: str | None = None
    """None: ``"{name}-{address}-{port}"``."""
    tags: tuple[str, ...] = ()
    meta: dict[str, str] = field(default_factory=dict)
    weight: int = 1
    health_check_interval: str = "10s"
    health_check_timeout: str = "5s"
    health_check_path: str = "/health"
    deregister_critical_service_after: str | None = "1m"

    def __post_init__(self) -> None:
        check_service(self.name)
        check_address(self.address)
        check_port(self.port)
        check_id(self.id)
        for tag in self.tags:
            check_tag(tag)
        check_meta(self.meta)
        check_path(self.health_check_path)
        check_duration(self.health_check_interval)
        check_duration(self.health_check_timeout)
        if self.deregister_critical_service_after is not None:
            check_duration(self.deregister_critical_service_after)

    @classmethod
    def of(cls, service: ServiceSettings, address: str) -> Self:
        """The instance that is reached at this address and keeps itself registered. Raises: InvalidInputError."""
        registration = cls(
            name=service.name,
            address=address,
            port=service.port,
            tags=service.tags,
            meta=service.meta,
            weight=service.weight,
            health_check_interval=f"{service.health_check_interval:g}s",
            # A hung health endpoint blocks the whole agent for this long.
            health_check_timeout="2s",
        )
        # The check names the instance: a newcomer on a reused address must not keep a ghost alive.
        path = f"{registration.health_check_path}?instance={quote(registration.id)}"
        return replace(registration, health_check_path=path)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.address}-{self.port}" if self.service_id is None else self.service_id

    @property
    def instance(self) -> Instance:
        return Instance(self.id, self.name, self.address, self.port, self.tags, self.meta, self.weight)

    def arguments(self, passing: bool) -> dict[str, Any]:
        """Keyword arguments of py-consul's ``agent.service.register``; ``passing``: found at once, unchecked."""
        check = Check.http(
            f"http://{self.instance.netloc}{self.health_check_path}",
            self.health_check_interval,
            self.health_check_timeout,
            self.deregister_critical_service_after,
        )
        check |= {
            "CheckID": f"service:{self.id}",
            "Name": f"{self.name} {self.health_check_path}",
            "FailuresBeforeCritical": FAILURES_BEFORE_CRITICAL,
            "Status": "passing" if passing else "critical",
        }
        return {
            "name": self.name,
            "service_id": self.id,
            "address": self.address,
            "port": self.port,
            "tags": list(self.tags),
            "meta": self.meta,
            "weights": {"Passing": self.weight, "Warning": 1},
            "check": check,
        }
