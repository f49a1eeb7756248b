"""The wheel as a newcomer has it: in an environment with nothing of this workspace. `nox -s release` runs these tests.

What is installed beside it comes by the versions and hashes of requirements.lock, only in the amount that it declares.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.pages import Block, blocks
from tools.services import ROOT

# A reader's session as one program: what the page says is typed into Python stands below this.
_PRELUDE = """\
import atexit, http.client, shlex, subprocess, sys, time

def answer(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    return connection.getresponse()

def start(line):
    command = shlex.split(line)
    server = subprocess.Popen([sys.executable, "-m", *command], stdout=sys.stderr)
    atexit.register(server.wait, 10)
    atexit.register(server.terminate)
    port, ready, deadline = int(command[command.index("--port") + 1]), False, time.monotonic() + 30
    while not ready:
        assert server.poll() is None and time.monotonic() < deadline, line
        time.sleep(0.05)
        try:
            instance = answer(port, "/health").headers["X-Service-Instance"]
            ready = not instance or answer(CONSUL, f"/v1/agent/health/service/id/{instance}").status == 200
        except OSError:
            pass

"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Runs it with a clean environment, and returns what it printed; fails when it fails."""
    ours = ("PYTHON", "VIRTUAL_ENV", "CONSUL_HTTP", "SERVICE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment that has these."""
    uv = shutil.which("uv")
    assert uv
    python = folder / "bin/python"
    run(uv, "venv", "--quiet", "--no-config", "--no-project", "--python", sys.executable, folder, cwd=folder.parent)
    install = (uv, "pip", "install", "--quiet", "--no-config", "--verify-hashes", "--only-binary", ":all:")
    run(*install, "--python", python, "-c", ROOT / "requirements.lock", *requirements, cwd=folder.parent)
    return python


@pytest.fixture(scope="module")
def wheel() -> Path:
    """What `nox -s release` has built."""
    [file] = Path(os.environ["RELEASE_DIST"]).glob("registry-*.whl")
    return file


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel and what it declares."""
    return environment(tmp_path_factory.mktemp("bare") / "venv", str(wheel))


@pytest.fixture(scope="module")
def served(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has a server too, as the README's reader does."""
    return environment(tmp_path_factory.mktemp("served") / "venv", str(wheel), "uvicorn")


@pytest.fixture(scope="module")
def extra(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel with its extras."""
    return environment(
        tmp_path_factory.mktemp("extra") / "venv", f"registry[metrics,testing,tracing] @ {wheel.as_uri()}"
    )


def installed(python: Path) -> dict[str, str]:
    """Name → version of everything that it has."""
    uv = shutil.which("uv")
    assert uv
    run(uv, "pip", "check", "--quiet", "--python", python, cwd=python.parent)
    listed = json.loads(run(uv, "pip", "list", "--format", "json", "--python", python, cwd=python.parent))
    assert not [entry for entry in listed if "editable_project_location" in entry]
    return {entry["name"]: entry["version"] for entry in listed}


def test_it_brings_what_it_declares_and_nothing_else(bare: Path, extra: Path) -> None:
    """What is installed is complete, has the locked versions, and holds no part of the workspace nor of an extra."""
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    for found in (installed(bare), installed(extra)):
        del found["registry"]
        assert found == {name: locked.get(name) for name in found}
    extras = {"pytest", "uvicorn", "opentelemetry-sdk", "prometheus-client"}
    assert not installed(bare).keys() & {*extras, "backend-api", "orchestrator-api"}
    assert installed(extra).keys() >= extras


def test_every_module_can_be_imported_or_names_the_extra(bare: Path, extra: Path, tmp_path: Path) -> None:
    """Without the extras, whatever needs one says what to install; everything else comes up."""
    program = """if True:
        import importlib, json, pkgutil, registry
        failures = {}
        for module in pkgutil.walk_packages(registry.__path__, "registry."):
            if not module.name.endswith("__main__"):
                try:
                    importlib.import_module(module.name)
                except ImportError as error:
                    failures[module.name] = str(error)
        print(json.dumps([registry.__file__, failures]))
    """
    place, failures = json.loads(run(bare, "-W", "error", "-c", program, cwd=tmp_path))
    assert Path(place).is_relative_to(bare.parents[1])
    # Run by its path, in a process of its own, which nothing but the fixtures start.
    assert "uvicorn" in failures.pop("registry.testing.instance_app")
    assert {name: message.rpartition("; install ")[2] for name, message in failures.items()} == {
        "registry.metrics": "registry[metrics]",
        "registry.testing.fixtures": "registry[testing]",
        "registry.tracing": "registry[tracing]",
    }
    assert json.loads(run(extra, "-W", "error", "-c", program, cwd=tmp_path))[1] == {}
    assert "--consul" in run(bare, "-m", "registry.conformance", "--help", cwd=tmp_path)


def play(page: list[Block], python: Path, agent: ConsulAgent, folder: Path) -> None:
    """Does what the blocks say, in order; what is printed must be what the page says."""
    ports = {str(documented): str(real) for documented, real in zip((8000, 8004), free_ports(2), strict=True)}
    ports["8500"] = str(agent.http_port)
    program, expected = f"CONSUL = {agent.http_port}\n{_PRELUDE}", []
    for block in page:
        code = re.sub(rf"\b({'|'.join(ports)})\b", lambda found: ports[found[1]], block.code)
        match block.language, block.options:
            case "python", "":
                program += f"{code}\n"
                expected += re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
            case "bash", "background":
                program += "".join(f"start({line!r})\n" for line in code.splitlines())
            case "python", options if name := re.fullmatch(r"file=(\S+)", options):
                (folder / name[1]).write_text(code)
            case unknown:
                raise AssertionError(f"nobody knows how to do {unknown}")
    (folder / "reader.py").write_text(program)
    printed = run(python, "-W", "error", "reader.py", cwd=folder, CONSUL_HTTP_ADDR=f"localhost:{agent.http_port}")
    assert printed.splitlines() == expected
    assert expected


def test_the_quick_start_works(served: Path, private_consul_agent: ConsulAgent, tmp_path: Path) -> None:
    """The README's one service and its one call, with the wheel and a server alone."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"^## One service$.*?^## One call$.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert found
    play(blocks(found[0]), served, private_consul_agent, tmp_path)


def test_its_own_readme_works(served: Path, private_consul_agent: ConsulAgent, tmp_path: Path) -> None:
    """What an index shows of it can be done with the wheel and a server alone."""
    text = (ROOT / "packages/registry/README.md").read_text()
    play(blocks(text), served, private_consul_agent, tmp_path)


def test_the_fixtures_work_with_the_extra(extra: Path, consul_binary: Path, tmp_path: Path) -> None:
    """A test of somebody's own has a real Consul and real instances with two lines, and no warning."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["registry.testing.fixtures"]\n')
    (tmp_path / "test_own.py").write_text(
        "from registry import ServiceRegistry\n\n\n"
        "def test_own(consul_agent, instances):\n"
        '    one, two = instances("own", 2, consul=consul_agent)\n'
        '    with ServiceRegistry("127.0.0.1", consul_agent.http_port) as registry:\n'
        '        assert len(registry.discover_service("own")) == 2\n'
    )
    printed = run(extra, "-m", "pytest", "-q", "-W", "error", cwd=tmp_path, CONSUL_BIN=str(consul_binary))
    assert "1 passed" in printed


def test_its_types_reach_its_users(extra: Path, tmp_path: Path) -> None:
    """A type checker sees the installed package's annotations: code that uses all of it passes, strictly."""
    shutil.copy(ROOT / "packages/registry/tests/typing/api.py", tmp_path)
    command = (
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        tmp_path / "cache",
        "--python-executable",
        extra,
    )
    run(*command, "api.py", cwd=tmp_path)
    (tmp_path / "wrong.py").write_text(
        "from registry import Instance\n\nInstance('b1', 'backend-api', 8002, '10.0.0.7')\n"
    )
    with pytest.raises(AssertionError, match="incompatible type"):
        run(*command, "wrong.py", cwd=tmp_path)
