"""Where a Consul binary comes from: an installed one, the cached one, or built from its Go module."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["ConsulNotFoundError", "find_consul"]

_RECIPE = Path(__file__).parent / "build"
_MODULE = "github.com/hashicorp/consul"
_WAYS_OUT = """\
There are three ways out:
  - install Consul, so that `consul` is on PATH
  - set CONSUL_BIN to the path of a Consul binary
  - install Go, and Consul is built from source, once (some minutes)"""


class ConsulNotFoundError(RuntimeError):
    """No Consul binary can be had on this machine; the message says what to do about it."""


def find_consul() -> Path:
    """A Consul binary that can be run: $CONSUL_BIN, else `consul` on PATH, else the cached one, else built.

    Blocks for minutes when it has to build, once per machine and user, and shows progress on stderr.

    Raises: ConsulNotFoundError.
    """
    if named := os.environ.get("CONSUL_BIN"):
        if not _is_executable(path := Path(named)):
            raise ConsulNotFoundError(
                f"CONSUL_BIN is set to {named!r}, which is not an executable file: correct it, or unset it."
            )
        return path.absolute()
    if installed := shutil.which("consul"):
        return Path(installed).absolute()
    cached = _cache_directory() / "consul"
    if not _is_executable(cached):
        _build(cached)
    return cached


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _version() -> str:
    found = re.search(rf"^require {re.escape(_MODULE)} v(\S+)$", (_RECIPE / "go.mod").read_text(), re.MULTILINE)
    assert found, "the recipe's go.mod requires one version of Consul"
    return found[1]


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "registry-testing", f"consul-{_version()}")


def _build(target: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ConsulNotFoundError(f"No Consul and no Go was found on this machine. {_WAYS_OUT}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_builder(target.with_suffix(".lock")):
        if _is_executable(target):
            return
        half_done, log = target.with_suffix(".new"), target.with_suffix(".log")
        command = [
            go,
            "build",
            "-v",
            "-mod=readonly",
            "-trimpath",
            "-gcflags=all=-dwarf=false",
            "-ldflags=-s -w",
            "-o",
            str(half_done),
            _MODULE,
        ]
        # A compiler that collects its garbage less often takes less CPU for these packages; much less often, gigabytes.
        environment = {"GOGC": "200", **os.environ}
        with (
            log.open("wb") as output,
            subprocess.Popen(command, cwd=_RECIPE, stderr=output, env=environment) as building,
        ):
            try:
                _show_progress(building, log)
            except BaseException:
                building.terminate()
                raise
        if building.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ConsulNotFoundError(f"Building Consul failed, see {log}:\n{tail}\n{_WAYS_OUT}")
        # A rename is atomic: whoever looks in the cache meanwhile sees a whole binary or none.
        half_done.replace(target)


@contextmanager
def _one_builder(lock: Path) -> Iterator[None]:
    """Hold `lock`, after waiting for its present holder; the system frees it when a holder is killed."""
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Another process is building Consul: waiting for it.\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _show_progress(building: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the build ends; until then tell on stderr how far it is (go writes one line per step)."""
    begun = time.monotonic()
    live = sys.stderr.isatty()
    _say(f"Building Consul {_version()} from source, once; this takes some minutes.\n")
    while True:
        with suppress(subprocess.TimeoutExpired):
            building.wait(timeout=1 if live else 15)
        steps = log.read_text(errors="replace").splitlines()
        downloads = sum(step.startswith("go: downloading") for step in steps)
        progress = (
            f"  {time.monotonic() - begun:4.0f} s: {downloads} modules fetched,"
            f" {len(steps) - downloads} packages compiled"
        )
        ended = building.returncode is not None
        _say(f"\r{progress}" + ("\n" if ended else "") if live else f"{progress}\n")
        if ended:
            return


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.stdout.write(f"{find_consul()}\n")
