"""What a transport needs to know about instances: the protocol, and a resolver whose answer never changes."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from registry.errors import ServiceNotFoundError
from registry.model import Instance, Snapshot, View

__all__ = ["HasResolver", "Resolver", "StaticResolver"]


@runtime_checkable
class Resolver(Protocol):
    """Knows the instances of services, and answers from memory. Service names are case-insensitive."""

    def resolve(self, service: str, tag: str | None = None) -> Snapshot | None:
        """The usable instances, never an empty tuple; None if nothing is known yet: await ``ready``, then ask again.

        Reads memory only, never blocks. Returns the same tuple object as long as nothing changes.

        Raises: ServiceNotFoundError, NoHealthyInstanceError, RegistryUnavailableError.
        """
        ...

    def view(self, service: str, tag: str | None = None) -> View:
        """How fresh the answer is and where it comes from. Reads memory only, never blocks, never raises."""
        ...

    async def ready(self, service: str, tag: str | None = None) -> None:
        """Waits until ``resolve`` can return an answer or raise an error. Cancelling it only stops the waiting.

        Raises: RegistryUnavailableError, if the registry does not answer in time; InvalidInputError.
        """
        ...

    async def aclose(self) -> None:
        """Closes connections and ends background tasks."""
        ...


@runtime_checkable
class HasResolver(Protocol):
    """Can make one, as a ServiceRegistry can."""

    def resolver(self) -> Resolver: ...


class StaticResolver:
    """A fixed answer, for tests and for platforms that resolve names themselves. Case-insensitive, like Consul."""

    def __init__(self, services: Mapping[str, Sequence[Instance]]) -> None:
        self._services = {
            name.lower(): tuple(sorted(instances, key=lambda instance: instance.id))
            for name, instances in services.items()
        }
        self._tagged: dict[tuple[str, str], Snapshot] = {}

    def resolve(self, service: str, tag: str | None = None) -> Snapshot:
        instances = self._services.get(service.lower(), ())
        if tag is not None:
            tagged = tuple(instance for instance in instances if tag in instance.tags)
            instances = self._tagged.setdefault((service.lower(), tag), tagged)
        if not instances:
            raise ServiceNotFoundError(service)
        return instances

    def view(self, service: str, tag: str | None = None) -> View:
        """Always fresh: it never changes."""
        return View("static", 0.0, None, len(self._services.get(service.lower(), ())), None)

    async def ready(self, service: str, tag: str | None = None) -> None:
        """Returns at once, because everything is known from the start."""

    async def aclose(self) -> None:
        """Does nothing."""
