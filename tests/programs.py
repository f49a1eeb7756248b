"""Programs of other projects that tests run, from Debian's packages where they are missing."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest


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


def _look(name: str) -> Path | None:
    folders = [*os.get_exec_path(), "/usr/sbin", *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))[::-1]]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found).resolve() if found else None
