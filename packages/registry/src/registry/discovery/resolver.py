"""Who is there: what a transport needs to know of service discovery, and an answer that never changes."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from registry.errors import ServiceNotFoundError
from registry.model import Instance, Snapshot, View

__all__ = ["Resolver", "StaticResolver"]


@runtime_checkable
class Resolver(Protocol):
    """A view of the instances of services, kept in memory. Upper and lower case make no difference in a name."""

    def resolve(self, service: str, tag: str | None = None) -> Snapshot | None:
        """The usable instances, never an empty tuple; None when nothing is known yet: await ``ready`` and ask again.

        Memory only, never blocks. The same tuple object as long as nothing changed.

        Raises: ServiceNotFoundError, NoHealthyInstanceError, RegistryUnavailableError.
        """
        ...

    def view(self, service: str, tag: str | None = None) -> View:
        """How fresh the answer is and where it is from. Memory only, never blocks, raises nothing."""
        ...

    async def ready(self, service: str, tag: str | None = None) -> None:
        """Returns as soon as ``resolve`` has an answer or an error to give. Cancelling it stops only the waiting.

        Raises: RegistryUnavailableError, when the registry does not answer in time; InvalidInputError.
        """
        ...

    async def aclose(self) -> None:
        """Ends whatever keeps the view alive."""
        ...


class StaticResolver:
    """A fixed answer: for tests, and for platforms that resolve names themselves. Ignores case, as Consul does."""

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
        """Returns at once: everything is known from the start."""

    async def aclose(self) -> None:
        """Does nothing."""
