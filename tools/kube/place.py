"""Where the nodes live on this machine, and processes that whoever comes later finds again, and ends, by their pids."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = [
    "ADDRESS",
    "FABRIC",
    "NODES",
    "PLACE",
    "KubeError",
    "address",
    "end",
    "inside",
    "remove",
    "running",
    "start",
    "wait_until",
    "zone",
]

PLACE = Path("/var/tmp/registry-kube")  # noqa: S108 - in no cache: overlays do not work on every file system
FABRIC = "registry-kube"
"""The network namespace of the bridge between the nodes, where the control plane is, too: the machine's own network and
its firewall never see a packet."""
NODES = (1, 2, 3)
ADDRESS = "10.214.0.1"
"""Of the control plane, in the fabric."""
_RUN = PLACE / "run"
_PAUSE = 0.1
_started: dict[str, subprocess.Popen[bytes]] = {}


class KubeError(Exception):
    """The nodes can't do what was asked; the message says why."""


def address(node: int) -> str:
    """Of a node in the fabric; its pods are in 10.244.{node}.0/24."""
    return f"10.214.0.{10 + node}"


def zone(node: int) -> str:
    """Where a node is, as its label says: each in one of its own."""
    return f"zone-{node}"


def inside(namespace: str, *command: str) -> list[str]:
    """The command that runs another in a network namespace; it takes its place, so it has its pid, too."""
    return ["nsenter", f"--net=/run/netns/{namespace}", *command]


def start(name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Starts a process that outlives this one, unless `end` ends it; returns its pid. Its log is in PLACE/log."""
    for folder in (_RUN, PLACE / "log"):
        folder.mkdir(parents=True, exist_ok=True)
    with (PLACE / "log" / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd="/",
            start_new_session=True,
        )
    _started[name] = process
    (_RUN / name).write_text(f"{process.pid} {_born(process.pid)}")
    return process.pid


def running(name: str) -> int | None:
    """The pid of what was started so, while it runs."""
    try:
        pid, born = map(int, (_RUN / name).read_text().split())
    except FileNotFoundError:
        return None
    if _born(pid) == born:
        return pid
    if process := _started.pop(name, None):  # whoever started it must take note of its end
        process.wait()
    return None


def end(name: str) -> None:
    """Kills it, and returns when it is gone. A pid that has been given to somebody else since is left alone."""
    pid = running(name)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: running(name) is None, 30.0, f"{name} ends")
    (_RUN / name).unlink(missing_ok=True)


def _born(pid: int) -> int:
    """When it was started, in ticks since the system was; 0 when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Returns when the condition holds, with the seconds that took. Raises: KubeError."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise KubeError(f"not within {seconds:g} s: {what}; logs are in {PLACE / 'log'}")
        time.sleep(_PAUSE)
    return time.monotonic() - begun


def remove(folder: Path) -> None:
    """A folder with all in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
