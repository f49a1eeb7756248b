"""Programs of other projects that tests run, from Debian's packages where they are missing."""

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from registry.testing.cache import cache as cache_folder


@cache
def find_program(name: str, package: str) -> Path:
    """Where it is. Root on Debian gets it installed; elsewhere the test is skipped, and says what to install."""
    if (found := _look(name)) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
            subprocess.run(["apt-get", *command], env=environment, check=False, capture_output=True)
        found = _look(name)
    if found is None:
        pytest.skip(f"needs {name}: apt-get install {package}")
    return found


@cache
def find_promtool() -> Path:
    """Prometheus' own checker of rules: an installed one, else Debian's, unpacked into the cache and not installed, for
    its package starts a server. Fails elsewhere, and says what to install."""
    if found := _look("promtool"):
        return found
    target = cache_folder() / "prometheus-debian" / "promtool"
    if not target.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for command in (["update", "-qq"], ["download", "-qq", "prometheus"]):
                subprocess.run(["apt-get", *command], cwd=folder, check=False, capture_output=True)
            for package in Path(folder).glob("prometheus_*.deb"):
                subprocess.run(["dpkg-deb", "-x", str(package), folder], check=False, capture_output=True)
            if (unpacked := Path(folder, "usr/bin/promtool")).exists():
                unpacked.replace(target)
    if not target.exists():
        pytest.fail("needs promtool: install Prometheus (https://prometheus.io/download)")
    return target


def _look(name: str) -> Path | None:
    folders = [*os.get_exec_path(), "/usr/sbin", *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))[::-1]]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found).resolve() if found else None
