"""How the system in containers stands: what the engine and Consul say of each container, and the table of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from deploy.compose.stack import Container, Stack
from registry import RegistryUnavailableError, ServiceRegistry
from tools.services import SERVICES

__all__ = ["Row", "rows", "table"]

_FOLDERS = {service.folder for service in SERVICES}
_BAD = {"critical", "unhealthy", "exited", "dead", "restarting"}


@dataclass(frozen=True)
class Row:
    """One container, as it stands."""

    container: Container
    instance: str
    """Its id in Consul; empty while it is not registered, and for what never is."""
    consul: str
    """What its check in Consul says; empty: nothing."""

    @property
    def health(self) -> str:
        """Of a service what Consul says, for that is what callers meet; of anything else what the engine says."""
        if self.container.state != "running":
            return self.container.state
        return (self.consul or "starting") if self.container.service in _FOLDERS else self.container.health

    @property
    def ready(self) -> bool:
        """Whether it does its work."""
        if self.container.state == "done":
            return True
        return self.health == ("passing" if self.container.service in _FOLDERS else "healthy")


def rows(stack: Stack, registry: ServiceRegistry) -> list[Row]:
    """Every container of the stack. Blocks; a Consul that is away knows nobody. Raises: StackError."""
    known: dict[tuple[str, str], tuple[str, str]] = {}
    try:
        for service in SERVICES:
            for instance in registry.discover_service(service.name, passing=False):
                health = registry.get_service_health(instance.id)
                known[service.folder, instance.address] = instance.id, health.status if health else ""
    except RegistryUnavailableError:
        known = {}
    return [
        Row(container, *known.get((container.service, container.address), ("", ""))) for container in stack.containers()
    ]


def table(found: list[Row], answered: Mapping[str, int], caption: str = "") -> Table:
    """The rows for people; ``answered``: instance → calls through the edge that it answered."""
    view = Table(title="Containers", title_justify="left", caption=caption, caption_justify="left")
    for heading in ("container", "health", "instance", "answered"):
        view.add_column(heading, no_wrap=True, justify="right" if heading == "answered" else "left")
    for row in found:
        health = Text(row.health, "green" if row.ready else "red" if row.health in _BAD else "yellow")
        view.add_row(row.container.short_name, health, row.instance, str(answered.get(row.instance, "")))
    return view
