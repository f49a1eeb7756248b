"""What an operator may turn: frozen values, each with its default."""

from dataclasses import dataclass
from ssl import SSLContext

from registry.errors import InvalidInputError

__all__ = ["ConnectionOptions"]


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How a transport talks to instances. Raises: InvalidInputError for a number that is not above 0."""

    max_connections: int = 500
    """Connections open at once, to all instances together; callers beyond that queue, in the order they came."""
    keepalive: float = 4.0
    """Seconds that an idle connection is kept: less than uvicorn's 5, or a request would meet one just closed."""
    max_header_size: int = 65_536
    """Bytes that the head of an answer may have."""
    max_headers: int = 1_000
    """Header lines that an answer may have."""
    max_response_size: int = 67_108_864
    """Bytes that an answer which is read whole may have, packed and unpacked. Streams are not limited."""

    ssl: SSLContext | None = None
    """For instances that speak https (``secure=true`` in their metadata): a private CA, say; None: as httpx does it."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value > 0:
                raise InvalidInputError(f"{name}={value!r}: pass a number above 0")
