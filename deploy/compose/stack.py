"""The system in containers, driven through Docker Compose: which command, which images, where everything answers.

Standard library only, so that `nox -s down` needs no environment of its own. Everything here blocks.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tools.services import ROOT

__all__ = [
    "HERE",
    "LOCAL_IMAGES",
    "Container",
    "Stack",
    "StackError",
    "can_have_official_images",
    "check_engine",
    "check_password",
    "compose_command",
    "exit_code",
    "has_images",
    "image_label",
    "overlaid",
    "read_env",
]

HERE = Path(__file__).parent
LOCAL_IMAGES = HERE / "local-images.env"
_ANSWER_SECONDS = 20.0
_NO_ENGINE = """\
No Docker engine answers: {reason}
Start Docker; on a Debian machine without one, as root: tools/docker.sh start"""
_NO_COMPOSE = """\
Docker Compose was not found. Install it (the plugin `docker compose`, version 2, is best; `docker-compose` 1.29 works),
or set DOCKER_COMPOSE to the command that runs it."""
_SHOWN = """\
POSTGRES_PASSWORD is set, and no container would get it: what stands in a variable, the engine shows to whoever asks.
Write it into a file that users 999 and 10001 can read, in a folder of yours alone, and set POSTGRES_PASSWORD_FILE to
its absolute path instead."""


class StackError(Exception):
    """The containers can't do what was asked; the message says why, and what to do about it."""


@dataclass(frozen=True)
class Container:
    """One container of the stack, as the engine sees it now."""

    id: str
    name: str
    service: str
    """The service's name in docker-compose.yml."""
    number: str
    """Which of its replicas, from 1."""
    state: str
    """``running``, ``exited``, ``restarting``, ...; ``done``: a job that ended well, and is not started again."""
    health: str
    """``starting``, ``healthy``, ``unhealthy``; empty: not checked."""
    address: str
    """In the services' network, that of Postgres in its own; empty while it does not run."""

    @property
    def short_name(self) -> str:
        """``backend-2``: the same under every Compose version, and without the project's name."""
        return f"{self.service}-{self.number}"


@dataclass
class Stack:
    """One Compose project. ``variables`` win over the shell's and over .env; a second project needs its own names."""

    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.command = compose_command()

    def compose(self, *arguments: str) -> None:
        """Runs Compose, its output shown as it comes. Raises: StackError."""
        done = subprocess.run([*self.command, *arguments], cwd=ROOT, env=self.environment(), check=False)
        if done.returncode != 0:
            raise StackError(f"`{shlex.join([*self.command, *arguments])}` failed, see above.")

    def ask(self, *arguments: str) -> str:
        """What Compose answers on standard output. Raises: StackError."""
        return _ask([*self.command, *arguments], self.environment())

    def keeper(self, *job: str) -> list[str]:
        """The command that runs a job of the keeper, for the locked deployment."""
        return [*self.command, "run", "--rm", "--no-deps", "-T", "keeper", *job]

    def pass_of(self, subject: str) -> str:
        """A token by which the locked front door lets somebody in, for an hour. Raises: StackError."""
        return _ask(self.keeper("pass", "--subject", subject), self.environment()).strip()

    def job(self, name: str, *, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> None:
        """Runs a job of the keeper; what it says is shown. Raises: StackError."""
        source: Any = subprocess.DEVNULL if stdin is None else stdin
        done = subprocess.run(
            self.keeper(name), cwd=ROOT, env=self.environment(), stdin=source, stdout=stdout, check=False
        )
        if done.returncode != 0:
            raise StackError(f"the keeper's job {name!r} failed, see above.")

    def address(self, service: str, port: int) -> str:
        """``host:port`` under which this machine reaches a published port. Raises: StackError."""
        return self.ask("port", service, str(port)).strip().replace("0.0.0.0", "127.0.0.1")  # noqa: S104

    def containers(self) -> list[Container]:
        """Every container of this project, by service and name, stopped ones too. Raises: StackError."""
        ids = self.ask("ps", "-a", "-q").split()
        # One that went away since is no error.
        done = subprocess.run(["docker", "inspect", *ids], capture_output=True, text=True, check=False) if ids else None
        found: list[dict[str, Any]] = json.loads(done.stdout) if done else []
        return sorted(map(_container, found), key=lambda container: (container.service, container.name))

    def volumes(self) -> list[str]:
        """The names of this project's volumes, in the engine. Raises: StackError."""
        project = self.environment().get("COMPOSE_PROJECT_NAME") or read_env(ROOT / ".env")["COMPOSE_PROJECT_NAME"]
        label = f"label=com.docker.compose.project={project}"
        return _ask(["docker", "volume", "ls", "-q", "--filter", label]).split()

    def logs(self, container: Container, lines: int = 15) -> str:
        """The last lines that a container logged."""
        command = ["docker", "logs", "--tail", str(lines), container.id]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        """What Compose is run with."""
        return {**os.environ, **self.variables}


def _container(found: dict[str, Any]) -> Container:
    labels = found["Config"]["Labels"]
    networks = found["NetworkSettings"]["Networks"]
    # The services' own, in which they are registered, comes first.
    names = sorted(networks, key=lambda name: not name.endswith("_default"))
    return Container(
        id=found["Id"],
        name=found["Name"].lstrip("/"),
        service=labels["com.docker.compose.service"],
        number=labels["com.docker.compose.container-number"],
        state="done" if _is_done(found) else found["State"]["Status"],
        health=found["State"].get("Health", {}).get("Status", ""),
        address=next((networks[name]["IPAddress"] for name in names if networks[name]["IPAddress"]), ""),
    )


def _is_done(found: dict[str, Any]) -> bool:
    restarts = found["HostConfig"]["RestartPolicy"]["Name"] not in {"", "no"}
    return not restarts and (found["State"]["Status"], found["State"]["ExitCode"]) == ("exited", 0)


def compose_command() -> list[str]:
    """How Compose is run here: $DOCKER_COMPOSE, else the plugin, else docker-compose. Raises: StackError."""
    if wanted := os.environ.get("DOCKER_COMPOSE"):
        return shlex.split(wanted)
    plugin = ["docker", "compose"]
    if (
        shutil.which("docker")
        and subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0
    ):
        return plugin
    if alone := shutil.which("docker-compose"):
        return [alone]
    raise StackError(_NO_COMPOSE)


def overlaid(*overlays: str) -> dict[str, str]:
    """The variables that put these overlays, such as ``observe``, over the files that Compose would read."""
    files = os.environ.get("COMPOSE_FILE") or read_env(ROOT / ".env")["COMPOSE_FILE"]
    separator = os.environ.get("COMPOSE_PATH_SEPARATOR", os.pathsep)
    added = [str((HERE / f"docker-compose.{overlay}.yml").relative_to(ROOT)) for overlay in overlays]
    return {"COMPOSE_FILE": separator.join([*(file for file in files.split(separator) if file not in added), *added])}


def exit_code(work: Callable[[], object], *also: type[Exception]) -> int:
    """Of a command that does this; a StackError, or one of the others, is said in a line. Blocks."""
    said: tuple[type[Exception], ...] = (StackError, *also)
    try:
        check_engine()
        work()
    except said as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def check_engine() -> None:
    """Raises: StackError, when no Docker engine answers."""
    try:
        _ask(["docker", "version", "--format", "{{.Server.Version}}"])
    except FileNotFoundError:
        raise StackError(_NO_ENGINE.format(reason="there is no command `docker`.")) from None
    except StackError as error:
        raise StackError(_NO_ENGINE.format(reason=str(error))) from None


def check_password() -> None:
    """Raises: StackError, when a password of Postgres is set where nothing reads it: the default would be taken."""
    if os.environ.get("POSTGRES_PASSWORD"):
        raise StackError(_SHOWN)


def read_env(path: Path) -> dict[str, str]:
    """The variables of an env file: NAME=value lines, comments and blank lines."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def image_label(image: str, label: str) -> str | None:
    """A label of an image that this engine has; None when it has neither."""
    form = f'{{{{index .Config.Labels "{label}"}}}}'
    command = ["docker", "image", "inspect", "--format", form, image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or None) if done.returncode == 0 else None


def has_images(images: Mapping[str, str]) -> bool:
    """Whether this engine has them all."""
    return (
        subprocess.run(["docker", "image", "inspect", *images.values()], capture_output=True, check=False).returncode
        == 0
    )


def can_have_official_images(images: Mapping[str, str]) -> bool:
    """Whether they can be pulled: asks their registry for each, fetches nothing, waits 20 s at most for an answer."""
    for image in images.values():
        command = ["docker", "manifest", "inspect", image]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_ANSWER_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return False
        if done.returncode != 0 and not has_images({"": image}):
            return False
    return True


def _ask(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError(f"`{shlex.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
