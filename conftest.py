import os
import signal

import pytest

pytest_plugins = ["registry.testing.fixtures"]

# A shell starts its background jobs with SIGINT ignored, and that is inherited: no child could be sent a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What is deployed is uvicorn with what it needs and no more; test_runners.py tries the rest that is installed here.
os.environ.setdefault("UVICORN_HTTP", "h11")
os.environ.setdefault("UVICORN_LOOP", "asyncio")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run every async test on asyncio: it is the loop the services run on."""
    return "asyncio"


REAL = {"consul_agent", "private_consul_agent", "consul_binary", "instances"}
"""Fixtures that start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what can't be quick: ``nox -s quick`` leaves it out."""
    for item in items:
        if REAL & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")
