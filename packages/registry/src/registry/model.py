"""What discovery talks about: an instance, and the snapshot of all instances of a service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["Instance", "ServiceHealth", "Snapshot", "View"]


@dataclass(frozen=True, slots=True)
class Instance:
    """One running copy of a service, as Consul knows it. Immutable.

    Fields can be read as attributes or as items: ``instance.address`` and ``instance["address"]`` are the same.
    """

    id: str
    """Unique among all instances of the service; ``"{service}-{address}-{port}"`` unless chosen by hand."""
    service: str
    """The logical name."""
    address: str
    """IP address or host name, without brackets. The service's own, else its node's."""
    port: int
    tags: Sequence[str] = ()
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    weight: int = 1
    """Share of the traffic relative to the others; Consul's ``Weights.Passing``."""

    def __getitem__(self, name: str) -> object:
        if name not in self.__slots__:
            raise KeyError(name)
        return getattr(self, name)

    @property
    def netloc(self) -> str:
        """``host:port`` as it stands in a URL, IPv6 in brackets."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


Snapshot: TypeAlias = tuple[Instance, ...]
"""All usable instances of one service at one moment: immutable, sorted by id."""


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """What the checks of one instance say."""

    status: str
    """The worst of all checks: ``passing``, ``warning`` or ``critical``."""
    checks: Mapping[str, str]
    """Check id → status."""
    outputs: Mapping[str, str]
    """Check id → what the check saw last."""


@dataclass(frozen=True, slots=True)
class View:
    """How fresh a resolver's view of one service is, and where it is from."""

    source: str
    """Who said it."""
    age: float | None
    """Seconds since the source last said anything but an error; None: never. A parked question is silence too."""
    changed: float | None
    """Seconds since the list last changed; None: never."""
    registered: int | None
    """How many instances are registered, usable or not; None: unknown."""
    error: str | None
    """Why the source does not answer now; None: it does, or was not asked."""
