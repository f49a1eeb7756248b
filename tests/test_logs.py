"""The logs of the three services, from a start without Consul to the end: every line parses and says enough."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.testing.fixtures import ConsulAgent
from tests.support.command import ServiceProcess, running_service, wait_until
from tools.services import SERVICES, Service

TOKEN = "b1gs3cr3t-0000-4000-8000-000000000000"


def lines(service: ServiceProcess) -> list[dict[str, Any]]:
    """Every line of its log. Raises: ValueError, when one is not JSON."""
    return [json.loads(line) for line in service.log.splitlines()]


def said(service: ServiceProcess, beginning: str) -> list[str]:
    """The messages of the package that begin so."""
    found = [line["message"] for line in lines(service) if line["logger"] == "registry"]
    return [message for message in found if message.startswith(beginning)]


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.folder)
def test_a_run_through_outages_reads_well(service: Service, private_consul_agent: ConsulAgent, tmp_path: Path) -> None:
    """Without Consul, found, Consul killed, stopped: each is told once, in one line, and nothing else is."""
    private_consul_agent.stop()
    env = {"LOG_FORMAT": "json", "DATABASE_URL": f"sqlite:///{tmp_path}/cards.db"}
    with running_service(service.app, service.name, consul=private_consul_agent, cwd=tmp_path, env=env) as one:
        wait_until(lambda: said(one, "registration failed"))
        private_consul_agent.start()
        wait_until(one.is_found)
        wait_until(lambda: said(one, "Consul answers again"))
        for path in ("/health", f"/health?instance={one.id}", "/openapi.json"):
            assert httpx.get(one.url + path, trust_env=False).is_success
        private_consul_agent.kill()
        wait_until(lambda: len(said(one, "Consul does not say who serves")) >= 2)
        one.end(signal.SIGTERM)
        (failed,) = said(one, "registration failed")
        assert "it serves on and tries again every 2 s: Consul at http://" in failed
        assert failed.endswith("is it running?")
        assert said(one, "registered") == [f"registered {one.id}"]
        assert len(said(one, "could not deregister")) == 1
        found = lines(one)
    assert {line["logger"] for line in found} == {"uvicorn.error", "uvicorn.access", "registry"}
    assert {line["instance"] for line in found} == {f"{one.name}-?-{one.port}", one.id}
    paths = [line["path"] for line in found if line["logger"] == "uvicorn.access"]
    assert [path for path in paths if path != "/"] == ["/openapi.json"]
    assert len(found) - len(paths) < 25


def test_at_debug_no_secret_is_logged(private_consul_agent: ConsulAgent, tmp_path: Path) -> None:
    """Every library may talk: each line still parses, and neither token nor password is in it."""
    env = {
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "DEBUG",
        "CONSUL_HTTP_TOKEN": TOKEN,
        "DATABASE_URL": f"sqlite:///{tmp_path}/cards.db",
        "SERVICE_HEALTH_CHECK_HEADERS": json.dumps({"Authorization": TOKEN}),
    }
    with running_service("backend.main:app", "backend-api", consul=private_consul_agent, env=env) as one:
        # The agent knows no such token, and refuses nothing as it asks for none.
        wait_until(lambda: said(one, "registered"))
        card = {"title": "a", "content": "two\nlines", "tags": []}
        assert httpx.post(f"{one.url}/api/publish", json=card, trust_env=False).status_code == 201
        one.end(signal.SIGTERM)
        found, log = lines(one), one.log
    assert {"uvicorn.access", "registry", "httpx"} <= {line["logger"] for line in found}
    assert TOKEN not in log
