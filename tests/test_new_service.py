"""The next service in one command: what it makes works everywhere, and what it can't make it refuses."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from registry import ConsulSettings
from registry.conformance import examine
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.clone import clone, run, succeed
from tools.services import SERVICES

COMPOSE = "deploy/compose/docker-compose.yml"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this repository as it stands."""
    folder = tmp_path_factory.mktemp("clone") / "registry"
    clone(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "port", "reason"),
    [
        ("Billing", "8004", "'Billing' is no name for a service"),
        ("../billing", "8004", "'../billing' is no name for a service"),
        ("billing; reboot", "8004", "'billing; reboot' is no name for a service"),
        ("bill_ing", "8004", "'bill_ing' is no name for a service"),
        ("b" * 25, "8004", "at most 24 characters"),
        ("billing-api", "8004", "leave out -api, it is added"),
        ("backend", "8004", "there is services/backend"),
        ("consul", "8004", "'consul' is taken"),
        ("postgres", "8004", "'postgres' is taken"),
        ("edge", "8004", "'edge' is taken"),
        ("prometheus", "8004", "'prometheus' is taken"),
        ("consul-ui", "8004", "'consul-ui' is taken"),
        ("keeper", "8004", "'keeper' is taken"),
        ("registry", "8004", "'registry' is taken"),
        ("tests", "8004", "'tests' is taken"),
        ("httpx", "8004", "'httpx' is taken"),
        ("json", "8004", "standard library has a module json"),
        ("class", "8004", "a word of Python itself"),
        ("billing", "8002", "Port 8002 is taken: backend-api has it"),
        ("billing", "8404", "Port 8404 is taken"),
        ("billing", "8500", "Port 8500 is taken"),
        ("billing", "8600", "Port 8600 is taken: Consul has it"),
        ("billing", "9090", "Port 9090 is taken: deploy/compose/docker-compose.observe.yml has it"),
        ("billing", "5432", "Port 5432 is taken: Postgres has it"),
        ("billing", "80", "'80' is no port for a service"),
        ("billing", "65536", "'65536' is no port for a service"),
        ("billing", "80o4", "'80o4' is no port for a service"),
        ("billing", "٨٠٠٤", "is no port for a service"),
    ],
)
def test_what_can_not_be_made_is_refused(copy: Path, name: str, port: str, reason: str) -> None:
    """A bad, reserved or taken name or port is refused in a sentence, and nothing was written."""
    refused = run(copy, "-m", "tools.new_service", name, port)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert succeed(copy, "git", "status", "--porcelain") == ""


def test_a_service_to_call_must_exist(copy: Path) -> None:
    """The example of a new service calls one that is there."""
    refused = run(copy, "-m", "tools.new_service", "billing", "8004", "--calls", "nobody-api")
    assert (refused.returncode, "no service 'nobody-api' to call" in refused.stderr) == (1, True)
    assert succeed(copy, "git", "status", "--porcelain") == ""


def test_a_failure_on_the_way_leaves_nothing(copy: Path) -> None:
    """When something breaks after the first file was written, all is as it was."""
    broken = run(copy, "-m", "tools.new_service", "billing", "8004", PYTHONPATH=str(_broken_ruff(copy.parent)))
    assert broken.returncode != 0
    assert succeed(copy, "git", "status", "--porcelain") == ""


def _broken_ruff(folder: Path) -> Path:
    package = folder / "broken" / "ruff"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('broken')")
    return package.parent


@pytest.fixture(scope="module")
def made(copy: Path) -> Iterator[Path]:
    """The copy with billing-api on 8004 and gift-cards-api on 8005, made as a user makes them."""
    begun = time.monotonic()
    succeed(copy, "-m", "nox", "-s", "new-service", "--", "billing", "8004")
    assert "passed" in succeed(copy, "-m", "nox", "-s", "tests", "--", "services/billing")
    assert time.monotonic() - begun < 60
    succeed(copy, "-m", "nox", "-s", "new-service", "--", "gift-cards", "8005", "--calls", "billing-api", "--auth")
    succeed(copy, "-m", "nox", "-s", "tests", "--", "services/gift_cards")
    yield copy
    succeed(copy, "git", "clean", "--quiet", "--force", "-d", "-x")
    succeed(copy, "git", "checkout", "--quiet", ".")


def test_the_new_service_is_small(made: Path) -> None:
    """Its program has at most forty lines."""
    program = made / "services/billing/src/billing/main.py"
    assert len(program.read_text().splitlines()) <= 40


def test_the_new_services_pass_every_check(made: Path, consul_binary: Path) -> None:
    """Format, style, imports, types, lock, the tests that go by the table, and the commands of a README."""
    tools, folders = made / ".nox/tests/bin", ("services/billing", "services/gift_cards")
    succeed(made, f"{tools}/ruff", "format", "--check", *folders)
    succeed(made, f"{tools}/ruff", "check", *folders)
    succeed(made, f"{tools}/mypy", *folders)
    succeed(made, f"{tools}/lint-imports")
    lock = (made / "requirements.lock").read_text()
    succeed(made, "-m", "nox", "-s", "lock")
    assert (made / "requirements.lock").read_text() == lock
    tables = ("service_variables_are_documented", "dependencies_are_all_explained", "links_lead_somewhere")
    tests = [
        "tests/test_compose.py",
        "tests/test_kubernetes.py",
        "tests/test_kubernetes_locked.py",
        "tests/test_locked.py",
        *(f"tests/test_docs_tables.py::test_{name}" for name in tables),
    ]
    page = "tests/test_docs.py::test_code_and_commands_run[services/gift_cards/README.md]"
    succeed(made, f"{tools}/python", "-m", "pytest", *tests, page, CONSUL_BIN=str(consul_binary))


def test_the_containers_have_the_new_service(made: Path) -> None:
    """The Compose file builds it like the others, with their health check, and the edge publishes its port."""
    services: dict[str, Any] = yaml.safe_load((made / COMPOSE).read_text())["services"]
    research, billing = services["research"], services["billing"]
    assert "healthcheck.py" in " ".join(billing["healthcheck"]["test"])
    assert billing.keys() == research.keys()
    for key in billing.keys() - {"image", "build"}:
        assert billing[key] == research[key]
    assert services["edge"]["ports"][-3:-1] == [  # the last is the topology page's
        "${EDGE_ADDRESS:-127.0.0.1}:${BILLING_PORT:-8004}:8004",
        "${EDGE_ADDRESS:-127.0.0.1}:${GIFT_CARDS_PORT:-8005}:8005",
    ]
    locked = yaml.safe_load((made / COMPOSE.replace(".yml", ".locked.yml")).read_text())["services"]
    assert locked["billing"]["environment"] == locked["research"]["environment"]
    observed = yaml.safe_load((made / COMPOSE.replace(".yml", ".observe.yml")).read_text())["services"]
    assert observed["billing"] == observed["gift_cards"] == observed["research"]


def test_kubernetes_has_the_new_service(made: Path) -> None:
    """Its Deployment and its PodDisruptionBudget differ from those of another service in name and port only."""
    text = (made / "deploy/kubernetes/base/services.yaml").read_text()
    found = {(each["kind"], each["metadata"]["name"]): yaml.safe_dump(each) for each in yaml.safe_load_all(text)}
    for kind in ("Deployment", "PodDisruptionBudget"):
        research = found[kind, "research-api"]
        assert found[kind, "billing-api"] == research.replace("research", "billing").replace("8001", "8004")
        assert (kind, "gift-cards-api") in found


def test_the_demo_has_the_new_service(made: Path, tmp_path: Path, consul_binary: Path) -> None:
    """The demo starts it, shows it passing, and calls it by name from orchestrator-api."""
    python = str(made / ".nox/tests/bin/python")
    ports = free_ports(3 + len(SERVICES))
    variables = {"CONSUL_BIN": str(consul_binary), "TMPDIR": str(tmp_path), "COLUMNS": "120"}
    output = succeed(made, python, "-m", "demo", "--once", "--ports", *map(str, ports), **variables)
    for name in ("billing-api", "gift-cards-api"):
        assert re.search(rf"│ {name} +│ {name}-127\.0\.0\.1-\d+ +│ healthy +│", output), "called by name"
        assert re.search(rf"│ {name}-127\.0\.0\.1-\d+ +│ +\d+ │ passing ", output)


@contextmanager
def billing(made: Path, port: int, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """An instance of billing-api, as a user starts it."""
    command = [str(made / ".nox/tests/bin/python"), "-m", "uvicorn", "billing.main:app", "--port", str(port)]
    with subprocess.Popen(command, cwd=made, env=os.environ | variables | {"SERVICE_PORT": str(port)}) as process:
        try:
            yield process
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Whether it says that it is healthy."""
    try:
        return httpx.get(f"{url}/health", trust_env=False, verify=False).is_success
    except httpx.TransportError:
        return False


def test_the_new_service_is_a_good_citizen(made: Path, tmp_path: Path, private_consul_agent: ConsulAgent) -> None:
    """It keeps every promise of registry.conformance: found, told apart, sick in time, back in time, drained."""
    scratch, gone = tmp_path / "scratch", tmp_path / "gone"
    scratch.mkdir()
    ports = free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    variables = {"TMPDIR": str(scratch), "SERVICE_HEALTH_CHECK_INTERVAL": "1"} | private_consul_agent.env()
    with ExitStack() as stack:
        replicas = [stack.enter_context(billing(made, port, **variables)) for port in ports]
        deadline = time.monotonic() + 30
        while not all(map(answers, urls)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        findings = examine(
            urls[0],
            ConsulSettings(port=private_consul_agent.http_port),
            replica=urls[1],
            sicken=lambda: scratch.rename(gone),
            heal=lambda: gone.rename(scratch),
            forget=True,
            stop=replicas[0].terminate,
        )
    assert [str(finding) for finding in findings if finding.verdict != "kept"] == []
