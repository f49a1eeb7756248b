"""The table of services that every way of running and checking them goes by: one row per folder under services/.

Standard library only, so that `nox -s down` needs no environment of its own.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "SERVICES", "Service"]

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Service:
    """One service of this repository."""

    folder: str
    """Under services/; also its import package and its name in docker-compose.yml."""
    name: str
    """In Consul: what callers call it by."""
    port: int
    """Where it listens, and where the edge publishes it."""

    @property
    def app(self) -> str:
        """What uvicorn runs."""
        return f"{self.folder}.main:app"


def _read(pyproject: Path) -> Service:
    document = tomllib.loads(pyproject.read_text())
    return Service(pyproject.parent.name, document["project"]["name"], document["tool"]["service"]["port"])


SERVICES = tuple(sorted(map(_read, ROOT.glob("services/*/pyproject.toml")), key=lambda service: service.port))
"""By port."""
