import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from registry import ServiceRegistry
from registry.consul import connection
from registry.testing.fixtures import ConsulAgent
from tests.support.server import Answer, RecordingServer, Request, Serve, recording_server


@pytest.fixture
def service_name() -> str:
    """A name that no other test uses: the agent is shared."""
    return f"cards-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def service_registry(consul_agent: ConsulAgent) -> Iterator[ServiceRegistry]:
    """The control plane of the shared agent."""
    with ServiceRegistry("127.0.0.1", consul_agent.http_port) as registry:
        yield registry


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The address of each request that this process has sent to Consul, the newest last."""
    addresses: list[str] = []
    signed = connection._Requests.signed

    def note(requests: connection._Requests, request: dict[str, Any], token: str | None) -> dict[str, Any]:
        addresses.append(str(request["url"]))
        return signed(requests, request, token)

    monkeypatch.setattr(connection._Requests, "signed", note)
    return addresses


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts instances on real sockets: ``serve()`` answers 200, ``serve(answer)`` what ``answer(request)`` says."""
    with ExitStack() as stack:

        def start(answer: Callable[[Request], Answer | None] | None = None) -> RecordingServer:
            return stack.enter_context(recording_server(answer))

        yield start
