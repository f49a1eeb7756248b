"""What is asked for, checked before anything is written: a name and a port that nobody has yet."""

import importlib.util
import keyword
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from tools.services import ROOT, SERVICES

__all__ = ["Request", "RequestError", "check", "check_folder"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 24
_STANDARD_PORTS = {5432: "Postgres", 8404: "the edge"} | dict.fromkeys(
    [*range(8300, 8303), *range(8500, 8504), 8600], "Consul"
)
_COMPOSE = tuple(f"deploy/compose/docker-compose{overlay}.yml" for overlay in ("", ".observe", ".locked"))


class RequestError(Exception):
    """It can't be made; the message says why, in a sentence."""


@dataclass(frozen=True)
class Request:
    """A service to make: ``billing`` becomes billing-api."""

    name: str
    port: int
    calls: str
    """The service that its example calls."""
    auth: bool = False
    """Whether its routes ask callers for a token."""

    @property
    def package(self) -> str:
        """Its folder, its import package and its name in docker-compose.yml."""
        return self.name.replace("-", "_")


def check(name: str, port: str, calls: str, auth: bool = False) -> Request:
    """The request, when this repository has room for it. Reads only. Raises: RequestError."""
    _check_name(name)
    request = Request(name, _port(port), calls, auth)
    for compose in _COMPOSE:
        _check_not_taken(request, compose)
    _check_importable(request)
    taken = _STANDARD_PORTS | _ports() | {service.port: service.name for service in SERVICES}
    if request.port in taken:
        raise RequestError(f"Port {port} is taken: {taken[request.port]} has it.")
    known = [service.name for service in SERVICES]
    if calls not in known:
        raise RequestError(f"There is no service {calls!r} to call: choose one of {', '.join(known)}.")
    return request


def check_folder(folder: Path) -> None:
    """A repository can be made there. Reads only. Raises: RequestError."""
    if folder.resolve().is_relative_to(ROOT):
        raise RequestError(f"{folder} is inside this repository: choose a folder beside it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} is there already: choose a folder that is new or empty.")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise RequestError(
            f"{name!r} is no name for a service: use lower-case letters, digits and inner hyphens, "
            f"a letter first, at most {_LONGEST} characters."
        )
    if name == "api" or name.endswith("-api"):
        raise RequestError(f"{name!r} is no name for a service: leave out -api, it is added.")


def _port(port: str) -> int:
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0
    if not 1024 <= number <= 65535:
        raise RequestError(f"{port!r} is no port for a service: choose a number from 1024 to 65535.")
    return number


def _check_not_taken(request: Request, compose: str) -> None:
    text = (ROOT / compose).read_text()
    name, package = request.name, request.package
    if (ROOT / "services" / package).exists():
        raise RequestError(f"The name {name!r} is taken: there is services/{package}.")
    if package in yaml.safe_load(text)["services"] or f"{package.upper()}_PORT:" in text:
        raise RequestError(f"The name {name!r} is taken: {compose} has it.")


def _check_importable(request: Request) -> None:
    """Its package must shadow no module, and no module its package."""
    name, package = request.name, request.package
    if keyword.iskeyword(package) or keyword.issoftkeyword(package):
        raise RequestError(f"The name {name!r} is reserved: it is a word of Python itself.")
    if package in sys.stdlib_module_names:
        raise RequestError(f"The name {name!r} is reserved: Python's standard library has a module {package}.")
    ours = {path.stem for path in ROOT.iterdir()} | {path.name for path in ROOT.glob("packages/*/src/*")}
    locked = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    if package in ours or name in locked or importlib.util.find_spec(package):
        raise RequestError(f"The name {name!r} is taken: a module or package {package} is in use here already.")


def _ports() -> dict[int, str]:
    """Every port that the containers use, and for what."""
    haproxy = (ROOT / "deploy/compose/haproxy.cfg").read_text()
    ports = {
        int(port): compose
        for compose in _COMPOSE
        for pair in re.findall(r"_PORT:-(\d+)\}:(\d+)", (ROOT / compose).read_text())
        for port in pair
    }
    return ports | {int(port): "the edge" for port in re.findall(r"^ *bind \S*:(\d+)", haproxy, re.MULTILINE)}
