"""The system under test: its own Compose project beside any other, the faults done to it, and waits for conditions.

Everything blocks. Faults go through the engine's API; what is asked, is asked of Consul, the engine and the edge.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import docker
import httpx
from docker.models.containers import Container

from deploy.compose.stack import HERE, Stack
from registry import RegistryUnavailableError, ServiceRegistry
from registry.testing.ports import free_ports
from tools.services import ROOT, SERVICES, Service

PROJECT = "registry-e2e"
NETWORK = f"{PROJECT}_default"
"""The services', in which they are registered."""
FILES = (HERE / "docker-compose.yml", HERE / "docker-compose.e2e.yml")
PASSWORD = "p@ss/50%:#"
"""Of the database: what would have to be escaped in a URL."""
BACKENDS = 3
"""So many stand before every scene."""
BACKEND = next(service for service in SERVICES if service.folder == "backend")
_SUBNETS = range(100, 200)
_PAUSE = 0.05


def wait_until(
    condition: Callable[[], object], seconds: float, what: str, how_it_stands: Callable[[], object] = lambda: ""
) -> float:
    """Returns when the condition holds, with the seconds that took. Raises: TimeoutError, which says what it waited for
    and how that stood at the end."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what}. {how_it_stands()}")
        time.sleep(_PAUSE)
    return time.monotonic() - begun


def run_in(container: Container, *command: str, **environment: str) -> str:
    """What the command said, in a running container. Raises: AssertionError with it, when it failed."""
    code, output = container.exec_run(list(command), environment=environment)
    assert isinstance(output, bytes)
    said = output.decode(errors="replace")
    assert code == 0, f"{command[0]} in {container.name}: {said}"
    return said


@dataclass
class Replica:
    """One container of a service. Its address and state are read anew each time."""

    container: Container
    service: Service

    def __str__(self) -> str:
        return str(self.container.name)

    @property
    def host(self) -> str:
        """Its name for itself, under which it keeps its journal."""
        return str(self.container.id)[:12]

    @property
    def state(self) -> dict[str, Any]:
        """As the engine has it now."""
        self.container.reload()
        state: dict[str, Any] = self.container.attrs["State"]
        return state

    @property
    def address(self) -> str:
        """In the services' network; empty while it is not in it."""
        self.container.reload()
        networks = self.container.attrs["NetworkSettings"]["Networks"]
        project = self.container.labels["com.docker.compose.project"]
        return str(networks.get(f"{project}_default", {}).get("IPAddress", ""))

    @property
    def instance(self) -> str:
        """The id under which it must be registered: its own address, nothing else."""
        return f"{self.service.name}-{self.address}-{self.service.port}"

    @property
    def healthy(self) -> bool:
        """What the engine's health check says, which is paused with the container."""
        state = self.state
        return (state["Status"], state["Health"]["Status"]) == ("running", "healthy")

    @property
    def healthy_at(self) -> float:
        """When the engine first found it healthy, since the epoch."""
        good = [entry for entry in self.state["Health"]["Log"] if entry["ExitCode"] == 0]
        return datetime.fromisoformat(good[0]["End"]).timestamp()

    def command(self, **faults: object) -> None:
        """Fail like this from now on, see tests.support.faults; without arguments: behave."""
        run_in(self.container, "python", "-m", "tests.support.faults", json.dumps(faults))

    def eat(self) -> None:
        """Take memory until the system ends it, which may end the command, too."""
        self.container.exec_run(["python", "-m", "tests.support.faults", '{"eat": true}'])


class System:
    """One Compose project with the fault overlay; `running` brings it up."""

    project = PROJECT
    files: tuple[Path, ...] = FILES
    registry: ServiceRegistry
    """How Consul is asked; made by `connect`."""

    def __init__(self, images: Mapping[str, str], folder: Path) -> None:
        """``folder``: for the journals and logs."""
        self.folder = folder
        self.journals = folder / "journals"
        self.journals.mkdir(parents=True)
        self.journals.chmod(0o777)  # written by the containers' own user
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o444)
        self.engine = docker.from_env()
        self.dns_port, ui_port, topology_port, *ports = free_ports(3 + len(SERVICES))
        published = {f"{service.folder.upper()}_PORT": port for service, port in zip(SERVICES, ports, strict=True)}
        self.stack = Stack(
            {
                "COMPOSE_PROJECT_NAME": self.project,
                "COMPOSE_FILE": os.pathsep.join(str(file.relative_to(ROOT)) for file in self.files),
                "NETWORK_PREFIX": self._free_prefix(),
                "CONSUL_UI_PORT": str(ui_port),
                "TOPOLOGY_PORT": str(topology_port),
                "E2E_DNS_PORT": str(self.dns_port),
                "E2E_JOURNALS": str(self.journals),
                "POSTGRES_PASSWORD_FILE": str(password.resolve()),
                **{name: str(port) for name, port in published.items()},
                **images,
            }
        )
        self.password = PASSWORD
        self.consul_port = ui_port
        self.consul = f"http://127.0.0.1:{ui_port}"
        self.page = f"http://127.0.0.1:{topology_port}"
        self.edge = {service.name: f"http://127.0.0.1:{port}" for service, port in zip(SERVICES, ports, strict=True)}
        self.http = httpx.Client(timeout=10.0, trust_env=False)

    def _free_prefix(self) -> str:
        taken = {
            str(config.get("Subnet", ""))
            for network in self.engine.networks.list()
            for config in (network.attrs["IPAM"]["Config"] or ())
        }
        prefixes = (f"10.213.{number}" for number in _SUBNETS)
        return next(prefix for prefix in prefixes if not any(subnet.startswith(prefix + ".") for subnet in taken))

    def up(self) -> None:
        """Builds and starts everything, and returns when all of it works."""
        self.down()  # what a run left that was killed
        # First, for the client runs the image of a service and has none to build.
        self.stack.compose("build")
        self.stack.compose("up", "-d", "--remove-orphans", "--scale", f"backend={BACKENDS}")
        self.connect()
        self.settle()

    def connect(self) -> None:
        """Finds the way to Consul, which runs by now."""
        self.registry = ServiceRegistry("127.0.0.1", self.consul_port)

    def down(self) -> None:
        """Removes every container, network and volume of the project."""
        self.stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")

    def close(self) -> None:
        """Leaves nothing of it."""
        self.http.close()
        if hasattr(self, "registry"):
            self.registry.close()
        self.down()
        self.engine.close()

    def container(self, name: str) -> Container:
        """The one container of this service of the compose file, stopped or not."""
        (found,) = self.containers(name)
        return found

    def replicas(self, service: Service = BACKEND) -> list[Replica]:
        """All of a service, stopped ones too, by name."""
        return [Replica(container, service) for container in self.containers(service.folder)]

    def containers(self, name: str | None = None) -> list[Container]:
        """All of the project, or of one service of the compose file, stopped ones too, by name."""
        labels = [f"com.docker.compose.project={self.project}"]
        labels += [f"com.docker.compose.service={name}"] if name else []
        found = self.engine.containers.list(all=True, filters={"label": labels})
        return sorted(found, key=lambda container: str(container.name))

    def free_address(self) -> str:
        """An address of the services' network that nobody is given by himself: the last but one."""
        return f"{self.stack.variables['NETWORK_PREFIX']}.126"

    def scale(self, backends: int) -> None:
        """So many replicas from now on; returns when Compose is done, not when they answer."""
        self.keep_logs("before scaling")  # which removes containers, and their logs with them
        self.stack.compose(
            *("up", "-d", "--no-deps", "--no-recreate", "--scale", f"backend={backends}", "backend"),
        )

    def passing(self, service: Service = BACKEND) -> set[str]:
        """The ids that Consul says are passing; none while it can't be asked."""
        return self._registered(service, passing=True)

    def registered(self, service: Service = BACKEND) -> set[str]:
        """The ids that Consul knows, sick ones too; none while it can't be asked."""
        return self._registered(service, passing=False)

    def _registered(self, service: Service, passing: bool) -> set[str]:
        try:
            return {instance.id for instance in self.registry.discover_service(service.name, passing=passing)}
        except RegistryUnavailableError:
            return set()

    def answering(self, service: Service = BACKEND, calls: int = 12) -> set[str]:
        """The ids that answered some calls through the edge."""
        found = set()
        for _ in range(calls):
            try:
                answer = self.http.get(f"{self.edge[service.name]}/health")
            except httpx.TransportError:
                continue
            if answer.is_success:
                found.add(answer.headers.get("X-Service-Instance", "unnamed"))
        return found

    def works(self) -> bool:
        """Whether every container is healthy, every instance passes and no other, and the edge knows them all."""
        containers = self.containers()
        for container in containers:
            state = container.attrs["State"]
            if state["Status"] != "running" or state.get("Health", {}).get("Status", "healthy") != "healthy":
                return False
        return self.everyone_passes() and all(
            self.answering(service, 4 * len(self.replicas(service))) == self.passing(service) for service in SERVICES
        )

    def everyone_passes(self) -> bool:
        """Whether every instance passes under its own address, and nobody else does."""
        return all(
            self.passing(service) == {replica.instance for replica in self.replicas(service)} for service in SERVICES
        )

    def ghosts(self) -> set[str]:
        """Registrations of instances that there are no more: Consul keeps them, as critical, for a minute or two."""
        return {
            instance
            for service in SERVICES
            for instance in self.registered(service) - {replica.instance for replica in self.replicas(service)}
        }

    def settle(self, backends: int = BACKENDS, seconds: float = 90.0) -> None:
        """Undoes what a scene left, and returns when everything works with so many backends."""
        for container in self.containers():
            if container.status == "paused":
                container.unpause()
            elif container.status != "running":
                container.start()
        if len(self.replicas()) != backends:
            self.scale(backends)
        wait_until(self.works, seconds, "everything works", self.describe)
        for ghost in self.ghosts():
            self.registry.deregister_service(ghost)
        self._query("truncate cards")  # a search reads all of them: the last scene would bear the cards of all before

    def describe(self) -> str:
        """How it stands, for messages."""
        return ", ".join(f"{container.name} {container.status}" for container in self.containers())

    def cards(self) -> dict[str, int]:
        """Title, without its spaces → how many cards in the database carry it."""
        said = self._query("select replace(title, ' ', '') || E'\\t' || count(*) from cards group by title")
        rows = (line.split("\t") for line in said.splitlines())
        return {title: int(count) for title, count in rows}

    def _query(self, statement: str) -> str:
        psql = ["psql", "-h", "127.0.0.1", "-U", "registry", "-At", "-c", statement]
        return run_in(self.container("postgres"), *psql, PGPASSWORD=self.password, PGOPTIONS="-c statement_timeout=15s")

    def keep_logs(self, folder: str) -> None:
        """Writes what every container has logged into a folder of this name."""
        target = self.folder / "logs" / folder
        target.mkdir(parents=True, exist_ok=True)
        for container in self.containers():
            with (target / f"{container.name}.log").open("wb") as file:
                file.write(container.logs(timestamps=True))


AnySystem = TypeVar("AnySystem", bound=System)


@contextmanager
def running(system: AnySystem) -> Iterator[AnySystem]:
    """The system, up and working; nothing of it is left when the context ends, whatever happened."""
    try:
        system.up()
        yield system
    except BaseException:
        system.keep_logs("at the end")
        raise
    finally:
        system.close()
