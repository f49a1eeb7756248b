"""One instance of `registry.testing.instances`: its process, its behaviour, and its entry in Consul."""

import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import httpx

from registry.model import Instance
from registry.presence.registration import FAILURES_BEFORE_CRITICAL
from registry.testing.agent import ConsulAgent
from registry.testing.stats import Stats, read_journals

__all__ = ["Mode", "RunningInstance"]

Mode = Literal["ok", "error", "hang", "cut", "half"]
"""``hang``: never answers. ``cut``: reads the request, then closes the connection. ``half``: closes it in the middle of
the response body. ``error``: answers with ``status``."""

_APP = Path(__file__).with_name("instance_app.py")
_START_SECONDS = 30.0
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Never used: to load the system's certificates for each request would cost more than the request."""
_ANSWER_SECONDS = 5.0


class RunningInstance:
    """One process on 127.0.0.1, created by `registry.testing.instances`. Methods block until they are done."""

    def __init__(self, instance: Instance, consul: ConsulAgent | None, registers: bool, env: Mapping[str, str]) -> None:
        self.instance = instance
        """The instance for discovery; its id is ``"{service}-127.0.0.1-{port}"``."""
        self.url = f"{'https' if instance.connect else 'http'}://{instance.netloc}"
        self._consul = consul
        self._registers = registers
        self._env = {**os.environ, **env}
        self._directory = Path(tempfile.mkdtemp(prefix="instance-"))
        self.journal = self._directory / "journal"
        """A file with a line for each request that it has received; read by `registry.testing.stats`."""
        self.journal.touch()
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<RunningInstance {self.instance.id}>"

    @property
    def pid(self) -> int:
        """The process id. Raises: RuntimeError when it is not running."""
        return self._running.pid

    def start(self, *, wait: bool = True) -> None:
        """Start the process, on the same port as before, and return when it answers; at once if not ``wait``.

        Raises: RuntimeError, with the end of its log, when it does not start.
        """
        with socket.socket() as listener, (self._directory / "log").open("ab") as log:
            # Bound here and listened to there: the port is ours at once, and refuses until the instance can answer.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.instance.address, self.instance.port))
            arguments = (
                self.instance.id,
                str(self._directory),
                str(listener.fileno()),
                "yes" if self._registers else "",
            )
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_APP), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[listener.fileno()],
                env=self._env,
                # Not ours, so that Ctrl-C leaves it to us; but of our session, so that the system ends it even when
                # it is paused and we die: a stopped process of an orphaned group is sent SIGHUP and SIGCONT.
                process_group=0,
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the process answers. Raises: RuntimeError, with the end of its log."""
        if self._line(_START_SECONDS) != b"ready\n":
            log = (self._directory / "log").read_text(errors="replace")
            raise RuntimeError(f"{self.instance.id} did not start:\n{log[-2000:]}")

    def set(
        self,
        mode: Mode = "ok",
        *,
        rate: float = 1.0,
        status: int = 500,
        delay: float = 0.0,
        retry_after: int | None = None,
        healthy: bool = True,
    ) -> None:
        """Sets the behaviour from now on; without arguments: answer normally.

        ``rate``: the share of requests to which ``mode`` applies. ``delay``: seconds before every answer. ``healthy``:
        whether ``/health`` answers 200 or 503; nothing else affects it. Raises: RuntimeError, if it is not running.
        """
        behaviour = {"mode": mode, "rate": rate, "status": status, "delay": delay} | {
            "retry_after": retry_after,
            "healthy": healthy,
        }
        process = self._running
        assert process.stdin
        process.stdin.write(json.dumps(behaviour).encode())
        process.stdin.flush()
        if self._line(_ANSWER_SECONDS) != b"done\n":
            raise RuntimeError(f"{self.instance.id} does not obey: is it paused?")

    def stats(self) -> Stats:
        """What it has received since it was created, across restarts; also works when it is dead."""
        return read_journals([self.journal])

    def register(self, *, check_interval: float | None = 10.0) -> None:
        """Register the instance in Consul, as passing. ``check_interval=None``: without a check, so it stays so."""
        instance, registration = self.instance, {}
        if check_interval is not None:
            registration["Check"] = {
                "CheckID": f"service:{instance.id}",
                "HTTP": f"{self.url}/health?instance={instance.id}",
                "TLSSkipVerify": instance.connect,
                "Interval": f"{check_interval:g}s",
                "Timeout": "1s",
                "FailuresBeforeCritical": FAILURES_BEFORE_CRITICAL,
                "Status": "passing",
            }
        self.deregister()  # "Status: passing" would be ignored for a check that exists
        self._put(
            "/v1/agent/service/register",
            registration
            | {"ID": instance.id, "Name": instance.service, "Address": instance.address, "Port": instance.port}
            | {"Tags": list(instance.tags), "Meta": dict(instance.meta)}
            | {"Weights": {"Passing": instance.weight, "Warning": 1}, "Connect": {"Native": instance.connect}},
        )

    def deregister(self) -> None:
        """Remove the instance from Consul; no-op if it is not registered."""
        self._put(f"/v1/agent/service/deregister/{self.instance.id}", None)

    def kill(self) -> None:
        """Kill the process, as a crash would; its entry in Consul stays. No-op if it is not running."""
        self._end(signal.SIGKILL)

    def terminate(self, *, wait: bool = True) -> None:
        """Send SIGTERM, and wait until the process has ended; ``wait=False`` returns at once: call `wait` later."""
        self._running.send_signal(signal.SIGTERM)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the process has ended by itself, for example after `terminate`."""
        self._end(None)

    def pause(self) -> None:
        """Freeze the process until `resume`: the system accepts connections, but no answers come."""
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process continue."""
        self._running.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it permanently, and remove it from Consul."""
        self.kill()
        if self._consul is not None:
            with suppress(httpx.HTTPError):  # Consul may be what the test has broken
                self.deregister()
        shutil.rmtree(self._directory)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.instance.id} is not running")
        return self._process

    def _line(self, seconds: float) -> bytes:
        stdout = self._running.stdout
        assert stdout
        readable, _, _ = select.select([stdout], [], [], seconds)
        return stdout.readline() if readable else b""

    def _end(self, number: signal.Signals | None) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if number is not None:
            process.send_signal(number)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe
            pipe.close()

    def _put(self, path: str, body: object) -> None:
        if self._consul is None:
            raise RuntimeError(f"{self.instance.id} was made without a Consul agent")
        headers = {} if self._consul.token is None else {"X-Consul-Token": self._consul.token}
        url = f"{self._consul.url}{path}"
        answer = httpx.put(url, json=body, headers=headers, timeout=5.0, trust_env=False, verify=_NO_TLS)
        if answer.status_code != httpx.codes.NOT_FOUND:
            answer.raise_for_status()
