"""A real Consul agent for tests and demos, with ports and data of its own; leaves nothing behind."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from registry.testing.acl import Acl
from registry.testing.binary import ConsulNotFoundError, find_consul
from registry.testing.configuration import server_configuration
from registry.testing.ports import free_ports, is_free

__all__ = ["ConsulAgent", "ConsulNotFoundError", "ConsulStartError", "find_consul", "running_agent"]

_START_SECONDS = 30.0
_STOP_SECONDS = 5.0

# The guard outlives us, however we end: a pipe tells it the agent's process id (0: none), and when the pipe
# closes it kills that process and removes the directory. PR_SET_PDEATHSIG would be shorter, but it is Linux
# only and fires when the *thread* that started the agent ends.
_GUARD = """
import contextlib, os, shutil, signal, sys, time
pid = 0
for line in sys.stdin:
    pid = int(line)
if pid:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
deadline = time.monotonic() + 5
while os.path.exists(sys.argv[1]) and time.monotonic() < deadline:
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    time.sleep(0.01)
"""


class ConsulStartError(RuntimeError):
    """The agent did not start. The message contains the reason, or the end of its log."""


class ConsulAgent:
    """A single Consul server on loopback, created by `running_agent`.

    Every method blocks until it has done what it promises. Ports stay the same when the agent is restarted.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        http_port: int | None,
        *,
        acl: bool,
        in_memory: bool = False,
        datacenter: str = "dc1",
        joins: "ConsulAgent | None" = None,
    ) -> None:
        """Settle ports and configuration; no agent runs before `start`."""
        free_port, self.dns_port, self.grpc_port, serf_port, server_port, self.wan_port = free_ports(6)
        self.http_port = http_port or free_port
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.token = str(uuid.uuid4()) if acl else None
        """The bootstrap token, which allows everything; None without ACL."""
        self._command = [str(binary), "agent", *(["-dev"] if in_memory else [])]
        self._data = directory / "data"
        self._log = directory / "consul.log"
        self._configuration = directory / "agent.json"
        self._datacenter, self._joins = datacenter, joins
        self._configuration.write_text(json.dumps(self._settings(serf_port, server_port)))
        self._process: subprocess.Popen[bytes] | None = None
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(directory)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __repr__(self) -> str:
        """Shows the URL, never the token."""
        return f"<ConsulAgent {self.url}>"

    @property
    def pid(self) -> int:
        """The process id of the running agent. Raises: RuntimeError, if it is not running."""
        if self._process is None:
            raise RuntimeError("the agent is not running")
        return self._process.pid

    @property
    def acl(self) -> Acl:
        """Makes tokens with less rights. Raises: RuntimeError, if the agent was started without ``acl=True``."""
        if self.token is None:
            raise RuntimeError("this agent knows no tokens: start it with acl=True")
        return Acl(self.url, self.token)

    def env(self) -> dict[str, str]:
        """Environment variables that make a child process use this agent."""
        token = {} if self.token is None else {"CONSUL_HTTP_TOKEN": self.token}
        return {"CONSUL_HTTP_ADDR": f"127.0.0.1:{self.http_port}", **token}

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the agent logged."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def start(self) -> None:
        """Start the agent, and return once it has a leader and accepts registrations; no-op if it is running.

        Raises: ConsulStartError.
        """
        if self._process is not None:
            return
        command = [*self._command, f"-config-file={self._configuration}"]
        with self._log.open("ab") as log:
            # Its own session: Ctrl-C in the terminal reaches us, and we decide what happens to the agent.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._tell_guard(self._process.pid)
        self._wait_until_leading(self._process)

    def stop(self) -> None:
        """Stop the agent cleanly, and keep its data; no-op if it is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the agent, as a crash would, and keep its data; no-op if it is not running."""
        self._end(signal.SIGKILL)

    def restart(self, *, keep_data: bool) -> None:
        """Stop and start the agent, on the same ports. ``keep_data=False``: it has lost all registrations."""
        self.stop()
        if not keep_data:
            shutil.rmtree(self._data, ignore_errors=True)
        self.start()

    def pause(self) -> None:
        """Freeze the agent until `resume`: the system accepts connections, but no answers come."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused agent continue."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop the agent permanently, and remove its data."""
        self.kill()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()

    def _settings(self, serf_port: int, server_port: int) -> dict[str, object]:
        ports = {"http": self.http_port, "dns": self.dns_port, "grpc": self.grpc_port, "serf_wan": self.wan_port}
        ports |= {"serf_lan": serf_port, "server": server_port}
        join_wan = self._joins.wan_port if self._joins else None
        return server_configuration(self._data, ports, self._datacenter, join_wan, self.token)

    def _wait_until_leading(self, process: subprocess.Popen[bytes]) -> None:
        # A consistent read is answered only by a leader that has replayed its log; before that, a restarted
        # server shows half-empty lists. It is critical to itself until its own registration went through.
        headers = {} if self.token is None else {"X-Consul-Token": self.token}
        deadline = time.monotonic() + _START_SECONDS
        with httpx.Client(base_url=self.url, headers=headers, timeout=2.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    self.kill()
                    raise ConsulStartError(f"Consul ended while starting:\n{self.log_tail()}")
                try:
                    answer = client.get("/v1/health/service/consul?passing&consistent")
                    if answer.is_success and answer.json():
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.03)
        self.kill()
        raise ConsulStartError(f"Consul did not lead within {_START_SECONDS:.0f} s:\n{self.log_tail()}")

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise RuntimeError("the agent is not running")
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._tell_guard(0)

    def _tell_guard(self, pid: int) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{pid}\n")
        self._guard.stdin.flush()


@contextmanager
def running_agent(
    *,
    http_port: int | None = None,
    acl: bool = False,
    binary: Path | None = None,
    in_memory: bool = False,
    datacenter: str = "dc1",
    joins: ConsulAgent | None = None,
) -> Iterator[ConsulAgent]:
    """Runs a Consul agent with its UI, on loopback only; stops it and removes its data when the context ends.

    It also ends when this process is interrupted, terminated or killed. ``http_port=None``: a free port;
    ``acl=True``: denies by default, and sets a bootstrap token; ``binary=None``: uses `find_consul`;
    ``in_memory=True``: starts two seconds sooner, and forgets everything when it is stopped. ``joins``: an agent of
    another datacenter; soon after the start, each answers questions about the other's.
    Blocks for about three seconds; the first time on a machine, for minutes if Consul has to be obtained.

    Raises: ConsulNotFoundError, ConsulStartError.
    """
    if http_port is not None and not is_free(http_port, socket.SOCK_STREAM):
        raise ConsulStartError(f"Port {http_port} is taken by another program: stop it, or choose another port.")
    binary = binary or find_consul()
    directory = Path(tempfile.mkdtemp(prefix="consul-agent-"))
    agent = ConsulAgent(binary, directory, http_port, acl=acl, in_memory=in_memory, datacenter=datacenter, joins=joins)
    try:
        agent.start()
        yield agent
    finally:
        agent.close()
