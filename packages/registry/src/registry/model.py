"""The data of discovery: an instance, and the snapshot of all instances of a service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, overload

__all__ = ["Absence", "Instance", "Key", "LeftOut", "ServiceHealth", "Snapshot", "View"]

Key: TypeAlias = tuple[str, str, int]
"""Id, address and port: an id alone is unique on one node only, and a new process may take over its predecessor's."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One running copy of a service, as Consul knows it. Immutable.

    Fields can be read as attributes or as items: ``instance.address`` and ``instance["address"]`` are the same.
    """

    id: str
    """Unique among all instances of the service; by default ``"{service}-{address}-{port}"``."""
    service: str
    """The logical name."""
    address: str
    """IP address or host name, without brackets: the address of the service if registered, or else of its node."""
    port: int
    tags: Sequence[str] = ()
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    weight: int = 1
    """Share of the traffic relative to the other instances; Consul's ``Weights.Passing``."""
    connect: bool = False
    """It speaks Consul Connect: mutual TLS, with the certificates of the mesh."""
    zone: str | None = None
    """Where it runs: what fails together. From its metadata ``zone``, else from Consul's locality. None: unknown."""

    @overload
    def __getitem__(self, name: Literal["port", "weight"]) -> int: ...
    @overload
    def __getitem__(self, name: Literal["id", "service", "address"]) -> str: ...
    @overload
    def __getitem__(self, name: Literal["tags"]) -> Sequence[str]: ...
    @overload
    def __getitem__(self, name: Literal["meta"]) -> Mapping[str, str]: ...
    @overload
    def __getitem__(self, name: Literal["connect"]) -> bool: ...
    @overload
    def __getitem__(self, name: Literal["zone"]) -> str | None: ...
    @overload
    def __getitem__(self, name: str) -> object: ...

    def __getitem__(self, name: str) -> object:
        if name not in self.__slots__:
            raise KeyError(name)
        return getattr(self, name)

    @property
    def key(self) -> Key:
        """Identifies it among all instances of its service, over time."""
        return self.id, self.address, self.port

    @property
    def scheme(self) -> str:
        """``https`` with ``connect``, or if its metadata contain ``secure=true``, as Spring Cloud writes it."""
        return "https" if self.connect or self.meta.get("secure", "").lower() == "true" else "http"

    @property
    def netloc(self) -> str:
        """``host:port`` as in a URL, with IPv6 in brackets."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


Snapshot: TypeAlias = tuple[Instance, ...]
"""All usable instances of one service at one moment: immutable, sorted by id."""


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """The results of one instance's checks."""

    status: str
    """The worst status of all checks: ``passing``, ``warning`` or ``critical``."""
    checks: Mapping[str, str]
    """Check id → status."""
    outputs: Mapping[str, str]
    """Check id → the output of its last run."""


Absence: TypeAlias = Literal["critical", "maintenance", "withdrew", "vanished", "uncallable", "elsewhere"]
"""Its checks fail; an operator's order; it was deregistered; the registry lost it; its entry can't be used; it is in
another datacenter, which is not needed."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An instance that is not offered to callers, and the reason."""

    id: str
    reason: str
    """For example ``in maintenance: new disks``, ``check 'health' is critical``, ``deregistered``."""
    kind: Absence = field(default="critical", compare=False)
    """The reason in a word."""


@dataclass(frozen=True, slots=True)
class View:
    """How fresh a resolver's view of one service is, and where it comes from."""

    source: str
    """Where it comes from, such as the URL of Consul."""
    age: float | None
    """Seconds since the source last answered without an error; None: never. Grows while a blocking query waits."""
    changed: float | None
    """Seconds since the list last changed; None: never."""
    registered: int | None
    """The number of registered instances, usable or not; None: unknown."""
    error: str | None
    """Why the source does not answer at present; None: it does, or has not been asked."""
    left_out: tuple[LeftOut, ...] = ()
    """Instances registered or known from before, but not offered. Deregistered ones are listed for about a minute."""
    lost: frozenset[Key] | None = None
    """Those of them that nobody removed on purpose: their checks fail, or the source has lost them.

    They are called while no other instance is left. None: the source can't tell, so all that are gone count as lost.
    """
    errors: int = 0
    """How many questions the source has not answered."""
    datacenter: str | None = None
    """Where the usable instances are, if datacenters were named; None: they were not, or there is nobody."""
