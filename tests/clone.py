"""A copy of this repository to try things in, and commands run there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.services import ROOT

__all__ = ["clone", "run", "succeed"]

# What the tests run on has uv, too, whether or not the user's PATH has.
_ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("CONSUL_HTTP", "SERVICE_", "NOX"))
}
_ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
_GIT = ("git", "-c", "user.name=registry", "-c", "user.email=registry@localhost")


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it there; blocks for up to ten minutes."""
    words = [sys.executable, *command] if command[0] == "-m" else command
    variables = _ENVIRONMENT | environment
    return subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=600, check=False)


def succeed(folder: Path, *command: str, **environment: str) -> str:
    """Runs it there and returns what it printed; fails when it fails."""
    done = run(folder, *command, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def clone(folder: Path) -> None:
    """This repository as it stands, uncommitted changes included, as a repository with one commit."""
    names = succeed(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")[:-1]
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    succeed(folder, "git", "init", "--quiet")
    succeed(folder, "git", "add", "--all")
    succeed(folder, *_GIT, "commit", "--quiet", "--message", "everything")
