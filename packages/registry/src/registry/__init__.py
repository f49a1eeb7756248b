"""A service registry for FastAPI on Consul: register, discover, call, and never notice that an instance died."""

from registry.client import ServiceDiscoveryClient
from registry.consul.presence import Registrar
from registry.consul.resolver import ConsulResolver
from registry.errors import (
    InvalidInputError,
    NoHealthyInstanceError,
    RegistryError,
    RegistryUnavailableError,
    ResponseTooLargeError,
    ServiceNotFoundError,
)
from registry.model import Instance, ServiceHealth, Snapshot
from registry.options import ConnectionOptions
from registry.resolver import Resolver, StaticResolver
from registry.retry import RetryPolicy
from registry.service_registry import ServiceRegistry
from registry.settings import ConsulSettings, ServiceSettings
from registry.transport import DiscoveryTransport

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
]
