"""Three nodes for all scenes, everything whole before each; a report of what they came to; logs where one failed."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from registry.testing.progress import UnavailableError
from tests.e2e.conftest import _FAILED, _ROWS, heading, pytest_configure, pytest_runtest_makereport
from tests.e2e.conftest import pytest_addoption as add_options
from tests.e2e.report import markdown, write
from tests.k8s.report import Row
from tests.k8s.system import System
from tools.kube.cluster import running_cluster
from tools.kube.place import KubeError
from tools.services import ROOT

__all__ = ["pytest_configure", "pytest_runtest_makereport"]

FOLDER = ROOT / ".e2e/kubernetes"
PUBLISHED = ROOT / "docs/e2e"
_COUNTED = "Calls by name from a pod, failed ones of all; *twice*: POSTs that are in the database more than once."
_SLOW = 1.0
"""Seconds: calls that took longer are kept, as those are that failed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The session's own options."""
    add_options(parser)
    parser.addoption("--locked", action="store_true", help="the overlay `locked` in place of `plain`")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of scenes, where everybody sees it."""
    if rows := config.stash[_ROWS]:
        terminalreporter.section("scenes")
        terminalreporter.write(markdown(rows))
        terminalreporter.write_line(f"Kept: {FOLDER}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Writes the table, and into the documentation when that was asked for."""
    if rows := config.stash[_ROWS]:
        title, options, page = "Scenes on three nodes of Kubernetes", "--publish", "kubernetes.md"
        if config.getoption("--locked"):
            title, options, page = f"{title}, locked", f"--locked {options}", "kubernetes-locked.md"
        head = heading(title, f"k8s -- {options}", _COUNTED)
        write(rows, head, FOLDER / "report.md")
        if config.getoption("--publish"):
            write(rows, head, PUBLISHED / page)


@pytest.fixture(scope="session")
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """The system on its nodes, up and working; shows progress despite capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    shutil.rmtree(FOLDER, ignore_errors=True)
    begun = time.monotonic()
    try:
        with capture.global_and_fixture_disabled():
            overlay = "locked" if request.config.getoption("--locked") else "plain"
            context = running_cluster(
                lambda text: sys.stderr.write(f"{time.monotonic() - begun:6.1f} s  {text}\n"), overlay
            )
            cluster = context.__enter__()
    except (KubeError, UnavailableError) as error:
        pytest.exit(str(error), returncode=1)
    try:
        yield System(cluster)
    finally:
        with capture.global_and_fixture_disabled():
            context.__exit__(None, None, None)


@pytest.fixture
def scene(system: System, request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row of this test's scene, whose name is the test's first line; everything works when it begins."""
    system.settle()
    row = Row(str(request.function.__doc__).partition("\n")[0].removesuffix("."))
    request.config.stash[_ROWS].append(row)
    begun = time.monotonic()
    yield row
    row.seconds = time.monotonic() - begun
    row.saw_failures()
    folder = FOLDER / request.node.name
    folder.mkdir(parents=True, exist_ok=True)
    if row.load is not None:
        calls = [asdict(call) | {"method": m} for m in ("GET", "POST") for call in row.load.report(m).outcomes]
        odd = [call for call in calls if call["error"] or call["seconds"] > _SLOW]
        (folder / "odd-calls.json").write_text(json.dumps(odd, indent=1))
    if request.node.stash.get(_FAILED, False):
        row.passed = False
        system.cluster.keep_logs(folder)
