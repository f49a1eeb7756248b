"""One locked system for all scenes, made whole again before each; a report of what they came to."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.compose.images import choose_images
from deploy.compose.stack import StackError, check_engine
from tests.e2e.conftest import (
    _ROWS,
    backends,
    pytest_addoption,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_terminal_summary,
    scene,
)
from tests.e2e.report import write
from tests.e2e.system import running
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
        head = (
            f"# Scenes of the locked system\n\n"
            f"Written by `nox -s e2e-locked -- --publish` on {time.strftime('%Y-%m-%d')}: "
            f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}. Failed calls of all calls; "
            "*twice*: POSTs that were carried out more than once, counted at the replicas and in the database."
        )
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
    capture = request.config.pluginmanager.getplugin("capturemanager")
    try:
        check_engine()
    except StackError as error:
        pytest.exit(str(error), returncode=1)
    with capture.global_and_fixture_disabled():
        context = running(LockedSystem(choose_images(print), folder))
        entered = context.__enter__()
    try:
        yield entered
    finally:
        with capture.global_and_fixture_disabled():
            context.__exit__(None, None, None)
