"""The documentation is true: its code and its commands run, and print what the page says.

In a page, blocks run in order, against a Consul agent of the page's own. What a block is, its fence says:

- ```` ```python ````: runs; ``print(...)  # text`` must print that text.
- ```` ```python file=NAME ````, or any other language with ``file=``: is written to that file, where the reader is.
- ```` ```bash ````: is typed into one terminal and must succeed. What would install packages or run these very tests
  is only checked to exist: ``pip install``, environments and nox sessions.
- ```` ```text ````: what the block before it must print; ``…`` stands for anything.
- ```` ```bash background ````: each line starts a server, which must answer ``/health`` and, if it registers itself,
  be passing in Consul; the servers stop when the page ends.
- ```` ```bash containers ````: is typed by tests/e2e, for it needs the system in containers; so is ``observed``, which
  adds Prometheus and Jaeger to it; ``locked`` is typed by tests/locked. What is for a ``cluster`` is held against the
  manifests by tests/test_kubernetes.py.

Ports (8500, 800x and those of the services) are replaced by free ones, so that this runs beside a running demo;
nothing else is. A page that types ``consul`` finds a binary, which starts an agent on the page's ports.
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

from registry import ServiceRegistry
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.pages import Block, Shell, blocks, check_output
from tools.services import SERVICES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("services/*/README.md")])
_DOCUMENTED_PORTS = sorted({8500, 8501, *range(8000, 8010), *(service.port for service in SERVICES)})
# Starts an agent that needs no fixed port; every other command is Consul's own.
_CONSUL = """#!/bin/sh
[ "$1" = agent ] || exec {binary} "$@"
exec {binary} "$@" -http-port={http} -server-port={server} -serf-lan-port={serf} -serf-wan-port=-1 -dns-port=-1 \\
    -grpc-port=-1 -grpc-tls-port=-1
"""


def name_of(page: Path) -> str:
    """A page as a test id."""
    return page.relative_to(ROOT).as_posix()


def program_of(command: str) -> str:
    """Where the command is: in the environment of these tests, else where it always is."""
    program = shutil.which(command, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, f"{command} is not there"
    return program


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
    shell: Shell | None = None
    printed: str = ""
    """What the last block printed."""
    unread: bool = False
    """Whether only a ``text`` block can say that this was right."""

    def __post_init__(self) -> None:
        # Sorted, so that what is sorted by port in the documentation stays so.
        ports = zip(_DOCUMENTED_PORTS, sorted(free_ports(len(_DOCUMENTED_PORTS))), strict=True)
        self.ports = {str(documented): str(real) for documented, real in ports}
        self.ports["8500"] = str(self.agent.http_port)

    def run(self, block: Block) -> None:
        """Does what the block is there for."""
        assert block.language == "text" or not self.unread, (
            f"the page does not say that this is printed: {self.printed}"
        )
        code = re.sub(rf"\b({'|'.join(self.ports)})\b", lambda found: self.ports[found[1]], block.code)
        match block.language, block.options.partition("=")[::2]:
            case "python", ("", ""):
                self._run_python(code, block.line)
            case _, ("file", name):
                (self.directory / name).write_text(code)
            case "bash", ("", ""):
                self._type(code)
            case "text", ("", ""):
                check_output(code, self.printed)
                self.unread = False
            case "bash", ("background", ""):
                self._start_servers(code.splitlines())
            case (("" | "ini"), _) | ("bash", ("containers" | "observed" | "locked" | "cluster", "")):
                pass
            case language, _:
                raise AssertionError(f"{self.page}:{block.line}: nobody knows how to check {language} {block.options}")

    def _run_python(self, code: str, line: int) -> None:
        expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
        program = compile("\n" * line + code, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, self.names)
        self.printed = printed.getvalue()
        self.unread = bool(self.printed) and not expected
        if not self.unread:
            assert self.printed.splitlines() == expected

    def _type(self, code: str) -> None:
        typed = [line for line in code.splitlines() if not self._is_only_checked(line)]
        if not typed:
            return
        if self.shell is None:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            self.shell = Shell(self.directory, os.environ | {"PATH": path})
        self.printed = self.shell.type("\n".join(typed))
        self.directory = self.shell.directory

    def _is_only_checked(self, line: str) -> bool:
        """Whether the line would install, or run these very tests; nox sessions are checked to exist."""
        for command in line.split("&&"):
            match shlex.split(command, comments=True):
                case ["python3", "-m", "nox", *options]:
                    sessions = [sys.executable, "-m", "nox", "--list", *options]
                    subprocess.run(sessions, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
                case (
                    ["python3", "-m", "pip" | "venv", *_]
                    | ["pip", "install", *_]
                    | [".", ".venv/bin/activate"]
                    | ["deactivate"]
                ):
                    pass
                case _:
                    return False
        return True

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
            answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0, trust_env=False, verify=False)
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
        if self.shell:
            self.shell.close()
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
    request: pytest.FixtureRequest,
    consul_binary: Path,
    fresh_consul_agent: ConsulAgent,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Session]:
    """The reader of one page."""
    for variable in [name for name in os.environ if name.startswith(("CONSUL_HTTP", "SERVICE_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"localhost:{fresh_consul_agent.http_port}")
    monkeypatch.chdir(tmp_path)
    typed = [block.code for block in blocks(request.param.read_text()) if block.language == "bash"]
    starts_agent = any(re.search(r"agent -(dev|config)", code) for code in typed)
    if starts_agent or any(re.search(r"^consul ", code, re.MULTILINE) for code in typed):
        server, serf = free_ports(2)
        consul = tmp_path_factory.mktemp("bin") / "consul"
        consul.write_text(
            _CONSUL.format(binary=consul_binary, http=fresh_consul_agent.http_port, server=server, serf=serf)
        )
        consul.chmod(0o755)
        monkeypatch.setenv("PATH", f"{consul.parent}{os.pathsep}{os.environ['PATH']}")
    if starts_agent:
        fresh_consul_agent.stop()
        monkeypatch.setenv("CONSUL_BIN", str(consul))
    session = Session(request.param, fresh_consul_agent, tmp_path)
    try:
        yield session
    finally:
        session.close()


@pytest.mark.parametrize("session", [page for page in PAGES if runs_something(page)], ids=name_of, indirect=True)
def test_code_and_commands_run(session: Session) -> None:
    """Every block of the page does what the page says."""
    for block in blocks(session.page.read_text()):
        session.run(block)
    assert not session.unread
