"""One system for all scenes, made whole again before each; a report of what they came to; logs of those that failed."""

import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from deploy.compose.images import choose_images
from deploy.compose.stack import StackError, check_engine
from tests.e2e.report import Row, Scene, markdown, write
from tests.e2e.system import BACKENDS, System, running
from tools.services import ROOT

FOLDER = ROOT / ".e2e"
PUBLISHED = ROOT / "docs" / "e2e"
S = TypeVar("S", bound=System)
_ROWS = pytest.StashKey[list[Scene]]()
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The session's own option."""
    parser.addoption("--publish", action="store_true", help="keep the report and the screenshot in docs/e2e")


def pytest_configure(config: pytest.Config) -> None:
    """A polite kill ends the run as Ctrl-C does: everything is removed."""
    config.stash[_ROWS] = []
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remembers on the test whether it failed."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of scenes, where everybody sees it."""
    if rows := config.stash[_ROWS]:
        terminalreporter.section("scenes")
        terminalreporter.write(markdown(rows))
        terminalreporter.write_line(f"Kept: {FOLDER}/report.md, junit.xml, and logs where a scene failed.")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Writes the table, and into the documentation when that was asked for."""
    if rows := config.stash[_ROWS]:
        head = heading("End-to-end scenes", "e2e -- --publish")
        write(rows, head, FOLDER / "report.md")
        if config.getoption("--publish"):
            picture = "Consul's UI, opened by one of the scenes:\n\n![Three healthy backends](consul-ui.png)"
            write(rows, f"{head}\n\n{picture}", PUBLISHED / "README.md")


_COUNTED = (
    "Failed calls of all calls; *twice*: POSTs that were carried out more than once, counted at the replicas and in "
    "the database."
)


def heading(title: str, session: str, counted: str = _COUNTED) -> str:
    """How a page of scenes begins. ``session``: with its options."""
    return (
        f"# {title}\n\nWritten by `nox -s {session}` on {time.strftime('%Y-%m-%d')}: "
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}. {counted}"
    )


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where this run leaves its report, the screenshot and, of scenes that failed, the logs."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    return FOLDER


@pytest.fixture(scope="session")
def system(request: pytest.FixtureRequest, folder: Path) -> Iterator[System]:
    """The system, up and working; shows progress despite capture."""
    yield from shown(request, lambda: System(choose_images(print), folder))


def shown(request: pytest.FixtureRequest, make: Callable[[], S]) -> Iterator[S]:
    """The system that is made, up and working; shows progress despite capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    try:
        check_engine()
    except StackError as error:
        pytest.exit(str(error), returncode=1)
    with capture.global_and_fixture_disabled():
        context = running(make())
        entered = context.__enter__()
    try:
        yield entered
    finally:
        with capture.global_and_fixture_disabled():
            context.__exit__(None, None, None)


@pytest.fixture
def backends(request: pytest.FixtureRequest) -> int:
    """How many stand before the scene; a test parametrizes it indirectly for another number."""
    return int(getattr(request, "param", BACKENDS))


@pytest.fixture
def scene(system: System, backends: int, request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row of this test's scene, whose name is the test's first line; everything works when it begins."""
    system.settle(backends)
    row = Row(str(request.function.__doc__).partition("\n")[0].removesuffix("."))
    request.config.stash[_ROWS].append(row)
    begun = time.monotonic()
    yield row
    row.seconds = time.monotonic() - begun
    if request.node.stash.get(_FAILED, False):
        row.passed = False
        system.keep_logs(request.node.name)
