"""Pytest fixtures that run a real Consul agent: `pytest_plugins = ["registry.testing.fixtures"]`."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, Unpack

from registry.extras import extra
from registry.testing.agent import ConsulAgent, find_consul, running_agent
from registry.testing.instances import Options, RunningInstance, running_instances

with extra("testing"):
    import pytest

__all__ = [
    "ConsulAgent",
    "Instances",
    "RunningInstance",
    "consul_agent",
    "consul_binary",
    "fresh_consul_agent",
    "instances",
    "locked_consul_agent",
    "private_consul_agent",
]


class Instances(Protocol):
    """The type of the fixture `instances`."""

    def __call__(self, service: str, count: int = 1, **options: Unpack[Options]) -> list[RunningInstance]: ...


@pytest.fixture(scope="session")
def consul_binary(request: pytest.FixtureRequest) -> Path:
    """The Consul binary that the agents run. If it has to be obtained first, progress is shown despite capture."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return find_consul()


@pytest.fixture(scope="session")
def consul_agent(consul_binary: Path) -> Iterator[ConsulAgent]:
    """One agent shared by all tests of the session: use unique service names, and leave it running."""
    with running_agent(binary=consul_binary) as agent:
        yield agent


@pytest.fixture
def fresh_consul_agent(consul_binary: Path) -> Iterator[ConsulAgent]:
    """An agent for this test only, which is there at once: it forgets everything when it is stopped."""
    with running_agent(binary=consul_binary, in_memory=True) as agent:
        yield agent


@pytest.fixture
def private_consul_agent(consul_binary: Path) -> Iterator[ConsulAgent]:
    """An agent for this test only, which it may kill, pause and restart."""
    with running_agent(binary=consul_binary) as agent:
        yield agent


@pytest.fixture(scope="session")
def locked_consul_agent(consul_binary: Path) -> Iterator[ConsulAgent]:
    """One agent shared by all tests of the session that denies by default: ``agent.acl.token(rules)``."""
    with running_agent(binary=consul_binary, acl=True, in_memory=True) as agent:
        yield agent


@pytest.fixture
def instances() -> Iterator[Instances]:
    """Starts instances that end with the test: ``one, two = instances("my-service", 2, consul=consul_agent)``."""
    with ExitStack() as stack:

        def start(service: str, count: int = 1, **options: Unpack[Options]) -> list[RunningInstance]:
            return stack.enter_context(running_instances(service, count, **options))

        yield start
