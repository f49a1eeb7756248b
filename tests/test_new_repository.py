"""The next service in a repository of its own: `nox -s new-service -- billing 8004 --standalone FOLDER`."""

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clone import run, succeed
from tools.services import ROOT

COMPOSE = "deploy/compose/docker-compose.yml"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of billing-api's own."""
    folder = tmp_path_factory.mktemp("alone") / "billing"
    succeed(ROOT, "-m", "tools.new_service", "billing", "8004", "--standalone", str(folder))
    return folder


def test_a_repository_of_its_own_passes_its_checks(repository: Path) -> None:
    """Lint, types and tests pass there, with nothing of this repository but the wheel."""
    succeed(repository, "-m", "nox")
    texts = [
        path.read_text() for path in repository.rglob("*") if path.suffix in {".py", ".toml", ".md", ".lock", ".yml"}
    ]
    assert not [text for text in texts if str(ROOT) in text]


def test_the_wheel_is_recorded_and_refreshed(repository: Path) -> None:
    """Version and hash stand there; another file under its name is refused, and `nox -s vendor` mends that."""
    sums = repository / "vendor/SHA256SUMS"
    recorded, name = sums.read_text().split()
    wheel = repository / "vendor" / name
    version = tomllib.loads((ROOT / "packages/registry/pyproject.toml").read_text())["project"]["version"]
    assert name == f"registry-{version}-py3-none-any.whl"
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == recorded
    assert f'"vendor/{name}"' in (repository / "pyproject.toml").read_text()
    with wheel.open("ab") as file:
        file.write(b"!")
    refused = run(repository, "-m", "nox", "-s", "tests")
    assert refused.returncode != 0
    assert "is not what vendor/SHA256SUMS says" in refused.stderr
    assert "Say where the repository" in run(repository, "-m", "nox", "-s", "vendor").stderr
    succeed(repository, "-m", "nox", "-s", "vendor", "--", str(ROOT))
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sums.read_text().split()[0]


def test_its_containers_join_a_running_consul(repository: Path) -> None:
    """Its Compose file has one container, as restricted as those here, in a network that exists already."""
    definition: dict[str, Any] = yaml.safe_load((repository / "docker-compose.yml").read_text())
    [billing] = definition["services"].values()
    base: dict[str, Any] = yaml.safe_load((ROOT / COMPOSE).read_text())["x-base"]
    del base["environment"]
    assert {key: billing[key] for key in base} == base
    assert definition["networks"]["consul"]["external"] is True
    assert (repository / "healthcheck.py").read_text() == (ROOT / "deploy/compose/healthcheck.py").read_text()


@pytest.mark.parametrize("folder", [ROOT / "services" / "new", ROOT.parent])
def test_a_repository_needs_a_place_of_its_own(folder: Path) -> None:
    """A folder inside this repository, or one with something in it, is refused."""
    refused = run(ROOT, "-m", "tools.new_service", "billing", "8004", "--standalone", str(folder))
    assert refused.returncode == 1
    assert "choose a folder" in refused.stderr
