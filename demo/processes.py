"""Local processes that never outlive the demo: each logs into a file, all end together."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["DemoError", "Process", "Processes"]

_STOP_SECONDS = 10.0

# The guard outlives us, however we end: it reads process ids from a pipe ("+7": started, "-7": ended), and when the
# pipe closes it kills whatever still runs and removes the directory, unless "keep" was said.
_GUARD = """
import contextlib, os, shutil, signal, sys
pids, keep = set(), False
for line in sys.stdin:
    word = line.strip()
    if word == "keep":
        keep = True
    elif word[0] == "+":
        pids.add(int(word[1:]))
    else:
        pids.discard(int(word[1:]))
for pid in pids:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
if not keep:
    shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class DemoError(Exception):
    """The demo can't go on; the message says why, and what to do about it."""


@dataclass(frozen=True)
class Process:
    """One uvicorn process. ``service`` is the name that it registers, ``port`` where it listens."""

    service: str
    port: int
    log: Path
    popen: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the number of the signal that ended it."""
        return self.popen.poll()

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that it logged."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Processes:
    """Starts processes; when the context ends, stops them all in good order and removes their directory.

    They end too when this process is killed. The directory stays after an error, for its logs.
    """

    def __init__(self) -> None:
        """Make the directory; nothing runs yet but the guard."""
        self.directory = Path(tempfile.mkdtemp(prefix="registry-demo-"))
        self._running: list[Process] = []
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self.directory)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __iter__(self) -> Iterator[Process]:
        return iter(self._running)

    def start(self, service: str, command: Sequence[str], port: int, environment: Mapping[str, str]) -> None:
        """Start one process without waiting for it; it logs to ``{service}-{port}.log`` in the directory."""
        log = self.directory / f"{service}-{port}.log"
        with log.open("wb") as output:
            # Its own session: Ctrl-C in the terminal reaches us, and we decide in which order things end.
            popen = subprocess.Popen(
                command,
                cwd=self.directory,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._tell_guard(f"+{popen.pid}")
        self._running.append(Process(service, port, log, popen))

    def stop(self) -> None:
        """SIGTERM to all at once, so that their drain times overlap; returns when all are gone, at most 10 s later."""
        for process in self._running:
            # Continued, in case somebody paused it to see what happens.
            for number in (signal.SIGTERM, signal.SIGCONT):
                process.popen.send_signal(number)
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._running:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            self._tell_guard(f"-{process.popen.pid}")
        self._running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception):
                self._tell_guard("keep")
            self.stop()
        finally:
            assert self._guard.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()
            self._guard.wait()

    def _tell_guard(self, word: str) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{word}\n")
        self._guard.stdin.flush()


def uvicorn_command(app: str, port: int) -> list[str]:
    """The plain command, from the environment that runs the demo."""
    beside = Path(sys.executable).with_name("uvicorn")
    uvicorn = str(beside) if beside.exists() else shutil.which("uvicorn") or "uvicorn"
    return [uvicorn, app, "--port", str(port)]


def clean_environment(**variables: str) -> dict[str, str]:
    """Without what the user's shell says of services, Consul, logs and traces, plus ``variables``."""
    ours = ("SERVICE_", "CONSUL_", "LOG_", "OTEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | variables
