"""One locked system for all scenes, made whole again before each; a report of what they came to."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.compose.images import choose_images
from tests.e2e.conftest import (
    _ROWS,
    backends,
    heading,
    pytest_addoption,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_terminal_summary,
    scene,
    shown,
)
from tests.e2e.report import write
from tests.locked.system import LockedSystem
from tools.services import ROOT

__all__ = [
    "backends",
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_makereport",
    "pytest_terminal_summary",
    "scene",
]

FOLDER = ROOT / ".e2e" / "locked"
PUBLISHED = ROOT / "docs" / "e2e" / "locked.md"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Writes the table, and into the documentation when that was asked for."""
    if rows := config.stash[_ROWS]:
        head = heading("Scenes of the locked system", "e2e-locked -- --publish")
        write(rows, head, FOLDER / "report.md")
        if config.getoption("--publish"):
            write(rows, head, PUBLISHED)


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where this run leaves its report and, of scenes that failed, the logs."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    return FOLDER


@pytest.fixture(scope="session")
def system(request: pytest.FixtureRequest, folder: Path) -> Iterator[LockedSystem]:
    """The system, up and working; shows progress despite capture."""
    yield from shown(request, lambda: LockedSystem(choose_images(print), folder))
