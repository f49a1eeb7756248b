"""What the demo runs, and how it stands: the processes, what Consul says of them, the table that shows both."""

import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from demo.collector import Collector
from demo.locked import Lock
from demo.processes import DemoError, Process, Processes, clean_environment, uvicorn_command
from registry import RegistryUnavailableError, ServiceRegistry
from registry.testing.ports import free_ports, is_free
from tools.services import SERVICES

__all__ = ["Ports", "Row", "System"]

_COLOURS = {"passing": "green", "starting": "yellow", "warning": "yellow", "critical": "red"}


@dataclass(frozen=True)
class Ports:
    """The ports that a user is told; the two more replicas of backend-api take free ones."""

    consul: int
    services: Mapping[str, int]
    """A service's name → its port."""

    def check(self) -> None:
        """Raises: DemoError, naming every port that somebody else listens on."""
        users = [(self.consul, "Consul"), *((port, name) for name, port in self.services.items())]
        taken = [f"port {port} ({user})" for port, user in users if not is_free(port, socket.SOCK_STREAM)]
        if taken:
            raise DemoError(
                f"The demo needs {', '.join(taken)}, which another program holds: stop that program, then try again."
            )


@dataclass(frozen=True)
class Row:
    """One process, as it stands."""

    instance: str
    """Its id in Consul, else its service and port."""
    pid: int
    health: str
    """``starting``, what Consul says, or how the process ended."""


@dataclass
class System:
    """The services of the demo. ``rows`` and ``start`` block."""

    ports: Ports
    processes: Processes
    collector: Collector
    """Gets every trace."""
    lock: Lock | None = None
    """With tokens and TLS; None: without."""
    answered: Counter[str] = field(default_factory=Counter)
    """Instance id → calls that it answered."""
    failed: int = 0
    """Calls that nobody answered."""

    def __post_init__(self) -> None:
        self.registry = self.lock.registry if self.lock else ServiceRegistry("localhost", self.ports.consul)

    def start(self) -> None:
        """Starts every process at once; they register as soon as Consul is there."""
        starts = [(service, self.ports.services[service.name]) for service in SERVICES]
        starts += [(service, port) for service in SERVICES if service.name == "backend-api" for port in free_ports(2)]
        for service, port in starts:
            plain = {"CONSUL_HTTP_ADDR": f"localhost:{self.ports.consul}"}
            environment = clean_environment(
                SERVICE_PORT=str(port),
                # Every second instead of every ten, so that the table shows soon what happens to an instance.
                SERVICE_HEALTH_CHECK_INTERVAL="1",
                DATABASE_URL=f"sqlite+aiosqlite:///{self.processes.directory}/backend.db",
                # What a process that is killed leaves behind goes with the directory.
                TMPDIR=str(self.processes.directory),
                **self.collector.environment(),
                **(self.lock.environment(service.name) if self.lock else plain),
            )
            self.processes.start(service.name, uvicorn_command(service.app, port), port, environment)

    def rows(self) -> list[Row]:
        """How every process stands, those of one service together."""
        known = {}
        try:
            for service in SERVICES:
                for instance in self.registry.discover_service(service.name, passing=False):
                    health = self.registry.get_service_health(instance.id)
                    known[instance.port] = instance.id, health.status if health else "starting"
        except RegistryUnavailableError:
            known = {}
        return [self._row(process, *known.get(process.port, (None, "starting"))) for process in self.processes]

    def _row(self, process: Process, instance: str | None, health: str) -> Row:
        if process.exit_code is not None:
            health = f"ended ({process.exit_code})"
        return Row(instance or f"{process.service} on port {process.port}", process.popen.pid, health)

    def dead(self) -> Process | None:
        """A process that has ended, None while all run."""
        return next((process for process in self.processes if process.exit_code is not None), None)

    def table(self, rows: list[Row], caption: str = "") -> Table:
        """The rows for people."""
        table = Table(title="Services", title_justify="left", caption=caption, caption_justify="left")
        for heading in ("instance", "pid", "health", "answered"):
            table.add_column(heading, no_wrap=True, justify="right" if heading in {"pid", "answered"} else "left")
        for row in rows:
            health = Text(row.health, _COLOURS.get(row.health, "red"))
            table.add_row(row.instance, str(row.pid), health, str(self.answered[row.instance] or ""))
        return table
