import signal
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

pytest_plugins = ["registry.testing.fixtures"]

# A shell starts its background jobs with SIGINT ignored, and that is inherited: no child could be sent a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run every async test on asyncio: it is the loop the services run on."""
    return "asyncio"


REAL = {"consul_agent", "fresh_consul_agent", "private_consul_agent", "consul_binary", "instances", "postgres"}
"""Fixtures that start processes."""
STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"}
"""What Python reports when it starts one: https://docs.python.org/3/library/audit_events.html"""
TOGETHER = Path(__file__).parent / "tests"
"""Tests of everything together."""
_quick: list[pytest.Item] = []
"""The test that is running, if it is not marked ``real``."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what can't be quick: ``nox -s quick`` leaves it out."""
    for item in items:
        if REAL & set(getattr(item, "fixturenames", ())) or item.path.is_relative_to(TOGETHER):
            item.add_marker("real")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that is not marked ``real`` can start no process."""
    if item.get_closest_marker("real") is None:
        _quick.append(item)
    try:
        return (yield)
    finally:
        _quick.clear()


def _refuse(event: str, _: tuple[object, ...]) -> None:
    if event in STARTS and _quick:
        raise RuntimeError(f"{_quick[0].nodeid} starts a process: mark it with pytest.mark.real")


sys.addaudithook(_refuse)
