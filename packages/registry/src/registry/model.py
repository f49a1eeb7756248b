"""What discovery talks about: an instance, and the snapshot of all instances of a service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, overload

__all__ = ["Instance", "Key", "LeftOut", "ServiceHealth", "Snapshot", "View"]

Key: TypeAlias = tuple[str, str, int]
"""Id, address and port: an id alone is unique on one node only, and a new process may take over its predecessor's."""


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

    @overload
    def __getitem__(self, name: Literal["port", "weight"]) -> int: ...
    @overload
    def __getitem__(self, name: Literal["id", "service", "address"]) -> str: ...
    @overload
    def __getitem__(self, name: Literal["tags"]) -> Sequence[str]: ...
    @overload
    def __getitem__(self, name: Literal["meta"]) -> Mapping[str, str]: ...
    @overload
    def __getitem__(self, name: str) -> object: ...

    def __getitem__(self, name: str) -> object:
        if name not in self.__slots__:
            raise KeyError(name)
        return getattr(self, name)

    @property
    def key(self) -> Key:
        """What tells it from every other instance of its service."""
        return self.id, self.address, self.port

    @property
    def scheme(self) -> str:
        """``https`` when its metadata say ``secure=true``, as Spring Cloud has it, else ``http``."""
        return "https" if self.meta.get("secure", "").lower() == "true" else "http"

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
class LeftOut:
    """An instance that is not offered, and why."""

    id: str
    reason: str
    """Such as ``in maintenance: new disks``, ``check 'health' is critical``, ``deregistered``."""


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
    left_out: tuple[LeftOut, ...] = ()
    """Registered or known from before, and not offered. Those who withdrew are named for about a minute."""
    lost: frozenset[Key] | None = None
    """Of these, the ones that nobody took out on purpose: their checks fail, or the source forgot them.

    They are asked while nobody else is left. None: the source can't tell, so all that are gone count as lost.
    """
