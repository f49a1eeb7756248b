"""A service registry for FastAPI on Consul: register, discover, call, and never notice that an instance died."""

from registry.client import ServiceDiscoveryClient
from registry.consul.resolver import ConsulResolver
from registry.discovery.balancing import Candidates, Pick, Policy
from registry.discovery.blame import Failure
from registry.discovery.call import Terms
from registry.discovery.endpoint import Endpoint, LastFailure
from registry.discovery.explanation import EndpointState, Explanation, ZoneState
from registry.discovery.options import ConnectionOptions, EjectionPolicy
from registry.discovery.peers import Peers
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
    UnsafeAgentError,
)
from registry.model import Absence, Instance, LeftOut, ServiceHealth, Snapshot, View
from registry.presence.registrar import Registrar
from registry.service_registry import ServiceRegistry
from registry.settings import ConsulSettings, ServiceSettings
from registry.telemetry import (
    AttemptOutcome,
    CallOutcome,
    Event,
    EventKind,
    ObservedAttempt,
    ObservedCall,
    Observer,
    Observers,
    PickReason,
)

__all__ = [
    "Absence",
    "AttemptOutcome",
    "CallOutcome",
    "Candidates",
    "ConnectionOptions",
    "ConsulResolver",
    "ConsulSettings",
    "DiscoveryTransport",
    "EjectionPolicy",
    "Endpoint",
    "EndpointState",
    "Event",
    "EventKind",
    "Explanation",
    "Failure",
    "Instance",
    "InvalidInputError",
    "LastFailure",
    "LeftOut",
    "NoHealthyInstanceError",
    "ObservedAttempt",
    "ObservedCall",
    "Observer",
    "Observers",
    "Peers",
    "Pick",
    "PickReason",
    "Policy",
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
    "Terms",
    "UnsafeAgentError",
    "View",
    "ZoneState",
]
