"""Faults on command: refused where they are not meant, done to requests and never to the health check, written down."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.command import ServiceProcess, running_service, wait_until

_APP = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    """A trivial app with faults around it, in a process of its own."""
    (tmp_path / "trivial.py").write_text(_APP)
    env = {"FAULTS_ALLOWED": "yes", "FAULTS_APP": "trivial:app", "FAULTS_DIRECTORY": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[1])))
    options = ("--factory", "--lifespan", "off")
    with running_service("tests.support.faults:create_app", "faulty", *options, env=env, cwd=tmp_path) as running:
        yield running


def command(service: ServiceProcess, faults: object) -> None:
    """As the module's own command does it from inside a container."""
    service.http.put("/faults", json=faults).raise_for_status()


def test_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    """Without the variable that only tests set, the app does not start and says why."""
    env = {"FAULTS_APP": "trivial:app", "FAULTS_DIRECTORY": str(tmp_path)}
    with running_service("tests.support.faults:create_app", "faulty", "--factory", env=env, wait=False) as refused:
        assert refused.process.wait(30) != 0
        assert "FAULTS_ALLOWED=yes" in refused.log


def test_faults_are_done_to_requests_and_not_to_the_health_check(service: ServiceProcess) -> None:
    """A commanded status answers every path but /health, until the command is taken back."""
    assert service.http.get("/work").status_code == 200
    command(service, {"status": 503})
    assert service.http.get("/work").status_code == 503
    assert service.http.get("/health").status_code == 200
    command(service, {})
    assert service.http.get("/work").status_code == 200


def test_a_delay_holds_up_the_answer(service: ServiceProcess) -> None:
    """A commanded delay is waited before the app answers."""
    command(service, {"delay": 0.3})
    assert service.http.get("/work").elapsed.total_seconds() >= 0.3


@pytest.mark.parametrize("faults", [{"status": "500"}, {"delay": "long"}, {"explode": True}, [], "no json"])
def test_a_command_that_is_not_understood_changes_nothing(service: ServiceProcess, faults: object) -> None:
    """A wrong command is refused with what can be said, and the one before it stays."""
    command(service, {"status": 418})
    answer = service.http.put("/faults", content=faults if isinstance(faults, str) else json.dumps(faults))
    assert answer.status_code == 422
    assert "status, delay (seconds), eat (true)" in answer.json()["detail"]
    assert service.http.get("/work").status_code == 418


def test_what_arrives_is_written_down_before_it_is_answered(service: ServiceProcess, tmp_path: Path) -> None:
    """Requests with an id are in the journal, in their order, even those that were never answered."""
    journal = tmp_path / os.uname().nodename
    service.http.get("/one", headers={"X-Request-Id": "a"})
    service.http.get("/unnamed")
    command(service, {"delay": 60})
    with pytest.raises(httpx.ReadTimeout):
        service.http.post("/two", headers={"X-Request-Id": "b"}, timeout=0.5)
    service.end(signal.SIGKILL)
    assert journal.read_text() == "GET\t/one\ta\nPOST\t/two\tb\n"


def test_eating_takes_memory_until_it_is_ended(service: ServiceProcess) -> None:
    """The process grows without bound; here the test ends it, in a container the system does."""
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    command(service, {"eat": True})
    wait_until(lambda: process.memory_info().rss > before + (64 << 20))
    service.end(signal.SIGKILL)


def test_the_command_line_commands_the_service_of_its_host(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module's command reaches the service on this host's port, and ends with its complaint when it refuses."""
    from tests.support import faults

    monkeypatch.setenv("SERVICE_PORT", str(service.port))
    faults.main('{"status": 500}')
    assert service.http.get("/work").status_code == 500
    with pytest.raises(SystemExit, match="explode"):
        faults.main('{"explode": true}')
    assert "pytest" not in Path(faults.__file__).read_text(), "it runs in images that hold no test tools"
