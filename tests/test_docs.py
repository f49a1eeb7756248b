"""The documentation is true: its code and its commands run, and print what the page says.

In a page, blocks run in order, against a Consul agent of the page's own. What a block is, its fence says:

- ```` ```python ````: runs; ``print(...)  # text`` must print that text.
- ```` ```python file=NAME ````: is written to that file.
- ```` ```bash ````: each line runs and must succeed. What would install packages or run these very tests is only
  checked to exist: ``pip install`` and nox sessions.
- ```` ```bash background ````: each line starts a server, which must answer ``/health`` and, if it registers itself,
  be passing in Consul; the servers stop when the page ends.

Ports (8500, 800x and those of the services) are replaced by free ones, so that this runs beside a running demo;
nothing else is.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.services import SERVICES
from registry import ServiceRegistry
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("services/*/README.md")])
_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DOCUMENTED_PORTS = sorted({8500, *range(8000, 8010), *(service.port for service in SERVICES)})


def name_of(page: Path) -> str:
    """A page as a test id."""
    return page.relative_to(ROOT).as_posix()


def program_of(command: str) -> str:
    """Where the command is: in the environment of these tests, else where it always is."""
    program = shutil.which(command, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, f"{command} is not there"
    return program


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is where its code begins, counted from 0."""

    language: str
    options: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(found[1], found[2].strip(), found[3], text.count("\n", 0, found.start(3)))
        for found in _FENCE.finditer(text)
    ]


def runs_something(page: Path) -> bool:
    """Whether a reader of the page would type something."""
    return any(block.language in {"python", "bash"} for block in blocks(page.read_text()))


@dataclass
class Session:
    """What a reader has open while working through a page: a Python prompt, a directory, running servers."""

    page: Path
    agent: ConsulAgent
    directory: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Sorted, so that what is sorted by port in the documentation stays so.
        ports = zip(_DOCUMENTED_PORTS, sorted(free_ports(len(_DOCUMENTED_PORTS))), strict=True)
        self.ports = {str(documented): str(real) for documented, real in ports}
        self.ports["8500"] = str(self.agent.http_port)

    def run(self, block: Block) -> None:
        """Does what the block is there for."""
        code = re.sub(rf"\b({'|'.join(self.ports)})\b", lambda found: self.ports[found[1]], block.code)
        match block.language, block.options.partition("=")[::2]:
            case "python", ("", ""):
                self._run_python(code, block.line)
            case "python", ("file", name):
                (self.directory / name).write_text(code)
            case "bash", ("", ""):
                for line in code.splitlines():
                    self._run_command(line)
            case "bash", ("background", ""):
                self._start_servers(code.splitlines())
            case (("" | "mermaid" | "ini"), _):
                pass
            case language, _:
                raise AssertionError(f"{self.page}:{block.line}: nobody knows how to check {language} {block.options}")

    def _run_python(self, code: str, line: int) -> None:
        expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
        program = compile("\n" * line + code, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, self.names)
        assert printed.getvalue().splitlines() == expected

    def _run_command(self, line: str) -> None:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            match words:
                case ["python3", "-m", "pip", "install", *_]:
                    continue
                case ["python3", "-m", "nox", *options]:
                    words = [sys.executable, "-m", "nox", "--list", *options]
            subprocess.run([program_of(words[0]), *words[1:]], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

    def _start_servers(self, lines: list[str]) -> None:
        waiting = []
        for line in lines:
            words = shlex.split(line, comments=True)
            given = [word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word)]
            command = words[len(given) :]
            port = command[command.index("--port") + 1]
            # A service's default port is one of the documented ones, so it is replaced too.
            environment = os.environ | {"SERVICE_PORT": port} | dict(given)
            log = self.directory / f"{port}.log"
            with log.open("wb") as output:
                server = subprocess.Popen(
                    [program_of(command[0]), *command[1:]],
                    cwd=self.directory,
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
            self.servers.append(server)
            waiting.append((line, port, server, log))
        for line, port, server, log in waiting:
            deadline = time.monotonic() + 60
            while not self._is_up(port):
                assert server.poll() is None and time.monotonic() < deadline, f"{line}:\n{log.read_text()}"  # noqa: PT018
                time.sleep(0.05)

    def _is_up(self, port: str) -> bool:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0, trust_env=False)
        except httpx.TransportError:
            return False
        instance = answer.headers.get("X-Service-Instance")
        if not answer.is_success or instance is None:
            return True
        with ServiceRegistry("localhost", self.agent.http_port) as consul:
            health = consul.get_service_health(instance)
        return health is not None and health.status == "passing"

    def close(self) -> None:
        """Stops the servers as an operator does; fails when one does not end."""
        for value in self.names.values():
            if isinstance(value, ServiceRegistry):
                value.close()
        for server in self.servers:
            server.terminate()
        try:
            for server in self.servers:
                server.wait(10)
        finally:
            for server in self.servers:
                server.kill()
                server.wait()


@pytest.fixture
def session(
    request: pytest.FixtureRequest, private_consul_agent: ConsulAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Session]:
    """The reader of one page."""
    for variable in [name for name in os.environ if name.startswith(("CONSUL_HTTP", "SERVICE_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"localhost:{private_consul_agent.http_port}")
    monkeypatch.chdir(tmp_path)
    session = Session(request.param, private_consul_agent, tmp_path)
    try:
        yield session
    finally:
        session.close()


@pytest.mark.parametrize("session", [page for page in PAGES if runs_something(page)], ids=name_of, indirect=True)
def test_code_and_commands_run(session: Session) -> None:
    """Every block of the page does what the page says."""
    for block in blocks(session.page.read_text()):
        session.run(block)
