"""What is written to Consul for one instance: the service entry and its health check."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self
from urllib.parse import quote

from consul import Check

from registry.model import Instance
from registry.settings import ServiceSettings
from registry.validation import (
    MAX_META,
    check_address,
    check_duration,
    check_headers,
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
    health_check_headers: dict[str, str] = field(default_factory=dict, repr=False)
    """May hold a token."""
    scheme: Literal["http", "https"] = "http"
    tls_server_name: str | None = None
    tls_skip_verify: bool = False
    connect: bool = False
    """Whether it speaks Consul Connect itself."""
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
        check_headers(self.health_check_headers)
        check_duration(self.health_check_interval)
        check_duration(self.health_check_timeout)
        if self.deregister_critical_service_after is not None:
            check_duration(self.deregister_critical_service_after)

    @classmethod
    def of(
        cls, service: ServiceSettings, address: str, about: Mapping[str, str] | None = None, *, connect: bool = False
    ) -> Self:
        """The instance that is reached at this address and keeps itself registered. Raises: InvalidInputError.

        ``about``: metadata that the settings don't say otherwise, such as ``version``. ``connect``: it serves mutual
        TLS by a certificate that neither the agent nor a probe can verify by its address.
        """
        scheme: Literal["http", "https"] = "https" if connect else service.scheme
        # "secure" is what Spring and others read.
        said = {**(about or {}), "secure": "true" if scheme == "https" else "false"}
        if service.version is not None:
            said["version"] = service.version
        given = ({} if service.zone is None else {"zone": service.zone}) | service.meta
        if len(given.keys() | said) > MAX_META:
            said = {}
        registration = cls(
            name=service.name,
            address=address,
            port=service.port,
            tags=service.tags,
            meta={**said, **given},
            weight=service.weight,
            health_check_interval=f"{service.health_check_interval:g}s",
            # A hung health endpoint blocks the whole agent for this long.
            health_check_timeout="2s",
            health_check_path=service.health_check_path,
            health_check_headers={n: value.get_secret_value() for n, value in service.health_check_headers.items()},
            scheme=scheme,
            tls_server_name=service.health_check_tls_server_name,
            tls_skip_verify=connect or service.health_check_tls_skip_verify,
            connect=connect,
        )
        # The check names the instance: a newcomer on a reused address must not keep a ghost alive.
        path = registration.health_check_path
        path += f"{'&' if '?' in path else '?'}instance={quote(registration.id)}"
        return replace(registration, health_check_path=path)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.address}-{self.port}" if self.service_id is None else self.service_id

    @property
    def instance(self) -> Instance:
        return Instance(self.id, self.name, self.address, self.port, self.tags, self.meta, self.weight)

    @property
    def health_check_url(self) -> str:
        """What Consul and our own probe ask."""
        return f"{self.scheme}://{self.instance.netloc}{self.health_check_path}"

    def arguments(self, passing: bool) -> dict[str, Any]:
        """Keyword arguments of py-consul's ``agent.service.register``; ``passing``: found at once, unchecked."""
        check = Check.http(
            self.health_check_url,
            self.health_check_interval,
            self.health_check_timeout,
            self.deregister_critical_service_after,
            {name: [value] for name, value in self.health_check_headers.items()},
        )
        if self.scheme == "https":
            check |= {"TLSServerName": self.tls_server_name or "", "TLSSkipVerify": self.tls_skip_verify}
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
            "connect": {"Native": True} if self.connect else None,
        }
