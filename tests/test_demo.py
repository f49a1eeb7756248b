"""The demo as a user starts it: what it shows, how it fails, and that nothing of it stays."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from registry.testing.ports import free_ports
from tools.services import SERVICES

ROOT = Path(__file__).parents[1]
BACKEND = 1 + [service.name for service in SERVICES].index("backend-api")
"""Its place among the ports."""


@pytest.fixture
def ports() -> list[int]:
    """Free ports for Consul and every service of the table, so that a demo may run beside."""
    return free_ports(1 + len(SERVICES))


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The directory that the demo takes for temporary files; its processes carry the name in their environment."""
    path = tmp_path / "demo"
    path.mkdir()
    return path


@contextmanager
def demo(
    *options: str, ports: list[int], temporary: Path, consul: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process of its own."""
    variables = {"TMPDIR": str(temporary), "CONSUL_BIN": str(consul), "COLUMNS": "120", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "demo", *options, "--ports", *map(str, ports)],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def processes_of(temporary: Path) -> list[psutil.Process]:
    """What a demo with this directory started, and still runs."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = Path(process.environ().get("TMPDIR", "/")).is_relative_to(temporary)
            if inside and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def calls_in(logs: list[Path]) -> int:
    """How many cards were read, by the access logs."""
    return sum(log.read_text().count('"GET /api/cards/') for log in logs)


def left_running(temporary: Path) -> list[str]:
    """Their names, for a message."""
    return [str(process) for process in processes_of(temporary)]


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.02)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the demo printed, up to the line with the text."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return "".join(seen)
    raise AssertionError(f"the demo ended without {text!r}: {''.join(seen)}")


def test_once_shows_the_tour_and_leaves_nothing(ports: list[int], temporary: Path, consul_binary: Path) -> None:
    """`--once` publishes and enriches a card, shows three backends answering, a trace and the URLs, leaves nothing."""
    with demo("--once", ports=ports, temporary=temporary, consul=consul_binary) as process:
        output, errors = process.communicate(timeout=90)
        assert process.returncode == 0, output + errors
    consul, *services = ports
    assert re.search(r"card\W+\d+: Calling a service by name", output)
    assert re.search(r"suggested when published\W+tag 'consul'", output)
    assert re.search(r"POST /api/enrich says\W+tag 'discovery'", output)
    answered = re.findall(r"│ (\d+) +│ (backend-api-127\.0\.0\.1-\d+) +│$", output, re.MULTILINE)
    assert [int(number) for number, _ in answered] == list(range(1, 11))
    assert len({instance for _, instance in answered}) == 3
    for name in {service.name for service in SERVICES} - {"orchestrator-api"}:
        assert re.search(rf"│ {name} +│ {name}-127\.0\.0\.1-\d+ +│ healthy +│", output), "called by name"
    indent = r"\n[│ ]*[├└]── "
    path = (
        r"\nPOST /api/publish at orchestrator-api-\S+ 201 [\d.]+ ms",
        r"call backend-api ok [\d.]+ ms",
        r"POST to backend-api-\S+ \(p2c_\w+\) 201 [\d.]+ ms",
        r"POST /api/publish at backend-api-\S+ 201 [\d.]+ ms",
        r"call research-api ok [\d.]+ ms",
        r"POST to research-api-\S+ \(only\) 200 [\d.]+ ms",
        r"POST /api/enrich at research-api-\S+ 200 [\d.]+ ms",
        r"call backend-api ok [\d.]+ ms",
    )
    assert re.search(indent.join(path), output), "a publish as a tree"
    for port in services:
        assert f"http://localhost:{port}/docs" in output
    front_door = services[[service.name for service in SERVICES].index("orchestrator-api")]
    assert f"http://localhost:{front_door}/\n" in output
    assert f"http://localhost:{consul}/ui" in output
    assert output.count(" passing ") == len(SERVICES) + 2
    assert left_running(temporary) == []
    assert list(temporary.iterdir()) == []


def test_taken_ports_are_named_before_anything_starts(ports: list[int], temporary: Path, consul_binary: Path) -> None:
    """Ports that somebody else holds are all named in one sentence, and nothing was started for it."""
    with socket.create_server(("127.0.0.1", ports[0])), socket.create_server(("127.0.0.1", ports[BACKEND])):
        with demo("--once", ports=ports, temporary=temporary, consul=consul_binary) as process:
            output, errors = process.communicate(timeout=30)
        assert process.returncode == 1
    assert f"port {ports[0]} (Consul), port {ports[BACKEND]} (backend-api), which another program holds" in errors
    assert output == ""
    assert list(temporary.iterdir()) == []


def test_dead_service_shows_the_end_of_its_log(ports: list[int], temporary: Path, consul_binary: Path) -> None:
    """A service that can't start ends the demo with its name, its log's last lines and the log's path."""
    with demo("--once", ports=ports, temporary=temporary, consul=consul_binary, DATABASE_TIMEOUT="soon") as process:
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 1
    assert re.search(r"backend-api on port \d+ ended with exit code 1\.", errors)
    assert "DATABASE_TIMEOUT" in errors
    log = re.search(r"The end of its log (\S+):", errors)
    assert log
    assert "DATABASE_TIMEOUT" in Path(log[1]).read_text()
    assert left_running(temporary) == []


def test_up_until_ctrl_c(ports: list[int], temporary: Path, consul_binary: Path) -> None:
    """The demo answers until SIGINT, no call fails when a backend is killed, and then everything ends, exit code 0."""
    with demo(ports=ports, temporary=temporary, consul=consul_binary) as process:
        read_until(process, "Ctrl-C stops everything")
        for port in ports[1:]:
            assert httpx.get(f"http://localhost:{port}/health").json()["status"] == "healthy"
            assert httpx.get(f"http://localhost:{port}/docs").is_success
        assert "Consul" in httpx.get(f"http://localhost:{ports[0]}/ui/").text
        served = ["backend.main:app", "--port", str(ports[BACKEND])]
        [backend] = [found for found in processes_of(temporary) if found.cmdline()[-3:] == served]
        backend.kill()
        survivors = [
            log for log in temporary.glob("*/backend-api-*.log") if log.stem != f"backend-api-{ports[BACKEND]}"
        ]
        answered = calls_in(survivors)
        wait_until(lambda: calls_in(survivors) >= answered + 6)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
    assert "Stopping" in output
    assert "ended (-9)" in output
    assert re.search(r"\b0 of [1-9]\d+ calls failed", output)
    assert left_running(temporary) == []
    assert list(temporary.iterdir()) == []


def test_killed_demo_leaves_nothing(ports: list[int], temporary: Path, consul_binary: Path) -> None:
    """kill -9 of the demo ends its services, its Consul and its files too."""
    with demo(ports=ports, temporary=temporary, consul=consul_binary) as process:
        read_until(process, "Ctrl-C stops everything")
        assert len(left_running(temporary)) >= 7
        process.kill()
        wait_until(lambda: left_running(temporary) == [])
        wait_until(lambda: list(temporary.iterdir()) == [])
