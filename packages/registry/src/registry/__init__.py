"""A service registry for FastAPI on Consul: register, discover, call, and never notice that an instance died."""

from registry.client import ServiceDiscoveryClient
from registry.consul.resolver import ConsulResolver
from registry.discovery.options import ConnectionOptions
from registry.discovery.resolver import Resolver, StaticResolver
from registry.discovery.retry import RetryPolicy
from registry.discovery.sync import SyncDiscoveryTransport
from registry.discovery.transport import DiscoveryTransport
from registry.errors import (
    InvalidInputError,
    NoHealthyInstanceError,
    RegistryError,
    RegistryUnavailableError,
    ResponseTooLargeError,
    ServiceNotFoundError,
)
from registry.model import Instance, ServiceHealth, Snapshot
from registry.presence.registrar import Registrar
from registry.service_registry import ServiceRegistry
from registry.settings import ConsulSettings, ServiceSettings

__all__ = [
    "ConnectionOptions",
    "ConsulResolver",
    "ConsulSettings",
    "DiscoveryTransport",
    "Instance",
    "InvalidInputError",
    "NoHealthyInstanceError",
    "Registrar",
    "RegistryError",
    "RegistryUnavailableError",
    "Resolver",
    "ResponseTooLargeError",
    "RetryPolicy",
    "ServiceDiscoveryClient",
    "ServiceHealth",
    "ServiceNotFoundError",
    "ServiceRegistry",
    "ServiceSettings",
    "Snapshot",
    "StaticResolver",
    "SyncDiscoveryTransport",
]
