"""Everything this package raises on purpose.

::

    RegistryError
    ├── InvalidInputError (ValueError)            a name, path, port or tag that can't be right: nothing was sent
    ├── ResponseTooLargeError (httpx.TransportError)  an answer over a limit of ConnectionOptions; blames nobody
    ├── RegistryUnavailableError                  Consul can't be asked, and nothing is known from before
    └── ServiceNotFoundError (ValueError)         Consul answered: no such service
        └── NoHealthyInstanceError                the service is known, but none of its instances is usable

A call that reached an instance and failed there raises httpx's own errors: ``httpx.HTTPStatusError`` for an
answer, ``httpx.TransportError`` for a connection, both with one note per attempt (``error.__notes__``).
"""

import httpx

__all__ = [
    "InvalidInputError",
    "NoHealthyInstanceError",
    "RegistryError",
    "RegistryUnavailableError",
    "ResponseTooLargeError",
    "ServiceNotFoundError",
]


class RegistryError(Exception):
    """The base of every error that this package raises; raised itself when Consul refuses a request."""


class InvalidInputError(RegistryError, ValueError):
    """An argument can't be right; nothing has been sent. The message says what to pass instead."""


class RegistryUnavailableError(RegistryError):
    """Consul can't be asked, and nothing is known from before. Never means that a service does not exist."""


class ResponseTooLargeError(RegistryError, httpx.TransportError):
    """An answer has more than this caller takes: raise the limit, if the answer is meant to be so large."""

    def __init__(self, what: str, option: str, limit: int) -> None:
        super().__init__(f"{what}: ConnectionOptions({option}={limit}) allows no more")


class ServiceNotFoundError(RegistryError, ValueError):
    """Consul answered, and knows no such service."""

    def __init__(self, service: str) -> None:
        super().__init__(f"Service '{service}' not found in registry")
        self.service = service


class NoHealthyInstanceError(ServiceNotFoundError):
    """The service is registered, but none of its instances passes its checks."""

    def __init__(self, service: str, known: int, maintained: int = 0) -> None:
        super().__init__(service)
        maintenance = f", {maintained} in maintenance" if maintained else ""
        self.args = (f"Service '{service}' has no healthy instance ({known} registered{maintenance})",)
        self.known = known
