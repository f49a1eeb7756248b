"""What an operator may tune: frozen values, each with its default."""

from dataclasses import dataclass
from ssl import SSLContext

from registry.discovery.peers import Peers
from registry.errors import InvalidInputError

__all__ = ["ConnectionOptions", "EjectionPolicy"]


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How a transport connects to instances. Raises: InvalidInputError for a number that is not above 0."""

    max_connections: int = 500
    """Maximum number of open connections, to all instances together; further callers queue in order of arrival."""
    max_instances: int = 250
    """So many instances of a service a caller knows: it sends to these only, as long as they work.

    Which ones differs from caller to caller; one that fails or leaves is replaced by another at once. For each tag that
    calls ask for, it is so many again.
    """
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
    peers: Peers | None = None
    """For instances with ``connect``: a ``MeshIdentity``. None: such instances are not called."""
    peers_keepalive: float = 60.0
    """Seconds to keep an idle connection to one of those: below the 75 of their servers; a handshake is dear."""

    def __post_init__(self) -> None:
        _check_above_zero(self)


@dataclass(frozen=True, slots=True)
class EjectionPolicy:
    """When an instance is left out, for how long, and how it comes back. Raises: InvalidInputError.

    The last instance is never ejected: with fewer than half left, all are used.
    """

    failures: int = 5
    """Bad answers or time-outs in a row that eject an instance."""
    seconds: float = 30.0
    """For how long, times how often it was ejected lately."""
    max_seconds: float = 300.0
    refused: float = 0.1
    """Seconds of the first ejection after a refused connection, and of the first failing fast; both double."""
    max_refused: float = 0.8
    """Less than one, so that a returning instance is found within a second."""
    slow_connect: float = 0.5
    """Failed connects at least this slow count as time-outs, and eject for longer: they cost every caller as much."""
    doubt: float = 10.0
    """Seconds after a bad answer in which calls that can't be sent again go elsewhere."""
    probe_interval: float = 0.1
    """Seconds between probes of ejected instances: the retry budget pays for failed ones."""
    remember: float = 60.0
    """Seconds that an instance which Consul has lost is remembered while others serve."""
    remember_at_most: int = 10_000
    """So many of them, the last that left."""
    latency_decay: float = 0.2
    """Seconds after which an old latency counts for 1/e; doubled by every peak in a row.

    One slow answer, a first connection say, is forgotten after about two seconds; an instance that is slow each time
    that it is tried again is tried ever more rarely.
    """
    latency_peaks: int = 4
    """How often a peak may double that."""

    def __post_init__(self) -> None:
        _check_above_zero(self, but="latency_peaks")


def _check_above_zero(options: ConnectionOptions | EjectionPolicy, but: str = "") -> None:
    for name in options.__slots__:
        value = getattr(options, name)
        if isinstance(value, (int, float)) and not (value > 0 or (name == but and value == 0)):
            raise InvalidInputError(f"{name}={value!r}: pass a number above 0")
