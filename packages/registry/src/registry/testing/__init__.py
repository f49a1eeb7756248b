"""Pytest fixtures with a real Consul agent behind them: `pytest_plugins = ["registry.testing"]`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.testing.agent import ConsulAgent, find_consul, running_agent

__all__ = ["ConsulAgent", "consul_agent", "consul_binary", "private_consul_agent"]


@pytest.fixture(scope="session")
def consul_binary(request: pytest.FixtureRequest) -> Path:
    """The Consul binary that agents run; when it must be built, progress shows despite capture."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return find_consul()


@pytest.fixture(scope="session")
def consul_agent(consul_binary: Path) -> Iterator[ConsulAgent]:
    """One agent shared by all tests of the session: use names of your own, leave it running."""
    with running_agent(binary=consul_binary) as agent:
        yield agent


@pytest.fixture
def private_consul_agent(consul_binary: Path) -> Iterator[ConsulAgent]:
    """An agent of this test alone, to kill, pause and restart."""
    with running_agent(binary=consul_binary) as agent:
        yield agent
