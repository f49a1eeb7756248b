"""All errors that this package defines.

::

    RegistryError
    ├── InvalidInputError (ValueError)            an invalid name, path, port or tag: nothing was sent
    ├── ResponseTooLargeError (httpx.TransportError)  a response exceeds a limit of ConnectionOptions
    ├── RegistryUnavailableError                  Consul can't be reached, and nothing is known from before
    ├── UnsafeAgentError                          the agent gives this service's private key to others
    └── ServiceNotFoundError (ValueError)         Consul answered: nobody has registered that name
        └── NoHealthyInstanceError                the service is registered, but none of its instances is usable

A call that reached an instance and failed there raises one of httpx's own errors: ``httpx.HTTPStatusError`` for a
response, ``httpx.TransportError`` for a connection, both with one note per attempt (``error.__notes__``).
"""

import httpx

__all__ = [
    "InvalidInputError",
    "NoHealthyInstanceError",
    "RegistryError",
    "RegistryUnavailableError",
    "ResponseTooLargeError",
    "ServiceNotFoundError",
    "UnsafeAgentError",
]


class RegistryError(Exception):
    """The base of all errors of this package; raised itself when Consul rejects a request."""


class InvalidInputError(RegistryError, ValueError):
    """An argument is invalid; nothing has been sent. The message says what to pass instead."""


class RegistryUnavailableError(RegistryError):
    """Consul can't be reached, and nothing is known from before. Never means that a service does not exist."""


class ResponseTooLargeError(RegistryError, httpx.TransportError):
    """A response exceeds a limit of ConnectionOptions: raise the limit if such a response is expected."""

    def __init__(self, what: str, option: str, limit: int) -> None:
        super().__init__(f"{what}: ConnectionOptions({option}={limit}) allows no more")


class UnsafeAgentError(RegistryError):
    """Consul's agent gives this service's certificate and private key to whoever asks (CVE-2026-105765)."""

    def __init__(self, agent: str, service: str) -> None:
        super().__init__(
            f"the agent at {agent} gives the private key of {service} to requests without a token, too "
            "(CVE-2026-105765: Consul 1.17.0 to 2.0.4), so whoever reaches it can pass for this service. Use Consul "
            "2.1.0 or later; or let a server sign the certificate: install registry[mesh] and set CONSUL_GRPC_ADDR; "
            "or, if this agent serves this service alone, set CONSUL_CONNECT_ALLOW_UNSAFE_AGENT=true"
        )


class ServiceNotFoundError(RegistryError, ValueError):
    """Consul answered: nobody has registered that name."""

    def __init__(self, service: str) -> None:
        super().__init__(f"Service '{service}' not found in registry")
        self.service = service


class NoHealthyInstanceError(ServiceNotFoundError):
    """The service is registered, but none of its instances is usable."""

    def __init__(self, service: str, known: int, maintained: int = 0) -> None:
        super().__init__(service)
        maintenance = f", {maintained} in maintenance" if maintained else ""
        self.args = (f"Service '{service}' has no healthy instance ({known} registered{maintenance})",)
        self.known = known
