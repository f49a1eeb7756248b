"""A service as it runs in production: its own process under the plain command ``python -m uvicorn module:app``.

``with running_service("backend.main:app", "backend-api", consul=agent) as backend: backend.end(signal.SIGTERM)``
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from registry.extras import extra
from registry.service_registry import ServiceRegistry
from registry.testing.agent import ConsulAgent
from registry.testing.ports import free_ports

with extra("testing"):
    import psutil

__all__ = ["ServiceProcess", "found", "running_service", "wait_until"]


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> float:
    """Blocks until the condition holds, and returns after how many seconds it did. Raises: AssertionError."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"not so within {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - begun


def found(consul: ConsulAgent, service: str, *, passing: bool = True) -> list[str]:
    """The ids of the instances that discovery finds, sorted; also the sick ones if not ``passing``."""
    with ServiceRegistry("127.0.0.1", consul.http_port, consul.token) as registry:
        return [instance.id for instance in registry.discover_service(service, passing=passing)]


class ServiceProcess:
    """One service on 127.0.0.1; made by `running_service`."""

    def __init__(
        self,
        app: str,
        name: str,
        *options: str,
        consul: ConsulAgent | None,
        port: int | None,
        cwd: Path | None,
        env: Mapping[str, str],
    ) -> None:
        self.name = name
        self.port = port or free_ports(1)[0]
        self.id = f"{name}-127.0.0.1-{self.port}"
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, trust_env=False, verify=False)
        self._consul = consul
        self._registry = ServiceRegistry("127.0.0.1", consul.http_port, consul.token) if consul else None
        self._directory = tempfile.TemporaryDirectory(prefix="service-")
        self.directory = Path(self._directory.name)
        """For files of the app and the test alone; the app finds it in the variable ``DIRECTORY``."""
        self._command = [sys.executable, "-m", "uvicorn", app, f"--port={self.port}", *options]
        self._cwd = cwd
        self._env = os.environ | {"SERVICE_NAME": name, "SERVICE_PORT": str(self.port), "SERVICE_DRAIN_SECONDS": "0.5"}
        self._env |= {"DIRECTORY": self._directory.name} | (consul.env() if consul else {}) | dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of the command. Raises: RuntimeError, when it was never started."""
        if self._process is None:
            raise RuntimeError(f"{self.id} was not started")
        return self._process

    def start(self, *, wait: bool = True) -> None:
        """Start it, again too, and return when its port answers; at once if not ``wait``. Raises: AssertionError."""
        with (self.directory / "log").open("ab") as log:
            # A group of its own: Ctrl-C in the terminal reaches us, and a test can send one to all its workers.
            self._process = subprocess.Popen(
                self._command, cwd=self._cwd, env=self._env, stdout=log, stderr=log, process_group=0
            )
        if wait:
            wait_until(self.answers, 30)

    def answers(self) -> bool:
        """Whether its port answers, whatever it says. Raises: AssertionError with its log, when it has ended."""
        assert self.process.poll() is None, self.log
        try:
            return bool(self.http.get("/").status_code)
        except httpx.TransportError:
            return False

    def is_found(self) -> bool:
        """Whether discovery finds it."""
        assert self._registry is not None, "made without a Consul agent"
        return self.id in {instance.id for instance in self._registry.discover_service(self.name)}

    @property
    def log(self) -> str:
        """All that it has logged so far."""
        return (self.directory / "log").read_text(errors="replace")

    def workers(self) -> list[int]:
        """The process ids of uvicorn's workers."""
        pids = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # it may end just now
                if "spawn_main" in " ".join(child.cmdline()):
                    pids.append(child.pid)
        return pids

    def end(self, number: signal.Signals) -> float:
        """Send it a signal, and return after how many seconds it had ended."""
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(30)
        return time.monotonic() - begun

    def close(self) -> None:
        """Kill it with its workers, whatever their state, and take it out of Consul."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.http.close()
        if self._registry is not None:
            self._registry.close()
        if self._consul is not None:
            headers = {} if self._consul.token is None else {"X-Consul-Token": self._consul.token}
            url = f"{self._consul.url}/v1/agent/service/deregister/{self.id}"
            with suppress(httpx.TransportError):  # Consul may be what the test has broken
                httpx.put(url, headers=headers, timeout=1.0, trust_env=False, verify=False)
        self._directory.cleanup()


@contextmanager
def running_service(
    app: str,
    name: str,
    *options: str,
    consul: ConsulAgent | None = None,
    port: int | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[ServiceProcess]:
    """``python -m uvicorn <app> <options>`` with ``SERVICE_*`` and ``CONSUL_*`` set, until the context ends.

    ``port`` None: a free one. ``env`` wins over what is set. ``wait``: until the port answers; in Consul it is later.
    Its log, its workers and what discovery says of it can be read. Raises: AssertionError, with its log.
    """
    service = ServiceProcess(app, name, *options, consul=consul, port=port, cwd=cwd, env=env or {})
    try:
        service.start(wait=wait)
        yield service
    finally:
        service.close()
