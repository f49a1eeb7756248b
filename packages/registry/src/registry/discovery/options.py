"""What an operator may tune: frozen values, each with its default."""

from dataclasses import dataclass
from ssl import SSLContext

from registry.errors import InvalidInputError

__all__ = ["ConnectionOptions"]


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How a transport connects to instances. Raises: InvalidInputError for a number that is not above 0."""

    max_connections: int = 500
    """Maximum number of open connections, to all instances together; further callers queue in order of arrival."""
    keepalive: float = 4.0
    """Seconds to keep an idle connection. Below uvicorn's 5, so that no request meets a connection just closed."""
    max_header_size: int = 65_536
    """Maximum size of a response head, in bytes."""
    max_headers: int = 1_000
    """Maximum number of header lines in a response."""
    max_response_size: int = 67_108_864
    """Maximum size of a response body in bytes, compressed and decompressed. Streamed responses are not limited."""

    ssl: SSLContext | None = None
    """For instances with ``secure=true`` in their metadata, for example with a private CA; None: httpx's default."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value > 0:
                raise InvalidInputError(f"{name}={value!r}: pass a number above 0")
